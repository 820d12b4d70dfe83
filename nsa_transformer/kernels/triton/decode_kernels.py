"""The kernels of `decode.py`: one new token of each sequence against its cache, the work split over keys.

Two launches. The first takes the compressed keys and the window, both in splits; whoever finishes last for a sequence and key/value head merges these two
branches and chooses the blocks. The second takes the chosen blocks in splits, and its last adds them to the others. Sums go over the splits in their order,
whoever is last.

Shape letters: B sequences, HKV key/value heads, G query heads of each, GP the power of two from max(G, 16) on; DK, DV head widths, DKP, DVP powers of two
from them on. A page is 64 compressed keys and the tokens they begin at. All softmaxes are in base 2: `scale` includes log2 e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_transformer.kernels.triton.common import add_dot

ROWS = tl.constexpr(64)  # compressed keys of a page, and keys of a tile of the window


@triton.jit
def _queries(q, pair, G: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr):
    """The queries [GP, DKP] of a pair of sequence and key/value head; rows past G are 0."""
    head = tl.arange(0, GP)
    column = tl.arange(0, DKP)
    return tl.load(q + (pair * G + head)[:, None] * DK + column[None, :], mask=(head < G)[:, None] & (column < DK)[None, :], other=0.0)


@triton.jit
def _tile(x, row, inside, D: tl.constexpr, DP: tl.constexpr):
    """Rows `row` int64 [N] of x, [N, DP]; 0 where not inside and past D."""
    column = tl.arange(0, DP)
    return tl.load(x + row[:, None] * D + column[None, :], mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _safe(peak):
    """A maximum of scores that exponents can be taken from: 0 where nothing has been seen."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _step(acc, peak, total, s, values, factor, PRECISION: tl.constexpr):
    """One tile of the online softmax: scores s [GP, N] in base 2, -inf where not seen; values [N, DVP], each row times factor [N]."""
    new_peak = tl.maximum(peak, tl.max(s, 1))
    shift = _safe(new_peak)
    p = tl.exp2(s - shift[:, None])
    fade = tl.exp2(peak - shift)
    acc = add_dot((p * factor[None, :]).to(values.dtype), values, acc * fade[:, None], PRECISION)
    return acc, new_peak, total * fade + tl.sum(p, 1)


@triton.jit
def _store_part(acc, peak, total, part_out, part_peak, part_sum, part, G: tl.constexpr, GP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    """A split's share: acc [G, DV], maximum and sum [G]."""
    head = tl.arange(0, GP)
    column = tl.arange(0, DVP)
    tl.store(part_out + (part * G + head)[:, None] * DV + column[None, :], acc, mask=(head < G)[:, None] & (column < DV)[None, :])
    tl.store(part_peak + part * G + head, peak, mask=head < G)
    tl.store(part_sum + part * G + head, total, mask=head < G)


@triton.jit
def _arrived(counter, count):
    """Whether this program is the last of `count`; then all that the others have stored is there. The counter is left at 0."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last


@triton.jit
def _merge(
    part_out, part_peak, part_sum, first, COUNT: tl.constexpr, SPAN: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr
):
    """COUNT splits from `first` on (SPAN: the power of two from COUNT on): their attention [GP, DVP], 0 for a row that saw nothing, and log2 sum exp [GP],
    +inf for such a row. All loads are independent of each other, so they are under way together."""
    head = tl.arange(0, GP)
    column = tl.arange(0, DVP)
    split = tl.arange(0, SPAN)
    there = (split < COUNT)[:, None] & (head < G)[None, :]
    at = (first + split)[:, None] * G + head[None, :]
    peaks = tl.load(part_peak + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(part_sum + at, mask=there, other=0.0, cache_modifier=".cg")
    shift = _safe(tl.max(peaks, 0))
    total = tl.sum(tl.exp2(peaks - shift[None, :]) * sums, 0)
    inside = (head < G)[:, None] & (column < DV)[None, :]
    acc = tl.zeros([GP, DVP], tl.float32)
    for part in tl.static_range(COUNT):
        row = (first + part) * G + head
        weight = tl.exp2(tl.load(part_peak + row, mask=head < G, other=float("-inf"), cache_modifier=".cg") - shift)
        acc += weight[:, None] * tl.load(part_out + row[:, None] * DV + column[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    seen = total > 0
    return tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0), tl.where(seen, shift + tl.log2(tl.where(seen, total, 1.0)), float("inf"))


@triton.jit
def _gate(gates, pair, BRANCH: tl.constexpr, G: tl.constexpr, GP: tl.constexpr):
    head = tl.arange(0, GP)
    return tl.load(gates + (pair * G + head) * 3 + BRANCH, mask=head < G, other=0.0).to(tl.float32)


@triton.jit
def _importance(lse, shares, peaks, pair, num_pages, max_pages, G: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr):
    """How much probability falls on each block, summed over the heads: [SPAN]. A block has what its page's keys give it and, as the first of its page, what the
    last key of the page before reaches into it; each relative to the largest score seen when it was computed."""
    block = tl.arange(0, SPAN)
    page = block // BLOCKS
    here = block < num_pages * BLOCKS
    first = (block % BLOCKS == 0) & (block > 0) & (block <= num_pages * BLOCKS)
    total = tl.zeros([SPAN], tl.float32)
    for g in tl.static_range(G):
        row = pair * G + g
        log_sum = tl.load(lse + row, cache_modifier=".cg")
        at = row * max_pages + page
        # exp2(-inf - x) is 0, so what is not there counts nothing.
        factor = tl.exp2(tl.load(peaks + at, mask=here, other=float("-inf"), cache_modifier=".cg") - log_sum)
        before = tl.exp2(tl.load(peaks + at - 1, mask=first, other=float("-inf"), cache_modifier=".cg") - log_sum)
        total += tl.load(shares + at * (BLOCKS + 1) + block % BLOCKS, mask=here, other=0.0, cache_modifier=".cg") * factor
        total += tl.load(shares + at * (BLOCKS + 1) - 1, mask=first, other=0.0, cache_modifier=".cg") * before
    return total


@triton.jit
def _choose(
    chosen, lse, shares, peaks, pair, num_pages, max_pages, t, G: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr,
    SELECT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """The N blocks of a query at position t, -1 where there are fewer: all, if they are few; else forced ones and the most important."""
    slot = tl.arange(0, NP)
    mine = t // SELECT
    if mine < N:
        tl.store(chosen + pair * N + slot, tl.where((slot <= mine) & (t >= 0), slot, -1), mask=slot < N)
    else:
        FORCED: tl.constexpr = INITIAL + LOCAL
        found = tl.where(slot < INITIAL, slot, mine - LOCAL + 1 + slot - INITIAL)
        if N > FORCED:
            block = tl.arange(0, SPAN)
            value = _importance(lse, shares, peaks, pair, num_pages, max_pages, G, BLOCKS, SPAN)
            value = tl.where((block >= INITIAL) & (block <= mine - LOCAL), value, -1.0)
            for turn in range(FORCED, N):
                _, place = tl.max(value, axis=0, return_indices=True, return_indices_tie_break_left=True)
                found = tl.where(slot == turn, place, found)
                value = tl.where(block == place, -1.0, value)
        tl.store(chosen + pair * N + slot, found, mask=slot < N)


@triton.jit(repr=lambda _: "decode_scan", do_not_specialize=["max_pages"])
def decode_scan(
    q, gates, k_cmp, v_cmp, k_win, v_win, pages, lengths, shares, peaks, lse, part_out, part_peak, part_sum, counters, base, chosen, scale, max_pages,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    WINDOW: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr, SPLITS_SPAN: tl.constexpr, WINDOW_SPLITS: tl.constexpr, WINDOW_SPAN: tl.constexpr,
    PAGES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid [SPLITS + WINDOW_SPLITS, B * HKV]. base [B, Hq, DV]: both branches, gated. chosen int32 [B, HKV, N]."""
    BLOCKS: tl.constexpr = ROWS // (SELECT // STRIDE)  # selection blocks of a page
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    sequence = pair // HKV
    length = tl.load(lengths + sequence)
    visible = tl.where(length >= BLOCK, (length - BLOCK) // STRIDE + 1, 0)
    num_pages = (visible + ROWS - 1) // ROWS
    queries = _queries(q, pair, G, GP, DK, DKP)
    head = tl.arange(0, GP)
    row = tl.arange(0, ROWS)
    acc = tl.zeros([GP, DVP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    one = tl.full([ROWS], 1.0, tl.float32)
    if split < SPLITS:
        # A key spreads its probability over SPREAD runs of STRIDE tokens, RUNS of which make a block; those past its block's end are the next block's.
        RUNS: tl.constexpr = SELECT // STRIDE
        SPREAD: tl.constexpr = BLOCK // STRIDE
        block = tl.arange(0, 2 * BLOCKS if BLOCKS > 8 else 16)  # of a page, and at BLOCKS the first of the next
        mine = tl.minimum(RUNS - row % RUNS, SPREAD)[:, None]
        behind = block[None, :] - (row // RUNS)[:, None]
        fold = tl.where(behind == 0, mine, tl.where(behind == 1, SPREAD - mine, 0)).to(queries.dtype)
        count = (num_pages + SPLITS - 1) // SPLITS
        for page in tl.range(split * count, tl.minimum((split + 1) * count, num_pages), num_stages=STAGES):
            at = (tl.load(pages + sequence * max_pages + page).to(tl.int64) * HKV + pair % HKV) * ROWS + row
            inside = page * ROWS + row < visible
            s = tl.dot(queries, tl.trans(_tile(k_cmp, at, inside, DK, DKP)), input_precision=PRECISION) * scale
            s = tl.where(inside[None, :], s, float("-inf"))
            values = _tile(v_cmp, at, inside, DV, DVP)
            new_peak = tl.maximum(peak, tl.max(s, 1))  # finite: a page of the loop has a visible key
            p = tl.exp2(s - new_peak[:, None])
            fade = tl.exp2(peak - new_peak)
            rounded = p.to(values.dtype)
            acc = add_dot(rounded, values, acc * fade[:, None], PRECISION)
            total = total * fade + tl.sum(p, 1)
            peak = new_peak
            share = tl.dot(rounded, fold, input_precision=PRECISION)
            if PRECISION != "ieee":  # what rounding to 16 bits took away
                share = tl.dot((p - rounded.to(tl.float32)).to(values.dtype), fold, share)
            to = (pair * G + head) * max_pages + page
            tl.store(peaks + to, peak, mask=head < G)
            tl.store(shares + to[:, None] * (BLOCKS + 1) + block[None, :], share, mask=(head < G)[:, None] & (block <= BLOCKS)[None, :])
    else:
        TILES: tl.constexpr = RING // ROWS
        SHARE: tl.constexpr = (TILES + WINDOW_SPLITS - 1) // WINDOW_SPLITS
        first = (split - SPLITS) * SHARE
        for tile in tl.range(first, tl.minimum(first + SHARE, TILES), num_stages=STAGES):
            place = tile * ROWS + row
            age = (length - 1 - place + RING) % RING  # tokens since the one that lies here
            inside = (age < WINDOW) & (age < length)
            at = (sequence * HKV + pair % HKV) * RING + place
            s = tl.dot(queries, tl.trans(_tile(k_win, at, inside, DK, DKP)), input_precision=PRECISION) * scale
            s = tl.where(inside[None, :], s, float("-inf"))
            acc, peak, total = _step(acc, peak, total, s, _tile(v_win, at, inside, DV, DVP), one, PRECISION)
    ALL: tl.constexpr = SPLITS + WINDOW_SPLITS
    _store_part(acc, peak, total, part_out, part_peak, part_sum, pair * ALL + split, G, GP, DV, DVP)
    if _arrived(counters + pair, ALL):
        out, log_sum = _merge(part_out, part_peak, part_sum, pair * ALL, SPLITS, SPLITS_SPAN, G, GP, DV, DVP)
        tl.store(lse + pair * G + head, log_sum, mask=head < G)
        near, _ = _merge(part_out, part_peak, part_sum, pair * ALL + SPLITS, WINDOW_SPLITS, WINDOW_SPAN, G, GP, DV, DVP)
        out = out * _gate(gates, pair, 0, G, GP)[:, None] + near * _gate(gates, pair, 2, G, GP)[:, None]
        column = tl.arange(0, DVP)
        tl.store(base + (pair * G + head)[:, None] * DV + column[None, :], out, mask=(head < G)[:, None] & (column < DV)[None, :])
        tl.debug_barrier()
        _choose(chosen, lse, shares, peaks, pair, num_pages, max_pages, length - 1, G, BLOCKS, PAGES * BLOCKS, SELECT, N, NP, INITIAL, LOCAL)


@triton.jit(repr=lambda _: "decode_selected", do_not_specialize=["max_pages"])
def decode_selected(
    q, gates, k_slc, v_slc, k_scale, v_scale, k_recent, v_recent, pages, lengths, base, chosen, part_out, part_peak, part_sum, counters, out, scale, max_pages,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    STRIDE: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, SPLITS_SPAN: tl.constexpr, QUANTIZED: tl.constexpr, THRESHOLD:
    tl.constexpr, RECENT: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid [SPLITS, B * HKV]. out [B, Hq, DV]: base and the gated attention to the chosen blocks. QUANTIZED: pages hold e4m3 with a scale for each row, and
    the blocks that reach into the newest THRESHOLD tokens lie in rings of RECENT tokens instead."""
    TOKENS: tl.constexpr = ROWS * STRIDE  # of a page
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    sequence = pair // HKV
    length = tl.load(lengths + sequence)
    queries = _queries(q, pair, G, GP, DK, DKP)
    acc = tl.zeros([GP, DVP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    row = tl.arange(0, TILE)  # a tile has at least 16 rows, a block may have 8
    for slot in tl.range(split, N, SPLITS, num_stages=STAGES):
        block = tl.load(chosen + pair * N + slot)
        token = block * SELECT + row
        inside = (block >= 0) & (token < length) & (row < SELECT)
        first = tl.maximum(block, 0) * SELECT
        page = tl.load(pages + sequence * max_pages + first // TOKENS, mask=block >= 0, other=0).to(tl.int64)
        at = (page * HKV + pair % HKV) * TOKENS + first % TOKENS + row
        factor = tl.full([TILE], 1.0, tl.float32)
        if QUANTIZED:
            old = (block + 1) * SELECT <= length - THRESHOLD
            keys = _tile(k_slc, at, inside & old, DK, DKP).to(queries.dtype)
            values = _tile(v_slc, at, inside & old, DV, DVP).to(queries.dtype)
            ring = (sequence * HKV + pair % HKV) * RECENT + first % RECENT + row
            keys += _tile(k_recent, ring, inside & ~old, DK, DKP)
            values += _tile(v_recent, ring, inside & ~old, DV, DVP)
            factor = tl.load(v_scale + at, mask=inside & old, other=1.0)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (tl.load(k_scale + at, mask=inside & old, other=1.0) * scale)[None, :]
        else:
            keys = _tile(k_slc, at, inside, DK, DKP)
            values = _tile(v_slc, at, inside, DV, DVP)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        acc, peak, total = _step(acc, peak, total, tl.where(inside[None, :], s, float("-inf")), values, factor, PRECISION)
    _store_part(acc, peak, total, part_out, part_peak, part_sum, pair * SPLITS + split, G, GP, DV, DVP)
    if _arrived(counters + pair, SPLITS):
        far, _ = _merge(part_out, part_peak, part_sum, pair * SPLITS, SPLITS, SPLITS_SPAN, G, GP, DV, DVP)
        head = tl.arange(0, GP)
        column = tl.arange(0, DVP)
        to = (pair * G + head)[:, None] * DV + column[None, :]
        inside = (head < G)[:, None] & (column < DV)[None, :]
        near = tl.load(base + to, mask=inside, other=0.0)
        tl.store(out + to, (near + far * _gate(gates, pair, 1, G, GP)[:, None]).to(out.dtype.element_ty), mask=inside)
