// Decoding: Native Sparse Attention of one new token of each sequence against its cache, in one launch.
//
// A pair of sequence and key/value head is the work of a cluster of C thread blocks. Every warp reads groups of 16 keys through two slots of its own, with no
// barrier among warps, and attends them for all heads of the group. First compressed keys, then the window, a run of both for each warp. What the blocks of a
// cluster have to tell each other (largest scores and sums, the most important selection blocks, sums of values) they write into each other's shared memory,
// then meet at a barrier of the cluster: no pair waits for another one. Sums go over warps and blocks in their order, so that two runs give the same bits.
//
// Letters: B sequences, D head width, T the dtype of queries, C thread blocks of a cluster, W their warps; a thread has heads g and g + 8 and, of a product's
// tile of 8 columns, columns 2 t and 2 t + 1. All softmaxes are in base 2: `scale` includes log2 e.

#pragma once

#include <cuda_runtime.h>

#include "arguments.cuh"
#include "cluster.cuh"
#include "e4m3.cuh"
#include "tiles.cuh"

namespace {

constexpr int SLOTS = 2;
constexpr int NOTE = HEADS + 4;  // floats of a note, of 16 heads, and of what keeps the notes that eight threads read out of each other's banks
constexpr int NOTES = 5 * NOTE;  // of a group of compressed keys: shares of its 4 selection blocks and the largest score

__host__ __device__ constexpr int padded(int D) { return D + 8; }  // floats of a row of a warp's sums

// Of a warp: slots for its groups, whose room takes its sums at the end, and those over blocks in e4m3 besides.
__host__ __device__ constexpr int ring_bytes(int D, bool fp8) {
    const int groups = SLOTS * 2 * KEYS * D * 2, sums = HEADS * (padded(D) + (fp8 ? D : 0)) * 4;
    return groups > sums ? groups : (sums + 127) / 128 * 128;
}

template <typename T, int D, bool FP8>
__global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ NsaDecode a) {
    constexpr int HALF = KEYS * D * 2, SLOT = 2 * HALF;  // bytes of the keys of a group; of them and their values
    constexpr int RING = ring_bytes(D, FP8);  // of a warp
    static_assert(HEADS * padded(D) * 4 + (FP8 ? HEADS * D * 4 : 0) <= RING && RING % 128 == 0);
    extern __shared__ __align__(128) char memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
    const int C = gridDim.x, W = C * WARPS, rank = blockIdx.x, me = rank * WARPS + warp;
    const int pair = blockIdx.y, sequence = pair / a.kv_heads, kv_head = pair - sequence * a.kv_heads;
    Told *const told = reinterpret_cast<Told *>(memory);
    char *const rings = memory + sizeof(Told);
    float *const exchange = reinterpret_cast<float *>(rings + WARPS * RING);  // notes, if they fit; at the end sums [C][16 D / C]
    float *const notes = a.notes == nullptr ? exchange : a.notes + (static_cast<int64_t>(pair) * C + rank) * a.most_groups * NOTES;
    float *const peaks = notes + a.most_groups * 4 * NOTE;
    const uint32_t slots = shared_address(rings + warp * RING);
    const int *const table = a.pages + static_cast<int64_t>(sequence) * a.max_pages;
    if (warp == 0 && lane * 32 < a.max_pages) asm volatile("prefetch.global.L2 [%0];" ::"l"(table + lane * 32) : "memory");
    const int length = a.lengths[sequence];

    // Queries as the first operand of products: a thread has heads g and g + 8.
    uint32_t q[D / 16][4];
    const T *const queries = static_cast<const T *>(a.q) + static_cast<int64_t>(pair) * a.group * D;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int head = g + 8 * i;
        const T *const from = queries + head * D + 2 * t;
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            q[step][i] = q[step][i + 2] = 0;
            if (head < a.group) {
                q[step][i] = *reinterpret_cast<const uint32_t *>(from + 16 * step);
                q[step][i + 2] = *reinterpret_cast<const uint32_t *>(from + 16 * step + 8);
            }
        }
    }
    if (threadIdx.x < 3 * HEADS) {
        const int head = threadIdx.x % HEADS, branch = threadIdx.x / HEADS;
        const int64_t at = (static_cast<int64_t>(pair) * a.group + head) * 3 + branch;
        float gate = 0.f;
        if (head < a.group) gate = a.float_gates ? static_cast<const float *>(a.gates)[at] : static_cast<float>(static_cast<const T *>(a.gates)[at]);
        told->gates[branch][head] = gate;
    }

    T *const out = static_cast<T *>(a.out) + static_cast<int64_t>(pair) * a.group * D;
    int *const chosen = a.chosen + pair * a.num_selected;
    if (length <= 0) {
        for (int i = threadIdx.x + rank * THREADS; i < a.group * D; i += C * THREADS) out[i] = T(0.f);
        if (rank == 0 && threadIdx.x < a.num_selected) chosen[threadIdx.x] = -1;
        return;
    }
    told->best[threadIdx.x] = 0;
    cluster_arrive();  // waited for before anything is told: by then every block of the cluster has begun

    // What a block of the cluster has to do: a run of the groups of compressed keys, then of the window's. Each warp has a run of both, counted within the
    // block.
    const int visible = length >= BLOCK ? (length - BLOCK) / STRIDE + 1 : 0, groups = (visible + KEYS - 1) / KEYS, near = a.ring / KEYS;
    const int shift = 31 - __clz(W), log_blocks = 31 - __clz(C);
    const int first_group = groups * rank >> log_blocks, scans = (groups * (rank + 1) >> log_blocks) - first_group;
    const int first_near = near * rank >> log_blocks, here = scans + (near * (rank + 1) >> log_blocks) - first_near;
    const int first = here * warp / WARPS, last = here * (warp + 1) / WARPS;
    const bool precedes = first < min(last, scans) && first_group + first > 0;  // the key before the run reaches into its first block
    // Pages of the run: a lane knows one of 32.
    const int first_page = max(first_group + first - 1, 0) / (ROWS / KEYS);
    int known = 0, page_of_lane = first < scans ? table[min(first_page + lane, a.max_pages - 1)] : 0;
    const int newest_place = (length - 1) % a.ring;
    const int newest = (length - 1) / SELECT, free = a.num_selected - a.num_initial - a.num_local;
    const bool full = newest >= a.num_selected, choose = full && free > 0;
    // Forced blocks are known: they will be asked for while blocks are compared, each group of them by one warp.
    int forced[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int number = (me + i * W) / 4;
        forced[i] = full && number < a.num_initial + a.num_local ? (number < a.num_local ? newest - number : number - a.num_local) : -1;
        if (forced[i] >= 0) forced[i] = forced[i] % (TOKENS / SELECT) + table[forced[i] * SELECT / TOKENS] * (TOKENS / SELECT);
    }

    float sums[D / 8][4], acc[D / 8][4], s[2][4], fade[2];
    uint32_t p[4];
    clear(acc);
    clear(sums);
    Softmax now, scan, window;
    int units = 0, wide_units = 0, wide = 0, small_from = 0, small = 0;
    int begin = precedes ? first - 1 : first, end = last;
    float before[2] = {-INFINITE, -INFINITE};  // scores of the key before a group, in lanes of the last columns
#pragma unroll 1
    for (int run = 0; run < 2; ++run) {
        const int turn_at = run == 0 ? min(max(scans, first), last) : end + 1;
        uint32_t there = 0, next_there = 0;  // rows of the group that is attended, and of the next
#pragma unroll 1
        for (int item = begin - 1;; ++item) {
            if (item == turn_at) {  // from compressed keys to the window
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[n][i] = acc[n][i];
                clear(acc);
                scan = now;
                now = Softmax();
            }
            if (item >= end) break;
            // Ask for the next group.
            __syncwarp();
            const int next = item + 1;
            there = next_there;
            if (next < end) {
                const char *keys, *values;
                int64_t row;
                if (run == 0 && next < scans) {
                    const int group = first_group + next, place = group / (ROWS / KEYS) - first_page;
                    if (place / 32 != known) {
                        known = place / 32;
                        page_of_lane = table[min(first_page + known * 32 + lane, a.max_pages - 1)];
                    }
                    const int page = __shfl_sync(~0u, page_of_lane, place % 32);
                    row = (static_cast<int64_t>(page) * a.kv_heads + kv_head) * ROWS + group % (ROWS / KEYS) * KEYS;
                    next_there = next < first ? 1u << (KEYS - 1) : first_rows(visible - group * KEYS);
                    keys = static_cast<const char *>(a.k_cmp), values = static_cast<const char *>(a.v_cmp);
                } else if (run == 0) {
                    const int place = (first_near + next - scans) * KEYS;
                    row = static_cast<int64_t>(pair) * a.ring + place;
                    int age = newest_place - place - (lane & 15);  // tokens since the one that lies here
                    if (age < 0) age += a.ring;
                    next_there = __ballot_sync(~0u, age < a.window && age < length) & 0xFFFFu;
                    keys = static_cast<const char *>(a.k_win), values = static_cast<const char *>(a.v_win);
                } else {
                    const int unit = me + next * W, quarter = unit % 4;
                    const int2 block = told->units[warp][unit / 4];
                    row = static_cast<int64_t>(block.x) * SELECT + quarter * KEYS;
                    next_there = first_rows(block.y - quarter * KEYS);
                    keys = static_cast<const char *>(FP8 ? a.k_recent : a.k_slc), values = static_cast<const char *>(FP8 ? a.v_recent : a.v_slc);
                }
                const uint32_t to = slots + (next - begin) % SLOTS * SLOT;
                fetch<D * 2>(to, keys + row * (D * 2), next_there, lane);
                fetch<D * 2>(to + HALF, values + row * (D * 2), next_there, lane);
            }
            commit();
            if (item < begin) continue;
            wait_copies<SLOTS - 1>();
            __syncwarp();
            const uint32_t slot = slots + (item - begin) % SLOTS * SLOT;
            score<T, D>(s, q, slot, lane);
            finish_scores(s, a.scale, there, lane);
            const float next_before[2] = {s[1][1], s[1][3]};
            now.step(s, fade);
            if (run == 0 && item < first) {  // of this key the largest score alone: what it spills is at most 1 then, and no infinity
                before[0] = next_before[0], before[1] = next_before[1];
                continue;
            }
            now.add(s, fade);
            if (run == 0 && item < scans) {
                float *const note = notes + item * 4 * NOTE;
                // A key covers two runs of 16 tokens: it counts twice for its block, but the last of a block once for that and once for the next.
                float share[2][2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float spill = exp2_fast(before[r] - now.peak[r]);
                    const float from_first = __shfl_sync(~0u, t == 3 ? spill : s[0][2 * r + 1], (lane & ~3) + (t >= 2 ? 1 : 3));
                    const float from_second = __shfl_sync(~0u, t == 3 ? s[0][2 * r + 1] : s[1][2 * r + 1], (lane & ~3) + (t >= 2 ? 1 : 3));
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        float x = 2.f * s[n][2 * r] + (t & 1 ? 1.f : 2.f) * s[n][2 * r + 1];
                        x += __shfl_xor_sync(~0u, x, 1);
                        share[n][r] = x + (n == 0 ? from_first : from_second);
                    }
                    before[r] = next_before[r];
                }
                const int head = g + 8 * (t & 1);
                note[(t >> 1) * NOTE + head] = t & 1 ? share[0][1] : share[0][0];
                note[(2 + (t >> 1)) * NOTE + head] = t & 1 ? share[1][1] : share[1][0];
                if (t < 2) peaks[item * NOTE + head] = t ? now.peak[1] : now.peak[0];
            }
            weights<T>(p, s);
            fade_rows(acc, fade);
            add_values<T, D>(acc, p, slot + HALF, lane);
        }
        now.finish();
        if (run == 1) break;
        scan.finish();
        window = now;
        leave_sums(told->of_warps[0][warp], scan, lane);
        leave_sums(told->of_warps[1][warp], window, lane);
        cluster_wait();
        __syncthreads();
        tell_sums(told, 0, 2, 2, rank, C);
        cluster_arrive();
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (forced[i] >= 0) {
                const int number = (me + i * W) / 4, quarter = me % 4;
                if (FP8 && number < a.num_local && newest - number >= (length - a.threshold) / SELECT) {
                    const int64_t row = (static_cast<int64_t>(pair) * a.recent + (newest - number) * SELECT % a.recent + quarter * KEYS) * (D * 2);
                    fetch_ahead<D * 2>(static_cast<const char *>(a.k_recent) + row, lane);
                    fetch_ahead<D * 2>(static_cast<const char *>(a.v_recent) + row, lane);
                } else {
                    constexpr int BYTES = FP8 ? D : D * 2, BLOCKS = TOKENS / SELECT;
                    const int64_t block = static_cast<int64_t>(forced[i] / BLOCKS * a.kv_heads + kv_head) * BLOCKS + forced[i] % BLOCKS;
                    const int64_t row = (block * SELECT + quarter * KEYS) * BYTES;
                    fetch_ahead<BYTES>(static_cast<const char *>(a.k_slc) + row, lane);
                    fetch_ahead<BYTES>(static_cast<const char *>(a.v_slc) + row, lane);
                }
            }
        cluster_wait();
        sum_up(told, 0, 2, 2, C, a.group);
        __syncthreads();

        // ---- The most important blocks: of each warp, then of this block, which proposes them to all.
        if (choose) {
            const int count = 4 * scans;
#pragma unroll 1
            for (int chunk = 0; chunk < count || chunk == 0; chunk += 2 * THREADS) {
                Key keys[2];
#pragma unroll 1
                for (int i = 0; i < 2; ++i) {
                    const int at = chunk + warp * 64 + i * 32 + lane, block = 4 * first_group + at;
                    Key key = 0;
                    if (at < count && block >= a.num_initial && block <= newest - a.num_local) {
                        const float4 *const share = reinterpret_cast<const float4 *>(notes + at * NOTE);
                        const float4 *const peak = reinterpret_cast<const float4 *>(peaks + at / 4 * NOTE);
                        const float4 *const log_sum = reinterpret_cast<const float4 *>(told->log_sums[0]);
                        float x = 0.f;
#pragma unroll
                        for (int n = 0; n < HEADS / 4; ++n) {
                            const float4 u = share[n], v = peak[n], w = log_sum[n];
                            x += u.x * exp2_fast(v.x - w.x) + u.y * exp2_fast(v.y - w.y) + u.z * exp2_fast(v.z - w.z) + u.w * exp2_fast(v.w - w.w);
                        }
                        key = static_cast<Key>(__float_as_uint(x) + 1) << 32 | ~static_cast<uint32_t>(block);
                    }
                    if (i == 0)
                        keys[0] = key;
                    else
                        keys[1] = key;
                }
                // The 16 largest of 64 are among the larger ones of 16 lanes and what those lanes have besides.
                const Key high = max(keys[0], keys[1]), low = min(keys[0], keys[1]);
                const int place = larger_in_warp(high);
                Key *const places = told->places[warp];
                __syncwarp();
                places[lane] = 0;
                __syncwarp();
                if (high != 0 && place < BEST) places[place] = high, places[BEST + place] = low;
                __syncwarp();
                Key key = places[lane];
                if (chunk > 0) {
                    keep_best(places, key, lane);
                    key = lane < BEST ? places[lane] : told->proposed[warp][lane - BEST];
                }
                keep_best(told->proposed[warp], key, lane);
            }
            __syncthreads();
            Key mine;
            int part, parts;
            const int place = larger_in_block(&told->proposed[0][0], WARPS * BEST, mine, part, parts);
            if (mine != 0 && place < free) {
                const uint32_t to = shared_address(&told->best[rank * BEST + place]);
#pragma unroll 1
                for (int c = part; c < C; c += parts) store_there(of_block(to, c), make_uint2(static_cast<uint32_t>(mine), static_cast<uint32_t>(mine >> 32)));
            }
            __syncwarp();
        }
        cluster_arrive();
        {
            float by[2], by_window[2];
            shares_of(by, told, 0, scan, lane);
            shares_of(by_window, told, 2, window, lane);
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[n][i] = sums[n][i] * by[i / 2] + acc[n][i] * by_window[i / 2];
            clear(acc);
            now = Softmax();
        }
        cluster_wait();

        // ---- All blocks choose alike: the forced ones of the newest, the most important, the other forced ones.
        if (choose) {
            Key mine;
            int part, parts;
            const Key *keys = told->best;
            int count = C * BEST;
            if (count > WARPS * BEST) {  // twice as many: each warp keeps half of its own
                keep_best(told->proposed[warp], keys[threadIdx.x], lane);
                __syncthreads();
                keys = &told->proposed[0][0], count = WARPS * BEST;
            }
            const int place = larger_in_block(keys, count, mine, part, parts);
            if (mine != 0 && place < free && part == 0) told->chosen[place] = static_cast<int>(~static_cast<uint32_t>(mine));
            __syncthreads();
        }
        int found;
        if (!full)
            found = lane < a.num_selected ? newest - lane : -1;
        else if (lane < a.num_local)
            found = newest - lane;
        else if (lane < a.num_local + free)
            found = told->chosen[lane - a.num_local];
        else
            found = lane < a.num_selected ? lane - a.num_local - free : -1;
        if (me == 0 && lane < a.num_selected) chosen[lane] = found < 0 ? -1 : found;
        // Where they lie: those in rings first. Of each the place, in blocks, and how many rows are there.
        const bool is = found >= 0;
        const int page = is ? table[found * SELECT / TOKENS] : 0;
        const bool recent = FP8 && is && found >= (length - a.threshold) / SELECT;
        const uint32_t found_lanes = __ballot_sync(~0u, is), recent_lanes = __ballot_sync(~0u, recent), below = (1u << lane) - 1;
        const int recent_blocks = __popc(recent_lanes), span = a.recent / SELECT;
        const int place = recent ? pair * span + found % span : (page * a.kv_heads + kv_head) * (TOKENS / SELECT) + found % (TOKENS / SELECT);
        if (is) {
            const int at = recent ? __popc(recent_lanes & below) : recent_blocks + __popc(found_lanes & ~recent_lanes & below);
            told->units[warp][at] = make_int2(place, length - found * SELECT);
        }
        __syncwarp();
        units = 4 * __popc(found_lanes), wide_units = FP8 ? 4 * recent_blocks : units;
        wide = me < wide_units ? ((wide_units - 1 - me) >> shift) + 1 : 0;
        begin = 0, end = wide;
        if constexpr (FP8) {
            small_from = me >= wide_units ? me : me + ((wide_units - me + W - 1) >> shift) * W;  // the first unit in e4m3 of this warp
            small = small_from < units ? ((units - 1 - small_from) >> shift) + 1 : 0;
#pragma unroll 1
            for (int unit = small_from; unit < units; unit += W) {
                const int64_t row = static_cast<int64_t>(told->units[warp][unit / 4].x) * SELECT + unit % 4 * KEYS;
                fetch_ahead<D>(static_cast<const char *>(a.k_slc) + row * D, lane);
                fetch_ahead<D>(static_cast<const char *>(a.v_slc) + row * D, lane);
            }
        }
        wait_copies<0>();
        __syncwarp();
    }
    // ---- Those in e4m3. Sums over them are apart from those over rings, whose weights are of another size; those are laid aside meanwhile.
    Softmax selected = now, ringed = now;
    float *const slab = reinterpret_cast<float *>(rings + warp * RING);
    if constexpr (FP8) {
        constexpr int ASIDE = D / 8 * 4 * 32 * 4;
        wait_copies<0>();
        if (wide > 0)
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) slab[(n * 4 + i) * 32 + lane] = acc[n][i];
        __syncwarp();
        attend_e4m3<T, D, (RING - ASIDE) / small_slot(D)>(acc, selected, q, queries, a, told->units[warp], small_from, small, W, slots + ASIDE, lane);
    }

    // ---- The branches' sums, over the warps, then over the blocks of the cluster.
    Softmax both = selected;
    if constexpr (FP8) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            both.peak[r] = fmaxf(selected.peak[r], ringed.peak[r]);
            const float shift = both.peak[r] == -INFINITE ? 0.f : both.peak[r];
            both.total[r] = selected.total[r] * exp2_fast(selected.peak[r] - shift) + ringed.total[r] * exp2_fast(ringed.peak[r] - shift);
        }
    }
    leave_sums(told->of_warps[0][warp], both, lane);
    __syncthreads();
    tell_sums(told, 1, 0, 1, rank, C);
    cluster_arrive();
    cluster_wait();
    sum_up(told, 1, 0, 1, C, a.group);
    __syncthreads();
    {
        float by[2];
        if constexpr (FP8) {
            shares_of(by, told, 1, ringed, lane);
            if (wide > 0)
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[n][i] += slab[(n * 4 + i) * 32 + lane] * by[i / 2];
            __syncwarp();
        }
        shares_of(by, told, 1, selected, lane);
        if constexpr (FP8) {  // a thread has other columns of them: into room of their own, runs and fours of columns moved out of each other's banks
            constexpr int RUN = D / 8;
            float *const others = slab + HEADS * padded(D);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int n = 0; n < RUN; n += 4)
                    *reinterpret_cast<float4 *>(others + (g + 8 * (i / 2)) * D + ((2 * t + (i & 1)) ^ (g & 1)) * RUN + ((n / 4 ^ t) & (RUN / 4 - 1)) * 4) =
                        make_float4(acc[n][i] * by[i / 2], acc[n + 1][i] * by[i / 2], acc[n + 2][i] * by[i / 2], acc[n + 3][i] * by[i / 2]);
        } else {
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[n][i] += acc[n][i] * by[i / 2];
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                *reinterpret_cast<float2 *>(slab + (g + 8 * r) * padded(D) + 8 * n + 2 * t) = make_float2(sums[n][2 * r], sums[n][2 * r + 1]);
    }
    __syncthreads();
    constexpr int QUADS = HEADS * D / 4;
    const int PART = QUADS / C;  // of four neighbours; those that a block adds up
#pragma unroll
    for (int at = threadIdx.x; at < QUADS; at += THREADS) {
        const int row = at / (D / 4), column = at % (D / 4) * 4;
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float *const from = reinterpret_cast<const float *>(rings + w * RING) + row * padded(D) + column;
            const float4 y = *reinterpret_cast<const float4 *>(from);
            x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
            if constexpr (FP8) {
                constexpr int RUN = D / 8;
                const int run = column / RUN, four = column % RUN / 4 ^ run / 2 & (RUN / 4 - 1);
                const float *const others = reinterpret_cast<const float *>(rings + w * RING) + HEADS * padded(D) + row * D;
                const float4 z = *reinterpret_cast<const float4 *>(others + (run ^ (row & 1)) * RUN + four * 4);
                x.x += z.x, x.y += z.y, x.z += z.z, x.w += z.w;
            }
        }
        store_there(of_block(shared_address(exchange + (rank * PART + at % PART) * 4), at / PART), x);
    }
    cluster_arrive();
    cluster_wait();
    for (int i = threadIdx.x; i < PART; i += THREADS) {
        const int at = rank * PART + i, row = at / (D / 4), column = at % (D / 4) * 4;
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
        for (int c = 0; c < C; ++c) {
            const float4 y = *reinterpret_cast<const float4 *>(exchange + (c * PART + i) * 4);
            x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
        }
        if (row < a.group) *reinterpret_cast<uint2 *>(out + row * D + column) = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
    }
}

}  // namespace
