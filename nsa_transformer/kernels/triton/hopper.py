"""Kernels for compute capability 9.0, in Gluon. Forward: one producer warp copies tiles of keys and values ahead, three warpgroups attend.

The warpgroups hold 64 query rows each and read the same tiles, so that a third as much comes out of the L2 cache. A warpgroup passes over tiles
that none of its own queries see, so the taller tile costs no products. Programs are persistent: the producer is already at the next tile of
queries while the warpgroups finish theirs. Keys and values share one head width, 64 or 128; other shapes take the kernels in Triton proper.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_transformer.kernels.triton import common

WARPGROUPS = gl.constexpr(3)
ROWS = gl.constexpr(192)  # query rows of a tile: 64 for each warpgroup, the height of its products


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Of tiles [rows, D] of x [S, H, D], seen as [S, H * D], in the layout that products read from shared memory."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1], [rows, x.shape[2]], layout)


# The same functions, compiled by Gluon: nothing in them names a layout.
find_document = gluon.jit(common.find_document.fn)
keys_before = gluon.jit(common.keys_before.fn)


@gluon.jit
def copy(keys, values, k_tiles, v_tiles, full, row, head, stage, N: gl.constexpr, D: gl.constexpr):
    """Starts the copies of N keys and values from `row` on into a free stage."""
    mbarrier.expect(full.index(stage), N * 2 * D * (keys.dtype.primitive_bitwidth // 8))
    tma.async_copy_global_to_shared(keys, [row, head * D], full.index(stage), k_tiles.index(stage))
    tma.async_copy_global_to_shared(values, [row, head * D], full.index(stage), v_tiles.index(stage))


@gluon.jit
def load_queries(q, q_stride, q_head_stride, q_tile, first, row0, rows, head, M: gl.constexpr, G: gl.constexpr, D: gl.constexpr):
    """Query rows row0 … row0 + M of a document into shared memory; 0 past its end."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    row = row0 + gl.arange(0, M, gl.SliceLayout(1, wide))
    column = gl.arange(0, D, gl.SliceLayout(0, wide))
    offsets = (first + row // G).to(gl.int64) * q_stride + (head * G + row % G) * q_head_stride
    x = gl.load(q + (gl.expand_dims(offsets, 1) + gl.expand_dims(column, 0)), mask=gl.expand_dims(row < rows, 1), other=0.0)
    q_tile.store(x)
    fence_async_shared()


@gluon.jit
def read_number(numbers, stage):
    """One number of a warpgroup's shared memory."""
    return gl.max(numbers.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def start_scores(q_tile, k_tiles, stage, LAYOUT: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    s = gl.zeros([M, N], gl.float32, LAYOUT)
    return warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def halves(x):
    """The first and the last half of x's columns. In the products' layout they lie in the same threads: no data moves."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def row_max(s, FOLDS: gl.constexpr, LAYOUT: gl.constexpr):
    """Row maxima of s [M, N], by halves down to 8 columns first: as one chain per row, one would wait for the other."""
    for _ in gl.static_range(FOLDS):
        a, b = halves(s)
        s = gl.maximum(a, b)
    return gl.convert_layout(gl.max(s, 1), gl.SliceLayout(1, LAYOUT))


@gluon.jit
def fold(p, FOLDS: gl.constexpr):
    """Sums over p's columns, [M, 8]: so much of a row's sum needs no other thread. The rest is added up once at the end."""
    for _ in gl.static_range(FOLDS):
        a, b = halves(p)
        p = a + b
    return p


@gluon.jit
def add_up(total, fade, p, FOLDS: gl.constexpr):
    return total * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, total.type.layout)), 1) + fold(p, FOLDS)


@gluon.jit
def left_operand(p, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def scale_rows(acc, fade, LAYOUT: gl.constexpr):
    return acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, LAYOUT)), 1)


@gluon.jit
def finish(acc, top, total, lse, pair, inside, scale, LAYOUT: gl.constexpr):
    """Stores lse and returns acc / total; a row that saw no key gets 0 and +inf."""
    seen = total > 0
    safe = gl.where(seen, total, 1.0)
    gl.store(lse + pair, gl.where(seen, top * scale + gl.log2(safe), float("inf")), mask=inside)
    return acc * gl.expand_dims(gl.convert_layout(gl.where(seen, 1.0 / safe, 0.0), gl.SliceLayout(1, LAYOUT)), 1)
