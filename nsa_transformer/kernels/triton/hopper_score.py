"""The score kernel for compute capability 9.0, in Gluon: `select.score` with a producer warp and two warpgroups that read the same keys.

Scores are [keys, (head, token)] as there, so the sum over heads stays in a thread. Each warpgroup has the heads of its own tokens; the next
tile's product runs while the exponentials of this one are taken.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from nsa_transformer.kernels.triton.hopper import find_document, fold, keys_before

WARPGROUPS = gl.constexpr(2)
COLUMNS = gl.constexpr(128)  # (head, token) pairs of a warpgroup


@gluon.jit
def _item(
    item, first_tile, count, tiles, num_docs, cu_q, q_start, P: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, SELECT: gl.constexpr, NUM: gl.constexpr
):
    """Of one tile of P tokens: its place in the strip, its head; its document's first query and how many it has, first token, position of the
    document's first query, and how many compressed keys it needs: none where all blocks are taken."""
    head = item // count
    local_tile = count - 1 - item % count
    tile = first_tile + local_tile
    document = find_document(tiles, num_docs, tile)
    first = (tile - gl.load(tiles + document)) * P
    document_q = gl.load(cu_q + document)
    queries = gl.load(cu_q + document + 1) - document_q
    start = gl.load(q_start + document)
    last_t = start + gl.minimum(first + P, queries) - 1
    visible = gl.where(last_t // SELECT < NUM, 0, keys_before(last_t, BLOCK, STRIDE))
    return document, local_tile, head, document_q, queries, first, start, visible


@gluon.jit
def _produce(
    keys, k_tiles, full, empty, cu_q, key_starts, q_start, tiles, num_docs, first_tile, strip,
    HKV: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr, SELECT: gl.constexpr, NUM: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    count = gl.maximum(gl.minimum(strip, gl.load(tiles + num_docs) - first_tile), 0)
    step = 0
    for item in range(gl.program_id(0), count * HKV, gl.num_programs(0)):
        document, _, head, _, _, _, _, visible = _item(item, first_tile, count, tiles, num_docs, cu_q, q_start, P, BLOCK, STRIDE, SELECT, NUM)
        base = gl.load(key_starts + document)
        for at in range(0, visible, N):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
            mbarrier.expect(full.index(stage), N * D * (keys.dtype.primitive_bitwidth // 8))
            tma.async_copy_global_to_shared(keys, [base + at, head * D], full.index(stage), k_tiles.index(stage))
            step += 1


@gluon.jit
def _start(k_tiles, stage, q_tile, LAYOUT: gl.constexpr, N: gl.constexpr):
    s = gl.zeros([N, COLUMNS], gl.float32, LAYOUT)
    return warpgroup_mma(k_tiles.index(stage), q_tile.permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _store(
    s, at, lse, limit, full_until, first_row, row_stride, own, carried, scale,
    LAYOUT: gl.constexpr, FOLDS: gl.constexpr, TOKENS: gl.constexpr, N: gl.constexpr, RUNS: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """Probabilities of N compressed keys, summed over the heads and over the keys of each block, into the table's rows of the tokens."""
    p = gl.exp2(s * scale - gl.expand_dims(lse, 0))
    if at + N > full_until:
        key = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
        p = gl.where(gl.expand_dims(at + key, 1) < gl.expand_dims(limit, 0), p, 0.0)
    p = fold(p, FOLDS)
    key = gl.arange(0, N, gl.SliceLayout(1, p.type.layout))
    here = gl.minimum(RUNS - key % RUNS, SPREAD).to(gl.float32)
    stays = gl.sum(gl.reshape(p * gl.expand_dims(here, 1), [N // RUNS, RUNS, TOKENS]), 1)
    goes = gl.sum(gl.reshape(p * gl.expand_dims(SPREAD - here, 1), [N // RUNS, RUNS, TOKENS]), 1)
    block = gl.arange(0, N // RUNS, gl.SliceLayout(1, stays.type.layout))
    row = first_row + gl.arange(0, TOKENS, gl.SliceLayout(0, stays.type.layout)).to(gl.int64) * row_stride
    to = gl.expand_dims(row, 0) + gl.expand_dims(at // RUNS + block, 1)
    gl.store(own + to, stays)
    gl.store(carried + to + 1, goes)


@gluon.jit
def _consume(
    q, q_stride, q_head_stride, q_tiles, k_tiles, full, empty, lse, own, carried, cu_q, q_start, tiles, num_docs, first_tile, strip, width, scale,
    WHICH: gl.constexpr, HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
    BLOCK: gl.constexpr, STRIDE: gl.constexpr, SELECT: gl.constexpr, NUM: gl.constexpr, FOLDS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = COLUMNS // HEADS
    RUNS: gl.constexpr = SELECT // STRIDE
    SPREAD: gl.constexpr = BLOCK // STRIDE
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    q_tile = q_tiles.index(WHICH)
    count = gl.maximum(gl.minimum(strip, gl.load(tiles + num_docs) - first_tile), 0)
    step = 0
    for item in range(gl.program_id(0), count * HKV, gl.num_programs(0)):
        _, local_tile, head, document_q, queries, first, start, visible = _item(
            item, first_tile, count, tiles, num_docs, cu_q, q_start, P, BLOCK, STRIDE, SELECT, NUM
        )
        if visible > 0:
            mine = first + WHICH * TOKENS
            row = gl.arange(0, COLUMNS, gl.SliceLayout(1, wide))
            token = mine + row % TOKENS
            member = row // TOKENS
            inside = (token < queries) & (member < G)
            offsets = (document_q + token).to(gl.int64) * q_stride + (head * G + member) * q_head_stride
            columns = gl.expand_dims(offsets, 1) + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, wide)), 0)
            q_tile.store(gl.load(q + columns, mask=gl.expand_dims(inside, 1), other=0.0))
            fence_async_shared()
            column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
            token = mine + column % TOKENS
            member = column // TOKENS
            pair = (document_q + token).to(gl.int64) * HQ + head * G + member
            row_lse = gl.load(lse + pair, mask=(token < queries) & (member < G), other=float("inf"))
            limit = keys_before(start + token, BLOCK, STRIDE)
            full_until = keys_before(start + mine, BLOCK, STRIDE)
            first_row = ((local_tile * P + WHICH * TOKENS).to(gl.int64) * HKV + head) * width
            last_step = step + (visible + N - 1) // N - 1
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            s = warpgroup_mma_wait(0, deps=[_start(k_tiles, stage, q_tile, layout, N)])
            mbarrier.arrive(empty.index(stage), count=1)
            mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step < last_step)
            at = 0
            for _ in range(step, last_step):
                step += 1
                stage = step % STAGES
                following = _start(k_tiles, stage, q_tile, layout, N)
                _store(s, at, row_lse, limit, full_until, first_row, HKV * width, own, carried, scale, layout, FOLDS, TOKENS, N, RUNS, SPREAD)
                at += N
                # This loop keeps the assembler from moving the exponentials behind the wait.
                mbarrier.wait(full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step < last_step)
                s = warpgroup_mma_wait(0, deps=[following])
                mbarrier.arrive(empty.index(stage), count=1)
            _store(s, at, row_lse, limit, full_until, first_row, HKV * width, own, carried, scale, layout, FOLDS, TOKENS, N, RUNS, SPREAD)
            step += 1


@gluon.jit(repr=lambda _: "nsa_score_sm90", do_not_specialize=["num_docs", "first_tile", "strip", "width"])
def score(
    q, q_stride, q_head_stride, keys, lse, own, carried, cu_q, key_starts, q_start, tiles, num_docs, first_tile, strip, width, scale,
    HQ: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
    BLOCK: gl.constexpr, STRIDE: gl.constexpr, SELECT: gl.constexpr, NUM: gl.constexpr, FOLDS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `select.score`, of `strip` tiles. Tiles of P tokens, 128 // HEADS for each warpgroup; FOLDS is log2 HEADS."""
    k_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, N, D], keys.layout)
    q_tiles = gl.allocate_shared_memory(keys.dtype, [WARPGROUPS, COLUMNS, D], keys.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()
    # Tuples written in place: once they have a name their constants are numbers at run time.
    gl.warp_specialize(
        [
            (_consume, (q, q_stride, q_head_stride, q_tiles, k_tiles, full, empty, lse, own, carried, cu_q, q_start, tiles, num_docs, first_tile, strip,
                        width, scale, 0, HQ, HKV, G, HEADS, P, N, BLOCK, STRIDE, SELECT, NUM, FOLDS, D, STAGES)),
            (_consume, (q, q_stride, q_head_stride, q_tiles, k_tiles, full, empty, lse, own, carried, cu_q, q_start, tiles, num_docs, first_tile, strip,
                        width, scale, 1, HQ, HKV, G, HEADS, P, N, BLOCK, STRIDE, SELECT, NUM, FOLDS, D, STAGES)),
            (_produce, (keys, k_tiles, full, empty, cu_q, key_starts, q_start, tiles, num_docs, first_tile, strip,
                        HKV, P, N, BLOCK, STRIDE, SELECT, NUM, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
