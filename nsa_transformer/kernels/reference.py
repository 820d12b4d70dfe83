"""Native Sparse Attention in plain PyTorch: the meaning that every other backend is judged by.

It reads like section 3 of arXiv 2502.11089. Softmax, sums and products are float32, or float64 for float64 inputs.
Work goes document by document and, inside a document, by chunks of queries, in the forward and in the backward alike: memory
is linear in the number of tokens, and a document gets the same bits alone and inside a pack. The backward recomputes each
chunk from the inputs and the selected blocks. Document boundaries are read on the host, so CUDA tensors wait here once a call.

Shape letters: T queries of a chunk, S keys, N compressed keys, B selection blocks, H key/value heads, G query heads per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig

# By kind of device: queries at once, fewer where a tensor (scores [H, T, G, S], gathered keys [H, T, S, D]) would pass so many
# elements. Short chunks waste less work on hidden keys, long ones fewer launches.
CHUNK = {"cpu": 128, "cuda": 1024}
SCORE_BUDGET = {"cpu": 1 << 24, "cuda": 1 << 28}
GATHER_RATIO = 4  # selected keys are gathered once the prefix is this many times longer than they are, and masked before that

_Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # q, the six keys and values, gates


def attention_forward(
    q: Tensor,
    keys_values: tuple[Tensor, ...],
    gates: Tensor,
    config: NSAConfig,
    cu_q: list[int],
    cu_k: list[int],
    q_start: list[int],
    blocks: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output [T, Hq, Dv] in q's dtype and the blocks each query attended, int32 [T, Hkv, n], -1 padded.

    `keys_values` is (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win); the rest as in `nsa_attention`, boundaries as host integers.
    """
    out = q.new_empty(q.shape[0], q.shape[1], keys_values[1].shape[-1])
    width = config.num_selected if blocks is None else blocks.shape[-1]
    used = torch.full((q.shape[0], keys_values[2].shape[1], width), -1, dtype=torch.int32, device=q.device)
    for piece in _pieces(config, cu_q, cu_k, q_start, q, _gathered(config, keys_values)):
        inputs = piece.take(q, keys_values, gates)
        given = None if blocks is None else blocks[piece.queries]
        out[piece.queries], used[piece.queries] = _attend_chunk(*inputs, piece.position, config, scale, given)
    return out, used


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    keys_values: tuple[Tensor, ...],
    gates: Tensor,
    config: NSAConfig,
    cu_q: list[int],
    cu_k: list[int],
    q_start: list[int],
    blocks: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, the six key and value tensors and the gates, in that order; `blocks` as the forward returned them."""
    inputs = (q, *keys_values, gates)
    grads = [torch.zeros_like(x, dtype=_accumulator(x)) for x in inputs]
    for piece in _pieces(config, cu_q, cu_k, q_start, q, _gathered(config, keys_values)):
        chunk = piece.take(q, keys_values, gates)
        grad = grad_out[piece.queries].to(_accumulator(q), copy=True, memory_format=torch.contiguous_format)
        found = _attend_chunk_backward(grad, *chunk, piece.position, config, scale, blocks[piece.queries])
        for target, rows, part in zip(grads, piece.rows, found, strict=True):
            target[rows] += part
    return [grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)]


@dataclass(frozen=True)
class _Piece:
    """A chunk of one document's queries and the rows of the keys it can see."""

    queries: slice
    compressed: slice
    prefix: slice
    window: slice
    position: int  # of the first query in its document

    @property
    def rows(self) -> tuple[slice, ...]:
        return (self.queries, self.compressed, self.compressed, self.prefix, self.prefix, self.window, self.window, self.queries)

    def take(self, q: Tensor, keys_values: tuple[Tensor, ...], gates: Tensor) -> _Inputs:
        taken = tuple(
            x[rows].to(_accumulator(x), copy=True, memory_format=torch.contiguous_format) for x, rows in zip((q, *keys_values, gates), self.rows, strict=True)
        )
        return cast(_Inputs, taken)


def _pieces(config: NSAConfig, cu_q: list[int], cu_k: list[int], q_start: list[int], q: Tensor, gathered: int) -> Iterator[_Piece]:
    block, stride, window = config.compress_block, config.compress_stride, config.window
    compressed = 0
    for document, position in enumerate(q_start):
        query, query_end = cu_q[document], cu_q[document + 1]
        key, key_end = cu_k[document], cu_k[document + 1]
        longest = max((key_end - key) // stride, min(key_end - key, GATHER_RATIO * config.num_selected * config.select_block), window)
        elements = q.shape[1] * max(longest, 1)  # of the largest tensor, per query
        if key_end - key > GATHER_RATIO * config.num_selected * config.select_block:
            elements = max(elements, gathered)
        kind = "cuda" if q.is_cuda else "cpu"
        size = max(16, min(CHUNK[kind], SCORE_BUDGET[kind] // elements))
        for start in range(query, query_end, size):
            end = min(start + size, query_end)
            first, last = position + start - query, position + end - query - 1
            yield _Piece(
                queries=slice(start, end),
                compressed=slice(compressed, compressed + max(0, (last + 1 - block) // stride + 1)),
                prefix=slice(key, key + last + 1),
                window=slice(key + max(0, first - window + 1), key + last + 1),
                position=first,
            )
        compressed += max(0, (key_end - key - block) // stride + 1)


def _gathered(config: NSAConfig, keys_values: tuple[Tensor, ...]) -> int:
    """Elements of the selected keys, or values, that are gathered for one query."""
    heads, widest = keys_values[2].shape[1], max(x.shape[2] for x in keys_values[2:4])
    return config.num_selected * config.select_block * heads * widest


def _attend_chunk(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    position: int,
    config: NSAConfig,
    scale: float,
    blocks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Equations 5 and 7–12 for the queries at `position`, `position + 1`, … of one document; out [T, Hq, Dv], blocks [T, H, n]."""
    t = torch.arange(position, position + q.shape[0], device=q.device)
    q, gates = (_by_head(x, k_slc.shape[1]) for x in (q, gates))
    q = q * scale

    o_cmp, p_cmp = _attend(q, _compressed(k_cmp, v_cmp, t, config))
    if blocks is None:
        importance = _importance(p_cmp.sum(2), int(t[-1]) // config.select_block + 1, config)
        blocks = _select(importance, t, config).transpose(0, 1)
    o_slc, _ = _attend(q, _selected(k_slc, v_slc, t, config, blocks))
    o_win, _ = _attend(q, _window(k_win, v_win, t, config))

    out = gates[..., 0:1] * o_cmp + gates[..., 1:2] * o_slc + gates[..., 2:3] * o_win
    return out.transpose(0, 1).flatten(1, 2), blocks


def _attend_chunk_backward(
    grad: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    position: int,
    config: NSAConfig,
    scale: float,
    blocks: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the eight tensors of `_attend_chunk`; selection has none."""
    t = torch.arange(position, position + q.shape[0], device=q.device)
    num_kv_heads = k_slc.shape[1]
    q, gates, grad = (_by_head(x, num_kv_heads) for x in (q, gates, grad))
    q = q * scale
    branches = (_compressed(k_cmp, v_cmp, t, config), _selected(k_slc, v_slc, t, config, blocks), _window(k_win, v_win, t, config))
    grad_q, grad_gates, grad_keys_values = torch.zeros_like(q), [], []
    for number, branch in enumerate(branches):
        out, p = _attend(q, branch)
        grad_gates.append((grad * out).sum(-1))
        grad_branch_q, grad_k, grad_v = _attend_backward(gates[..., number : number + 1] * grad, q, branch, p)
        grad_q += grad_branch_q
        grad_keys_values += [grad_k.transpose(0, 1), grad_v.transpose(0, 1)]

    def by_token(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1, 2)

    return by_token(grad_q * scale), *grad_keys_values, by_token(torch.stack(grad_gates, dim=-1))


# ------------------------------------------------------------------------------------------------------- the three branches


@dataclass(frozen=True)
class _Branch:
    """What one branch lets a chunk attend: k, v [H, S, D] shared by its queries, or [H, T, S, D] gathered for each of them
    from `rows` [H, T, S] of `num_rows`; visible [H or 1, T, S]; seeing [H or 1, T], queries that see any key, None: all do."""

    k: Tensor
    v: Tensor
    visible: Tensor
    seeing: Tensor | None = None
    rows: Tensor | None = None
    num_rows: int = 0


def _compressed(k: Tensor, v: Tensor, t: Tensor, config: NSAConfig) -> _Branch:
    """A compressed key is visible once all of its tokens are."""
    ends = torch.arange(k.shape[0], device=t.device) * config.compress_stride + config.compress_block
    return _Branch(k.transpose(0, 1), v.transpose(0, 1), (ends <= t[:, None] + 1)[None], (t + 1 >= config.compress_block)[None])


def _window(k: Tensor, v: Tensor, t: Tensor, config: NSAConfig) -> _Branch:
    """The last `window` keys; k and v end with the last query's own."""
    key = torch.arange(k.shape[0], device=t.device) + (t[-1] + 1 - k.shape[0])
    return _Branch(k.transpose(0, 1), v.transpose(0, 1), ((key <= t[:, None]) & (key > t[:, None] - config.window))[None])


def _selected(k: Tensor, v: Tensor, t: Tensor, config: NSAConfig, blocks: Tensor) -> _Branch:
    """The keys, up to each query's own position, of the blocks [T, H, n] that it selected."""
    size, num_keys = config.select_block, k.shape[0]
    blocks = blocks.transpose(0, 1).long()
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    seeing = ((blocks >= 0) & (blocks * size <= t[:, None])).any(-1)
    if num_keys > GATHER_RATIO * blocks.shape[-1] * size:
        key = blocks[..., None] * size + torch.arange(size, device=t.device)
        visible = ((blocks[..., None] >= 0) & (key <= t[:, None, None])).flatten(2)
        rows = key.flatten(2).clamp(0, num_keys - 1)
        head = torch.arange(k.shape[0], device=t.device)[:, None, None]
        return _Branch(k[head, rows], v[head, rows], visible, seeing, rows, num_keys)
    num_blocks = -(-num_keys // size)
    # Padding and blocks that lie wholly in the future share one column past the end.
    column = torch.where((blocks < 0) | (blocks >= num_blocks), num_blocks, blocks)
    member = torch.zeros(*blocks.shape[:2], num_blocks + 1, dtype=torch.bool, device=t.device).scatter_(-1, column, True)
    of_keys = member[..., :num_blocks, None].expand(-1, -1, -1, size).flatten(2)[..., :num_keys]
    return _Branch(k, v, of_keys & (torch.arange(num_keys, device=t.device) <= t[:, None]), seeing)


def _attend(q: Tensor, branch: _Branch) -> tuple[Tensor, Tensor]:
    """Softmax attention of scaled q [H, T, G, D]: out [H, T, G, Dv], and p [H, T, G, S]. Exactly 0 for a query that sees no key."""
    visible, seeing = branch.visible, branch.seeing
    if seeing is not None and bool(seeing.all()):
        seeing = None
    if seeing is not None:  # a row that sees nothing goes through the softmax unmasked, which keeps it finite, and is set to 0 after it
        visible = visible | ~seeing.unsqueeze(-1)
    bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
    p = torch.softmax(_rows_times(q, branch.k.mT).add_(bias.unsqueeze(2)), dim=-1)
    if seeing is not None:
        p *= seeing[..., None, None]
    return _rows_times(p, branch.v), p


def _attend_backward(grad: Tensor, q: Tensor, branch: _Branch, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled q [H, T, G, D], and of k and v [H, rows, D] before any gathering."""
    grad_scores = torch.ops.aten._softmax_backward_data(_rows_times(grad, branch.v.mT), p, -1, p.dtype)
    grad_q = _rows_times(grad_scores, branch.k)
    if branch.rows is None:
        return grad_q, grad_scores.flatten(1, 2).mT @ q.flatten(1, 2), p.flatten(1, 2).mT @ grad.flatten(1, 2)
    heads = len(branch.rows)
    flat = (branch.rows + torch.arange(heads, device=q.device)[:, None, None] * branch.num_rows).flatten()

    def scatter(each: Tensor) -> Tensor:
        total = each.new_zeros(heads * branch.num_rows, each.shape[-1])
        return total.index_add_(0, flat, each.flatten(0, 2)).unflatten(0, (heads, branch.num_rows))

    return grad_q, scatter(grad_scores.mT @ q), scatter(p.mT @ grad)


def _rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    """x [H, T, G, A] times [H, A, B], shared by all queries, or [H, T, A, B]."""
    return x @ matrix if matrix.dim() == 4 else (x.flatten(1, 2) @ matrix).unflatten(1, x.shape[1:3])


def _by_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """[T, Hq, D] as [H, T, G, D]."""
    return x.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)


def _importance(p_cmp: Tensor, num_blocks: int, config: NSAConfig) -> Tensor:
    """Equations 9 and 10: how much probability p_cmp [H, T, N] falls on each selection block, [H, T, B].

    A compressed key spreads its probability over the `compress_block / compress_stride` runs of stride tokens that it covers;
    a block collects the runs that it is made of.
    """
    runs_per_key, runs_per_block = config.compress_block // config.compress_stride, config.select_block // config.compress_stride
    runs = p_cmp.new_zeros(*p_cmp.shape[:2], num_blocks * runs_per_block)
    for shift in range(runs_per_key):
        runs[..., shift : shift + p_cmp.shape[-1]] += p_cmp
    return runs.unflatten(-1, (num_blocks, runs_per_block)).sum(-1)


def _select(importance: Tensor, t: Tensor, config: NSAConfig) -> Tensor:
    """The blocks of each query, [H, T, n] ascending and -1 padded: forced ones, then the most important, ties to the lower index."""
    num_blocks = importance.shape[-1]
    block, own = torch.arange(num_blocks, device=t.device), t[:, None] // config.select_block
    forced = (block < config.num_initial) | (block > own - config.num_local)
    rank = importance.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    value, index = rank.sort(dim=-1, descending=True, stable=True)
    value, index = value[..., : config.num_selected], index[..., : config.num_selected]
    chosen = index.masked_fill(value == -torch.inf, num_blocks).sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == num_blocks, -1)
    return torch.nn.functional.pad(chosen, (0, config.num_selected - chosen.shape[-1]), value=-1)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
