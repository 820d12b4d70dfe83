"""The kernels of `decode.py`: one new token of each sequence against its cache, the work split over keys.

Four launches, none of which waits for a counter: `decode_scan` takes the compressed keys and the window in splits; `decode_rank` chooses the blocks from what
that left; `decode_selected` takes these in splits; `decode_combine` adds up. From compute capability 9.0 on each is launched while the one before it still
runs (PDL: programmatic dependent launch) and waits, once it has started, for what it reads. Sums go over the splits in their order.

Shape letters: B sequences, HKV key/value heads, G query heads of each, GP the power of two from max(G, 16) on; DK, DV head widths, DKP, DVP powers of two
from them on; ROWS keys of a tile, TILES tiles of a page: 64 compressed keys, and the tokens they begin at. All softmaxes are in base 2: `scale` includes log2 e. A split's
part is its attention not yet divided [G, DV], and the largest score and the sum [G].
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa_transformer.kernels.triton.common import add_dot

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
def _weigh(peak, total, s):
    """Of scores s [GP, N] in base 2, -inf where not seen: their weights, what is left of earlier sums [GP], and the new largest score and sum [GP]."""
    new_peak = tl.maximum(peak, tl.max(s, 1))
    shift = _safe(new_peak)
    p = tl.exp2(s - shift[:, None])
    fade = tl.exp2(peak - shift)
    return p, fade, new_peak, total * fade + tl.sum(p, 1)


@triton.jit
def _step(acc, peak, total, s, values, PRECISION: tl.constexpr):
    """One tile of the online softmax: scores as `_weigh` takes them, values [N, DVP]."""
    p, fade, peak, total = _weigh(peak, total, s)
    return add_dot(p.to(values.dtype), values, acc * fade[:, None], PRECISION), peak, total


@triton.jit
def _step_of_two(acc, peak, total, s, small_values, factor, values, PRECISION: tl.constexpr):
    """The same with rows whose values are small_values times factor [N], or values; the other one is 0."""
    p, fade, peak, total = _weigh(peak, total, s)
    acc = add_dot((p * factor[None, :]).to(values.dtype), small_values, acc * fade[:, None], PRECISION)
    return add_dot(p.to(values.dtype), values, acc, PRECISION), peak, total


@triton.jit
def _store_part(acc, peak, total, part_out, part_peak, part_sum, part, G: tl.constexpr, GP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    """A split's share: acc [G, DV], maximum and sum [G]."""
    head = tl.arange(0, GP)
    column = tl.arange(0, DVP)
    tl.store(part_out + (part * G + head)[:, None] * DV + column[None, :], acc, mask=(head < G)[:, None] & (column < DV)[None, :])
    tl.store(part_peak + part * G + head, peak, mask=head < G)
    tl.store(part_sum + part * G + head, total, mask=head < G)


@triton.jit
def _log_sum(part_peak, part_sum, first, COUNT: tl.constexpr, SPAN: tl.constexpr, G: tl.constexpr, GP: tl.constexpr):
    """log2 sum exp [GP] over COUNT splits from `first` on (SPAN: the power of two from COUNT on), +inf for a row that saw nothing."""
    head = tl.arange(0, GP)
    split = tl.arange(0, SPAN)
    there = (split < COUNT)[:, None] & (head < G)[None, :]
    at = (first + split)[:, None] * G + head[None, :]
    peaks = tl.load(part_peak + at, mask=there, other=float("-inf"))
    sums = tl.load(part_sum + at, mask=there, other=0.0)
    shift = _safe(tl.max(peaks, 0))
    total = tl.sum(tl.exp2(peaks - shift[None, :]) * sums, 0)
    return tl.where(total > 0, shift + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))


@triton.jit
def _importance(log_sum, shares, spills, peaks, pair, first, num_tiles, max_tiles, G: tl.constexpr, GP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """How much probability falls on each of SIZE blocks from `first` on, summed over the heads: [SIZE // Q, Q], Q neighbours of a tile to a thread. A block has
    what its tile's keys give it and, as the first of its tile, what the last key of the tile before spills into it; each relative to the largest score seen
    when it was computed."""
    Q: tl.constexpr = 4 if BLOCKS >= 4 else BLOCKS
    block = first + tl.arange(0, SIZE // Q) * Q
    inner = tl.arange(0, Q)
    head = tl.arange(0, GP)
    tile = block // BLOCKS
    here = tile < num_tiles
    behind = (block % BLOCKS == 0) & (tile > 0) & (tile <= num_tiles)
    value = tl.zeros([SIZE // Q, Q], tl.float32)
    spilled = tl.zeros([SIZE // Q], tl.float32)
    # Head by head: of a tile of all heads Triton 3.6 would spread a block's neighbours over warps.
    for g in tl.static_range(G):
        shift = tl.max(tl.where(head == g, log_sum, float("-inf")), 0)
        at = (pair * G + g) * max_tiles
        # exp2(-inf - x) is 0, so what is not there counts nothing.
        own = tl.exp2(tl.load(peaks + at + tile, mask=here, other=float("-inf")) - shift)
        before = tl.exp2(tl.load(peaks + at + tile - 1, mask=behind, other=float("-inf")) - shift)
        value += tl.load(shares + at * BLOCKS + block[:, None] + inner[None, :], mask=here[:, None], other=0.0) * own[:, None]
        spilled += tl.load(spills + at + tile - 1, mask=behind, other=0.0) * before
    return value + tl.where(inner[None, :] == 0, spilled[:, None], 0.0)


@triton.jit
def _largest(keys, COUNT: tl.constexpr, NP: tl.constexpr, LINES: tl.constexpr):
    """Of int64 keys [LINES, 128], different but for those of -1, the COUNT largest, falling, then -1: [NP]. First of each line, which is one warp's work, then
    of the lines' best."""
    slot = tl.arange(0, NP)
    best = tl.full([LINES, NP], -1, tl.int64)
    for turn in range(COUNT):
        top = tl.max(keys, 1)
        best = tl.where(slot[None, :] == turn, top[:, None], best)
        keys = tl.where(keys == top[:, None], -1, keys)
    found = tl.reshape(best, [LINES * NP])
    # How many are larger says the place of each: one exchange between threads, where sorting has dozens.
    rank = tl.sum((found[None, :] > found[:, None]).to(tl.int32), 1)
    return tl.max(tl.where(rank[:, None] == slot[None, :], found[:, None], -1), 0)


@triton.jit
def _compressed(
    queries, k_cmp, v_cmp, pages, length, pair, split, shares, spills, peaks, scale, max_pages,
    ROWS: tl.constexpr, TILES: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A split's part of the compressed branch, nothing for those from SPLITS on. Per head and tile: peaks, the largest score seen so far; relative to it shares [BLOCKS] of the tile's blocks,
    and what spills into the next tile's first."""
    RUNS: tl.constexpr = SELECT // STRIDE  # keys that begin in a block
    BLOCKS: tl.constexpr = ROWS // RUNS  # of a tile
    SPREAD: tl.constexpr = BLOCK // STRIDE
    table = pages + pair // HKV * max_pages
    # The page of an iteration is loaded in the one before, and the first without the length, so that no tile waits for its address.
    ahead = tl.load(table + split // TILES)
    visible = tl.where(length >= BLOCK, (length - BLOCK) // STRIDE + 1, 0)
    num_tiles = tl.where(split < SPLITS, (visible + ROWS - 1) // ROWS, 0)
    head = tl.arange(0, GP)
    row = tl.arange(0, ROWS)
    acc = tl.zeros([GP, DVP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    # A key spreads its probability over SPREAD runs of STRIDE tokens, RUNS of which make a block; those past its block's end are the next block's.
    block = tl.arange(0, 2 * BLOCKS if BLOCKS > 8 else 16)  # of a tile, and at BLOCKS the first of the next
    mine = tl.minimum(RUNS - row % RUNS, SPREAD)[:, None]
    behind = block[None, :] - (row // RUNS)[:, None]
    fold = tl.where(behind == 0, mine, tl.where(behind == 1, SPREAD - mine, 0)).to(queries.dtype)
    for tile in tl.range(split, num_tiles, SPLITS, num_stages=STAGES):
        at = (ahead.to(tl.int64) * HKV + pair % HKV) * (TILES * ROWS) + tile % TILES * ROWS + row
        ahead = tl.load(table + (tile + SPLITS) // TILES, mask=tile + SPLITS < num_tiles, other=0)
        inside = tile * ROWS + row < visible
        s = tl.dot(queries, tl.trans(_tile(k_cmp, at, inside, DK, DKP)), input_precision=PRECISION) * scale
        s = tl.where(inside[None, :], s, float("-inf"))
        values = _tile(v_cmp, at, inside, DV, DVP)
        new_peak = tl.maximum(peak, tl.max(s, 1))  # finite: a tile of the loop has a visible key
        p = tl.exp2(s - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        rounded = p.to(values.dtype)
        acc = add_dot(rounded, values, acc * fade[:, None], PRECISION)
        total = total * fade + tl.sum(p, 1)
        peak = new_peak
        share = tl.dot(rounded, fold, input_precision=PRECISION)
        if PRECISION != "ieee":  # what rounding to 16 bits took away
            share = tl.dot((p - rounded.to(tl.float32)).to(values.dtype), fold, share)
        to = (pair * G + head) * max_pages * TILES + tile
        tl.store(peaks + to, peak, mask=head < G)
        tl.store(shares + to[:, None] * BLOCKS + block[None, :], share, mask=(head < G)[:, None] & (block < BLOCKS)[None, :])
        tl.store(spills + to[:, None] + tl.zeros_like(block)[None, :], share, mask=(head < G)[:, None] & (block == BLOCKS)[None, :])
    return acc, peak, total


@triton.jit
def _window(
    queries, k_win, v_win, length, pair, split, scale,
    ROWS: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A split's part of the window, from rings of RING tokens; nothing for those below 0."""
    tiles = tl.where(split >= 0, RING // ROWS, split)
    row = tl.arange(0, ROWS)
    acc = tl.zeros([GP, DVP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    for tile in tl.range(split, tiles, SPLITS, num_stages=STAGES):
        place = tile * ROWS + row
        age = (length - 1 - place + RING) % RING  # tokens since the one that lies here
        inside = (age < WINDOW) & (age < length)
        at = pair * RING + place
        s = tl.dot(queries, tl.trans(_tile(k_win, at, inside, DK, DKP)), input_precision=PRECISION) * scale
        s = tl.where(inside[None, :], s, float("-inf"))
        acc, peak, total = _step(acc, peak, total, s, _tile(v_win, at, inside, DV, DVP), PRECISION)
    return acc, peak, total


@triton.jit(repr=lambda _: "decode_scan", do_not_specialize=["max_pages"])
def decode_scan(
    q, k_cmp, v_cmp, k_win, v_win, pages, lengths, shares, spills, peaks, part_out, part_peak, part_sum, near_out, near_peak, near_sum, scale, max_pages,
    ROWS: tl.constexpr, TILES: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr, NEAR_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid [B * HKV, SPLITS + NEAR_SPLITS]: compressed keys, then the window's. EARLY: the next kernels' programs have room beside these; where they have
    not, some multiprocessors would get more of them."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    length = tl.load(lengths + pair // HKV)
    queries = _queries(q, pair, G, GP, DK, DKP)
    # One after the other, each for the programs whose it is: in two branches of an if each would have shared memory of its own.
    acc, peak, total = _compressed(
        queries, k_cmp, v_cmp, pages, length, pair, split, shares, spills, peaks, scale, max_pages,
        ROWS, TILES, HKV, G, GP, DK, DKP, DV, DVP, BLOCK, STRIDE, SELECT, SPLITS, PRECISION, STAGES,
    )  # fmt: skip
    if split < SPLITS:
        _store_part(acc, peak, total, part_out, part_peak, part_sum, pair * SPLITS + split, G, GP, DV, DVP)
    split -= SPLITS
    acc, peak, total = _window(
        queries, k_win, v_win, length, pair, split, scale, ROWS, GP, DK, DKP, DV, DVP, WINDOW, RING, NEAR_SPLITS, PRECISION, STAGES
    )
    if PDL and not EARLY:
        gdc_launch_dependents()
    if split >= 0:
        _store_part(acc, peak, total, near_out, near_peak, near_sum, pair * NEAR_SPLITS + split, G, GP, DV, DVP)


@triton.jit(repr=lambda _: "decode_rank", do_not_specialize=["max_pages"])
def decode_rank(
    shares, spills, peaks, lengths, scan_peak, scan_sum, chosen, max_pages,
    ROWS: tl.constexpr, TILES: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, SCAN_SPLITS: tl.constexpr, SCAN_SPAN: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid [B * HKV]. chosen int32 [B, HKV, N], -1 where there are fewer: all blocks, if they are few; else the most important, then the forced ones. Of equals
    the first block is the more important. LINES * 128 blocks are compared at once."""
    BLOCKS: tl.constexpr = ROWS // (SELECT // STRIDE)  # of a tile
    SIZE: tl.constexpr = LINES * 128
    FREE: tl.constexpr = N - INITIAL - LOCAL
    pair = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    length = tl.load(lengths + pair // HKV)
    if PDL:
        gdc_wait()
    slot = tl.arange(0, NP)
    mine = (length - 1) // SELECT
    if mine < N:
        found = tl.where((slot <= mine) & (length > 0), slot, -1)
    else:
        found = slot - FREE + tl.where(slot < FREE + INITIAL, 0, mine - LOCAL + 1 - INITIAL)
        if FREE > 0:
            visible = tl.where(length >= BLOCK, (length - BLOCK) // STRIDE + 1, 0)
            num_tiles = (visible + ROWS - 1) // ROWS
            log_sum = _log_sum(scan_peak, scan_sum, pair * SCAN_SPLITS, SCAN_SPLITS, SCAN_SPAN, G, GP)
            block = tl.arange(0, LINES)[:, None] * 128 + tl.arange(0, 128)[None, :]
            best = tl.full([NP], -1, tl.int64)
            for first in range(0, mine - LOCAL + 1, SIZE):
                value = _importance(log_sum, shares, spills, peaks, pair, first, num_tiles, max_pages * TILES, G, GP, SIZE, BLOCKS)
                value = tl.reshape(value.to(tl.int32, bitcast=True), [LINES, 128])  # not negative, so its bits rise with it
                key = (value.to(tl.int64) << 32) | (0x7FFFFFFF - first - block).to(tl.int64)
                key = tl.where((first + block >= INITIAL) & (first + block <= mine - LOCAL), key, -1)
                keys = _largest(key, FREE, NP, LINES)
                # Of two falling rows, one turned round, the larger of each place are the largest of both.
                best = keys if first == 0 else tl.sort(tl.maximum(best, tl.flip(keys, 0)), descending=True)
            # At least FREE: a sequence that has more blocks than are forced and free has not fewer to choose from.
            found = tl.where(slot < FREE, 0x7FFFFFFF - (best & 0xFFFFFFFF).to(tl.int32), found)
    tl.store(chosen + pair * N + slot, found, mask=slot < N)


@triton.jit(repr=lambda _: "decode_selected", do_not_specialize=["max_pages"])
def decode_selected(
    q, k_slc, v_slc, k_scale, v_scale, k_recent, v_recent, pages, lengths, chosen, part_out, part_peak, part_sum, scale, max_pages,
    ROWS: tl.constexpr, TILES: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    STRIDE: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, SPLITS: tl.constexpr, QUANTIZED: tl.constexpr, THRESHOLD: tl.constexpr,
    RECENT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid [SPLITS, B * HKV]. QUANTIZED: pages hold e4m3 with a scale for each row, and the blocks that reach into the newest THRESHOLD tokens lie in rings of
    RECENT tokens instead."""
    TOKENS: tl.constexpr = TILES * ROWS * STRIDE  # of a page
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    sequence = pair // HKV
    if PDL:
        gdc_launch_dependents()
    length = tl.load(lengths + sequence)
    queries = _queries(q, pair, G, GP, DK, DKP)
    row = tl.arange(0, ROWS)
    if PDL:
        gdc_wait()
    slots = tl.arange(0, NP)
    found = tl.load(chosen + pair * N + slots, mask=slots < N, other=-1)
    acc = tl.zeros([GP, DVP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    PARTS: tl.constexpr = (SELECT + ROWS - 1) // ROWS  # tiles of a block
    places = tl.load(pages + sequence * max_pages + tl.maximum(found, 0) * SELECT // TOKENS, mask=found >= 0, other=0)
    for unit in tl.range(split, N * PARTS, SPLITS, num_stages=STAGES):
        slot = unit // PARTS
        line = unit % PARTS * ROWS + row  # of the block
        block = tl.max(tl.where(slots == slot, found, -1), 0)
        inside = (block >= 0) & (block * SELECT + line < length) & (line < SELECT)
        first = tl.maximum(block, 0) * SELECT
        page = tl.max(tl.where(slots == slot, places, 0), 0).to(tl.int64)
        at = (page * HKV + pair % HKV) * TOKENS + first % TOKENS + line
        if QUANTIZED:
            # From its page or from the ring, without a branch, in which nothing would be loaded ahead: what is not there is not read and counts as 0.
            old = inside & ((block + 1) * SELECT <= length - THRESHOLD)
            new = inside & ((block + 1) * SELECT > length - THRESHOLD)
            ring = pair * RECENT + first % RECENT + line
            small_keys = _tile(k_slc, at, old, DK, DKP).to(queries.dtype)
            small_values = _tile(v_slc, at, old, DV, DVP).to(queries.dtype)
            keys = _tile(k_recent, ring, new, DK, DKP)
            values = _tile(v_recent, ring, new, DV, DVP)
            s = tl.dot(queries, tl.trans(small_keys), input_precision=PRECISION) * tl.load(k_scale + at, mask=old, other=0.0).to(tl.float32)[None, :]
            s = add_dot(queries, tl.trans(keys), s, PRECISION) * scale
            factor = tl.load(v_scale + at, mask=old, other=0.0).to(tl.float32)
            acc, peak, total = _step_of_two(acc, peak, total, tl.where(inside[None, :], s, float("-inf")), small_values, factor, values, PRECISION)
        else:
            s = tl.dot(queries, tl.trans(_tile(k_slc, at, inside, DK, DKP)), input_precision=PRECISION) * scale
            acc, peak, total = _step(acc, peak, total, tl.where(inside[None, :], s, float("-inf")), _tile(v_slc, at, inside, DV, DVP), PRECISION)
    _store_part(acc, peak, total, part_out, part_peak, part_sum, pair * SPLITS + split, G, GP, DV, DVP)


@triton.jit
def _load_parts(part_out, part_peak, part_sum, first, g, COUNT: tl.constexpr, SPAN: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    """Of COUNT splits from `first` on (SPAN: the power of two from COUNT on) the parts [SPAN, DVP] of head g, largest scores and sums [SPAN]."""
    split = tl.arange(0, SPAN)
    column = tl.arange(0, DVP)
    row = (first + split) * G + g
    peaks = tl.load(part_peak + row, mask=split < COUNT, other=float("-inf"))
    sums = tl.load(part_sum + row, mask=split < COUNT, other=0.0)
    return tl.load(part_out + row[:, None] * DV + column[None, :], mask=(split < COUNT)[:, None] & (column < DV)[None, :], other=0.0), peaks, sums


@triton.jit
def _merge(parts, peaks, sums):
    """Attention [DVP], 0 where nothing was seen."""
    weight = tl.exp2(peaks - _safe(tl.max(peaks, 0)))
    total = tl.sum(weight * sums, 0)
    return tl.sum(weight[:, None] * parts, 0) / tl.where(total > 0, total, 1.0)


@triton.jit(repr=lambda _: "decode_combine")
def decode_combine(
    gates, scan_out, scan_peak, scan_sum, near_out, near_peak, near_sum, part_out, part_peak, part_sum, out,
    G: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SCAN_SPLITS: tl.constexpr, SCAN_SPAN: tl.constexpr, NEAR_SPLITS: tl.constexpr,
    NEAR_SPAN: tl.constexpr, SPLITS: tl.constexpr, SPLITS_SPAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid [B * Hq]. out [B, Hq, DV]: the three branches, gated. All is loaded before any is merged, so that it is under way together."""
    head = tl.program_id(0).to(tl.int64)
    pair = head // G
    g = head % G
    gate_scan = tl.load(gates + head * 3).to(tl.float32)
    gate_selected = tl.load(gates + head * 3 + 1).to(tl.float32)
    gate_near = tl.load(gates + head * 3 + 2).to(tl.float32)
    if PDL:
        gdc_wait()
    scan, scan_peaks, scan_sums = _load_parts(scan_out, scan_peak, scan_sum, pair * SCAN_SPLITS, g, SCAN_SPLITS, SCAN_SPAN, G, DV, DVP)
    near, near_peaks, near_sums = _load_parts(near_out, near_peak, near_sum, pair * NEAR_SPLITS, g, NEAR_SPLITS, NEAR_SPAN, G, DV, DVP)
    selected, peaks, sums = _load_parts(part_out, part_peak, part_sum, pair * SPLITS, g, SPLITS, SPLITS_SPAN, G, DV, DVP)
    result = _merge(scan, scan_peaks, scan_sums) * gate_scan + _merge(selected, peaks, sums) * gate_selected + _merge(near, near_peaks, near_sums) * gate_near
    column = tl.arange(0, DVP)
    tl.store(out + head * DV + column, result.to(out.dtype.element_ty), mask=column < DV)
