"""Mixture of experts in Triton: gather, first product and SwiGLU in one kernel, no atomics, nothing that waits for the device.

Routed rows, R = T * K of them, are sorted by expert; row r stands for place order[r] of [T, K], so for token order[r] // K. A tile of rows lies within one
expert, which each program finds in `offsets`. Results of a token's K rows go back to [T, K, H] and are summed there in one order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa_transformer.kernels.triton.common import packed, precision
from nsa_transformer.kernels.triton.expert_kernels import experts_down_backward, experts_outer, experts_product, experts_sum, experts_up


@dataclass(frozen=True)
class Tile:
    """columns of a product's tile, the depth of one step of its sum, warps, stages of the pipeline; rows where the routing does not say them"""

    columns: int
    depth: int
    warps: int
    stages: int
    rows: int = 0
    registers: int | None = None  # at most, a thread

    @property
    def launch(self) -> dict[str, int | None]:
        return {"N": self.columns, "DEPTH": self.depth, "STAGES": self.stages, "num_warps": self.warps, "maxnreg": self.registers}


@dataclass(frozen=True)
class Tiles:
    """rows of a tile in all products over rows; the tile of each kernel"""

    rows: int
    up: Tile
    down: Tile
    down_backward: Tile
    up_backward: Tile
    outer: Tile


@dataclass(frozen=True)
class Routing:
    """order int64 [R]: places of [T, K], by expert, tokens ascending. offsets int32 [E + 1]: each expert's first row."""

    order: Tensor
    offsets: Tensor

    @property
    def num(self) -> int:
        return self.offsets.numel() - 1

    def part(self, first: int, count: int) -> Routing:
        """Of some neighbouring experts."""
        return Routing(self.order, self.offsets[first : first + count + 1])


def make_routing(indices: Tensor, num_experts: int) -> Routing:
    narrow = torch.int16 if num_experts < 1 << 15 else torch.int32  # a radix sort takes as many passes as the keys have bytes
    expert, order = indices.flatten().to(narrow).sort(stable=True)
    return Routing(order, torch.searchsorted(expert, torch.arange(num_experts + 1, dtype=narrow, device=expert.device), out_int32=True))


def choose_tiles(dtype: torch.dtype, rows_per_expert: int) -> Tiles:
    """As measured on an H100 (benchmarks/log.md). Two programs of 128 × 128 a multiprocessor hide each other's beginning and end, and tiles of 256 columns
    ask less of the second-level cache, which is the limit; few rows an expert fill no tall tile."""
    if dtype == torch.float32:  # on the ordinary cores
        small = Tile(32, 32, 4, 1, rows=32)
        return Tiles(32, small, small, small, small, small)
    square = Tile(128, 64, 4, 3, rows=128)
    if rows_per_expert < 128:
        return Tiles(16 if rows_per_expert < 32 else 64, square, square, square, square, square)
    narrow = rows_per_expert < 512
    return Tiles(
        rows=128,
        up=Tile(64 if narrow else 128, 64, 8, 3),
        down=square,
        down_backward=Tile(128, 64, 8, 3, registers=128),
        up_backward=Tile(128 if narrow else 256, 64, 8, 3),
        outer=square,
    )


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    flat = x.view(-1, x.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), [flat.shape[1], 1], [rows, columns])


def _by_rows(routing: Routing, rows: int, tile: Tile, width: int) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and settings of a product over rows, in tiles of so many, whose result has `width` columns. The grid is for as many tiles as there may be."""
    total = routing.order.numel()
    grid = (triton.cdiv(width, tile.columns) * (total // rows + min(routing.num, total)),)
    return grid, {"order": routing.order, "offsets": routing.offsets, "E": routing.num, "SPAN": triton.next_power_of_2(routing.num), "M": rows, **tile.launch}


def up(x: Tensor, w13: Tensor, routing: Routing, top_k: int, hidden: Tensor, activation: Tensor, rows: int, tile: Tile) -> None:
    """Writes activation [R, I], and hidden [R, 2I] where it has any row."""
    width = activation.shape[1]
    grid, settings = _by_rows(routing, rows, tile, width)
    experts_up[grid](
        x, _descriptor(w13, tile.columns, tile.depth), hidden=hidden, activation=activation,
        K=top_k, H=x.shape[1], WIDTH=width, SAVE=hidden.shape[0] > 0, PRECISION=precision(x.dtype), **settings,
    )  # fmt: skip


def product(left: Tensor, right: Tensor, transposed: bool, routing: Routing, out: Tensor, rows: int, tile: Tile) -> None:
    """Writes out [R, B], rows in the order of [T, K]: left [R, A] times each row's matrix of right [E, A, B], or [E, B, A] where transposed."""
    a, b = left.shape[1], out.shape[1]
    grid, settings = _by_rows(routing, rows, tile, b)
    box = (tile.columns, tile.depth) if transposed else (tile.depth, tile.columns)
    experts_product[grid](
        _descriptor(left, rows, tile.depth), _descriptor(right, *box), out=out,
        A=a, B=b, TRANSPOSED=transposed, PRECISION=precision(left.dtype), **settings,
    )  # fmt: skip


def down_backward(grad: Tensor, w2: Tensor, hidden: Tensor, weights: Tensor, routing: Routing, rows: int, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """grad_hidden [R, 2I], weighted activation [R, I], and the routing weights' gradients as parts [I / N, T, K] to be summed."""
    width = w2.shape[2]
    grad_hidden, weighted = torch.empty_like(hidden), grad.new_empty(hidden.shape[0], width)
    partial = torch.empty(triton.cdiv(width, tile.columns), *weights.shape, dtype=torch.float32, device=grad.device)
    grid, settings = _by_rows(routing, rows, tile, width)
    experts_down_backward[grid](
        grad, _descriptor(w2, tile.depth, tile.columns), hidden, weights, grad_hidden=grad_hidden, weighted=weighted, partial=partial,
        num_rows=weights.numel(), K=weights.shape[1], H=grad.shape[1], WIDTH=width, PRECISION=precision(grad.dtype), **settings,
    )  # fmt: skip
    return grad_hidden, weighted, partial


def outer(sorted_rows: Tensor, gathered: Tensor, gathered_first: bool, routing: Routing, top_k: int, tile: Tile) -> Tensor:
    """[E, A, B], of each expert the sum over its rows of left^T right."""
    a, b = (gathered.shape[1], sorted_rows.shape[1]) if gathered_first else (sorted_rows.shape[1], gathered.shape[1])
    out = gathered.new_empty(routing.num, a, b)
    experts_outer[(triton.cdiv(a, tile.rows) * triton.cdiv(b, tile.columns), routing.num)](
        sorted_rows, gathered, routing.order, routing.offsets, out,
        K=top_k, A=a, B=b, GATHERED_FIRST=gathered_first, M=tile.rows, PRECISION=precision(gathered.dtype), **tile.launch,
    )  # fmt: skip
    return out


def sum_rows(rows: Tensor, weights: Tensor, weighted: bool, partial: Tensor | None = None, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """rows [T * K, H] summed over K, times weights [T, K] where `weighted`: [T, H]. And partial [parts, T, K] summed, like weights; without it, weights.
    `pdl`: launched while the kernel just ahead still runs, which writes rows and nothing else that is read here."""
    (tokens, top_k), width = weights.shape, rows.shape[1]
    out, sums = rows.new_empty(tokens, width), weights if partial is None else torch.empty_like(weights)
    columns = min(512, max(16, triton.next_power_of_2(width)))
    experts_sum[(triton.cdiv(tokens, 4), triton.cdiv(width, columns))](
        rows, weights, out, sums if partial is None else partial, sums, tokens,
        K=top_k, H=width, WEIGHTED=weighted, PARTS=0 if partial is None else partial.shape[0], M=4, N=columns, PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    return out, sums


def forward(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, save: bool) -> tuple[Tensor, Tensor, Routing]:
    """y [T, H]; with `save` the pre-activations [R, 2I] in the rows' order, else empty; the routing."""
    return forward_in_parts(x, indices, weights, w13.shape[0], w2.shape[2], [(0, w13, w2)], save)


def forward_in_parts(
    x: Tensor, indices: Tensor, weights: Tensor, num: int, width: int, parts: Iterable[tuple[int, Tensor, Tensor]], save: bool = False
) -> tuple[Tensor, Tensor, Routing]:
    """As `forward`, with the `num` experts a few at a time: (first, w13 [C, 2I, H], w2 [C, H, I]), neighbours that together are all. The same bits however
    they are cut. The next part is asked for once the kernels that read the last one are launched."""
    x, weights = packed(x), weights.contiguous()  # which no descriptor reads
    top_k, total = indices.shape[1], indices.numel()
    routing = make_routing(indices, num)
    hidden = x.new_empty(total if save else 0, 2 * width)
    if total == 0:
        return torch.zeros_like(x), hidden, routing
    tiles = choose_tiles(x.dtype, total // num)
    activation, y = x.new_empty(total, width), x.new_empty(total, x.shape[1])
    for first, w13, w2 in parts:
        w13, w2, part = packed(w13), packed(w2), routing.part(first, w13.shape[0])
        up(x, w13, part, top_k, hidden, activation, tiles.rows, tiles.up)
        product(activation, w2, True, part, y, tiles.rows, tiles.down)
    return sum_rows(y, weights, True)[0], hidden, routing


def backward(
    grad: Tensor, x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, hidden: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, w13 and w2."""
    weights, (grad, x, w13, w2) = weights.contiguous(), (packed(t) for t in (grad, x, w13, w2))
    top_k, total = weights.shape[1], order.numel()
    if total == 0:
        return torch.zeros_like(x), torch.zeros_like(weights), torch.zeros_like(w13), torch.zeros_like(w2)
    tiles, routing = choose_tiles(x.dtype, total // w13.shape[0]), Routing(order, offsets)
    grad_hidden, weighted, partial = down_backward(grad, w2, hidden, weights, routing, tiles.rows, tiles.down_backward)
    grad_rows = x.new_empty(total, x.shape[1])
    product(grad_hidden, w13, False, routing, grad_rows, tiles.rows, tiles.up_backward)
    grad_x, grad_weights = sum_rows(grad_rows, weights, False, partial)
    grad_w13 = outer(grad_hidden, x, False, routing, top_k, tiles.outer)
    grad_w2 = outer(weighted, grad, True, routing, top_k, tiles.outer)
    return grad_x, grad_weights, grad_w13, grad_w2
