"""Mixture of experts in Triton: gather, first product and SwiGLU in one kernel, no atomics, nothing that waits for the device.

Routed rows, R = T * K of them, are sorted by expert; row r stands for place order[r] of [T, K], so for token order[r] // K. A tile of rows lies within one
expert, found by bisection in `tiles`, as documents are in the attention. Results of a token's K rows go back to [T, K, H] and are summed there in one order.

Shape letters: M rows of a tile, N columns, DEPTH of the sum at a step; H hidden width, I expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa_transformer.kernels.triton.common import add_dot, find_document, packed, precision

# Grids of products over rows have one axis, column tiles fastest: the second axis of a grid ends at 65,535.


@triton.jit
def _row_tile(tiles, offsets, tile, M: tl.constexpr, E: tl.constexpr):
    """The expert of a tile, its first row, and the end of the expert's rows."""
    expert = find_document(tiles, E, tile)
    return expert, tl.load(offsets + expert) + (tile - tl.load(tiles + expert)) * M, tl.load(offsets + expert + 1)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit(repr=lambda _: "experts_up")
def experts_up(
    x, w13, order, offsets, tiles, hidden, activation,
    K: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """activation [R, I] = silu(gate) * up, gate and up [M, N] from x [T, H] and w13 [E * 2I, H]; with SAVE, hidden [R, 2I] holds both."""
    columns: tl.constexpr = (WIDTH + N - 1) // N
    tile = tl.program_id(0) // columns
    if tile >= tl.load(tiles + E):
        return
    expert, first, end = _row_tile(tiles, offsets, tile, M, E)
    row = first + tl.arange(0, M)
    inside = row < end
    token = tl.load(order + row, mask=inside, other=0) // K
    column = tl.program_id(0) % columns * N
    at = expert * (2 * WIDTH) + column
    depth = tl.arange(0, DEPTH)
    rows = x + token.to(tl.int64)[:, None] * H
    gate = tl.zeros([M, N], tl.float32)
    up = tl.zeros([M, N], tl.float32)
    for k in tl.range(0, H, DEPTH, num_stages=STAGES):
        mask = inside[:, None] & (k + depth < H)[None, :]
        a = tl.load(rows + (k + depth)[None, :], mask=mask, other=0.0)
        gate = add_dot(a, tl.trans(w13.load([at, k])), gate, PRECISION)
        up = add_dot(a, tl.trans(w13.load([at + WIDTH, k])), up, PRECISION)
    to = column + tl.arange(0, N)
    mask = inside[:, None] & (to < WIDTH)[None, :]
    dtype = activation.dtype.element_ty
    gate = gate.to(dtype)
    up = up.to(dtype)
    if SAVE:
        saved = hidden + row.to(tl.int64)[:, None] * (2 * WIDTH) + to[None, :]
        tl.store(saved, gate, mask=mask)
        tl.store(saved + WIDTH, up, mask=mask)
    # From the rounded values, as the backward has them.
    value = silu(gate.to(tl.float32)) * up.to(tl.float32)
    tl.store(activation + row.to(tl.int64)[:, None] * WIDTH + to[None, :], value.to(dtype), mask=mask)


@triton.jit(repr=lambda _: "experts_product")
def experts_product(
    left, right, order, offsets, tiles, out, A: tl.constexpr, B: tl.constexpr, E: tl.constexpr,
    TRANSPOSED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[order[r]] [B] = left[r] [A] times the matrix of the row's expert, [A, B], or [B, A] where TRANSPOSED; both through descriptors."""
    columns: tl.constexpr = (B + N - 1) // N
    tile = tl.program_id(0) // columns
    if tile >= tl.load(tiles + E):
        return
    expert, first, end = _row_tile(tiles, offsets, tile, M, E)
    row = first + tl.arange(0, M)
    inside = row < end
    column = tl.program_id(0) % columns * N
    total = tl.zeros([M, N], tl.float32)
    for k in tl.range(0, A, DEPTH, num_stages=STAGES):
        a = left.load([first, k])
        b = tl.trans(right.load([expert * B + column, k])) if TRANSPOSED else right.load([expert * A + k, column])
        if A % DEPTH != 0 and not TRANSPOSED:  # the next expert's matrix follows, and may hold what makes NaN of 0
            b = tl.where((k + tl.arange(0, DEPTH) < A)[:, None], b, 0.0)
        total = add_dot(a, b, total, PRECISION)
    place = tl.load(order + row, mask=inside, other=0)
    to = column + tl.arange(0, N)
    tl.store(out + place.to(tl.int64)[:, None] * B + to[None, :], total.to(out.dtype.element_ty), mask=inside[:, None] & (to < B)[None, :])


@triton.jit(repr=lambda _: "experts_sum", do_not_specialize=["tokens"])
def experts_sum(rows, weights, out, tokens, K: tl.constexpr, H: tl.constexpr, WEIGHTED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """out [T, H]: rows [T, K, H] summed over K in float32, WEIGHTED by weights [T, K]."""
    token = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    mask = (token < tokens)[:, None] & (column < H)[None, :]
    total = tl.zeros([M, N], tl.float32)
    for k in tl.static_range(K):
        value = tl.load(rows + (token * K + k)[:, None] * H + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * K + k, mask=token < tokens, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(out + token[:, None] * H + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _halves(x):
    """The left and the right half of x's columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _swiglu_backward(back, row, inside, column, hidden, weight, grad_hidden, weighted, WIDTH: tl.constexpr, W: tl.constexpr):
    """Of W columns: stores the pre-activations' gradients and the weighted activation; returns each row's <back, activation>."""
    to = column + tl.arange(0, W)
    mask = inside[:, None] & (to < WIDTH)[None, :]
    saved = row.to(tl.int64)[:, None] * (2 * WIDTH) + to[None, :]
    gate = tl.load(hidden + saved, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(hidden + saved + WIDTH, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp2(gate * -1.4426950408889634))
    dtype = grad_hidden.dtype.element_ty
    value = (gate * sigmoid * up).to(dtype)  # what the second product multiplied
    tl.store(weighted + row.to(tl.int64)[:, None] * WIDTH + to[None, :], (value.to(tl.float32) * weight[:, None]).to(dtype), mask=mask)
    total = tl.sum(tl.where(mask, back * value.to(tl.float32), 0.0), axis=1)
    back *= weight[:, None]
    tl.store(grad_hidden + saved + WIDTH, (back * gate * sigmoid).to(dtype), mask=mask)
    tl.store(grad_hidden + saved, (back * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dtype), mask=mask)
    return total


@triton.jit(repr=lambda _: "experts_down_backward", do_not_specialize=["num_rows"])
def experts_down_backward(
    grad, w2, hidden, weights, order, offsets, tiles, grad_hidden, weighted, partial, num_rows,
    K: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From grad [T, H] and w2 [E * H, I]: grad_hidden [R, 2I]; weighted [R, I], the activation times its routing weight; and partial [I / N, R], what these
    columns give to the weight's gradient, <w2^T dy, a>, so that the second product's output need not be kept."""
    columns: tl.constexpr = (WIDTH + N - 1) // N
    tile = tl.program_id(0) // columns
    if tile >= tl.load(tiles + E):
        return
    expert, first, end = _row_tile(tiles, offsets, tile, M, E)
    row = first + tl.arange(0, M)
    inside = row < end
    place = tl.load(order + row, mask=inside, other=0)
    column = tl.program_id(0) % columns * N
    depth = tl.arange(0, DEPTH)
    rows = grad + (place // K).to(tl.int64)[:, None] * H
    back = tl.zeros([M, N], tl.float32)
    for k in tl.range(0, H, DEPTH, num_stages=STAGES):
        a = tl.load(rows + (k + depth)[None, :], mask=inside[:, None] & (k + depth < H)[None, :], other=0.0)
        b = w2.load([expert * H + k, column])
        if H % DEPTH != 0:
            b = tl.where((k + depth < H)[:, None], b, 0.0)
        back = add_dot(a, b, back, PRECISION)
    weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
    # By quarters: each of the epilogue's six tiles would be as many registers as the sum.
    left, right = _halves(back)
    first_quarter, second_quarter = _halves(left)
    third_quarter, fourth_quarter = _halves(right)
    W: tl.constexpr = N // 4
    total = _swiglu_backward(first_quarter, row, inside, column, hidden, weight, grad_hidden, weighted, WIDTH, W)
    total += _swiglu_backward(second_quarter, row, inside, column + W, hidden, weight, grad_hidden, weighted, WIDTH, W)
    total += _swiglu_backward(third_quarter, row, inside, column + 2 * W, hidden, weight, grad_hidden, weighted, WIDTH, W)
    total += _swiglu_backward(fourth_quarter, row, inside, column + 3 * W, hidden, weight, grad_hidden, weighted, WIDTH, W)
    tl.store(partial + (tl.program_id(0) % columns).to(tl.int64) * num_rows + row, total, mask=inside)


@triton.jit(repr=lambda _: "experts_weight_sums", do_not_specialize=["num_rows"])
def experts_weight_sums(partial, order, grad_weights, num_rows, PARTS: tl.constexpr, CHUNK: tl.constexpr):
    """grad_weights[order[r]] = the sum of partial [PARTS, R] over its parts, in order."""
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = row < num_rows
    total = tl.zeros([CHUNK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + part * num_rows.to(tl.int64) + row, mask=inside, other=0.0)
    tl.store(grad_weights + tl.load(order + row, mask=inside, other=0), total.to(grad_weights.dtype.element_ty), mask=inside)


@triton.jit
def _outer_step(total, r, end, sorted_rows, at, gathered, order, wide, K: tl.constexpr, LENGTH: tl.constexpr, GATHERED_FIRST: tl.constexpr, LAST: tl.constexpr,
                DEPTH: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """total + left^T right over DEPTH rows; where they are the LAST ones, those past `end` are another expert's and left out."""
    row = r + tl.arange(0, DEPTH)
    inside = row < end
    token = tl.load(order + row, mask=inside, other=0) // K
    some = tl.load(gathered + token.to(tl.int64)[:, None] * LENGTH + wide[None, :], mask=inside[:, None] & (wide < LENGTH)[None, :], other=0.0)
    others = sorted_rows.load([r, at])
    if LAST:
        others = tl.where(inside[:, None], others, 0.0)
    left = some if GATHERED_FIRST else others
    right = others if GATHERED_FIRST else some
    return add_dot(tl.trans(left), right, total, PRECISION)


@triton.jit(repr=lambda _: "experts_outer")
def experts_outer(
    sorted_rows, gathered, order, offsets, out, K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GATHERED_FIRST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [E, A, B]: of each expert the sum over its rows of left^T right, 0 for an expert without rows. One side is in the rows' order, through a descriptor;
    the other, GATHERED_FIRST: the left one, is a token's row of `gathered`."""
    expert = tl.program_id(1)
    across = tl.cdiv(B, N)
    at_a = tl.program_id(0) // across * M
    at_b = tl.program_id(0) % across * N
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    WIDE: tl.constexpr = M if GATHERED_FIRST else N
    LENGTH: tl.constexpr = A if GATHERED_FIRST else B
    wide = (at_a if GATHERED_FIRST else at_b) + tl.arange(0, WIDE)
    at = at_b if GATHERED_FIRST else at_a
    total = tl.zeros([M, N], tl.float32)
    whole = begin + (end - begin) // DEPTH * DEPTH
    for r in tl.range(begin, whole, DEPTH, num_stages=STAGES):
        total = _outer_step(total, r, end, sorted_rows, at, gathered, order, wide, K, LENGTH, GATHERED_FIRST, 0, DEPTH, PRECISION)
    if whole < end:
        total = _outer_step(total, whole, end, sorted_rows, at, gathered, order, wide, K, LENGTH, GATHERED_FIRST, 1, DEPTH, PRECISION)
    row = at_a + tl.arange(0, M)
    column = at_b + tl.arange(0, N)
    to = (expert.to(tl.int64) * A + row)[:, None] * B + column[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=(row < A)[:, None] & (column < B)[None, :])


@dataclass(frozen=True)
class Tile:
    """rows and columns of a product's tile, the depth of one step of its sum, warps, stages of the pipeline"""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Routing:
    """order int32 [R]: places of [T, K], by expert, tokens ascending. offsets, tiles int32 [E + 1]: each expert's first row, and first tile of rows."""

    order: Tensor
    offsets: Tensor
    tiles: Tensor
    tile_rows: int

    def max_tiles(self, rows: int, experts: int) -> int:
        """As many tiles as `rows` rows of `experts` experts can fill."""
        return rows // self.tile_rows + min(experts, rows)

    def part(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """offsets and tiles of some neighbouring experts."""
        tiles = self.tiles[first : first + count + 1]
        return self.offsets[first : first + count + 1], tiles - tiles[0] if first else tiles


def make_routing(indices: Tensor, num_experts: int, rows: int) -> Routing:
    flat = indices.flatten()
    expert, order = flat.sort(stable=True)
    offsets = torch.searchsorted(expert, torch.arange(num_experts + 1, dtype=expert.dtype, device=flat.device), out_int32=True)
    counts = (offsets.diff() + (rows - 1)) // rows
    tiles = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
    return Routing(order.to(torch.int32), offsets, tiles, rows)


def _tiles(dtype: torch.dtype, rows_per_expert: int) -> tuple[Tile, Tile]:
    """Of the products over rows, and of the sums over rows. Few rows an expert fill no tall tile."""
    if dtype == torch.float32:  # on the ordinary cores
        return Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1)
    if rows_per_expert >= 256:
        return Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3)
    return Tile(16 if rows_per_expert < 32 else 64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    flat = x.view(-1, x.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), [flat.shape[1], 1], [rows, columns])


def launch_options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "STAGES": tile.stages}


def sum_rows(rows: Tensor, weights: Tensor | None, like: Tensor, top_k: int) -> Tensor:
    tokens, width = like.shape
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    columns = min(512, max(16, triton.next_power_of_2(width)))
    given = rows if weights is None else weights
    experts_sum[(triton.cdiv(tokens, 4), triton.cdiv(width, columns))](rows, given, out, tokens, top_k, width, weights is not None, 4, columns)
    return out


def forward(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """y [T, H], and with `save` the pre-activations [R, 2I] in the rows' order, else empty."""
    return forward_in_parts(x, indices, weights, w13.shape[0], w2.shape[2], [(0, w13, w2)], save)


def forward_in_parts(
    x: Tensor, indices: Tensor, weights: Tensor, num: int, width: int, parts: Iterable[tuple[int, Tensor, Tensor]], save: bool = False
) -> tuple[Tensor, Tensor]:
    """As `forward`, with the `num` experts a few at a time: (first, w13 [C, 2I, H], w2 [C, H, I]), neighbours that together are all. The same bits however
    they are cut. The next part is asked for once the kernels that read the last one are launched."""
    x, weights = packed(x), packed(weights)
    hidden_size, top_k, rows = x.shape[1], indices.shape[1], indices.numel()
    hidden = x.new_empty(rows if save else 0, 2 * width)
    if rows == 0:
        return torch.zeros_like(x), hidden
    tile, _ = _tiles(x.dtype, rows // num)
    routing = make_routing(indices, num, tile.rows)
    activation, y = x.new_empty(rows, width), x.new_empty(rows, hidden_size)
    for first, w13, w2 in parts:
        w13, w2 = packed(w13), packed(w2)
        routed = (routing.order, *routing.part(first, w13.shape[0]))
        tiles = routing.max_tiles(rows, w13.shape[0])
        shared = {"E": w13.shape[0], "M": tile.rows, "N": tile.columns, "DEPTH": tile.depth, "PRECISION": precision(x.dtype), **launch_options(tile)}
        experts_up[(triton.cdiv(width, tile.columns) * tiles,)](
            x, _descriptor(w13, tile.columns, tile.depth), *routed, hidden, activation, K=top_k, H=hidden_size, WIDTH=width, SAVE=save, **shared
        )
        experts_product[(triton.cdiv(hidden_size, tile.columns) * tiles,)](
            _descriptor(activation, tile.rows, tile.depth), _descriptor(w2, tile.columns, tile.depth), *routed, y,
            A=width, B=hidden_size, TRANSPOSED=True, **shared,
        )  # fmt: skip
    return sum_rows(y, weights, x, top_k), hidden


def backward(grad: Tensor, x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, w13 and w2."""
    grad, x, w13, w2 = (packed(t) for t in (grad, x, w13, w2))
    hidden_size, (num, width) = x.shape[1], (w13.shape[0], w2.shape[2])
    top_k, rows = indices.shape[1], indices.numel()
    grad_weights = torch.empty(weights.shape, dtype=weights.dtype, device=x.device)
    if rows == 0:
        return torch.zeros_like(x), grad_weights, torch.zeros_like(w13), torch.zeros_like(w2)
    tile, outer = _tiles(x.dtype, rows // num)
    routing = make_routing(indices, num, tile.rows)
    routed = (routing.order, routing.offsets, routing.tiles)
    shared = {"E": num, "M": tile.rows, "N": tile.columns, "DEPTH": tile.depth, "PRECISION": precision(x.dtype), **launch_options(tile)}
    parts = triton.cdiv(width, tile.columns)
    grad_hidden, weighted = x.new_empty(rows, 2 * width), x.new_empty(rows, width)
    partial = torch.empty(parts, rows, dtype=torch.float32, device=x.device)
    experts_down_backward[(parts * routing.max_tiles(rows, num),)](
        grad, _descriptor(w2, tile.depth, tile.columns), hidden, weights.contiguous(), *routed, grad_hidden, weighted, partial, rows,
        K=top_k, H=hidden_size, WIDTH=width, **shared,
    )  # fmt: skip
    experts_weight_sums[(triton.cdiv(rows, 256),)](partial, routing.order, grad_weights, rows, parts, 256)
    grad_rows = x.new_empty(rows, hidden_size)
    experts_product[(triton.cdiv(hidden_size, tile.columns) * routing.max_tiles(rows, num),)](
        _descriptor(grad_hidden, tile.rows, tile.depth), _descriptor(w13, tile.depth, tile.columns), *routed, grad_rows,
        A=2 * width, B=hidden_size, TRANSPOSED=False, **shared,
    )  # fmt: skip
    grad_x = sum_rows(grad_rows, None, x, top_k)
    grads = []
    for sorted_rows, gathered, like, first in ((grad_hidden, x, w13, False), (weighted, grad, w2, True)):
        grads.append(torch.empty_like(like))
        a, b = like.shape[1:]
        experts_outer[(triton.cdiv(a, outer.rows) * triton.cdiv(b, outer.columns), num)](
            _descriptor(sorted_rows, outer.depth, outer.columns if first else outer.rows), gathered, routing.order, routing.offsets, grads[-1],
            K=top_k, A=a, B=b, GATHERED_FIRST=first, M=outer.rows, N=outer.columns, DEPTH=outer.depth, PRECISION=precision(x.dtype), **launch_options(outer),
        )  # fmt: skip
    return grad_x, grad_weights, grads[0], grads[1]
