"""Random inputs for the attention, plain PyTorch to measure errors by, and the comparisons the tests share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nsa_transformer import NSAConfig
from nsa_transformer.kernels import nsa_attention

from .oracle import Answer, Geometry, Inputs, forced_blocks, num_compressed, oracle_attention

NAMES = Inputs._fields
DEFAULT = {"compress_block": 4, "compress_stride": 2, "select_block": 8, "num_selected": 4, "num_initial": 1, "num_local": 2, "window": 7}


def config_of(**changes: Any) -> NSAConfig:
    return NSAConfig(**{**DEFAULT, **changes})


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bounds(lengths: list[int], padding: int = 0) -> Tensor:
    """Lengths as `cu_seqlens`, its end repeated `padding` times."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return int32(ends + [ends[-1]] * padding)


@dataclass(frozen=True, repr=False)
class Case:
    """One call of `nsa_attention`: inputs, an upstream gradient, the configuration and the keyword arguments."""

    inputs: Inputs
    grad_out: Tensor
    config: NSAConfig
    keywords: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = {name: tuple(x.shape) for name, x in self.inputs._asdict().items()}
        lists = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self.keywords.items()}
        return f"Case({self.config}, {self.inputs.q.dtype}, {shapes}, {lists})"

    def to(self, dtype: torch.dtype, gates: torch.dtype | None = None) -> Case:
        inputs = Inputs(*(x.to(dtype) for x in self.inputs))
        return replace(self, inputs=inputs._replace(gates=self.inputs.gates.to(gates or dtype)), grad_out=self.grad_out.to(dtype))

    def using(self, **keywords: Any) -> Case:
        return replace(self, keywords={**self.keywords, **keywords})

    def changed(self, **tensors: Tensor) -> Case:
        return replace(self, inputs=self.inputs._replace(**tensors))


def make_case(
    lengths: list[int],
    config: NSAConfig | None = None,
    *,
    lengths_q: list[int] | None = None,
    q_start: list[int] | None = None,
    hkv: int = 2,
    group: int = 2,
    dk: int = 4,
    dv: int = 6,
    dtype: torch.dtype = torch.float64,
    padding: int = 0,
    unread: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Random inputs for documents of the given key lengths (and, for tails, query lengths); `unread` rows past N in k_cmp, v_cmp."""
    config = config or config_of()
    generator = torch.Generator(device).manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

    total_k, total_q = sum(lengths), sum(lengths if lengths_q is None else lengths_q)
    rows = sum(num_compressed(length, Geometry.of(config)) for length in lengths) + unread
    inputs = Inputs(
        2 * rand(total_q, hkv * group, dk),  # twice: softmax and importance far from uniform
        rand(rows, hkv, dk),
        rand(rows, hkv, dv),
        rand(total_k, hkv, dk),
        rand(total_k, hkv, dv),
        rand(total_k, hkv, dk),
        rand(total_k, hkv, dv),
        torch.rand((total_q, hkv * group, 3), generator=generator, dtype=torch.float64, device=device),
    )
    keywords: dict[str, Any] = {"cu_seqlens": bounds(lengths if lengths_q is None else lengths_q, padding).to(device)}
    if lengths_q is not None:
        keywords["cu_seqlens_k"] = bounds(lengths, padding).to(device)
    if q_start is not None:
        keywords["q_start"] = int32(q_start + [0] * padding).to(device)
    return Case(inputs, rand(total_q, hkv * group, dv), config, keywords).to(dtype)


@dataclass(frozen=True)
class Result:
    out: Tensor
    blocks: Tensor
    grads: Inputs


def backward(out: Tensor, inputs: Inputs, grad_out: Tensor) -> Inputs:
    grads = torch.autograd.grad(out, inputs, grad_out.to(out.dtype), allow_unused=True)
    return Inputs(*(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)))


def fresh(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return Inputs(*(x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in inputs))


def run(case: Case, backend: str = "reference") -> Result:
    """`nsa_attention` forward and backward."""
    inputs = fresh(case.inputs)
    out, blocks = nsa_attention(*inputs, case.config, **{"backend": backend, **case.keywords}, return_blocks=True)
    return Result(out.detach(), blocks, backward(out, inputs, case.grad_out))


def run_oracle(case: Case, blocks: Tensor | None = None) -> tuple[Answer, Inputs]:
    """The oracle forward and backward in float64, on `blocks` if given."""
    inputs = fresh(case.inputs, torch.float64)
    keywords = {k: v for k, v in case.keywords.items() if k in ("cu_seqlens", "cu_seqlens_k", "q_start", "blocks", "scale")}
    if blocks is not None:
        keywords["blocks"] = blocks
    answer = oracle_attention(inputs, case.config, **keywords)
    return answer._replace(out=answer.out.detach()), backward(answer.out, inputs, case.grad_out)


def positions(case: Case) -> list[tuple[int, int]]:
    """(document, position in it) of each query."""
    ends = case.keywords["cu_seqlens"].tolist()
    ends_k = case.keywords.get("cu_seqlens_k", case.keywords["cu_seqlens"]).tolist()
    found = []
    for document in range(len(ends) - 1):
        length, length_k = ends[document + 1] - ends[document], ends_k[document + 1] - ends_k[document]
        start = int(case.keywords["q_start"][document]) if "q_start" in case.keywords else length_k - length
        found += [(document, start + r) for r in range(length)]
    return found


def assert_blocks_follow_importance(case: Case, blocks: Tensor, answer: Answer, tolerance: float) -> None:
    """`blocks` is a legal selection: layout, forced ones, count, and no block left out that beats a chosen one by more than `tolerance`."""
    geo = Geometry.of(case.config)
    hkv = case.inputs.k_slc.shape[1]
    assert blocks.dtype == torch.int32 and blocks.shape == (len(case.inputs.q), hkv, geo.n) and not blocks.requires_grad
    for row, (_, t) in enumerate(positions(case)):
        for h in range(hkv):
            listed = blocks[row, h].tolist()
            importance = answer.importance[row][h]
            chosen = [j for j in listed if j >= 0]
            assert listed == sorted(set(chosen)) + [-1] * (geo.n - len(chosen)), f"query {row}: ascending, no block twice, -1 at the end: {listed}"
            assert set(chosen) <= set(range(len(importance))), f"query {row} at position {t}: {listed}, but only {len(importance)} blocks compete"
            assert len(chosen) == min(geo.n, len(importance)), f"query {row} at position {t}: {listed} of {len(importance)}"
            forced = forced_blocks(t, geo)
            assert forced <= set(chosen), f"query {row} at position {t}: {listed} lacks one of {forced}"
            free = [importance[j] for j in chosen if j not in forced]
            rest = [importance[j] for j in range(len(importance)) if j not in chosen]
            if free and rest:
                assert min(free) >= max(rest) - tolerance, f"query {row} at position {t}, head {h}: {listed} of importance {importance}"


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    """Within `tolerance` of the largest number expected (of 1 where that is smaller)."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=tolerance * max(1.0, largest), msg=lambda m: f"{name}: {m}")


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    assert torch.equal(actual, expected), f"{name}: differs by up to {(actual.double() - expected.double()).abs().max().item():.3g}"


def assert_matches_oracle(case: Case, backend: str = "reference") -> Result:
    """Blocks (the same sets as given, if they were), output and every gradient of a float64 case."""
    result = run(case, backend)
    given = case.keywords.get("blocks")
    answer, grads = run_oracle(case, result.blocks)
    if given is None:
        assert_blocks_follow_importance(case, result.blocks, answer, 1e-12)
    else:
        assert_same_bits("blocks", result.blocks.sort().values, given.sort().values)
    assert result.out.dtype == case.inputs.q.dtype
    assert_close("out", result.out, answer.out)
    for name, actual, expected in zip(NAMES, result.grads, grads, strict=True):
        assert_close(f"gradient of {name}", actual, expected, 1e-10)
    return result


def plain_attention(inputs: Inputs, case: Case, blocks: Tensor) -> Tensor:
    """The same attention as ordinary PyTorch with T x T masks: products in the dtype of the inputs, softmax in float32.

    What anyone would write first; its error is the yardstick for every backend in that dtype.
    """
    geo = Geometry.of(case.config)
    hkv = inputs.k_slc.shape[1]
    q = inputs.q.unflatten(1, (hkv, -1))
    ends_k = case.keywords.get("cu_seqlens_k", case.keywords["cu_seqlens"]).tolist()
    key, compressed = [], []  # (document, position), (document, index)
    for document in range(len(ends_k) - 1):
        length = ends_k[document + 1] - ends_k[document]
        key += [(document, s) for s in range(length)]
        compressed += [(document, i) for i in range(num_compressed(length, geo))]

    def columns(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        return tuple(torch.tensor(pairs, dtype=torch.long, device=q.device).reshape(-1, 2).unbind(1))  # type: ignore[return-value]

    (doc_q, t), (doc_k, s), (doc_c, i) = columns(positions(case)), columns(key), columns(compressed)
    causal = (doc_q[:, None] == doc_k) & (s <= t[:, None])  # [Tq, Tk]
    visible = (doc_q[:, None] == doc_c) & (i * geo.d + geo.l <= t[:, None] + 1)  # [Tq, N]
    chosen = (blocks[:, :, None, :] == (s // geo.l_slc)[None, None, :, None]).any(-1)  # [Tq, Hkv, Tk]

    def branch(k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("qhgd,khd->qhgk", q, k) * case.keywords.get("scale", q.shape[-1] ** -0.5)
        mask = mask[:, :, None, :]
        scores = scores.float() if scores.dtype != torch.float64 else scores
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        weights = torch.where(mask, weights, 0.0).to(v.dtype)
        return torch.einsum("qhgk,khd->qhgd", weights, v)

    n = len(i)
    outs = (
        branch(inputs.k_cmp[:n], inputs.v_cmp[:n], visible[:, None].expand(-1, hkv, -1)),
        branch(inputs.k_slc, inputs.v_slc, causal[:, None] & chosen),
        branch(inputs.k_win, inputs.v_win, (causal & (s > t[:, None] - geo.w))[:, None].expand(-1, hkv, -1)),
    )
    gates = inputs.gates.to(q.dtype).unflatten(1, (hkv, -1))
    return sum(gates[..., b, None] * out for b, out in enumerate(outs)).flatten(1, 2)  # type: ignore[union-attr]


def errors_beside_plain(case: Case, backend: str = "reference") -> dict[str, tuple[float, float, float, float]]:
    """Per tensor: RMS error of the backend and of plain PyTorch, then the largest errors; both against float64 on the same blocks."""
    result = run(case, backend)
    exact = case.to(torch.float64)
    answer, exact_grads = run_oracle(exact, result.blocks)
    inputs = fresh(case.inputs)
    plain_out = plain_attention(inputs, case, result.blocks)
    plain_grads = backward(plain_out, inputs, case.grad_out)

    table = {}
    rows = zip(("out", *NAMES), (result.out, *result.grads), (plain_out.detach(), *plain_grads), (answer.out, *exact_grads), strict=True)
    for name, actual, plain, expected in rows:
        mine, theirs = actual.double() - expected, plain.double() - expected
        table[name] = (mine.square().mean().sqrt().item(), theirs.square().mean().sqrt().item(), mine.abs().max().item(), theirs.abs().max().item())
    return table


def assert_error_beside_plain(case: Case, backend: str = "reference", times: float = 2) -> None:
    """Error at most `times` that of plain PyTorch, both against float64."""
    for name, (rms, plain_rms, largest, plain_largest) in errors_beside_plain(case, backend).items():
        assert rms <= times * plain_rms, f"{name}: RMS error {rms:.3g}, plain PyTorch {plain_rms:.3g}"
        assert largest <= times * plain_largest, f"{name}: largest error {largest:.3g}, plain PyTorch {plain_largest:.3g}"
