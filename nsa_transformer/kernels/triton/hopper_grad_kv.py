"""dk and dv of a tile of keys for compute capability 9.0, in Gluon: what the selected and the banded kernels share.

Producer warps fetch query rows as boxes of tokens: a token's rows of one key/value head, G of q and G of dO, lie side by side in memory. They take turns at the
tiles: while one waits for a tile's numbers, those of the next tiles are on their way to the others. Two warpgroups attend to the tiles. Scores are
[keys, rows], so that probabilities are the left operands of the sums they go into.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_transformer.kernels.triton.hopper import left_operand, read_number

KEYS = gl.constexpr(64)  # of a warpgroup

# One barrier under two names: Triton 3.7 and 3.6.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def token_descriptor(x: Tensor, group: int) -> TensorDescriptor:
    """Of boxes [group, D] of x [T, Hq, D], contiguous, seen as [T * Hq, D]: one token's rows of one key/value head."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, [x.shape[0] * x.shape[1], x.shape[2]], [x.shape[2], 1], [group, x.shape[2]], layout)


def neighbours_descriptor(x: Tensor, group: int, rows: int) -> TensorDescriptor:
    """Of boxes [rows / group, group, D] of x [T, Hq, D]: neighbouring tokens' rows of one key/value head."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows // group, group, x.shape[2]], layout)


@gluon.jit
def load_stats(lse, delta, gates, token, inside, head, BRANCH: gl.constexpr, HQ: gl.constexpr, G: gl.constexpr, LAYOUT: gl.constexpr):
    """Of a tile's rows what the softmax needs; rows that do not exist get probabilities of 0."""
    ROWS: gl.constexpr = token.shape[0]
    pair = gl.where(inside, token, 0).to(gl.int64) * HQ + head * G + gl.arange(0, ROWS, LAYOUT) % G
    row_lse = gl.load(lse + pair, mask=inside, other=float("inf"))
    row_delta = gl.load(delta + pair, mask=inside, other=0.0)
    return row_lse, row_delta, gl.load(gates + pair * 3 + BRANCH, mask=inside, other=0.0)


@gluon.jit
def fill(
    q_rows, grad_rows, q_tiles, grad_tiles, stats, sees, edges, full, empty, step, token, row_lse, row_delta, gate, high, head,
    NEIGHBOURS: gl.constexpr, HQ: gl.constexpr, G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """One tile of rows into its stage, once that is free: boxes of the tokens, and beside them lse, delta, gate and how many keys each row sees; in
    `edges` the fewest and the most of these. NEIGHBOURS: the tokens are, and come in one box."""
    single: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ROWS: gl.constexpr = q_tiles.shape[1]
    stage = step % STAGES
    row = gl.arange(0, ROWS, LAYOUT)
    fewest = gl.min(high, 0)
    most = gl.max(high, 0)
    mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
    stats.index(3 * stage).store(row_lse)
    stats.index(3 * stage + 1).store(row_delta)
    stats.index(3 * stage + 2).store(gate)
    sees.index(stage).store(high)
    edges.index(2 * stage).store(gl.full([1], fewest, gl.int32, single))
    edges.index(2 * stage + 1).store(gl.full([1], most, gl.int32, single))
    _barrier()  # one thread arrives for all that stored
    mbarrier.expect(full.index(stage), ROWS * 2 * D * (q_tiles.dtype.primitive_bitwidth // 8))
    if NEIGHBOURS:
        box: gl.constexpr = [ROWS // G, G, D]
        first = gl.min(token, 0)
        tma.async_copy_global_to_shared(q_rows, [first, head * G, 0], full.index(stage), q_tiles.index(stage).reshape(box))
        tma.async_copy_global_to_shared(grad_rows, [first, head * G, 0], full.index(stage), grad_tiles.index(stage).reshape(box))
    else:
        for i in gl.static_range(ROWS // G):
            at = gl.sum(gl.where(row == i * G, token, 0), 0) * HQ + head * G
            tma.async_copy_global_to_shared(q_rows, [at, 0], full.index(stage), q_tiles.index(stage).slice(i * G, G))
            tma.async_copy_global_to_shared(grad_rows, [at, 0], full.index(stage), grad_tiles.index(stage).slice(i * G, G))


@gluon.jit
def store_scores(ds, grad_scores, first, count, G: gl.constexpr, SELECT: gl.constexpr):
    """ds [KEYS, ROWS] to grad_scores [tokens, SELECT, G], tokens first … first + count of the tile's. A thread holds rows 2i, 2i + 1, 2i + 8 and 2i + 9 of
    sixteen: they are stored side by side, as `selected_q.member_of` knows."""
    ROWS: gl.constexpr = ds.shape[1]
    ds = gl.permute(gl.reshape(ds, [KEYS, ROWS // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
    ds = gl.reshape(ds, [KEYS, ROWS])
    LAYOUT: gl.constexpr = ds.type.layout
    key = gl.expand_dims(gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT)), 1)
    row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT)), 0)
    to = grad_scores + first.to(gl.int64) * (SELECT * G)
    gl.store(to + (row // G * (SELECT * G) + key * G + row % G), ds, mask=(row // G < count) & (key >= 0))


@gluon.jit
def add_rows(
    k_tile, v_tile, q_tiles, grad_tiles, stats, sees, edges, grad_scores, full, empty, first_step, steps, every, tokens, offset, scale,
    WINDOW: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, STORE: gl.constexpr, G: gl.constexpr, SELECT: gl.constexpr,
):  # fmt: skip
    """dk (less its scale) and dv [KEYS, D] from every `every`-th tile of rows. Row r sees keys below sees[r] - offset, of a WINDOW the last so many.
    With STORE, the scores' gradients of `tokens` tokens go to grad_scores; tiles come from the last one on."""
    ROWS: gl.constexpr = q_tiles.shape[1]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    by_row: gl.constexpr = gl.SliceLayout(0, scores)
    DTYPE: gl.constexpr = k_tile.dtype
    dk = gl.zeros([KEYS, D], gl.float32, outputs)
    dv = gl.zeros([KEYS, D], gl.float32, outputs)
    for step in range(first_step, steps, every):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        q_tile = q_tiles.index(stage)
        grad_tile = grad_tiles.index(stage)
        s = gl.zeros([KEYS, ROWS], gl.float32, scores)
        s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), s, use_acc=False, is_async=True)
        dp = gl.zeros([KEYS, ROWS], gl.float32, scores)
        dp = warpgroup_mma(v_tile, grad_tile.permute((1, 0)), dp, use_acc=False, is_async=True)
        # A number for each row is many registers: they are read where they are used.
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale - gl.expand_dims(stats.index(3 * stage).load(by_row), 0))
        edge = read_number(edges, 2 * stage) - offset < KEYS
        if WINDOW > 0:
            edge = edge | (read_number(edges, 2 * stage + 1) - offset > WINDOW)
        if edge:
            high = sees.index(stage).load(by_row) - offset
            key = gl.expand_dims(gl.arange(0, KEYS, gl.SliceLayout(1, scores)), 1)
            visible = key < gl.expand_dims(high, 0)
            if WINDOW > 0:
                visible = visible & (key >= gl.expand_dims(high - WINDOW, 0))
            p = gl.where(visible, p, 0.0)
        p = p * gl.expand_dims(stats.index(3 * stage + 2).load(by_row), 0)
        dv = warpgroup_mma(left_operand(p, DTYPE, outputs), grad_tile, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = p * (dp - gl.expand_dims(stats.index(3 * stage + 1).load(by_row), 0))
        dk = warpgroup_mma(left_operand(ds, DTYPE, outputs), q_tile, dk, is_async=True)
        if STORE:
            first = (steps - 1 - step) * (ROWS // G)
            store_scores(ds.to(DTYPE), grad_scores, first, tokens - first, G, SELECT)
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def store_sums(sums, out, row, inside, D: gl.constexpr, LAYOUT: gl.constexpr):
    """sums [KEYS, D] to rows `row`, int64 [KEYS], of `out`."""
    width = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, LAYOUT)), 0)
    gl.store(out + (gl.expand_dims(row * D, 1) + width), sums.to(out.dtype.element_ty), mask=gl.expand_dims(inside, 1))
