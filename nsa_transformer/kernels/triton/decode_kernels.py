"""The kernels of `decode.py`: one new token of each sequence against its cache, the work split over keys.

Four launches, none of which waits for a counter: `decode_scan` takes the compressed keys in splits; `decode_rank` compares stretches of blocks and leaves the
best of each; `decode_selected` takes the window in splits, then, each program for itself, chooses the blocks among those and takes its share of them;
`decode_combine` adds up. From compute capability 9.0 on each is launched while the one before it still runs (PDL: programmatic dependent launch) and waits,
once it has started, for what it reads: the window, which needs nothing of the scan, is read while blocks are compared. Sums go over the splits in their order.

Shape letters: B sequences, HKV key/value heads, G query heads of each, GP the power of two from max(G, 16) on; DK, DV head widths, DKP, DVP powers of two
from them on. A page is 64 compressed keys and the tokens they begin at. All softmaxes are in base 2: `scale` includes log2 e. A split's part is its attention
not yet divided [G, DV], and the largest score and the sum [G].
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
def _weigh(peak, total, s, worth):
    """Of scores s [GP, N] in base 2, -inf where not seen: their weights, what is left of earlier sums [GP], and the new largest score and sum [GP], to which a
    weight adds `worth` times itself: a number, or [1, N]."""
    new_peak = tl.maximum(peak, tl.max(s, 1))
    shift = _safe(new_peak)
    p = tl.exp2(s - shift[:, None])
    fade = tl.exp2(peak - shift)
    return p, fade, new_peak, total * fade + tl.sum(p * worth, 1)


@triton.jit
def _step(acc, peak, total, s, values, PRECISION: tl.constexpr):
    """One tile of the online softmax: scores as `_weigh` takes them, values [N, DVP]."""
    p, fade, peak, total = _weigh(peak, total, s, 1.0)
    return add_dot(p.to(values.dtype), values, acc * fade[:, None], PRECISION), peak, total


@triton.jit
def _step_of_halves(even, odd, peak, total, s, worth, even_values, odd_values, PRECISION: tl.constexpr):
    """The same with the even and the odd columns of values and sums apart, [N, DVP / 2] and [GP, DVP / 2]."""
    p, fade, peak, total = _weigh(peak, total, s, worth)
    p = p.to(even_values.dtype)
    return add_dot(p, even_values, even * fade[:, None], PRECISION), add_dot(p, odd_values, odd * fade[:, None], PRECISION), peak, total


@triton.jit
def _to_float16(queries):
    """Queries in 16 bits as float16 times a power of two that brings the largest to 2^14 … 2^15, and what is to be multiplied by afterwards. A head loses bits
    where its queries are 2^28 times smaller than another's of the group."""
    largest = tl.max(tl.max(tl.abs(queries.to(tl.float32)), 1), 0)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)  # with its bias of 127
    fit = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return (queries.to(tl.float32) * fit).to(tl.float16), ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _widen(x, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """The even and the odd columns of e4m3 numbers, in dtype, from pairs of neighbours as int16 (a product's operands go from shared memory to registers by 16
    bits; bytes of values would go one by one). NATIVE: to float16 by the GPU's instruction, two at once; Triton's own takes a pair apart first."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; .reg .b16 a, b; prmt.b32 t, $2, 0, 0x3120; mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;}",
            "=r,=r,r", [x], (tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    even = x.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(dtype)
    return even, (x >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(dtype)


@triton.jit
def _log2(x, NATIVE: tl.constexpr):
    """Of normal float32 numbers. NATIVE: by the GPU's instruction, to 2^-22, where tl.log2 takes a dozen."""
    if NATIVE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _fetch_ahead(x, COUNT: tl.constexpr, SPAN: tl.constexpr):
    """COUNT numbers from x on, which will be read soon, into the L2 cache. SPAN: a power of two from COUNT on."""
    LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth  # numbers of 128 bytes
    line = tl.minimum(tl.arange(0, SPAN // LINE) * LINE, COUNT - 1)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [x + line], tl.int32, is_pure=False, pack=1)


@triton.jit
def _find(unit, kinds, places, PARTS: tl.constexpr, NP: tl.constexpr):
    """What `kinds` and `places` int32 [NP] say of the chosen block that a tile belongs to; 0 where there are no more."""
    mine = tl.arange(0, NP) == unit // PARTS
    return tl.sum(tl.where(mine, kinds, 0), 0), tl.sum(tl.where(mine, places, 0), 0)


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
def _importance(log_sum, shares, spills, peaks, pair, first, num_pages, max_pages, G: tl.constexpr, GP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """How much probability falls on each of SIZE blocks from `first` on, summed over the heads: [SIZE]. A block has what its page's keys give it and, as the
    first of its page, what the last key of the page before spills into it; each relative to the largest score seen when it was computed."""
    Q: tl.constexpr = 4 if BLOCKS >= 4 else BLOCKS  # neighbours in a page, which share a factor and are loaded at once
    LINE: tl.constexpr = SIZE // Q
    row = tl.arange(0, GP * LINE)  # of a head and Q blocks
    head = row // LINE
    block = first + row % LINE * Q
    inner = tl.arange(0, Q)
    page = block // BLOCKS
    here = (head < G) & (page < num_pages)
    behind = (head < G) & (block % BLOCKS == 0) & (page > 0) & (page <= num_pages)
    at = (pair * G + head) * max_pages + page
    log_sum = tl.reshape(tl.broadcast_to(log_sum[:, None], [GP, LINE]), [GP * LINE])
    # exp2(-inf - x) is 0, so what is not there counts nothing.
    own = tl.exp2(tl.load(peaks + at, mask=here, other=float("-inf")) - log_sum)
    before = tl.exp2(tl.load(peaks + at - 1, mask=behind, other=float("-inf")) - log_sum)
    spilled = tl.load(spills + at - 1, mask=behind, other=0.0) * before
    to = (pair * G + head) * max_pages * BLOCKS + block
    share = tl.load(shares + to[:, None] + inner[None, :], mask=here[:, None], other=0.0) * own[:, None]
    return tl.sum(tl.reshape(share + tl.where(inner[None, :] == 0, spilled[:, None], 0.0), [GP, SIZE]), 0)


@triton.jit
def _largest(key, NP: tl.constexpr, SIZE: tl.constexpr, FIRST: tl.constexpr = 0):
    """The largest of SIZE int64 keys, falling, in [NP] from place FIRST on, -1 elsewhere and where there are fewer. Keys differ but for those of -1, which
    count nothing."""
    slot = tl.arange(0, NP) - FIRST
    if SIZE <= 128:  # every key is compared with every other: one exchange between threads where sorting has dozens
        rank = tl.sum((key[:, None] > key[None, :]).to(tl.int32), 0)
        return tl.max(tl.where(rank[None, :] == slot[:, None], key[None, :], -1), 1)
    else:
        found = tl.full([NP], -1, tl.int64)
        for turn in range(NP):
            top = tl.max(key, 0)
            found = tl.where(slot == turn, top, found)
            key = tl.where(key == top, -1, key)
        return found


@triton.jit(repr=lambda _: "decode_scan", do_not_specialize=["max_pages"])
def decode_scan(
    q, k_cmp, v_cmp, pages, lengths, shares, spills, peaks, part_out, part_peak, part_sum, scale, max_pages,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid [SPLITS, B * HKV]. Per head and page: peaks, the largest score seen so far; relative to it shares [BLOCKS] of the page's blocks, and what spills
    into the next page's first."""
    BLOCKS: tl.constexpr = ROWS // (SELECT // STRIDE)  # selection blocks of a page
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    sequence = pair // HKV
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(lengths + sequence)
    visible = tl.where(length >= BLOCK, (length - BLOCK) // STRIDE + 1, 0)
    num_pages = (visible + ROWS - 1) // ROWS
    queries = _queries(q, pair, G, GP, DK, DKP)
    head = tl.arange(0, GP)
    row = tl.arange(0, ROWS)
    acc = tl.zeros([GP, DVP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    # A key spreads its probability over SPREAD runs of STRIDE tokens, RUNS of which make a block; those past its block's end are the next block's.
    RUNS: tl.constexpr = SELECT // STRIDE
    SPREAD: tl.constexpr = BLOCK // STRIDE
    block = tl.arange(0, 2 * BLOCKS if BLOCKS > 8 else 16)  # of a page, and at BLOCKS the first of the next
    mine = tl.minimum(RUNS - row % RUNS, SPREAD)[:, None]
    behind = block[None, :] - (row // RUNS)[:, None]
    fold = tl.where(behind == 0, mine, tl.where(behind == 1, SPREAD - mine, 0)).to(queries.dtype)
    table = pages + sequence * max_pages
    # The page of an iteration is loaded in the one before, and the first without the length, so that no tile waits for its address.
    ahead = tl.load(table + split)
    for page in tl.range(split, num_pages, SPLITS, num_stages=STAGES):
        at = (ahead.to(tl.int64) * HKV + pair % HKV) * ROWS + row
        ahead = tl.load(table + page + SPLITS, mask=page + SPLITS < num_pages, other=0)
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
        tl.store(shares + to[:, None] * BLOCKS + block[None, :], share, mask=(head < G)[:, None] & (block < BLOCKS)[None, :])
        tl.store(spills + to[:, None] + tl.zeros_like(block)[None, :], share, mask=(head < G)[:, None] & (block == BLOCKS)[None, :])
    _store_part(acc, peak, total, part_out, part_peak, part_sum, pair * SPLITS + split, G, GP, DV, DVP)


@triton.jit(repr=lambda _: "decode_rank", do_not_specialize=["max_pages"])
def decode_rank(
    shares, spills, peaks, lengths, scan_peak, scan_sum, best, max_pages,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, SCAN_SPLITS: tl.constexpr, SCAN_SPAN: tl.constexpr, STRETCH: tl.constexpr, SIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid [stretches, B * HKV]. best int64 [B * HKV, stretches, NP]: of STRETCH blocks the most important that are not forced, as keys, falling, then -1. Of
    equals the first block is the larger key. SIZE blocks are compared at once. Nothing is written for a sequence that has no more than N blocks."""
    BLOCKS: tl.constexpr = ROWS // (SELECT // STRIDE)
    stretch = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    length = tl.load(lengths + pair // HKV)
    if PDL:
        gdc_wait()
    mine = (length - 1) // SELECT
    if (length > 0) & (mine >= N):
        visible = tl.where(length >= BLOCK, (length - BLOCK) // STRIDE + 1, 0)
        num_pages = (visible + ROWS - 1) // ROWS
        log_sum = _log_sum(scan_peak, scan_sum, pair * SCAN_SPLITS, SCAN_SPLITS, SCAN_SPAN, G, GP)
        kept = tl.full([NP], -1, tl.int64)
        for first in range(stretch * STRETCH, tl.minimum((stretch + 1) * STRETCH, mine - LOCAL + 1), SIZE):
            block = first + tl.arange(0, SIZE)
            value = _importance(log_sum, shares, spills, peaks, pair, first, num_pages, max_pages, G, GP, SIZE, BLOCKS)
            # Importance is not negative, so its bits rise with it.
            key = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - block).to(tl.int64)
            key = tl.where((block >= INITIAL) & (block <= mine - LOCAL), key, -1)
            found = _largest(key, NP, SIZE)
            # Of two falling rows, one turned round, the larger of each place are the largest of both.
            kept = found if STRETCH == SIZE else tl.sort(tl.maximum(kept, tl.flip(found, 0)), descending=True)
        slot = tl.arange(0, NP)
        tl.store(best + (pair * tl.num_programs(0) + stretch) * NP + slot, kept)


@triton.jit(repr=lambda _: "decode_selected", do_not_specialize=["max_pages"])
def decode_selected(
    q, k_slc, v_slc, k_win, v_win, k_scale, v_scale, k_recent, v_recent, pages, lengths, best,
    near_out, near_peak, near_sum, part_out, part_peak, part_sum, chosen, scale, max_pages,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    STRIDE: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    WINDOW: tl.constexpr, RING: tl.constexpr, NEAR_SPLITS: tl.constexpr, SPLITS: tl.constexpr, CANDIDATES: tl.constexpr, CANDIDATES_SPAN: tl.constexpr,
    QUANTIZED: tl.constexpr, NATIVE: tl.constexpr, THRESHOLD: tl.constexpr, RECENT: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid [SPLITS, B * HKV]. best int64 [B * HKV, CANDIDATES] as `decode_rank` left them; chosen int32 [B, HKV, N]; near: the window's parts, NEAR_SPLITS of
    them. QUANTIZED: pages hold e4m3 with a scale for each row, and the blocks that reach into the newest THRESHOLD tokens lie in rings of RECENT tokens
    instead. Queries and e4m3 are multiplied in float16, which holds both to the bit (in float32 where queries are; NATIVE: they are not, and this is a GPU).
    A key's scale multiplies its score. log2 of a value's is added to it: so weights are for what is stored and at most 1, whatever the scales, and their sum
    takes it back."""
    TOKENS: tl.constexpr = ROWS * STRIDE  # of a page
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    sequence = pair // HKV
    if PDL:
        gdc_launch_dependents()
    length = tl.load(lengths + sequence)
    queries = _queries(q, pair, G, GP, DK, DKP)
    mine = (length - 1) // SELECT
    PARTS: tl.constexpr = (SELECT + TILE - 1) // TILE  # tiles of a block; a tile has at least 16 rows, a block may have 8
    BLOCKS: tl.constexpr = RECENT // SELECT  # of a ring
    LINES: tl.constexpr = min(TILE, SELECT)
    if QUANTIZED and PDL:
        # No loop loads ahead from rings, so that each of these would be waited for. The newest are forced, whatever is chosen.
        for unit in range(split, LOCAL * PARTS, SPLITS):
            at = (pair * BLOCKS + tl.maximum(mine - unit // PARTS, 0) % BLOCKS) * SELECT + unit % PARTS * TILE
            _fetch_ahead(k_recent + at * DK, LINES * DK, LINES * DKP)
            _fetch_ahead(v_recent + at * DV, LINES * DV, LINES * DVP)
    acc = tl.zeros([GP, DVP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    if split < NEAR_SPLITS:
        tile_row = tl.arange(0, ROWS)
        for tile in tl.range(split, RING // ROWS, NEAR_SPLITS, num_stages=STAGES):
            place = tile * ROWS + tile_row
            age = (length - 1 - place + RING) % RING  # tokens since the one that lies here
            inside = (age < WINDOW) & (age < length)
            at = pair * RING + place
            s = tl.dot(queries, tl.trans(_tile(k_win, at, inside, DK, DKP)), input_precision=PRECISION) * scale
            s = tl.where(inside[None, :], s, float("-inf"))
            acc, peak, total = _step(acc, peak, total, s, _tile(v_win, at, inside, DV, DVP), PRECISION)
        _store_part(acc, peak, total, near_out, near_peak, near_sum, pair * NEAR_SPLITS + split, G, GP, DV, DVP)
    if PDL:
        gdc_wait()
    slots = tl.arange(0, NP)
    # Newest first: what is read from rings is not loaded ahead, and so waits beside the first tiles of the pages, for which a program waits anyway.
    if mine < N:
        found = tl.where(length > 0, mine - slots, -1)
    else:  # the forced ones of the newest, the most important, the other forced ones
        FREE: tl.constexpr = N - INITIAL - LOCAL
        found = tl.where(slots < LOCAL, mine - slots, slots - LOCAL - FREE)
        if FREE > 0:
            number = tl.arange(0, CANDIDATES_SPAN)
            key = tl.load(best + pair * CANDIDATES + number, mask=number < CANDIDATES, other=-1)
            free = _largest(key, NP, CANDIDATES_SPAN, LOCAL)  # at least FREE: a sequence that has so many blocks has not fewer to choose from
            found = tl.where((slots >= LOCAL) & (slots < LOCAL + FREE), 0x7FFFFFFF - (free & 0xFFFFFFFF).to(tl.int32), found)
    found = tl.where(slots < N, tl.maximum(found, -1), -1)
    if split == 0:
        tl.store(chosen + pair * N + slots, found, mask=slots < N)
    acc = tl.zeros([GP, DVP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    row = tl.arange(0, TILE)
    block = tl.maximum(found, 0)
    places = tl.load(pages + sequence * max_pages + block * SELECT // TOKENS, mask=found >= 0, other=0)
    if QUANTIZED:  # while that is under way
        small_queries, back = queries, 1.0
        if PRECISION != "ieee":
            small_queries, back = _to_float16(queries)
        even_queries, odd_queries = tl.split(tl.reshape(small_queries, [GP, DKP // 2, 2]))
    places = (places * HKV + (pair % HKV).to(tl.int32)) * (TOKENS // SELECT) + block % (TOKENS // SELECT)  # in blocks, which int32 counts
    kinds = tl.where(found >= 0, tl.minimum(length - block * SELECT, SELECT), 0)  # rows that are there, negative in a ring
    if QUANTIZED:
        recent = found >= (length - THRESHOLD) // SELECT
        kinds = tl.where(recent, -kinds, kinds)
        places = tl.where(recent, pair.to(tl.int32) * BLOCKS + block % BLOCKS, places)
        if PDL:
            for unit in range(split + SPLITS, N * PARTS, SPLITS):
                kind, place = _find(unit, kinds, places, PARTS, NP)
                if kind < 0:
                    at = place.to(tl.int64) * SELECT + unit % PARTS * TILE
                    _fetch_ahead(k_recent + at * DK, LINES * DK, LINES * DKP)
                    _fetch_ahead(v_recent + at * DV, LINES * DV, LINES * DVP)
        # Sums over what lies in pages are apart from those over rings, whose weights are of another size.
        even = tl.zeros([GP, DVP // 2], tl.float32)
        odd = tl.zeros([GP, DVP // 2], tl.float32)
        small_peak, small_total = peak, total
        key_pairs = k_slc.to(tl.pointer_type(tl.int16), bitcast=True)
        value_pairs = v_slc.to(tl.pointer_type(tl.int16), bitcast=True)
        for unit in tl.range(split, N * PARTS, SPLITS, num_stages=STAGES):
            line = unit % PARTS * TILE + row
            kind, place = _find(unit, kinds, places, PARTS, NP)
            at = place.to(tl.int64) * SELECT + line
            # Of a block in the pages all rows are there, though a tile may be longer. The mask is alike for neighbours, whose scales so are loaded together:
            # less than four bytes Triton does not load ahead.
            stored = (line < SELECT) & (kind > 0)
            small_keys = _tile(key_pairs, at, stored, DK // 2, DKP // 2)
            small_values = _tile(value_pairs, at, stored, DV // 2, DVP // 2)
            factor = tl.load(k_scale + at, mask=stored, other=0.0).to(tl.float32) * (scale * back)
            bonus = _log2(tl.load(v_scale + at, mask=stored, other=1.0).to(tl.float32), NATIVE)
            if kind > 0:
                even_keys, odd_keys = _widen(small_keys, small_queries.dtype, NATIVE)
                even_values, odd_values = _widen(small_values, small_queries.dtype, NATIVE)
                s = tl.dot(even_queries, tl.trans(even_keys), input_precision=PRECISION)
                s = add_dot(odd_queries, tl.trans(odd_keys), s, PRECISION) * factor[None, :] + bonus[None, :]
                if SELECT % TILE:
                    s = tl.where((line < SELECT)[None, :], s, float("-inf"))
                even, odd, small_peak, small_total = _step_of_halves(
                    even, odd, small_peak, small_total, s, tl.exp2(-bonus)[None, :], even_values, odd_values, PRECISION
                )
            elif kind < 0:
                inside = line < -kind
                keys, values = _tile(k_recent, at, inside, DK, DKP), _tile(v_recent, at, inside, DV, DVP)
                t = tl.where(inside[None, :], tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale, float("-inf"))
                acc, peak, total = _step(acc, peak, total, t, values, PRECISION)
        last_peak = tl.maximum(peak, small_peak)
        fade, small_fade = tl.exp2(peak - _safe(last_peak)), tl.exp2(small_peak - _safe(last_peak))
        acc = acc * fade[:, None] + tl.interleave(even * small_fade[:, None], odd * small_fade[:, None])
        peak, total = last_peak, total * fade + small_total * small_fade
    else:
        for unit in tl.range(split, N * PARTS, SPLITS, num_stages=STAGES):
            rows, place = _find(unit, kinds, places, PARTS, NP)
            line = unit % PARTS * TILE + row
            at = place.to(tl.int64) * SELECT + line
            inside = line < rows
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
