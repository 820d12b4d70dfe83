"""The Triton backend on a GPU: errors in every dtype and shape, the same bits every time, memory, and that nothing waits for the device.

Every shape compiles its own dozen kernels, so there are few; whatever has no need of a shape of its own takes the first.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa_transformer import NSAConfig
from nsa_transformer.kernels import available_backends, dispatch, nsa_attention

from .cases import NAMES, Case, Result, assert_close, assert_same_bits, fresh, make_case, run
from .judge import check, poisoned, selection_of

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PAPER = NSAConfig()
FEWER = NSAConfig(num_selected=8, window=200)


@dataclass(frozen=True)
class Shape:
    dtype: torch.dtype = torch.bfloat16
    dk: int = 128
    dv: int = 128
    group: int = 16
    hkv: int = 1
    config: NSAConfig = PAPER

    def case(self, lengths: list[int], **keywords: Any) -> Case:
        return make_case(lengths, self.config, hkv=self.hkv, group=self.group, dk=self.dk, dv=self.dv, dtype=self.dtype, device=DEVICE, **keywords)


FIRST = Shape()
SHAPES = {
    "bf16 128 G16": FIRST,
    "bf16 64 G4": Shape(torch.bfloat16, 64, 64, 4, 2, FEWER),
    "fp16 128 G3": Shape(torch.float16, 128, 128, 3, 2, FEWER),
    "bf16 192/128 G32": Shape(torch.bfloat16, 192, 128, 32, 1, FEWER),
    "fp16 256 G1": Shape(torch.float16, 256, 256, 1, 2, FEWER),
    "fp32 64 G16": Shape(torch.float32, 64, 64, 16, 1, FEWER),
    "bf16 128/64 G4, blocks of 16": Shape(torch.bfloat16, 128, 64, 4, 2, NSAConfig(8, 4, 16, 6, 1, 2, 50)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def attend(case: Case, inputs: Any = None, **keywords: Any) -> Any:
    return nsa_attention(*(inputs or case.inputs), case.config, **case.keywords | keywords, backend="triton")


def assert_same(one: Result, other: Result) -> None:
    for name, x, y in zip(("out", "blocks", *NAMES), (one.out, one.blocks, *one.grads), (other.out, other.blocks, *other.grads), strict=True):
        assert_same_bits(name, x, y)


# ------------------------------------------------------------------------------------------------------------------- errors


def test_unwritten_memory_is_poisoned() -> None:
    with poisoned():
        assert torch.empty(1000, device=DEVICE).isnan().all() and torch.empty(9, dtype=torch.int32, device=DEVICE).min() > 1 << 30


@every_shape
def test_documents(shape: Shape) -> None:
    check(shape.case([1300, 1, 0, 37, 33, 500], padding=2), rounding=0)


@every_shape
def test_queries_that_are_the_tail_of_their_documents(shape: Shape) -> None:
    check(shape.case([1300, 700, 9], lengths_q=[60, 700, 0]), rounding=0)
    check(shape.case([1300, 700], lengths_q=[200, 33], q_start=[1000, 3]), rounding=0)


def some_blocks(case: Case, count: int = 5) -> Tensor:
    """Blocks in no order, some in the future, some queries without any, nothing forced."""
    generator = torch.Generator().manual_seed(3)
    queries, hkv, keys = len(case.inputs.q), case.inputs.k_slc.shape[1], len(case.inputs.k_slc)
    picked = torch.rand(queries, hkv, -(-keys // case.config.select_block), generator=generator).argsort()[..., :count]
    picked = picked.masked_fill(torch.rand(picked.shape, generator=generator) < 0.4, -1)
    return picked.masked_fill((torch.arange(queries) % 7 == 0)[:, None, None], -1).int().to(case.inputs.q.device)


@every_shape
def test_given_blocks(shape: Shape) -> None:
    case = shape.case([1300])
    check(case.using(blocks=some_blocks(case)), rounding=0)


@pytest.mark.parametrize("stored", [0, 1 << 20], ids=["computed once more", "one head at a time"])
def test_scores_are_stored_for_dq_or_computed_once_more(stored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_transformer.kernels.triton import attention

    case = replace(FIRST, hkv=2).case([700, 33])
    whole = run(case, "triton")
    monkeypatch.setattr(attention, "STORED_SCORES", stored and 733 * PAPER.num_selected * 16 * PAPER.select_block * 2)
    result = check(case, rounding=0)
    if stored:
        for name, x, y in zip(NAMES, whole.grads, result.grads, strict=True):
            assert_same_bits(name, x, y[: len(x)])  # `check` adds rows that nobody reads


def thousands(count: int = 4096, shape: Shape = FIRST) -> None:
    """Many documents shorter than a tile, some of them empty: plain PyTorch would need them all against all, so
    the bound is the dtype's rounding; the one compressed key of a document gets a gradient of 0, but for that."""
    lengths = torch.randint(1, 41, (count,), generator=torch.Generator().manual_seed(0))
    lengths[::97] = 0
    case = shape.case(lengths.tolist(), padding=5)
    with poisoned():
        result = run(case, "triton")
    exact = run(case.to(torch.float64).using(blocks=result.blocks), "reference")
    assert (result.blocks[..., 0] == 0).all() and (result.blocks[..., 1:] == -1).all()
    for name, found, wanted in zip(("out", *NAMES), (result.out, *result.grads), (exact.out, *exact.grads), strict=True):
        assert_close(name, found, wanted, 16 * torch.finfo(shape.dtype).eps)
        error, size = ((x.double().square().mean().sqrt()) for x in (found.double() - wanted, wanted))
        assert error <= 4 * torch.finfo(shape.dtype).eps * max(1.0, size), f"{name}: RMS error {error:.3g} of {size:.3g}"


def test_thousands_of_documents() -> None:
    thousands()


@pytest.mark.parametrize("lengths", [[1], [0, 1, 0], [31], [32], [0, 0]], ids=str)
def test_least_documents(lengths: list[int]) -> None:
    check(FIRST.case(lengths, padding=1))


# ---------------------------------------------------------------------------------------------------------------- selection


def selects_the_best(case: Case) -> None:
    with torch.no_grad():
        _, blocks = attend(case, return_blocks=True)
    chosen, narrow = selection_of(case)
    taken = torch.zeros(*chosen.shape[:2], chosen.shape[2] + 1, dtype=torch.bool, device=chosen.device)
    taken = taken.scatter_(-1, blocks.long().where(blocks >= 0, chosen.shape[2]), True)[..., :-1]
    wide = narrow > 1e-4
    assert wide.double().mean() > 0.95
    wrong = (taken != chosen).any(-1) & wide
    assert not wrong.any(), f"{int(wrong.sum())} queries, first {wrong.nonzero()[0].tolist()}"
    assert (blocks.masked_fill(blocks < 0, 1 << 30).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("table", [None, 1 << 18], ids=["whole", "in strips"])
def test_the_best_blocks_are_selected(table: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_transformer.kernels.triton import attention

    if table:
        monkeypatch.setattr(attention, "SCORE_TABLE", table)
    selects_the_best(FIRST.case([8192]))


def test_the_best_of_more_blocks_than_one_look_takes() -> None:
    from nsa_transformer.kernels.triton import attention

    keys = 2 * 64 * attention.SELECT_CHUNK
    selects_the_best(FIRST.case([keys], lengths_q=[300]))


# -------------------------------------------------------------------------------------------- the same bits, without waiting


def test_the_same_bits_every_time() -> None:
    case = FIRST.case([3000, 0, 1100, 5])
    once = run(case, "triton")
    assert_same(run(case, "triton"), once)
    held = [torch.full((size,), torch.nan, device=DEVICE) for size in (1 << 12, 1 << 20, 1 << 26)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    noise = torch.randn(8192, 8192, device=DEVICE)
    for _ in range(20):  # the device is busy with something else meanwhile
        noise @ noise
    with torch.cuda.stream(side):
        there = run(case, "triton")
    torch.cuda.synchronize()
    del held
    assert_same(there, once)
    assert_same(run(case, "triton"), once)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("kind", ["documents", "one document", "tail", "given blocks"])
def test_nothing_waits_for_the_device(kind: str) -> None:
    case = FIRST.case([1300, 700], lengths_q=[60, 700] if kind == "tail" else None)
    if kind == "one document":
        case = replace(FIRST.case([2000]), keywords={})
    if kind == "given blocks":
        case = FIRST.case([2000])
        case = case.using(blocks=some_blocks(case))
    leaves = fresh(case.inputs)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(case, leaves), leaves, case.grad_out)

    step()
    with waiting_is_an_error():
        grads = step()
    assert all(grad.isfinite().all() for grad in grads)


def test_a_captured_forward_replays() -> None:
    case = FIRST.case([1300, 0, 37, 700])
    other = FIRST.case([1300, 0, 37, 700], seed=1)
    inputs = [x.clone() for x in case.inputs]
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            attend(case, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, blocks = attend(case, inputs, return_blocks=True)
        for given in (case, other, case):
            for static, x in zip(inputs, given.inputs, strict=True):
                static.copy_(x)
            out.fill_(torch.nan)
            graph.replay()
            expected, chosen = attend(given, return_blocks=True)
            assert_same_bits("out", out, expected)
            assert_same_bits("blocks", blocks, chosen)


# ------------------------------------------------------------------------------------------------------------------- memory


def peak(tokens: int, backward: bool = True) -> int:
    """Most bytes that a call allocates at once beside its inputs."""
    case = FIRST.case([tokens])
    inputs = fresh(case.inputs)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.set_grad_enabled(backward):
        out = attend(case, inputs)
        if backward:
            torch.autograd.grad(out, inputs, case.grad_out)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("backward", [True, False], ids=["with the backward", "forward alone"])
def test_memory_is_linear_in_the_tokens(backward: bool) -> None:
    """The table of importances, 256 MiB at most, reaches that between 32k and 64k tokens. One of T x T / 64, if only in int32, would
    raise the last slope by half."""
    peaks = {tokens: peak(tokens, backward) for tokens in (8192, 16384, 32768, 65536, 131072)}
    slopes = [(more - less) / (longer - shorter) for (shorter, less), (longer, more) in pairwise(peaks.items())]  # bytes per token
    assert max(slopes[:2]) <= 1.3 * min(slopes[:2]), slopes
    assert slopes[3] <= 1.1 * slopes[2] <= 1.3 * slopes[1], slopes


# ------------------------------------------------------------------------------------------------- torch.compile and backends


class Block(nn.Module):
    """Projections around the attention, as in a model: strided views of one product go in, and the result is read twice."""

    def __init__(self, shape: Shape, hidden: int = 64) -> None:
        super().__init__()
        self.shape, heads = shape, shape.group * shape.hkv
        self.sizes = [heads * shape.dk, *[shape.hkv * width for _ in range(2) for width in (shape.dk, shape.dv)], heads * 3]
        self.project = nn.Linear(hidden, sum(self.sizes), device=DEVICE, dtype=shape.dtype)
        self.compress = nn.Linear(hidden, shape.hkv * (shape.dk + shape.dv), device=DEVICE, dtype=shape.dtype)

    def forward(self, x: Tensor, blocks: Tensor | None, cu_seqlens: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        q, *pairs, gates = (part.unflatten(1, (heads, -1)) for part, heads in zip(self.project(x).split(self.sizes, dim=1), self.heads(), strict=True))
        k_cmp, v_cmp = self.compress(x[:: self.shape.config.compress_stride]).unflatten(1, (self.shape.hkv, -1)).split([self.shape.dk, self.shape.dv], dim=2)
        inputs = (q, k_cmp, v_cmp, *pairs, gates.sigmoid())
        out, used = nsa_attention(*inputs, self.shape.config, cu_seqlens=cu_seqlens, blocks=blocks, backend=backend, return_blocks=True)
        return out * torch.sigmoid(out), used

    def heads(self) -> list[int]:
        heads = self.shape.group * self.shape.hkv
        return [heads, *[self.shape.hkv] * 4, heads]


def compiled_is_eager(shape: Shape, lengths: list[int], compiler: str, backend: str = "auto") -> None:
    torch.manual_seed(0)
    block, tokens = Block(shape), sum(lengths)
    x, cu = torch.randn(tokens, 64, device=DEVICE, dtype=shape.dtype), shape.case(lengths).keywords["cu_seqlens"]
    with torch.no_grad():
        _, used = block(x, None, cu, backend)  # blocks for both: rounding may change which are the best
    weight = torch.randn(tokens, shape.group * shape.hkv, shape.dv, device=DEVICE, dtype=shape.dtype)
    found = []
    for call in (block, torch.compile(block, fullgraph=True, backend=compiler)):
        leaf = x.clone().requires_grad_()
        out, _ = call(leaf, used, cu, backend)
        found.append((out.detach(), *torch.autograd.grad(out, [leaf, *block.parameters()], weight)))
    for eager, compiled in zip(*found, strict=True):
        assert (compiled.double() - eager.double()).norm() <= 2 * torch.finfo(shape.dtype).eps * eager.double().norm()


def test_inductor_takes_it_as_one_graph() -> None:
    compiled_is_eager(FIRST, [1300, 700], "inductor")


def test_auto_takes_the_kernels() -> None:
    assert available_backends()[:2] == ["reference", "triton"]
    assert dispatch.describe_auto().startswith("triton on GPU tensors")
    case = FIRST.case([200])
    for name in ("auto", "triton"):
        assert dispatch.choose_backend(name, case.inputs.q, case.inputs.v_slc, case.config) == "triton"
    assert_same(run(case, "auto"), run(case, "triton"))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(torch.float64), "q has dtype torch.float64"),
        (Shape(dk=96), "head widths 96 and 128"),
        (Shape(config=NSAConfig(compress_block=4, compress_stride=2)), "compress_stride=2"),
        (Shape(config=NSAConfig(select_block=256)), "select_block=256"),
    ],
    ids=["float64", "width", "stride", "block"],
)
def test_what_the_kernels_do_not_take(shape: Shape, words: str) -> None:
    case = shape.case([100])
    with pytest.raises(ValueError, match=words):
        run(case, "triton")
    assert_same(run(case, "auto"), run(case, "reference"))


def test_tensors_elsewhere_are_refused() -> None:
    q = torch.zeros(10, 16, 128)
    assert dispatch.choose_backend("auto", q, q, NSAConfig()) == "reference"
    with pytest.raises(ValueError, match="on cpu, not on an NVIDIA GPU"):
        dispatch.choose_backend("triton", q, q, NSAConfig())
