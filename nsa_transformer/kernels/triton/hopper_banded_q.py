"""`banded.banded_grad_q` for compute capability 9.0, in Gluon; see `hopper_grad_q`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa_transformer.kernels.triton.hopper import find_document, keys_before, load_queries
from nsa_transformer.kernels.triton.hopper_banded import mask_band, pass_tiles, produce_band
from nsa_transformer.kernels.triton.hopper_grad_q import ROWS, WARPGROUPS, finish_product, row_stats, score_gradients, start_products, store_gradient


@gluon.jit
def _grad_band(
    q, q_stride, q_head_stride, grad_out, q_tiles, grad_tiles, k_tiles, v_tiles, full, empty, lse, delta, gates, grad_q,
    cu_q, q_start, tiles, num_docs, scale, raw_scale, WHICH: gl.constexpr,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows of each tile."""
    M: gl.constexpr = ROWS // WARPGROUPS
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    DTYPE: gl.constexpr = k_tiles.dtype
    q_tile = q_tiles.index(WHICH)
    grad_tile = grad_tiles.index(WHICH)
    num_tiles = gl.load(tiles + num_docs)
    step = 0
    for item in range(gl.program_id(0), num_tiles * HKV, gl.num_programs(0)):
        head = item // num_tiles
        tile = num_tiles - 1 - item % num_tiles
        document = find_document(tiles, num_docs, tile)
        row0 = (tile - gl.load(tiles + document)) * ROWS
        first = gl.load(cu_q + document)
        tokens = gl.load(cu_q + document + 1) - first
        rows = tokens * G
        start = gl.load(q_start + document)
        end = keys_before(start + gl.minimum((row0 + ROWS - 1) // G, tokens - 1), BLOCK, STRIDE)
        begin = 0
        if WINDOW > 0:
            begin = gl.maximum(start + row0 // G + 1 - WINDOW, 0)
        row0 += WHICH * M
        earliest = start + row0 // G
        latest = start + gl.minimum((row0 + M - 1) // G, tokens - 1)
        all_see = keys_before(earliest, BLOCK, STRIDE)
        some_see = gl.where(row0 < rows, keys_before(latest, BLOCK, STRIDE), 0)
        load_queries(q, q_stride, q_head_stride, q_tile, first, row0, rows, head, M, G, D)
        load_queries(grad_out, HQ * D, D, grad_tile, first, row0, rows, head, M, G, D)
        row = row0 + gl.arange(0, M, by_row)
        t = start + row // G
        pair = (first + row // G).to(gl.int64) * HQ + head * G + row % G
        row_lse, row_delta = row_stats(lse, delta, pair, row < rows)
        column = gl.arange(0, N, gl.SliceLayout(0, scores))
        high = keys_before(t, BLOCK, STRIDE)
        low = t + 1 - WINDOW
        dq = gl.zeros([M, D], gl.float32, outputs)
        # Of the tile's steps this warpgroup takes part in [first_step, last_step).
        last_step = step + (gl.maximum(gl.minimum(some_see, end) - begin, 0) + N - 1) // N
        after = step + (gl.maximum(end - begin, 0) + N - 1) // N
        first_step = step
        if WINDOW > 0:
            first_step = gl.minimum(step + gl.maximum(earliest + 1 - WINDOW - begin, 0) // N, last_step)
        at = begin + (first_step - step) * N
        step = pass_tiles(full, empty, step, first_step, STAGES)
        if step < last_step:
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            s, dp = start_products(q_tile, grad_tile, k_tiles, v_tiles, stage, scores, M, N)
            s, dp = warpgroup_mma_wait(0, deps=[s, dp])
            s = mask_band(s, at, column, low, high, earliest, latest, all_see, WINDOW, N)
            ds = score_gradients(s, dp, row_lse, row_delta, scale, outputs, DTYPE)
            mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step + 1 < last_step)
            for _ in range(step + 1, last_step):
                step += 1
                at += N
                before = stage
                stage = step % STAGES
                # The next tile's products and this one's sum are under way together; the arithmetic on the former runs beside the latter.
                s, dp = start_products(q_tile, grad_tile, k_tiles, v_tiles, stage, scores, M, N)
                dq = warpgroup_mma(ds, k_tiles.index(before), dq, is_async=True)
                s, dp = warpgroup_mma_wait(1, deps=[s, dp])
                s = mask_band(s, at, column, low, high, earliest, latest, all_see, WINDOW, N)
                ds = score_gradients(s, dp, row_lse, row_delta, scale, outputs, DTYPE)
                # This loop keeps the assembler from moving the arithmetic behind the wait.
                mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step + 1 < last_step)
                dq = warpgroup_mma_wait(0, deps=[dq])
                mbarrier.arrive(empty.index(before), count=1)
            dq = finish_product(ds, k_tiles, stage, dq)
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
        step = pass_tiles(full, empty, step, after, STAGES)
        row = row0 + gl.arange(0, M, gl.SliceLayout(1, outputs))
        store_gradient(dq, grad_q, gates, first, row, rows, head, raw_scale, 2 if WINDOW > 0 else 0, WINDOW > 0, HQ, G, D, outputs)


def _named(spec):
    return f"nsa_{'window' if spec.constants.get('WINDOW') else 'compressed'}_dq_sm90"


@gluon.jit(repr=_named, do_not_specialize=["num_docs"])
def banded_grad_q(
    q, q_stride, q_head_stride, keys, values, grad_out, lse, delta, gates, grad_q, cu_q, key_starts, q_start, tiles, num_docs, scale, raw_scale,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `banded.banded_grad_q`."""
    k_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, N, D], keys.layout)
    v_tiles = gl.allocate_shared_memory(values.dtype, [STAGES, N, D], values.layout)
    q_tiles = gl.allocate_shared_memory(keys.dtype, [WARPGROUPS, ROWS // WARPGROUPS, D], keys.layout)
    grad_tiles = gl.allocate_shared_memory(keys.dtype, [WARPGROUPS, ROWS // WARPGROUPS, D], keys.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()
    # Tuples written in place: once they have a name their constants are numbers at run time.
    gl.warp_specialize(
        [
            (_grad_band, (q, q_stride, q_head_stride, grad_out, q_tiles, grad_tiles, k_tiles, v_tiles, full, empty, lse, delta, gates, grad_q,
                          cu_q, q_start, tiles, num_docs, scale, raw_scale, 0, HQ, HKV, G, BLOCK, STRIDE, WINDOW, N, D, STAGES)),
            (_grad_band, (q, q_stride, q_head_stride, grad_out, q_tiles, grad_tiles, k_tiles, v_tiles, full, empty, lse, delta, gates, grad_q,
                          cu_q, q_start, tiles, num_docs, scale, raw_scale, 1, HQ, HKV, G, BLOCK, STRIDE, WINDOW, N, D, STAGES)),
            (produce_band, (keys, values, k_tiles, v_tiles, full, empty, cu_q, key_starts, q_start, tiles, num_docs,
                            HKV, G, BLOCK, STRIDE, WINDOW, N, D, STAGES, ROWS)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
