"""`selected.selected_grad_q` for compute capability 9.0, in Gluon; see `hopper_grad_q`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa_transformer.kernels.triton.hopper import find_document, load_queries
from nsa_transformer.kernels.triton.hopper_grad_q import ROWS, WARPGROUPS, finish_product, row_stats, score_gradients, start_products, store_gradient
from nsa_transformer.kernels.triton.hopper_selected import next_seen, produce_selected, read_number


@gluon.jit
def _mask(s, position, member, bit, row_lse, column, t, earliest, N: gl.constexpr):
    """Scores with -inf for keys of the future, and the rows' lse, infinite where a token did not choose the block: its probabilities are 0."""
    if position + N > earliest + 1:
        s = gl.where(gl.expand_dims(column, 0) < gl.expand_dims(t + 1 - position, 1), s, float("-inf"))
    return s, gl.where(((member >> bit) & 1) != 0, row_lse, float("inf"))


@gluon.jit
def _grad_selected(
    q, q_stride, q_head_stride, grad_out, q_tiles, grad_tiles, k_tiles, v_tiles, full, empty, positions, members, counts, lse, delta, gates, grad_q,
    cu_q, q_start, tiles, num_docs, scale, raw_scale, WHICH: gl.constexpr,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, SELECT: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows of each tile."""
    M: gl.constexpr = ROWS // WARPGROUPS
    PIECES: gl.constexpr = SELECT // N
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
        tile = item % num_tiles
        document = find_document(tiles, num_docs, tile)
        tile_row = (tile - gl.load(tiles + document)) * ROWS
        row0 = tile_row + WHICH * M
        first = gl.load(cu_q + document)
        rows = (gl.load(cu_q + document + 1) - first) * G
        start = gl.load(q_start + document)
        until = step + gl.load(counts + tile * HKV + head) * PIECES
        load_queries(q, q_stride, q_head_stride, q_tile, first, row0, rows, head, M, G, D)
        load_queries(grad_out, HQ * D, D, grad_tile, first, row0, rows, head, M, G, D)
        row = row0 + gl.arange(0, M, by_row)
        t = start + row // G
        pair = (first + row // G).to(gl.int64) * HQ + head * G + row % G
        row_lse, row_delta = row_stats(lse, delta, pair, row < rows)
        bit = row // G - tile_row // G
        low_bit = row0 // G - tile_row // G
        bits = (1 << ((row0 + M - 1) // G - row0 // G + 1)) - 1
        earliest = start + row0 // G
        column = gl.arange(0, N, gl.SliceLayout(0, scores))
        dq = gl.zeros([M, D], gl.float32, outputs)
        step = next_seen(full, empty, members, step, until, low_bit, bits, STAGES)
        while step < until:
            stage = step % STAGES
            s, dp = start_products(q_tile, grad_tile, k_tiles, v_tiles, stage, scores, M, N)
            s, dp = warpgroup_mma_wait(0, deps=[s, dp])
            s, here_lse = _mask(s, read_number(positions, stage), read_number(members, stage), bit, row_lse, column, t, earliest, N)
            ds = score_gradients(s, dp, here_lse, row_delta, scale, outputs, DTYPE)
            # It looks no farther ahead than the producer can be while the stages in use are held.
            reach = gl.minimum(until, step + STAGES)
            step = next_seen(full, empty, members, step + 1, reach, low_bit, bits, STAGES)
            while step < reach:
                before = stage
                stage = step % STAGES
                # The next tile's products and this one's sum are under way together; the arithmetic on the former runs beside the latter.
                s, dp = start_products(q_tile, grad_tile, k_tiles, v_tiles, stage, scores, M, N)
                dq = warpgroup_mma(ds, k_tiles.index(before), dq, is_async=True)
                position = read_number(positions, stage)
                member = read_number(members, stage)
                s, dp = warpgroup_mma_wait(1, deps=[s, dp])
                s, here_lse = _mask(s, position, member, bit, row_lse, column, t, earliest, N)
                ds = score_gradients(s, dp, here_lse, row_delta, scale, outputs, DTYPE)
                # Looking for the next tile here also keeps the assembler from moving the arithmetic behind the wait.
                following = next_seen(full, empty, members, step + 1, reach, low_bit, bits, STAGES)
                dq = warpgroup_mma_wait(0, deps=[dq])
                mbarrier.arrive(empty.index(before), count=1)
                if following == reach:
                    reach = gl.minimum(until, step + STAGES)
                    following = next_seen(full, empty, members, following, reach, low_bit, bits, STAGES)
                else:
                    reach = gl.minimum(until, step + STAGES)
                step = following
            dq = finish_product(ds, k_tiles, stage, dq)
            mbarrier.arrive(empty.index(stage), count=1)
            step = next_seen(full, empty, members, step, until, low_bit, bits, STAGES)
        row = row0 + gl.arange(0, M, gl.SliceLayout(1, outputs))
        store_gradient(dq, grad_q, gates, first, row, rows, head, raw_scale, 1, True, HQ, G, D, outputs)


@gluon.jit(repr=lambda _: "nsa_selected_dq_sm90", do_not_specialize=["num_docs"])
def selected_grad_q(
    q, q_stride, q_head_stride, keys, values, union, who, counts, grad_out, lse, delta, gates, grad_q,
    cu_q, cu_k, q_start, tiles, num_docs, scale, raw_scale,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, L: gl.constexpr, SELECT: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `selected.selected_grad_q`."""
    k_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, N, D], keys.layout)
    v_tiles = gl.allocate_shared_memory(values.dtype, [STAGES, N, D], values.layout)
    q_tiles = gl.allocate_shared_memory(keys.dtype, [WARPGROUPS, ROWS // WARPGROUPS, D], keys.layout)
    grad_tiles = gl.allocate_shared_memory(keys.dtype, [WARPGROUPS, ROWS // WARPGROUPS, D], keys.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    positions = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    members = gl.allocate_shared_memory(who.dtype.element_ty, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()
    # Tuples written in place: once they have a name their constants are numbers at run time.
    gl.warp_specialize(
        [
            (_grad_selected, (q, q_stride, q_head_stride, grad_out, q_tiles, grad_tiles, k_tiles, v_tiles, full, empty, positions, members, counts,
                              lse, delta, gates, grad_q, cu_q, q_start, tiles, num_docs, scale, raw_scale, 0, HQ, HKV, G, SELECT, N, D, STAGES)),
            (_grad_selected, (q, q_stride, q_head_stride, grad_out, q_tiles, grad_tiles, k_tiles, v_tiles, full, empty, positions, members, counts,
                              lse, delta, gates, grad_q, cu_q, q_start, tiles, num_docs, scale, raw_scale, 1, HQ, HKV, G, SELECT, N, D, STAGES)),
            (produce_selected, (keys, values, k_tiles, v_tiles, full, empty, positions, members, union, who, counts, cu_k, tiles, num_docs,
                                HKV, L, SELECT, N, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
