"""Native Sparse Attention by brute force: one query, one head, one key at a time, in float64.

Written from the definition alone and sharing nothing with the package but the names of the settings, so that it can
judge every backend. Each rule is a plain `if` over 0-based positions inside one document. Gradients come from autograd;
the selection of blocks carries none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of `nsa_attention`, in the order of its arguments."""

    q: Tensor  # [Tq, Hq, Dk]
    k_cmp: Tensor  # [N', Hkv, Dk]
    v_cmp: Tensor  # [N', Hkv, Dv]
    k_slc: Tensor  # [Tk, Hkv, Dk]
    v_slc: Tensor  # [Tk, Hkv, Dv]
    k_win: Tensor  # [Tk, Hkv, Dk]
    v_win: Tensor  # [Tk, Hkv, Dv]
    gates: Tensor  # [Tq, Hq, 3]


@dataclass(frozen=True)
class Geometry:
    """The six lengths and counts by the letters of the paper; made from anything that has `NSAConfig`'s fields."""

    l: int  # noqa: E741  the paper's letter
    d: int
    l_slc: int
    n: int
    num_initial: int
    num_local: int
    w: int

    @classmethod
    def of(cls, config) -> Geometry:
        return cls(
            config.compress_block,
            config.compress_stride,
            config.select_block,
            config.num_selected,
            config.num_initial,
            config.num_local,
            config.window,
        )


class Answer(NamedTuple):
    out: Tensor  # [Tq, Hq, Dv], float64
    blocks: list[list[list[int]]]  # [Tq][Hkv], the chosen blocks, ascending
    importance: list[list[list[float]]]  # [Tq][Hkv], one number per block that competes


def num_compressed(length: int, geometry: Geometry) -> int:
    """Compressed tokens of a document: the i whose l tokens all lie inside it."""
    count = 0
    while count * geometry.d + geometry.l <= length:
        count += 1
    return count


@cache
def shared_tokens(i: int, j: int, geometry: Geometry) -> int:
    """Tokens that compressed token i and selection block j have in common, counted one by one."""
    compressed = set(range(i * geometry.d, i * geometry.d + geometry.l))
    selected = set(range(j * geometry.l_slc, (j + 1) * geometry.l_slc))
    return len(compressed & selected)


def forced_blocks(t: int, geometry: Geometry) -> set[int]:
    """Blocks that query t attends to whatever their importance."""
    own = next(j for j in range(t + 1) if j * geometry.l_slc <= t < (j + 1) * geometry.l_slc)
    initial = {j for j in range(geometry.num_initial) if j * geometry.l_slc <= t}
    local = {j for j in range(own + 1) if own - j < geometry.num_local}
    return initial | local


def select(importance: list[float], t: int, geometry: Geometry) -> list[int]:
    """Blocks of query t, ascending, `importance` having one entry per block that starts at or before t.

    Not a sort but the definition: a block is in if it is forced, or if fewer blocks beat it than there are places left.
    """
    assert [j for j in range(t + 1) if j * geometry.l_slc <= t] == list(range(len(importance)))
    forced = forced_blocks(t, geometry)
    places = geometry.n - len(forced)

    def beats(a: int, b: int) -> bool:
        return importance[a] > importance[b] or (importance[a] == importance[b] and a < b)

    free = [j for j in range(len(importance)) if j not in forced]
    chosen = {j for j in free if sum(beats(other, j) for other in free) < places}
    return sorted(forced | chosen)


def attend(query: Tensor, keys: Tensor, values: Tensor, rows: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query [Dk] over the given rows. No rows: exactly 0, and no gradient."""
    if not rows:
        return values.new_zeros(values.shape[-1]), values.new_zeros(0)
    scores = (keys[rows] * query).sum(-1) * scale
    weights = (scores - scores.max().detach()).exp()
    probabilities = weights / weights.sum()
    return (probabilities[:, None] * values[rows]).sum(0), probabilities


def _lengths(cu_seqlens: Tensor | list[int] | None, total: int) -> list[int]:
    bounds = [0, total] if cu_seqlens is None else [int(b) for b in cu_seqlens]
    assert bounds[0] == 0 and bounds[-1] == total and bounds == sorted(bounds)
    return [b - a for a, b in pairwise(bounds)]


def oracle_attention(
    inputs: Inputs, config, *, cu_seqlens=None, cu_seqlens_k=None, q_start=None, blocks: Tensor | None = None, scale: float | None = None
) -> Answer:
    """What `nsa_attention` must give for float64 `inputs`; arguments as there.

    With `blocks` ([Tq, Hkv, any], -1 for none) the selected branch attends to exactly these; `Answer.blocks` is then that
    set and `Answer.importance` still what selection would have gone by.
    """
    assert all(x.dtype == torch.float64 for x in inputs)
    geo = Geometry.of(config)
    (num_queries, hq, dk), hkv, dv = inputs.q.shape, inputs.k_slc.shape[1], inputs.v_slc.shape[2]
    group = hq // hkv
    assert group * hkv == hq
    scale = dk**-0.5 if scale is None else scale

    lengths_q = _lengths(cu_seqlens, num_queries)
    lengths_k = lengths_q if cu_seqlens_k is None else _lengths(cu_seqlens_k, len(inputs.k_slc))
    assert len(lengths_q) == len(lengths_k)
    lengths_c = [num_compressed(length, geo) for length in lengths_k]
    unread = len(inputs.k_cmp) - sum(lengths_c)  # rows past N
    assert unread >= 0

    def by_document(x: Tensor, lengths: list[int]) -> list[Tensor]:
        return list(x.split(lengths))

    per_document = zip(
        lengths_q,
        lengths_k,
        lengths_c,
        by_document(inputs.q, lengths_q),
        by_document(inputs.gates, lengths_q),
        *(by_document(x, [*lengths_c, unread])[:-1] for x in (inputs.k_cmp, inputs.v_cmp)),
        *(by_document(x, lengths_k) for x in (inputs.k_slc, inputs.v_slc, inputs.k_win, inputs.v_win)),
        strict=True,
    )
    answer = Answer(inputs.q.new_zeros(0, hq, dv), [], [])
    rows_out: list[Tensor] = []
    row = 0
    for document, (len_q, len_k, len_c, q, gates, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win) in enumerate(per_document):
        first = len_k - len_q if q_start is None else int(q_start[document])
        for r in range(len_q):
            t = first + r
            assert t >= 0
            answer.blocks.append([])
            answer.importance.append([])
            for h in range(hkv):
                heads = range(h * group, (h + 1) * group)

                # Compression: token i covers [i*d, i*d + l) and is visible once all of it lies at or before t.
                visible = [i for i in range(len_c) if i * geo.d + geo.l <= t + 1]
                compressed = [attend(q[r, a], k_cmp[:, h], v_cmp[:, h], visible, scale) for a in heads]

                # Importance: the probability of each compressed token, weighted by the tokens it shares with the block.
                competing = [j for j in range(t + 1) if j * geo.l_slc <= t]
                importance = [0.0 for _ in competing]
                for j in competing:
                    for _, probabilities in compressed:
                        for i, p in zip(visible, probabilities.tolist(), strict=True):
                            importance[j] += shared_tokens(i, j, geo) / geo.d * p
                answer.importance[row].append(importance)

                chosen = select(importance, t, geo) if blocks is None else sorted({j for j in blocks[row, h].tolist() if j >= 0})
                answer.blocks[row].append(chosen)
                in_chosen = [s for s in range(len_k) if s // geo.l_slc in chosen and s <= t]
                in_window = [s for s in range(len_k) if t - geo.w < s <= t]

                for a, (o_cmp, _) in zip(heads, compressed, strict=True):
                    o_slc, _ = attend(q[r, a], k_slc[:, h], v_slc[:, h], in_chosen, scale)
                    o_win, _ = attend(q[r, a], k_win[:, h], v_win[:, h], in_window, scale)
                    rows_out.append(gates[r, a, 0] * o_cmp + gates[r, a, 1] * o_slc + gates[r, a, 2] * o_win)
            row += 1
    if not rows_out:
        # Still a function of the inputs, so that backward works.
        return answer._replace(out=inputs.q.new_zeros(num_queries, hq, dv) + sum(x.sum() * 0 for x in (inputs.q, inputs.gates)))
    return answer._replace(out=torch.stack(rows_out).reshape(num_queries, hq, dv))
