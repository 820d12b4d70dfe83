"""What is computed once a chunk, against loops over positions; that layers do not compute it again; and that it does not matter where chunks end."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_transformer.config import KVCacheConfig, NSAConfig
from nsa_transformer.kernels.paged import page_rows, page_tokens
from nsa_transformer.models.chunk import Places, SparseChunkPlan, ring_pieces, write_ring

from .small import NSA, random_tokens, small_model
from .test_cache import GEOMETRIES


@pytest.mark.parametrize("threshold", [None, 0, 23])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_plan(geometry: str, threshold: int | None) -> None:
    config, rng = NSAConfig(**NSA | GEOMETRIES[geometry]), random.Random(geometry)
    length, stride, span, size = config.compress_block, config.compress_stride, page_tokens(config), page_rows(config)
    for _ in range(30):
        start = rng.choice([0, rng.randint(0, 10), rng.randint(0, 400)])
        end = start + rng.choice([0, 1, rng.randint(0, 400)])
        pages = rng.sample(range(1, 1000), end // span + 3)
        plan = SparseChunkPlan.build(3, start, end, torch.tensor(pages, dtype=torch.int32), config, threshold)
        assert (plan.sequence, plan.start, plan.end) == (3, start, end)

        def places(first: int, last: int, size: int, pages: list[int] = pages) -> list[tuple[int, int]]:
            return [(pages[t // size], t % size) for t in range(first, last)]

        def found(places: Places) -> list[tuple[int, int]]:
            return list(zip(places.page.tolist(), places.row.tolist(), strict=True))

        def old(tokens: int) -> int:  # of the selection blocks all of whose tokens are older than the threshold
            return sum(config.select_block for b in range(tokens) if (b + 1) * config.select_block <= tokens - threshold)

        before, after = (start, end) if threshold is None else (old(start), old(end))
        assert (plan.stored_before, plan.stored) == (before, after)
        assert found(plan.tokens) == places(0, end if threshold is None else before, span)
        assert found(plan.new_tokens) == places(before, after, span)
        firsts = [first for first in range(0, end, stride) if start < first + length <= end]
        whole = [first // stride for first in range(0, end, stride) if first + length <= end]
        assert (plan.blocks_before, plan.blocks) == (len(whole) - len(firsts), len(whole))
        assert found(plan.all_blocks) == places(0, len(whole), size)
        assert found(plan.new_blocks) == places(len(whole) - len(firsts), len(whole), size)
        assert plan.middles.tolist() == [first + length // 2 for first in firsts]
        assert (plan.block_rows + plan.run_start).tolist() == [list(range(first, first + length)) for first in firsts]
        assert plan.run.tolist() == [0, end - plan.run_start] and plan.run.dtype == torch.int32
        assert plan.run_start == (firsts[0] if firsts else start)
        assert 0 <= start - plan.run_start < length, "the ring of tokens not yet compressed holds them"


def test_a_ring_holds_the_newest() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ring, end = torch.full((rng.randint(1, 9), 2, 3), -1), 0
        for _ in range(5):
            count = rng.randint(0, 12)
            end += count
            write_ring(ring, end, torch.arange(end - count, end)[:, None, None].expand(-1, 2, 3))
            first = rng.randint(max(0, end - len(ring)), end)
            held = torch.cat(ring_pieces(ring, first, end))
            assert torch.equal(held, torch.arange(first, end)[:, None, None].expand(-1, 2, 3)), (len(ring), first, end)


@torch.no_grad()
@pytest.mark.parametrize("settings", [None, KVCacheConfig("fp8", 16)], ids=["none", "fp8"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_cache_holds_the_same_wherever_chunks_end(geometry: str, settings: KVCacheConfig | None) -> None:
    """Every store after one prefill, one token at a time, and chunks of any size. float64, so that sums in another order are the same e4m3. In FP8 of the first
    layer alone: what a chunk reads of those before is rounded, and the layers above it see that."""
    model, tokens, rng = small_model(nsa=GEOMETRIES[geometry]).double(), random_tokens(230), random.Random(geometry)
    expected: dict[str, Tensor] = {}
    for sizes in ([230], [1] * 230, random_sizes(rng, 230), random_sizes(rng, 230)):
        cache = model.new_cache(1, settings)
        for chunk in tokens.split(sizes):
            model(chunk, cache=cache)
        layers = cache.layers if settings is None else cache.layers[:1]
        found = {f"{number} {name}": x[: cache.num_pages].double() for number, layer in enumerate(layers) for name, x in layer._stores.items()}
        expected = expected or found
        assert found.keys() == expected.keys() and all(x.any() for x in expected.values())
        for name, x in found.items():
            torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name, sizes=sizes: f"{name} after {sizes}: {text}")


def random_sizes(rng: random.Random, total: int) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(rng.choice([1, 2, rng.randint(1, 20), rng.randint(1, 120)]), total - sum(sizes)))
    return sizes


class Operations(TorchDispatchMode):
    """Counts aten operations, but not those that only make a view."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(("settings", "first", "later"), [(None, 12, 21), (KVCacheConfig("fp8", 16), 27, 46)], ids=["none", "fp8"])
def test_layers_do_not_compute_positions(settings: KVCacheConfig | None, first: int, later: int) -> None:
    """Without φ, a chunk at the beginning and a later one."""
    model, found = small_model(), []
    cache = model.new_cache(1, settings)
    model(random_tokens(200), cache=cache)
    cache.free(0)  # all room is there
    layer = cache.layers[1]

    def extend(plan, new, compress):
        k, v = (torch.zeros(len(plan.block_rows), *x.shape[1:]) for x in (new.k_raw, new.v_raw))
        with Operations() as operations:
            rows = type(layer).extend(layer, plan, new, lambda *_: (k, v))
        found.append(operations.found)
        return rows

    layer.extend = extend
    for chunk in random_tokens(150).split([77, 73]):
        model(chunk, cache=cache)
    assert all(not counts.keys() & {"arange", "remainder", "floor_divide", "div_"} for counts in found)
    assert found[0].total() <= first and found[1].total() <= later, found
