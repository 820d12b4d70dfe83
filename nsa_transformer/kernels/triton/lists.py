"""Selected blocks turned into lists: per tile of query rows the union of their blocks, and per block the queries that chose it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_transformer.kernels.triton.common import find_document


@triton.jit(repr=lambda _: "nsa_lists", do_not_specialize=["num_docs", "num", "num_queries"])
def union_lists(
    blocks,
    ordered,
    union,
    members,
    counts,
    places,
    last,
    cu_q,
    q_start,
    tiles,
    num_docs,
    num,
    num_queries,
    HKV: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    SELECT: tl.constexpr,
    PLACES: tl.constexpr,
):
    """union int32 [tiles, HKV, L]: the blocks that any token of a tile chose, ascending; counts of them [tiles, HKV]; members [tiles, HKV, L]: who
    chose each, bit by bit from the tile's first token on. L = TOKENS * SLOTS; ordered [tiles, HKV, L] is scratch, of integers that hold
    blocks * L.

    With PLACES, from `places` of `Choosers`: last int32 [tiles, HKV, L], the place in a block's list of the last token of the tile that chose it. The
    tile's others stand right before.
    """
    L: tl.constexpr = TOKENS * SLOTS
    KEY: tl.constexpr = ordered.dtype.element_ty
    NOTHING: tl.constexpr = (1 << (KEY.primitive_bitwidth - 1)) - 1
    tile = tl.program_id(0)
    head = tl.program_id(1)
    if tile >= tl.load(tiles + num_docs):
        return
    document = find_document(tiles, num_docs, tile)
    row = (tile - tl.load(tiles + document)) * M
    first = tl.load(cu_q + document)
    queries = tl.load(cu_q + document + 1) - first
    start = tl.load(q_start + document)
    entry = tl.arange(0, L)
    slot = entry % SLOTS
    token = row // G + entry // SLOTS
    inside = (token < tl.minimum((row + M + G - 1) // G, queries)) & (slot < num)
    block = tl.load(blocks + ((first + token).to(tl.int64) * HKV + head) * num + slot, mask=inside, other=-1)
    inside = inside & (block >= 0) & (block * SELECT <= start + token)
    pairs = tl.sort(tl.where(inside, block.to(KEY) * L + entry, NOTHING))  # by block, then token
    at = (tile.to(tl.int64) * HKV + head) * L
    tl.store(ordered + at + entry, pairs)
    tl.debug_barrier()
    following = tl.load(ordered + at + entry + 1, mask=entry < L - 1, other=NOTHING)
    valid = pairs != NOTHING
    ends = valid & (pairs // L != following // L)
    place = tl.cumsum(ends.to(tl.int32)) - 1
    # A running sum of 1 << token over the pairs, in which no bit occurs twice for one block. It may wrap around; differences do not mind.
    one = tl.full([L], 1, members.dtype.element_ty)
    token = (pairs % L // SLOTS).to(tl.int32)
    bits = tl.cumsum(tl.where(valid, one << token.to(members.dtype.element_ty), 0))
    count = tl.sum(ends.to(tl.int32))
    tl.store(counts + tile * HKV + head, count)
    tl.store(union + at + place, (pairs // L).to(tl.int32), mask=ends)
    tl.store(members + at + place, bits, mask=ends)
    if PLACES:
        of = (head.to(tl.int64) * num_queries + first + row // G + token) * num + pairs % SLOTS
        tl.store(last + at + place, tl.load(places + of, mask=ends, other=0), mask=ends)
    tl.debug_barrier()
    there = entry < count
    chosen = tl.load(members + at + entry, mask=there, other=0)
    chosen -= tl.load(members + at + entry - 1, mask=there & (entry > 0), other=0)
    tl.debug_barrier()
    tl.store(members + at + entry, chosen, mask=there)


@dataclass(frozen=True)
class Union:
    """Lists per tile of M query rows and key/value head; see `union_lists`. `last` is empty where no places were given."""

    blocks: Tensor
    members: Tensor
    counts: Tensor
    last: Tensor
    length: int
    rows: int


def make_union(
    blocks: Tensor,
    num_keys: int,
    cu_q: Tensor,
    q_start: Tensor,
    tiles: Tensor,
    max_tiles: int,
    group: int,
    rows: int,
    select: int,
    places: Tensor | None = None,
) -> Union:
    queries, hkv, num = blocks.shape
    if rows % group == 0:
        tokens = rows // group
    elif group % rows == 0:
        tokens = 1
    else:
        tokens = (rows - 2) // group + 2
    tokens, slots = triton.next_power_of_2(tokens), max(16, triton.next_power_of_2(num))
    assert tokens <= 64
    length = tokens * slots
    device = blocks.device
    key = torch.int32 if (num_keys // select + 1) * length < 1 << 31 else torch.int64
    ordered = torch.empty(max_tiles, hkv, length, dtype=key, device=device)
    union = torch.empty(max_tiles, hkv, length, dtype=torch.int32, device=device)
    members = torch.empty(max_tiles, hkv, length, dtype=torch.int32 if tokens <= 32 else torch.int64, device=device)
    counts = torch.empty(max_tiles, hkv, dtype=torch.int32, device=device)
    last = torch.empty_like(union) if places is not None else counts.new_empty(0)
    union_lists[(max_tiles, hkv)](
        blocks, ordered, union, members, counts, places if places is not None else counts, last, cu_q, q_start, tiles, cu_q.shape[0] - 1, num, queries,
        hkv, group, rows, tokens, slots, select, places is not None, num_warps=max(1, min(8, length // 64)),
    )  # fmt: skip
    return Union(union, members, counts, last, length, rows)


@dataclass(frozen=True)
class Choosers:
    """Per (key/value head, block of the pack): the tokens that chose it, ascending, cut from the end into segments of at most SEGMENT tokens.

    Lists are walked from their ends. All blocks of a document may be chosen up to its last token, and about as often from any token on, so programs
    that begin there are at the same tokens at the same time and find each other's rows in the cache; the lists' beginnings are far apart.

    tokens int32 [T * n * HKV], block after block; starts int32 [HKV * blocks + 1] into it; segments int32 [HKV * blocks + 1], running count of
    segments (at least one each); shared int32 [HKV * blocks + 1], running count of those segments whose block has several; places int32
    [HKV * T * n]: where in `tokens` each token's choice stands.
    """

    tokens: Tensor
    starts: Tensor
    segments: Tensor
    shared: Tensor
    places: Tensor
    max_segments: int
    max_shared: int
    num_blocks: int
    segment: int


def make_choosers(blocks: Tensor, cu_q: Tensor, q_start: Tensor, block_starts: Tensor, num_blocks: int, select: int, segment: int) -> Choosers:
    """`num_blocks` bounds the blocks of the pack. A stable sort keeps tokens ascending, so the sums over them have one order."""
    queries, hkv, num = blocks.shape
    device = blocks.device
    token = torch.arange(queries, dtype=torch.int32, device=device)
    document = torch.searchsorted(cu_q[1:], token, right=True).clamp_(max=cu_q.shape[0] - 2)
    t = token - cu_q[document] + q_start[document]
    by_head = blocks.transpose(0, 1)
    usable = (by_head >= 0) & (by_head * select <= t[:, None])
    head = torch.arange(hkv, dtype=torch.int32, device=device)[:, None, None]
    nowhere = hkv * num_blocks
    key = torch.where(usable, by_head + (block_starts[document][:, None] + head * num_blocks), nowhere)
    key, order = key.flatten().sort(stable=True)
    tokens = (order // num % queries).to(torch.int32)
    places = torch.empty_like(tokens)
    places[order] = torch.arange(len(order), dtype=torch.int32, device=device)
    starts = torch.searchsorted(key, torch.arange(nowhere + 1, dtype=torch.int32, device=device), out_int32=True)
    pieces = (starts.diff() + (segment - 1)) // segment
    zero = pieces.new_zeros(1)
    segments = torch.cat([zero, pieces.clamp(min=1).cumsum(0, dtype=torch.int32)])
    shared = torch.cat([zero, torch.where(pieces > 1, pieces, 0).cumsum(0, dtype=torch.int32)])
    entries = queries * hkv * num
    # A block with several segments has more than SEGMENT entries, hence at most twice entries / SEGMENT of them.
    return Choosers(tokens, starts, segments, shared, places, entries // segment + nowhere, 2 * (entries // segment), num_blocks, segment)
