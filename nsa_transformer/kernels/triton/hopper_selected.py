"""`selected.selected_forward` for compute capability 9.0, in Gluon; see `hopper`."""

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
    left_operand,
    load_queries,
    read_number,
    row_max,
    scale_rows,
    start_scores,
)


@gluon.jit
def produce_selected(
    keys, values, k_tiles, v_tiles, full, empty, positions, members, union, who, counts, cu_k, tiles, num_docs,
    HKV: gl.constexpr, L: gl.constexpr, SELECT: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Beside each tile of keys goes where it starts and which tokens chose it: the lists are read once, by a warp that is ahead."""
    PIECES: gl.constexpr = SELECT // N
    single: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    num_tiles = gl.load(tiles + num_docs)
    step = 0
    for item in range(gl.program_id(0), num_tiles * HKV, gl.num_programs(0)):
        head = item // num_tiles
        tile = item % num_tiles
        base = gl.load(cu_k + find_document(tiles, num_docs, tile))
        at = (tile.to(gl.int64) * HKV + head) * L
        block = gl.load(union + at)
        chosen = gl.load(who + at)
        for entry in range(gl.load(counts + tile * HKV + head)):
            after = at + gl.minimum(entry + 1, L - 1)
            next_block = gl.load(union + after)
            next_chosen = gl.load(who + after)
            for piece in gl.static_range(PIECES):
                stage = step % STAGES
                position = block * SELECT + piece * N
                mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
                positions.index(stage).store(gl.full([1], position, gl.int32, single))
                members.index(stage).store(gl.full([1], chosen, members.dtype, single))
                copy(keys, values, k_tiles, v_tiles, full, base + position, head, stage, N, D)
                step += 1
            block = next_block
            chosen = next_chosen


@gluon.jit
def next_seen(full, empty, members, step, until, low_bit, bits, STAGES: gl.constexpr):
    """The first tile from `step` on that a token of this warpgroup chose, or `until`; lets go of those before it."""
    chosen = 0
    while (step < until) & (chosen == 0):
        mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
        chosen = ((read_number(members, step % STAGES) >> low_bit) & bits).to(gl.int32)
        if chosen == 0:
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1
    return step


@gluon.jit
def _shift_selected(s, top, position, member, bit, inside, column, t, earliest, scale, N: gl.constexpr, FOLDS: gl.constexpr, LAYOUT: gl.constexpr):
    if position + N > earliest + 1:
        s = gl.where(gl.expand_dims(column, 0) < gl.expand_dims(t + 1 - position, 1), s, float("-inf"))
    # A row that did not choose the block has an infinite shift: its probabilities are 0.
    chosen = (((member >> bit) & 1) != 0) & inside
    new_top = gl.where(chosen, gl.maximum(top, row_max(s, FOLDS, LAYOUT)), top)
    sees = chosen & (new_top != float("-inf"))
    shift = gl.where(sees, new_top * scale, float("inf"))
    fade = gl.where(sees, gl.exp2((top - new_top) * scale), 1.0)
    return s, new_top, shift, fade


@gluon.jit
def _attend_selected(
    q, q_stride, q_head_stride, q_tiles, k_tiles, v_tiles, full, empty, positions, members, counts, gates, out_compressed, out_window, out_selected, out, lse,
    cu_q, q_start, tiles, num_docs, scale, WHICH: gl.constexpr,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, SELECT: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows of each tile."""
    M: gl.constexpr = ROWS // WARPGROUPS
    PIECES: gl.constexpr = SELECT // N
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    CHUNK: gl.constexpr = 16
    FOLDS: gl.constexpr = 3 if N == 64 else 4
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    q_tile = q_tiles.index(WHICH)
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
        row = row0 + gl.arange(0, M, by_row)
        inside = row < rows
        t = start + row // G
        bit = row // G - tile_row // G
        low_bit = row0 // G - tile_row // G
        bits = (1 << ((row0 + M - 1) // G - row0 // G + 1)) - 1
        earliest = start + row0 // G
        column = gl.arange(0, N, gl.SliceLayout(0, scores))
        top = gl.full([M], float("-inf"), gl.float32, by_row)
        total = fold(gl.zeros([M, N], gl.float32, scores), FOLDS)
        acc = gl.zeros([M, D], gl.float32, outputs)
        step = next_seen(full, empty, members, step, until, low_bit, bits, STAGES)
        while step < until:
            stage = step % STAGES
            s = warpgroup_mma_wait(0, deps=[start_scores(q_tile, k_tiles, stage, scores, M, N)])
            s, top, shift, fade = _shift_selected(
                s, top, read_number(positions, stage), read_number(members, stage), bit, inside, column, t, earliest, scale, N, FOLDS, scores
            )
            p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
            total = add_up(total, fade, p, FOLDS)
            p = left_operand(p, v_tiles.dtype, outputs)
            acc = scale_rows(acc, fade, outputs)
            # It looks no farther ahead than the producer can be while the stages in use are held.
            reach = gl.minimum(until, step + STAGES)
            step = next_seen(full, empty, members, step + 1, reach, low_bit, bits, STAGES)
            while step < reach:
                before = stage
                stage = step % STAGES
                # The next scores and this tile's sum are under way together; the softmax of the former runs beside the latter.
                s = start_scores(q_tile, k_tiles, stage, scores, M, N)
                acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
                position = read_number(positions, stage)
                member = read_number(members, stage)
                s = warpgroup_mma_wait(1, deps=[s])
                s, top, shift, fade = _shift_selected(s, top, position, member, bit, inside, column, t, earliest, scale, N, FOLDS, scores)
                p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
                total = add_up(total, fade, p, FOLDS)
                p = left_operand(p, v_tiles.dtype, outputs)
                # Looking for the next tile here also keeps the assembler from moving the softmax behind the wait.
                following = next_seen(full, empty, members, step + 1, reach, low_bit, bits, STAGES)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(before), count=1)
                acc = scale_rows(acc, fade, outputs)
                if following == reach:
                    reach = gl.minimum(until, step + STAGES)
                    following = next_seen(full, empty, members, following, reach, low_bit, bits, STAGES)
                else:
                    reach = gl.minimum(until, step + STAGES)
                step = following
            acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)])
            mbarrier.arrive(empty.index(stage), count=1)
            step = next_seen(full, empty, members, step, until, low_bit, bits, STAGES)
        pair = (first + row // G).to(gl.int64) * HQ + head * G + row % G
        acc = finish(acc, top, gl.convert_layout(gl.sum(total, 1), by_row), lse, pair, inside, scale, outputs)

        q_tile.store(acc.to(out.dtype.element_ty))  # the queries have done their work
        for part in gl.static_range(M // CHUNK):
            row = row0 + part * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, wide))
            pair = (first + row // G).to(gl.int64) * HQ + head * G + row % G
            to = gl.expand_dims(pair * D, 1) + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, wide)), 0)
            here = row < rows
            inside_wide = gl.expand_dims(here, 1)
            c = gl.load(out_compressed + to, mask=inside_wide, other=0.0).to(gl.float32)
            w = gl.load(out_window + to, mask=inside_wide, other=0.0).to(gl.float32)
            selected = q_tile.slice(part * CHUNK, CHUNK).load(wide)
            if SAVE:
                gl.store(out_selected + to, selected, mask=inside_wide)
            mixed = gl.expand_dims(gl.load(gates + pair * 3, mask=here, other=0.0), 1) * c
            mixed += gl.expand_dims(gl.load(gates + pair * 3 + 1, mask=here, other=0.0), 1) * selected.to(gl.float32)
            mixed += gl.expand_dims(gl.load(gates + pair * 3 + 2, mask=here, other=0.0), 1) * w
            gl.store(out + to, mixed.to(out.dtype.element_ty), mask=inside_wide)


@gluon.jit(repr=lambda _: "nsa_selected_forward_sm90", do_not_specialize=["num_docs"])
def selected_forward(
    q, q_stride, q_head_stride, keys, values, union, who, counts, gates, out_compressed, out_window, out_selected, out, lse,
    cu_q, cu_k, q_start, tiles, num_docs, scale,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, L: gl.constexpr, SELECT: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    """As `selected.selected_forward`."""
    k_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, N, D], keys.layout)
    v_tiles = gl.allocate_shared_memory(values.dtype, [STAGES, N, D], values.layout)
    q_tiles = gl.allocate_shared_memory(keys.dtype, [WARPGROUPS, ROWS // WARPGROUPS, D], keys.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    positions = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    members = gl.allocate_shared_memory(who.dtype.element_ty, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend_selected, (q, q_stride, q_head_stride, q_tiles, k_tiles, v_tiles, full, empty, positions, members, counts, gates,
                                out_compressed, out_window, out_selected, out, lse, cu_q, q_start, tiles, num_docs, scale, 0,
                                HQ, HKV, G, SELECT, N, D, STAGES, SAVE)),
            (_attend_selected, (q, q_stride, q_head_stride, q_tiles, k_tiles, v_tiles, full, empty, positions, members, counts, gates,
                                out_compressed, out_window, out_selected, out, lse, cu_q, q_start, tiles, num_docs, scale, 1,
                                HQ, HKV, G, SELECT, N, D, STAGES, SAVE)),
            (_attend_selected, (q, q_stride, q_head_stride, q_tiles, k_tiles, v_tiles, full, empty, positions, members, counts, gates,
                                out_compressed, out_window, out_selected, out, lse, cu_q, q_start, tiles, num_docs, scale, 2,
                                HQ, HKV, G, SELECT, N, D, STAGES, SAVE)),
            (produce_selected, (keys, values, k_tiles, v_tiles, full, empty, positions, members, union, who, counts, cu_k, tiles, num_docs,
                                 HKV, L, SELECT, N, D, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
