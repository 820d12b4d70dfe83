"""Forward kernels for compute capability 9.0, in Gluon: one producer warp copies tiles of keys and values ahead, three warpgroups attend.

The warpgroups hold 64 query rows each and read the same tiles, so that a third as much comes out of the L2 cache. A warpgroup passes over tiles
that none of its own queries see, so the taller tile costs no products. Programs are persistent: the producer is already at the next tile of
queries while the warpgroups finish theirs. Keys and values share one head width, 64 or 128; other shapes take the kernels in Triton proper.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

WARPGROUPS = gl.constexpr(3)
ROWS = gl.constexpr(192)  # query rows of a tile: 64 for each warpgroup, the height of its products


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Of tiles [rows, D] of x [S, H, D], seen as [S, H * D], in the layout that products read from shared memory."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1], [rows, x.shape[2]], layout)


@gluon.jit
def _find_document(starts, num_docs, index):
    """As `common.find_document`."""
    low = 0
    high = num_docs
    while high - low > 1:
        middle = (low + high) // 2
        below = gl.load(starts + middle) <= index
        low = gl.where(below, middle, low)
        high = gl.where(below, high, middle)
    return low


@gluon.jit
def _keys_before(t, BLOCK: gl.constexpr, STRIDE: gl.constexpr):
    """As `common.keys_before`."""
    return gl.maximum(t + 1 - BLOCK + STRIDE, 0) // STRIDE


@gluon.jit
def _copy(keys, values, k_tiles, v_tiles, full, row, head, stage, N: gl.constexpr, D: gl.constexpr):
    """Starts the copies of N keys and values from `row` on into a free stage."""
    mbarrier.expect(full.index(stage), N * 2 * D * (keys.dtype.primitive_bitwidth // 8))
    tma.async_copy_global_to_shared(keys, [row, head * D], full.index(stage), k_tiles.index(stage))
    tma.async_copy_global_to_shared(values, [row, head * D], full.index(stage), v_tiles.index(stage))


@gluon.jit
def _load_queries(q, q_stride, q_head_stride, q_tile, first, row0, rows, head, M: gl.constexpr, HQ: gl.constexpr, G: gl.constexpr, D: gl.constexpr):
    """Query rows row0 … row0 + M of a document into shared memory; 0 past its end."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    row = row0 + gl.arange(0, M, gl.SliceLayout(1, wide))
    column = gl.arange(0, D, gl.SliceLayout(0, wide))
    offsets = (first + row // G).to(gl.int64) * q_stride + (head * G + row % G) * q_head_stride
    x = gl.load(q + (gl.expand_dims(offsets, 1) + gl.expand_dims(column, 0)), mask=gl.expand_dims(row < rows, 1), other=0.0)
    q_tile.store(x)
    fence_async_shared()


@gluon.jit
def _start_scores(q_tile, k_tiles, stage, LAYOUT: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    s = gl.zeros([M, N], gl.float32, LAYOUT)
    return warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _halves(x):
    """The first and the last half of x's columns. In the products' layout they lie in the same threads: no data moves."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def _row_max(s, FOLDS: gl.constexpr, LAYOUT: gl.constexpr):
    """Row maxima of s [M, N], by halves down to 8 columns first: as one chain per row, one would wait for the other."""
    for _ in gl.static_range(FOLDS):
        a, b = _halves(s)
        s = gl.maximum(a, b)
    return gl.convert_layout(gl.max(s, 1), gl.SliceLayout(1, LAYOUT))


@gluon.jit
def _fold(p, FOLDS: gl.constexpr):
    """Sums over p's columns, [M, 8]: so much of a row's sum needs no other thread. The rest is added up once at the end."""
    for _ in gl.static_range(FOLDS):
        a, b = _halves(p)
        p = a + b
    return p


@gluon.jit
def _add_up(total, fade, p, FOLDS: gl.constexpr):
    return total * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, total.type.layout)), 1) + _fold(p, FOLDS)


@gluon.jit
def _left_operand(p, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def _fade(acc, fade, LAYOUT: gl.constexpr):
    return acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, LAYOUT)), 1)


@gluon.jit
def _finish(acc, top, total, lse, pair, inside, scale, LAYOUT: gl.constexpr):
    """Stores lse and returns acc / total; a row that saw no key gets 0 and +inf."""
    seen = total > 0
    safe = gl.where(seen, total, 1.0)
    gl.store(lse + pair, gl.where(seen, top * scale + gl.log2(safe), float("inf")), mask=inside)
    return acc * gl.expand_dims(gl.convert_layout(gl.where(seen, 1.0 / safe, 0.0), gl.SliceLayout(1, LAYOUT)), 1)


@gluon.jit
def _produce_band(
    keys, values, k_tiles, v_tiles, full, empty, cu_q, key_starts, q_start, tiles, num_docs,
    HKV: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    num_tiles = gl.load(tiles + num_docs)
    step = 0
    for item in range(gl.program_id(0), num_tiles * HKV, gl.num_programs(0)):
        head = item // num_tiles
        tile = num_tiles - 1 - item % num_tiles
        document = _find_document(tiles, num_docs, tile)
        base = gl.load(key_starts + document)
        row0 = (tile - gl.load(tiles + document)) * ROWS
        queries = gl.load(cu_q + document + 1) - gl.load(cu_q + document)
        start = gl.load(q_start + document)
        end = _keys_before(start + gl.minimum((row0 + ROWS - 1) // G, queries - 1), BLOCK, STRIDE)
        begin = 0
        if WINDOW > 0:
            begin = gl.maximum(start + row0 // G + 1 - WINDOW, 0)
        for at in range(begin, end, N):
            mbarrier.wait(empty.index(step % STAGES), (step // STAGES + 1) & 1)
            _copy(keys, values, k_tiles, v_tiles, full, base + at, head, step % STAGES, N, D)
            step += 1


@gluon.jit
def _pass(full, empty, step, until, STAGES: gl.constexpr):
    """Lets go of the tiles from `step` to `until` unread; each is waited for, or a stage could be let go twice for one tile."""
    for _ in range(step, until):
        mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(step % STAGES), count=1)
        step += 1
    return step


@gluon.jit
def _mask_band(s, at, column, low, high, earliest, latest, all_see, WINDOW: gl.constexpr, N: gl.constexpr):
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
    new_top = gl.maximum(top, _row_max(s, FOLDS, LAYOUT))
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
        document = _find_document(tiles, num_docs, tile)
        row0 = (tile - gl.load(tiles + document)) * ROWS
        first = gl.load(cu_q + document)
        tokens = gl.load(cu_q + document + 1) - first
        rows = tokens * G
        start = gl.load(q_start + document)
        end = _keys_before(start + gl.minimum((row0 + ROWS - 1) // G, tokens - 1), BLOCK, STRIDE)
        begin = 0
        if WINDOW > 0:
            begin = gl.maximum(start + row0 // G + 1 - WINDOW, 0)
        row0 += WHICH * M
        earliest = start + row0 // G
        latest = start + gl.minimum((row0 + M - 1) // G, tokens - 1)
        all_see = _keys_before(earliest, BLOCK, STRIDE)
        some_see = gl.where(row0 < rows, _keys_before(latest, BLOCK, STRIDE), 0)
        _load_queries(q, q_stride, q_head_stride, q_tile, first, row0, rows, head, M, HQ, G, D)
        row = row0 + gl.arange(0, M, by_row)
        t = start + row // G
        column = gl.arange(0, N, gl.SliceLayout(0, scores))
        high = _keys_before(t, BLOCK, STRIDE)
        low = t + 1 - WINDOW
        top = gl.full([M], float("-inf"), gl.float32, by_row)
        total = _fold(gl.zeros([M, N], gl.float32, scores), FOLDS)
        acc = gl.zeros([M, D], gl.float32, outputs)
        # Of the tile's steps this warpgroup takes part in [first_step, last_step).
        last_step = step + (gl.maximum(gl.minimum(some_see, end) - begin, 0) + N - 1) // N
        after = step + (gl.maximum(end - begin, 0) + N - 1) // N
        first_step = step
        if WINDOW > 0:
            first_step = gl.minimum(step + gl.maximum(earliest + 1 - WINDOW - begin, 0) // N, last_step)
        at = begin + (first_step - step) * N
        step = _pass(full, empty, step, first_step, STAGES)
        if step < last_step:
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            s = warpgroup_mma_wait(0, deps=[_start_scores(q_tile, k_tiles, stage, scores, M, N)])
            s = _mask_band(s, at, column, low, high, earliest, latest, all_see, WINDOW, N)
            top, shift, fade = _shift_band(s, top, scale, N, FOLDS, scores)
            p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
            total = _add_up(total, fade, p, FOLDS)
            p = _left_operand(p, v_tiles.dtype, outputs)
            mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step + 1 < last_step)
            for _ in range(step + 1, last_step):
                step += 1
                at += N
                before = stage
                stage = step % STAGES
                # The next scores and this tile's sum are under way together; the softmax of the former runs beside the latter.
                s = _start_scores(q_tile, k_tiles, stage, scores, M, N)
                acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                s = _mask_band(s, at, column, low, high, earliest, latest, all_see, WINDOW, N)
                top, shift, fade = _shift_band(s, top, scale, N, FOLDS, scores)
                p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
                total = _add_up(total, fade, p, FOLDS)
                p = _left_operand(p, v_tiles.dtype, outputs)
                # This loop between the softmax and the wait keeps the assembler from moving the one behind the other.
                mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step + 1 < last_step)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(before), count=1)
                acc = _fade(acc, fade, outputs)
            acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)])
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
        step = _pass(full, empty, step, after, STAGES)
        inside = row < rows
        pair = (first + row // G).to(gl.int64) * HQ + head * G + row % G
        acc = _finish(acc, top, gl.convert_layout(gl.sum(total, 1), by_row), lse, pair, inside, scale, outputs)
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
            (_produce_band, (keys, values, k_tiles, v_tiles, full, empty, cu_q, key_starts, q_start, tiles, num_docs,
                             HKV, G, BLOCK, STRIDE, WINDOW, N, D, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


@gluon.jit
def _produce_selected(
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
        base = gl.load(cu_k + _find_document(tiles, num_docs, tile))
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
                _copy(keys, values, k_tiles, v_tiles, full, base + position, head, stage, N, D)
                step += 1
            block = next_block
            chosen = next_chosen


@gluon.jit
def _read(numbers, stage):
    return gl.max(numbers.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _next_seen(full, empty, members, step, until, low_bit, bits, STAGES: gl.constexpr):
    """The first tile from `step` on that a token of this warpgroup chose, or `until`; lets go of those before it."""
    chosen = 0
    while (step < until) & (chosen == 0):
        mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
        chosen = ((_read(members, step % STAGES) >> low_bit) & bits).to(gl.int32)
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
    new_top = gl.where(chosen, gl.maximum(top, _row_max(s, FOLDS, LAYOUT)), top)
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
        document = _find_document(tiles, num_docs, tile)
        tile_row = (tile - gl.load(tiles + document)) * ROWS
        row0 = tile_row + WHICH * M
        first = gl.load(cu_q + document)
        rows = (gl.load(cu_q + document + 1) - first) * G
        start = gl.load(q_start + document)
        until = step + gl.load(counts + tile * HKV + head) * PIECES
        _load_queries(q, q_stride, q_head_stride, q_tile, first, row0, rows, head, M, HQ, G, D)
        row = row0 + gl.arange(0, M, by_row)
        inside = row < rows
        t = start + row // G
        bit = row // G - tile_row // G
        low_bit = row0 // G - tile_row // G
        bits = (1 << ((row0 + M - 1) // G - row0 // G + 1)) - 1
        earliest = start + row0 // G
        column = gl.arange(0, N, gl.SliceLayout(0, scores))
        top = gl.full([M], float("-inf"), gl.float32, by_row)
        total = _fold(gl.zeros([M, N], gl.float32, scores), FOLDS)
        acc = gl.zeros([M, D], gl.float32, outputs)
        step = _next_seen(full, empty, members, step, until, low_bit, bits, STAGES)
        while step < until:
            stage = step % STAGES
            s = warpgroup_mma_wait(0, deps=[_start_scores(q_tile, k_tiles, stage, scores, M, N)])
            s, top, shift, fade = _shift_selected(
                s, top, _read(positions, stage), _read(members, stage), bit, inside, column, t, earliest, scale, N, FOLDS, scores
            )
            p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
            total = _add_up(total, fade, p, FOLDS)
            p = _left_operand(p, v_tiles.dtype, outputs)
            acc = _fade(acc, fade, outputs)
            # It looks no farther ahead than the producer can be while the stages in use are held.
            reach = gl.minimum(until, step + STAGES)
            step = _next_seen(full, empty, members, step + 1, reach, low_bit, bits, STAGES)
            while step < reach:
                before = stage
                stage = step % STAGES
                # The next scores and this tile's sum are under way together; the softmax of the former runs beside the latter.
                s = _start_scores(q_tile, k_tiles, stage, scores, M, N)
                acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
                position = _read(positions, stage)
                member = _read(members, stage)
                s = warpgroup_mma_wait(1, deps=[s])
                s, top, shift, fade = _shift_selected(s, top, position, member, bit, inside, column, t, earliest, scale, N, FOLDS, scores)
                p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
                total = _add_up(total, fade, p, FOLDS)
                p = _left_operand(p, v_tiles.dtype, outputs)
                # Looking for the next tile here also keeps the assembler from moving the softmax behind the wait.
                following = _next_seen(full, empty, members, step + 1, reach, low_bit, bits, STAGES)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(before), count=1)
                acc = _fade(acc, fade, outputs)
                if following == reach:
                    reach = gl.minimum(until, step + STAGES)
                    following = _next_seen(full, empty, members, following, reach, low_bit, bits, STAGES)
                else:
                    reach = gl.minimum(until, step + STAGES)
                step = following
            acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)])
            mbarrier.arrive(empty.index(stage), count=1)
            step = _next_seen(full, empty, members, step, until, low_bit, bits, STAGES)
        pair = (first + row // G).to(gl.int64) * HQ + head * G + row % G
        acc = _finish(acc, top, gl.convert_layout(gl.sum(total, 1), by_row), lse, pair, inside, scale, outputs)

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
            (_produce_selected, (keys, values, k_tiles, v_tiles, full, empty, positions, members, union, who, counts, cu_k, tiles, num_docs,
                                 HKV, L, SELECT, N, D, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
