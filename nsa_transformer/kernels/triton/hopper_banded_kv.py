"""`banded.banded_grad_kv` for compute capability 9.0, in Gluon; see `hopper_grad_kv`. The warpgroups share the rows and have 64 keys each."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from nsa_transformer.kernels.triton.hopper import find_document, keys_before
from nsa_transformer.kernels.triton.hopper_grad_kv import KEYS, add_rows, fill, load_stats, store_sums

WARPGROUPS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # of a tile
PRODUCERS = gl.constexpr(4)  # warps


@gluon.jit
def _item(
    cu_q, key_starts, q_start, tiles, num_docs, num_parts,
    G: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Of this program: first key of its tile (row, place in its document), keys from there on, the part, its first token's row in the pack, the
    position of the document's first query, and tokens begin … end of the document that see any of the keys: none where there is no tile."""
    # All key tiles of one run of queries side by side, so that they read its rows from the cache.
    tiles_here = gl.num_programs(0) // num_parts
    tile = gl.program_id(0) % tiles_here
    part = num_parts - 1 - gl.program_id(0) // tiles_here
    exists = tile < gl.load(tiles + num_docs)
    document = find_document(tiles, num_docs, gl.where(exists, tile, 0))
    at = (tile - gl.load(tiles + document)) * (WARPGROUPS * KEYS)
    base = gl.load(key_starts + document)
    num_keys = gl.where(exists, gl.load(key_starts + document + 1) - base - at, 0)
    first = gl.load(cu_q + document)
    start = gl.load(q_start + document)
    queries = gl.load(cu_q + document + 1) - first
    last = at + gl.minimum(num_keys, WARPGROUPS * KEYS) - 1
    begin = gl.maximum(at * STRIDE + BLOCK - 1 - start, 0)
    end = queries
    if WINDOW > 0:
        end = gl.minimum(gl.maximum(last + WINDOW - start, 0), queries)
    TOKENS: gl.constexpr = ROWS // G
    each = ((queries + num_parts - 1) // num_parts + TOKENS - 1) // TOKENS * TOKENS
    begin = gl.maximum(begin, part * each)
    end = gl.where(exists, gl.minimum(end, (part + 1) * each), 0)
    return base + at, at, num_keys, part, first, start, begin, end


@gluon.jit
def _produce(
    keys, values, q_rows, grad_rows, k_tiles, v_tiles, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, lse, delta, gates,
    cu_q, key_starts, q_start, tiles, num_docs, num_parts, WHICH: gl.constexpr,
    HQ: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = ROWS // G
    BRANCH: gl.constexpr = 2 if WINDOW > 0 else 0
    by_lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    head = gl.program_id(1)
    base, at, _, _, first, start, begin, end = _item(cu_q, key_starts, q_start, tiles, num_docs, num_parts, G, BLOCK, STRIDE, WINDOW)
    if begin < end:
        if WHICH == 0:
            mbarrier.expect(ready, WARPGROUPS * KEYS * 2 * D * (keys.dtype.primitive_bitwidth // 8))
            for part in gl.static_range(WARPGROUPS):
                tma.async_copy_global_to_shared(keys, [base + part * KEYS, head * D], ready, k_tiles.index(part))
                tma.async_copy_global_to_shared(values, [base + part * KEYS, head * D], ready, v_tiles.index(part))
        nth = gl.arange(0, ROWS, by_lane) // G
        here = begin + WHICH * TOKENS + nth
        row_lse, row_delta, gate = load_stats(lse, delta, gates, first + here, here < end, head, BRANCH, HQ, G, by_lane)
        for place in range(begin + WHICH * TOKENS, end, PRODUCERS * TOKENS):
            after = place + PRODUCERS * TOKENS + nth
            next_lse, next_delta, next_gate = load_stats(lse, delta, gates, first + after, after < end, head, BRANCH, HQ, G, by_lane)
            high = keys_before(start + place + nth, BLOCK, STRIDE) - at
            fill(
                q_rows, grad_rows, q_tiles, grad_tiles, stats, sees, edges, full, empty, (place - begin) // TOKENS, first + place + nth,
                row_lse, row_delta, gate, high, head,
                True, HQ, G, D, STAGES, by_lane,
            )  # fmt: skip
            row_lse = next_lse
            row_delta = next_delta
            gate = next_gate


@gluon.jit
def _consume(
    k_tiles, v_tiles, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, grad_k, grad_v, part_stride, cu_q, key_starts, q_start, tiles, num_docs,
    num_parts, scale, raw_scale, WHICH: gl.constexpr,
    HKV: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    TOKENS: gl.constexpr = ROWS // G
    base, _, num_keys, part, _, _, begin, end = _item(cu_q, key_starts, q_start, tiles, num_docs, num_parts, G, BLOCK, STRIDE, WINDOW)
    if begin < end:
        mbarrier.wait(ready, 0)
    steps = (gl.maximum(end - begin, 0) + TOKENS - 1) // TOKENS
    dk, dv = add_rows(
        k_tiles.index(WHICH), v_tiles.index(WHICH), q_tiles, grad_tiles, stats, sees, edges, grad_k, full, empty, 0, steps, 1, 0, WHICH * KEYS, scale,
        WINDOW, D, STAGES, False, G, 1,
    )  # fmt: skip
    column = WHICH * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, outputs))
    row = (part * part_stride + base + column).to(gl.int64) * HKV + gl.program_id(1)
    store_sums(dk * raw_scale, grad_k, row, column < num_keys, D, outputs)
    store_sums(dv, grad_v, row, column < num_keys, D, outputs)


def _named(spec):
    return f"nsa_{'window' if spec.constants.get('WINDOW') else 'compressed'}_dkv_sm90"


@gluon.jit(repr=_named, do_not_specialize=["num_docs", "num_parts", "part_stride"])
def banded_grad_kv(
    q_rows, grad_rows, keys, values, lse, delta, gates, grad_k, grad_v, part_stride, cu_q, key_starts, q_start, tiles, num_docs, scale, raw_scale, num_parts,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `banded.banded_grad_kv`."""
    k_tiles = gl.allocate_shared_memory(keys.dtype, [WARPGROUPS, KEYS, D], keys.layout)
    v_tiles = gl.allocate_shared_memory(keys.dtype, [WARPGROUPS, KEYS, D], keys.layout)
    q_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, ROWS, D], keys.layout)
    grad_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, ROWS, D], keys.layout)
    stats = gl.allocate_shared_memory(gl.float32, [3 * STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    sees = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    edges = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Barriers tell one round of a stage from the next alone, so no producer may be two rounds ahead.
    gl.static_assert(STAGES >= PRODUCERS)
    mbarrier.init(ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()
    # Tuples written in place: once they have a name their constants are numbers at run time.
    gl.warp_specialize(
        [
            (_consume, (k_tiles, v_tiles, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, grad_k, grad_v, part_stride, cu_q, key_starts, q_start,
                        tiles, num_docs, num_parts, scale, raw_scale, 0, HKV, G, BLOCK, STRIDE, WINDOW, D, STAGES)),
            (_consume, (k_tiles, v_tiles, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, grad_k, grad_v, part_stride, cu_q, key_starts, q_start,
                        tiles, num_docs, num_parts, scale, raw_scale, 1, HKV, G, BLOCK, STRIDE, WINDOW, D, STAGES)),
            (_produce, (keys, values, q_rows, grad_rows, k_tiles, v_tiles, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, lse, delta, gates,
                        cu_q, key_starts, q_start, tiles, num_docs, num_parts, 0, HQ, G, BLOCK, STRIDE, WINDOW, D, STAGES)),
            (_produce, (keys, values, q_rows, grad_rows, k_tiles, v_tiles, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, lse, delta, gates,
                        cu_q, key_starts, q_start, tiles, num_docs, num_parts, 1, HQ, G, BLOCK, STRIDE, WINDOW, D, STAGES)),
            (_produce, (keys, values, q_rows, grad_rows, k_tiles, v_tiles, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, lse, delta, gates,
                        cu_q, key_starts, q_start, tiles, num_docs, num_parts, 2, HQ, G, BLOCK, STRIDE, WINDOW, D, STAGES)),
            (_produce, (keys, values, q_rows, grad_rows, k_tiles, v_tiles, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, lse, delta, gates,
                        cu_q, key_starts, q_start, tiles, num_docs, num_parts, 3, HQ, G, BLOCK, STRIDE, WINDOW, D, STAGES)),
        ],
        [4, 1, 1, 1, 1],
        [232, 40, 40, 40, 40],
    )  # fmt: skip
