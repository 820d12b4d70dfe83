"""`selected.selected_grad_kv` for compute capability 9.0, in Gluon; see `hopper_grad_kv`. Producer warps follow the list of tokens; the
warpgroups take turns at its tiles of rows, and add their sums at the end."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from nsa_transformer.kernels.triton.hopper import find_document
from nsa_transformer.kernels.triton.hopper_grad_kv import KEYS, add_rows, fill, load_stats, store_sums

WARPGROUPS = gl.constexpr(2)
ROWS = gl.constexpr(32)  # of a tile
PRODUCERS = gl.constexpr(4)  # warps


@gluon.jit
def _item(
    starts, segments, cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner,
    HKV: gl.constexpr, SELECT: gl.constexpr,
):  # fmt: skip
    """Of this program: whether there is work, its owner, head, first key (row, place in its document), how many keys the document has from there,
    the list's start and length, number of the segment, and what turns a token's index into how many keys of the tile it sees."""
    item = gl.load(segments + first_owner) + gl.program_id(0)
    exists = item < gl.load(segments + end_owner)
    owner = find_document(segments, HKV * num_blocks, gl.where(exists, item, 0))
    head = owner // num_blocks
    block = owner % num_blocks
    exists = exists & (block < gl.load(block_starts + num_docs))
    document = find_document(block_starts, num_docs, gl.where(exists, block, 0))
    position = (block - gl.load(block_starts + document)) * SELECT + gl.program_id(1) * KEYS
    base = gl.load(cu_k + document)
    keys = gl.load(cu_k + document + 1) - base - position
    number = item - gl.load(segments + owner)
    # Segments are counted from the end of the list, see `lists.Choosers`.
    end = gl.load(starts + owner + 1) - number * segment
    begin = gl.maximum(end - segment, gl.load(starts + owner))
    count = gl.where(exists, end - begin, 0)
    shift = gl.load(q_start + document) - gl.load(cu_q + document) + 1 - position
    return exists, owner, head, base + position, keys, begin, count, number, shift


@gluon.jit
def _produce(
    keys, values, q_rows, grad_rows, k_tile, v_tile, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, tokens, starts, segments, lse, delta, gates,
    cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner, num_tokens, WHICH: gl.constexpr,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, SELECT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = ROWS // G
    BYTES: gl.constexpr = keys.dtype.primitive_bitwidth // 8
    by_lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    _, _, head, base, _, begin, count, _, shift = _item(
        starts, segments, cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner, HKV, SELECT
    )
    if count > 0:
        if WHICH == 0:
            mbarrier.expect(ready, KEYS * 2 * D * BYTES)
            tma.async_copy_global_to_shared(keys, [base, head * D], ready, k_tile)
            tma.async_copy_global_to_shared(values, [base, head * D], ready, v_tile)
        end = begin + count
        nth = gl.arange(0, ROWS, by_lane) // G
        steps = (count + TOKENS - 1) // TOKENS
        last = begin + (steps - 1) * TOKENS + nth
        # From the last token on, see `lists.Choosers`. Tokens are read two turns ahead, what belongs to their rows one. Past the list comes a token that
        # does not exist: rows of zeros.
        place = last - WHICH * TOKENS
        here = gl.load(tokens + place, mask=(place >= begin) & (place < end), other=num_tokens)
        place -= PRODUCERS * TOKENS
        ahead = gl.load(tokens + place, mask=place >= begin, other=num_tokens)
        row_lse, row_delta, gate = load_stats(lse, delta, gates, here, here < num_tokens, head, 1, HQ, G, by_lane)
        for step in range(WHICH, steps, PRODUCERS):
            place -= PRODUCERS * TOKENS
            later = gl.load(tokens + place, mask=place >= begin, other=num_tokens)
            next_lse, next_delta, next_gate = load_stats(lse, delta, gates, ahead, ahead < num_tokens, head, 1, HQ, G, by_lane)
            fill(
                q_rows, grad_rows, q_tiles, grad_tiles, stats, sees, edges, full, empty, step, here, row_lse, row_delta, gate, here + shift, head,
                False, HQ, G, D, STAGES, by_lane,
            )  # fmt: skip
            here = ahead
            ahead = later
            row_lse = next_lse
            row_delta = next_delta
            gate = next_gate


@gluon.jit
def _consume(
    k_tile, v_tile, q_tiles, grad_tiles, stats, sees, edges, exchange, ready, full, empty, done, starts, segments, shared,
    grad_k, grad_v, parts_k, parts_v, grad_scores, cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner,
    scale, raw_scale, WHICH: gl.constexpr,
    HKV: gl.constexpr, G: gl.constexpr, SELECT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, STORE: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = ROWS // G
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    exists, owner, head, base, num_keys, begin, count, number, _ = _item(
        starts, segments, cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner, HKV, SELECT
    )
    if count > 0:
        mbarrier.wait(ready, 0)
    steps = (count + TOKENS - 1) // TOKENS
    to = grad_scores
    if STORE:
        to += (begin - gl.load(starts + first_owner)).to(gl.int64) * (SELECT * G) + gl.program_id(1) * KEYS * G
    dk, dv = add_rows(
        k_tile, v_tile, q_tiles, grad_tiles, stats, sees, edges, to, full, empty, WHICH, steps, WARPGROUPS, count, 0, scale, 0, D, STAGES, STORE, G, SELECT
    )
    if WHICH == 1:
        exchange.index(0).store(dk)
        exchange.index(1).store(dv)
        mbarrier.arrive(done, count=1)
    else:
        mbarrier.wait(done, 0)
        dk += exchange.index(0).load(outputs)
        dv += exchange.index(1).load(outputs)
        if exists:
            column = gl.arange(0, KEYS, gl.SliceLayout(1, outputs))
            part = gl.load(shared + owner)
            if gl.load(shared + owner + 1) > part:
                row = (part + number).to(gl.int64) * SELECT + gl.program_id(1) * KEYS + column
                store_sums(dk * raw_scale, parts_k, row, column >= 0, D, outputs)
                store_sums(dv, parts_v, row, column >= 0, D, outputs)
            else:
                row = (base + column).to(gl.int64) * HKV + head
                store_sums(dk * raw_scale, grad_k, row, column < num_keys, D, outputs)
                store_sums(dv, grad_v, row, column < num_keys, D, outputs)


@gluon.jit(repr=lambda _: "nsa_selected_dkv_sm90", do_not_specialize=["num_docs", "num_blocks", "segment", "first_owner", "end_owner", "num_tokens"])
def selected_grad_kv(
    q_rows, grad_rows, keys, values, tokens, starts, segments, shared, lse, delta, gates, grad_k, grad_v, parts_k, parts_v, grad_scores,
    cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner, num_tokens, scale, raw_scale,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, SELECT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, STORE: gl.constexpr,
):  # fmt: skip
    """As `selected.selected_grad_kv`, the rows of grad_scores in the order of `selected_q.member_of`."""
    k_tile = gl.allocate_shared_memory(keys.dtype, [KEYS, D], keys.layout)
    v_tile = gl.allocate_shared_memory(keys.dtype, [KEYS, D], keys.layout)
    q_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, ROWS, D], keys.layout)
    grad_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, ROWS, D], keys.layout)
    stats = gl.allocate_shared_memory(gl.float32, [3 * STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    sees = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    edges = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    exchange = gl.allocate_shared_memory(gl.float32, [2, KEYS, D], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Barriers tell one round of a stage from the next alone. So that no producer is two rounds ahead of the warpgroups, and no warpgroup of the
    # producers, a stage is always the same warpgroup's, and a producer's tile before has been waited for.
    gl.static_assert(STAGES >= PRODUCERS and STAGES % 2 == 0 and PRODUCERS % 2 == 0)
    mbarrier.init(ready, count=1)
    mbarrier.init(done, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    # Tuples written in place: once they have a name their constants are numbers at run time.
    gl.warp_specialize(
        [
            (_consume, (k_tile, v_tile, q_tiles, grad_tiles, stats, sees, edges, exchange, ready, full, empty, done, starts, segments, shared,
                        grad_k, grad_v, parts_k, parts_v, grad_scores, cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner,
                        scale, raw_scale, 0, HKV, G, SELECT, D, STAGES, STORE)),
            (_consume, (k_tile, v_tile, q_tiles, grad_tiles, stats, sees, edges, exchange, ready, full, empty, done, starts, segments, shared,
                        grad_k, grad_v, parts_k, parts_v, grad_scores, cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner,
                        scale, raw_scale, 1, HKV, G, SELECT, D, STAGES, STORE)),
            (_produce, (keys, values, q_rows, grad_rows, k_tile, v_tile, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, tokens, starts, segments,
                        lse, delta, gates, cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner, num_tokens, 0,
                        HQ, HKV, G, SELECT, D, STAGES)),
            (_produce, (keys, values, q_rows, grad_rows, k_tile, v_tile, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, tokens, starts, segments,
                        lse, delta, gates, cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner, num_tokens, 1,
                        HQ, HKV, G, SELECT, D, STAGES)),
            (_produce, (keys, values, q_rows, grad_rows, k_tile, v_tile, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, tokens, starts, segments,
                        lse, delta, gates, cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner, num_tokens, 2,
                        HQ, HKV, G, SELECT, D, STAGES)),
            (_produce, (keys, values, q_rows, grad_rows, k_tile, v_tile, q_tiles, grad_tiles, stats, sees, edges, ready, full, empty, tokens, starts, segments,
                        lse, delta, gates, cu_q, cu_k, q_start, block_starts, num_docs, num_blocks, segment, first_owner, end_owner, num_tokens, 3,
                        HQ, HKV, G, SELECT, D, STAGES)),
        ],
        [4, 1, 1, 1, 1],
        [232, 40, 40, 40, 40],
    )  # fmt: skip
