"""The CUDA extension on a GPU, where it is built: that it computes what the others do, with every size of a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels import nsa_decode, sparse_attention
from nsa_transformer.kernels.paged import PagedKeysValues
from nsa_transformer.kernels.sparse_attention import decode as extension

from . import test_decode as plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and sparse_attention.missing() is not None, reason=f"{sparse_attention.missing()}"),
]

PAPER = NSAConfig()


@pytest.fixture(params=extension.CLUSTERS)
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every size of a cluster, whatever the size of the step."""
    monkeypatch.setattr(extension, "cluster_size", lambda *sizes, **kind: request.param)
    return request.param


def wide_table(cache: PagedKeysValues) -> PagedKeysValues:
    """The same with room for so many pages that no shared memory holds the notes of a block."""
    table = torch.full((len(cache.lengths), 4000), 1 << 30, dtype=torch.int32, device=cache.pages.device)
    table[:, : cache.pages.shape[1]] = cache.pages
    return replace(cache, pages=table)


def compare(cache: PagedKeysValues, dtype: torch.dtype, group: int, width: int, config: NSAConfig = PAPER, gates_dtype: torch.dtype = torch.float32) -> None:
    """With the reference, on the same rounded keys and values."""
    count, heads = len(cache.lengths), cache.k_slc.shape[1] * group
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(count, heads, width, generator=generator).to(dtype).cuda()
    gates = torch.rand(count, heads, 3, generator=generator).to(gates_dtype).cuda()
    expected, chosen = nsa_decode(q, gates, cache, config, backend="reference", return_blocks=True)
    found, blocks = nsa_decode(q, gates, cache, config, backend="cuda", return_blocks=True)
    assert torch.equal(blocks, chosen)
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "group", "width"), [(torch.bfloat16, 16, 128), (torch.float16, 3, 128), (torch.bfloat16, 1, 64)], ids=str)
def test_lengths(cluster: int, dtype: torch.dtype, group: int, width: int) -> None:
    plain.check([5000, 1, 31, 32, 64, 1025, 0, 4096, 2047], PAPER, dtype, 2, group, width, width, backend="cuda")


def test_every_remainder(cluster: int) -> None:
    plain.check([1500 + 7 * i for i in range(12)], PAPER, torch.float16, 1, 4, 128, 128, backend="cuda")


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("config", [NSAConfig(32, 16, 64, 9, 0, 1, 200), NSAConfig(32, 16, 64, 3, 1, 2, 1), NSAConfig(32, 16, 64, 32, 4, 12, 700)], ids=str)
def test_geometries(cluster: int, config: NSAConfig, width: int) -> None:
    """Another window and number of blocks, forced blocks alone, the most that are taken."""
    plain.check([4000, 3000, 999], config, torch.float16, 1, 4, width, width, backend="cuda")


@pytest.mark.parametrize(("dtype", "group", "width"), [(torch.bfloat16, 8, 128), (torch.float16, 3, 64)], ids=str)
@pytest.mark.parametrize("threshold", [0, 100, 512])
def test_fp8(cluster: int, threshold: int, dtype: torch.dtype, group: int, width: int) -> None:
    """What lies in the ring is not read from a page, and what nobody should read is NaN."""
    compare(plain.quantized([5000, 5, 0, 1280, 7000, 3001], PAPER, dtype, threshold, width, width), dtype, group, width)


@pytest.mark.parametrize("fp8", [False, True])
def test_notes_in_global_memory(cluster: int, fp8: bool) -> None:
    lengths = [5000, 5, 0, 1280, 7000, 3001]
    if fp8:
        cache = plain.quantized(lengths, PAPER, torch.bfloat16, 512, 128, 128)
    else:
        cache = plain.paged(plain.sequences(lengths, PAPER, torch.bfloat16, 2, 128, 128), PAPER, torch.bfloat16)
    cache = wide_table(cache)
    step = extension._sizes(groups=4 * 4000, cluster=cluster, bfloat16=True, width=128, fp8=fp8, pairs=12)
    assert sparse_attention.library().nsa_decode_notes(step) > 0
    compare(cache, torch.bfloat16, 8, 128)


def test_long_sequences(cluster: int) -> None:
    """A warp with more than 32 pages and more than 64 blocks, where few blocks share a pair."""
    cache = plain.paged(plain.sequences([300_000, 40_000], PAPER, torch.float16, 1, 64, 64), PAPER, torch.float16)
    compare(cache, torch.float16, 4, 64)


@pytest.mark.parametrize("gap", [88, 180], ids=["no weight", "no number"])
def test_a_key_far_above_the_next_ones(cluster: int, gap: int) -> None:
    """The last of 16 keys, which counts for two blocks, by more than float32 has room for: for the second block too, where another warp has that."""
    config, length = NSAConfig(32, 16, 64, 15, 1, 2, 512), 8000
    parts = plain.sequences([length], config, torch.float16, 1, 64, 64)
    parts[0][0].zero_()
    parts[0][0][..., 0] = -gap
    for i, group in enumerate([16, 7, 25, 10, 1, 22, 13, 19, 28, 4]):  # no two neighbours; six of them are the twelve blocks
        parts[0][0][16 * group + 15, :, 0] = -i / 4
    cache = plain.paged(parts, config, torch.float16)
    q = torch.zeros(1, 4, 64, dtype=torch.float16, device="cuda")
    q[..., 0] = 8  # scores in base e are a key's first number
    gates = torch.ones(1, 4, 3, device="cuda")
    expected, chosen = nsa_decode(q, gates, cache, config, backend="reference", return_blocks=True)
    found, blocks = nsa_decode(q, gates, cache, config, backend="cuda", return_blocks=True)
    assert blocks.tolist() == chosen.tolist() == [[sorted([0, 123, 124] + [b for g in (16, 7, 25, 10, 1, 22) for b in (4 * g + 3, 4 * g + 4)])]]
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(torch.float16).eps)


def test_gates_in_16_bit() -> None:
    cache = plain.paged(plain.sequences([3000, 70], PAPER, torch.bfloat16, 2, 128, 128), PAPER, torch.bfloat16)
    compare(cache, torch.bfloat16, 4, 128, gates_dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponents", [(-10, -9), (0, 10), (-12, 4)], ids=str)
def test_fp8_of_any_size(exponents: tuple[int, int], dtype: torch.dtype) -> None:
    plain.check_fp8_of_any_size(exponents, dtype, PAPER, [3000, 1280, 7000], 100, 128, backend="cuda")


@pytest.mark.parametrize("fp8", [False, True])
def test_two_runs_are_the_same_bits(cluster: int, fp8: bool) -> None:
    lengths = [7000, 30, 2000]
    parts = plain.sequences(lengths, PAPER, torch.bfloat16, 2, 128, 128)
    q, gates = torch.randn(3, 32, 128, dtype=torch.bfloat16, device="cuda"), torch.rand(3, 32, 3, device="cuda")
    if fp8:
        caches = [plain.quantized(lengths, PAPER, torch.bfloat16, 512, 128, 128)] * 2
    else:
        caches = [plain.paged(parts, PAPER, torch.bfloat16, seed=seed) for seed in (1, 2)]
    first, second = (nsa_decode(q, gates, cache, PAPER, backend="cuda") for cache in caches)
    assert torch.equal(first, second)


def test_many_sequences_of_which_some_are_not_there() -> None:
    """More pairs than blocks run at once, by `auto`, with the size of a cluster that it chooses."""
    cache = plain.paged(plain.sequences([0 if i % 7 == 3 else 1 + 37 * i for i in range(150)], PAPER, torch.bfloat16, 2, 64, 64), PAPER, torch.bfloat16)
    compare(cache, torch.bfloat16, 4, 64)
    q, gates = torch.randn(150, 8, 64, dtype=torch.bfloat16, device="cuda"), torch.rand(150, 8, 3, device="cuda")
    assert torch.equal(nsa_decode(q, gates, cache, PAPER), nsa_decode(q, gates, cache, PAPER, backend="cuda"))


def test_clusters_leave_room_for_all_pairs() -> None:
    kind = {"bfloat16": True, "width": 128, "fp8": False}
    sizes = [extension.cluster_size(torch.device("cuda", torch.cuda.current_device()), groups=544, **kind, pairs=pairs) for pairs in (1, 8, 16, 64, 132, 10000)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1 and sizes[-1] == 1


def test_a_graph_of_it_is_replayed() -> None:
    cache = plain.paged(plain.sequences([3000, 70], PAPER, torch.bfloat16, 2, 128, 128), PAPER, torch.bfloat16)
    q, gates = torch.randn(2, 8, 128, dtype=torch.bfloat16, device="cuda"), torch.rand(2, 8, 3, device="cuda")
    for room in (cache, wide_table(cache)):
        expected = nsa_decode(q, gates, room, PAPER, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = nsa_decode(q, gates, room, PAPER, backend="cuda")
        assert isinstance(out, Tensor)
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    cache = plain.paged(plain.sequences([3000, 70], PAPER, torch.bfloat16, 2, 128, 128), PAPER, torch.bfloat16)
    q, gates = torch.randn(2, 8, 128, dtype=torch.bfloat16, device="cuda"), torch.rand(2, 8, 3, device="cuda")
    expected = nsa_decode(q, gates, cache, PAPER, backend="cuda")
    there = replace(cache, **{name: x.to("cuda:1") for name, x in vars(cache).items() if isinstance(x, Tensor)})
    found = nsa_decode(q.to("cuda:1"), gates.to("cuda:1"), there, PAPER, backend="cuda")
    assert isinstance(found, Tensor) and found.device == torch.device("cuda", 1) and torch.equal(found.to(q.device), expected)
