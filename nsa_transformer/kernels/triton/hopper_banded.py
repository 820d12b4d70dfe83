"""`banded.banded_forward` for compute capability 9.0, in Gluon; see `hopper`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from nsa_transformer.kernels.triton.hopper import (
    ROWS,
    WARPGROUPS,
    add_up,
    copy,
    find_document,
    finish,
    fold,
    keys_before,
    left_operand,
    load_queries,
    row_max,
    scale_rows,
    start_scores,
)


@gluon.jit
def produce_band(
    keys, values, k_tiles, v_tiles, full, empty, cu_q, key_starts, q_start, tiles, num_docs,
    HKV: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    num_tiles = gl.load(tiles + num_docs)
    step = 0
    for item in range(gl.program_id(0), num_tiles * HKV, gl.num_programs(0)):
        head = item // num_tiles
        tile = num_tiles - 1 - item % num_tiles
        document = find_document(tiles, num_docs, tile)
        base = gl.load(key_starts + document)
        row0 = (tile - gl.load(tiles + document)) * M
        queries = gl.load(cu_q + document + 1) - gl.load(cu_q + document)
        start = gl.load(q_start + document)
        end = keys_before(start + gl.minimum((row0 + M - 1) // G, queries - 1), BLOCK, STRIDE)
        begin = 0
        if WINDOW > 0:
            begin = gl.maximum(start + row0 // G + 1 - WINDOW, 0)
        for at in range(begin, end, N):
            mbarrier.wait(empty.index(step % STAGES), (step // STAGES + 1) & 1)
            copy(keys, values, k_tiles, v_tiles, full, base + at, head, step % STAGES, N, D)
            step += 1


@gluon.jit
def pass_tiles(full, empty, step, until, STAGES: gl.constexpr):
    """Lets go of the tiles from `step` to `until` unread; each is waited for, or a stage could be let go twice for one tile."""
    for _ in range(step, until):
        mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(step % STAGES), count=1)
        step += 1
    return step


@gluon.jit
def mask_band(s, at, column, low, high, earliest, latest, all_see, WINDOW: gl.constexpr, N: gl.constexpr):
    edge = at + N > all_see
    if WINDOW > 0:
        edge = edge | (at < latest + 1 - WINDOW)
    if edge:
        here = gl.expand_dims(at + column, 0)
        visible = here < gl.expand_dims(high, 1)
        if WINDOW > 0:
            visible = visible & (here >= gl.expand_dims(low, 1))
        s = gl.where(visible, s, float("-inf"))
    return s


@gluon.jit
def _shift_band(s, top, scale, N: gl.constexpr, FOLDS: gl.constexpr, LAYOUT: gl.constexpr):
    new_top = gl.maximum(top, row_max(s, FOLDS, LAYOUT))
    shift = gl.where(new_top == float("-inf"), 0.0, new_top * scale)  # a row may have seen nothing yet
    return new_top, shift, gl.exp2(top * scale - shift)


@gluon.jit
def _attend_band(
    q, q_stride, q_head_stride, q_tiles, k_tiles, v_tiles, full, empty, out, lse, cu_q, q_start, tiles, num_docs, scale, WHICH: gl.constexpr,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows of each tile."""
    M: gl.constexpr = ROWS // WARPGROUPS
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    CHUNK: gl.constexpr = 16
    FOLDS: gl.constexpr = 3 if N == 64 else 4
    q_tile = q_tiles.index(WHICH)
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
        row = row0 + gl.arange(0, M, by_row)
        t = start + row // G
        column = gl.arange(0, N, gl.SliceLayout(0, scores))
        high = keys_before(t, BLOCK, STRIDE)
        low = t + 1 - WINDOW
        top = gl.full([M], float("-inf"), gl.float32, by_row)
        total = fold(gl.zeros([M, N], gl.float32, scores), FOLDS)
        acc = gl.zeros([M, D], gl.float32, outputs)
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
            s = warpgroup_mma_wait(0, deps=[start_scores(q_tile, k_tiles, stage, scores, M, N)])
            s = mask_band(s, at, column, low, high, earliest, latest, all_see, WINDOW, N)
            top, shift, fade = _shift_band(s, top, scale, N, FOLDS, scores)
            p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
            total = add_up(total, fade, p, FOLDS)
            p = left_operand(p, v_tiles.dtype, outputs)
            mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step + 1 < last_step)
            for _ in range(step + 1, last_step):
                step += 1
                at += N
                before = stage
                stage = step % STAGES
                # The next scores and this tile's sum are under way together; the softmax of the former runs beside the latter.
                s = start_scores(q_tile, k_tiles, stage, scores, M, N)
                acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                s = mask_band(s, at, column, low, high, earliest, latest, all_see, WINDOW, N)
                top, shift, fade = _shift_band(s, top, scale, N, FOLDS, scores)
                p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
                total = add_up(total, fade, p, FOLDS)
                p = left_operand(p, v_tiles.dtype, outputs)
                # This loop between the softmax and the wait keeps the assembler from moving the one behind the other.
                mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step + 1 < last_step)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(before), count=1)
                acc = scale_rows(acc, fade, outputs)
            acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)])
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
        step = pass_tiles(full, empty, step, after, STAGES)
        inside = row < rows
        pair = (first + row // G).to(gl.int64) * HQ + head * G + row % G
        acc = finish(acc, top, gl.convert_layout(gl.sum(total, 1), by_row), lse, pair, inside, scale, outputs)
        q_tile.store(acc.to(out.dtype.element_ty))  # the queries have done their work
        for part in gl.static_range(M // CHUNK):
            row = row0 + part * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, wide))
            pair = (first + row // G).to(gl.int64) * HQ + head * G + row % G
            to = gl.expand_dims(pair * D, 1) + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, wide)), 0)
            gl.store(out + to, q_tile.slice(part * CHUNK, CHUNK).load(wide), mask=gl.expand_dims(row < rows, 1))


def _named(spec):
    return f"nsa_{'window' if spec.constants.get('WINDOW') else 'compressed'}_forward_sm90"


@gluon.jit(repr=_named, do_not_specialize=["num_docs"])
def banded_forward(
    q, q_stride, q_head_stride, keys, values, out, lse, cu_q, key_starts, q_start, tiles, num_docs, scale,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `banded.banded_forward`."""
    k_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, N, D], keys.layout)
    v_tiles = gl.allocate_shared_memory(values.dtype, [STAGES, N, D], values.layout)
    q_tiles = gl.allocate_shared_memory(keys.dtype, [WARPGROUPS, ROWS // WARPGROUPS, D], keys.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()
    # Tuples written in place: once they have a name their constants are numbers at run time.
    gl.warp_specialize(
        [
            (_attend_band, (q, q_stride, q_head_stride, q_tiles, k_tiles, v_tiles, full, empty, out, lse, cu_q, q_start, tiles, num_docs, scale, 0,
                            HQ, HKV, G, BLOCK, STRIDE, WINDOW, N, D, STAGES)),
            (_attend_band, (q, q_stride, q_head_stride, q_tiles, k_tiles, v_tiles, full, empty, out, lse, cu_q, q_start, tiles, num_docs, scale, 1,
                            HQ, HKV, G, BLOCK, STRIDE, WINDOW, N, D, STAGES)),
            (_attend_band, (q, q_stride, q_head_stride, q_tiles, k_tiles, v_tiles, full, empty, out, lse, cu_q, q_start, tiles, num_docs, scale, 2,
                            HQ, HKV, G, BLOCK, STRIDE, WINDOW, N, D, STAGES)),
            (produce_band, (keys, values, k_tiles, v_tiles, full, empty, cu_q, key_starts, q_start, tiles, num_docs,
                             HKV, G, BLOCK, STRIDE, WINDOW, N, D, STAGES, ROWS)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
