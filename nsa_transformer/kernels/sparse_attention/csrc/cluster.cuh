// What the warps of a block, and the blocks of a cluster, tell each other: largest scores and sums, and the most important selection blocks.
#pragma once

#include "tiles.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int MOST_BLOCKS = 16;  // of a cluster
constexpr int MOST_CHOSEN = 32;  // selection blocks of a query
constexpr int BEST = 16;         // selection blocks that a warp, and then a block of the cluster, proposes: all that are chosen and not forced may be its own

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ uint32_t of_block(uint32_t address, int block) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

__device__ __forceinline__ void store_there(uint32_t to, float x) { asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }

__device__ __forceinline__ void store_there(uint32_t to, uint2 x) {
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(x.x), "r"(x.y) : "memory");
}

__device__ __forceinline__ void store_there(uint32_t to, float4 x) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

using Key = unsigned long long;  // bits of an importance, plus one, and the block's number turned round: of equals the first is the larger

// What the warps of a block, and the blocks of a cluster, tell each other.
struct alignas(128) Told {
    Key proposed[WARPS][BEST];               // of this block's warps
    Key best[MOST_BLOCKS * BEST];            // of all blocks of the cluster
    Key places[WARPS][32];                   // for a warp alone
    float of_warps[2][WARPS][2][HEADS];      // largest scores and sums
    float of_blocks[3][MOST_BLOCKS][2][HEADS];
    float log_sums[3][HEADS];
    float gates[3][HEADS];
    int chosen[BEST];
    int2 units[WARPS][MOST_CHOSEN];
};

// A warp's largest scores and sums for the other warps.
__device__ __forceinline__ void leave_sums(float (&to)[2][HEADS], const Softmax &softmax, int lane) {
    const int g = lane >> 2, t = lane & 3;
    to[t >> 1][g + 8 * (t & 1)] = t == 0 ? softmax.peak[0] : t == 1 ? softmax.peak[1] : t == 2 ? softmax.total[0] : softmax.total[1];
}

// Of eight neighbours: the largest score, and the sum relative to it.
__device__ __forceinline__ void join(float &peak, float &total) {
    float top = peak;
#pragma unroll
    for (int d = 1; d < 8; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    total *= exp2_fast(peak - (top == -INFINITE ? 0.f : top));
#pragma unroll
    for (int d = 1; d < 8; d *= 2) total += __shfl_xor_sync(~0u, total, d);
    peak = top;
}

// The warps' sums to all blocks of the cluster. Eight threads for a head of a branch, of which `step` is the distance between those in `of_warps`.
__device__ __forceinline__ void tell_sums(Told *told, int first_branch, int step, int branches, int rank, int C) {
    const int i = threadIdx.x / 128, head = threadIdx.x / 8 % HEADS, part = threadIdx.x % 8;
    if (i < branches) {
        float peak = told->of_warps[i][part][0][head], total = told->of_warps[i][part][1][head];
        join(peak, total);
        const uint32_t to = shared_address(&told->of_blocks[first_branch + i * step][rank][0][head]);
#pragma unroll 1
        for (int c = part; c < C; c += 8) {
            const uint32_t there = of_block(to, c);
            store_there(there, peak);
            store_there(there + HEADS * 4, total);
        }
    }
}

// log2 of the sums over the cluster, +inf where there is nothing.
__device__ __forceinline__ void sum_up(Told *told, int first_branch, int step, int branches, int C, int group) {
    const int i = threadIdx.x / 128, branch = first_branch + i * step, head = threadIdx.x / 8 % HEADS, part = threadIdx.x % 8;
    if (i < branches) {
        float peak = -INFINITE, total = 0.f;
#pragma unroll 1
        for (int c = part; c < C; c += 8) {
            const float other = told->of_blocks[branch][c][0][head], top = fmaxf(peak, other), shift = top == -INFINITE ? 0.f : top;
            total = total * exp2_fast(peak - shift) + told->of_blocks[branch][c][1][head] * exp2_fast(other - shift);
            peak = top;
        }
        join(peak, total);
        if (part == 0) told->log_sums[branch][head] = total > 0.f && head < group ? peak + log2_fast(total) : INFINITE;
    }
}

__device__ __forceinline__ void shares_of(float (&by)[2], const Told *told, int branch, const Softmax &softmax, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int head = (lane >> 2) + 8 * r;
        by[r] = told->gates[branch][head] * exp2_fast(softmax.peak[r] - told->log_sums[branch][head]);
    }
}

// How many of a warp's keys are larger.
__device__ __forceinline__ int larger_in_warp(Key key) {
    int count = 0;
#pragma unroll 8
    for (int i = 0; i < 32; ++i) count += __shfl_sync(~0u, key, i) > key;
    return count;
}

// The 16 largest of a warp's keys to `to`, 0 where there are fewer.
__device__ __forceinline__ void keep_best(Key *to, Key key, int lane) {
    const int place = larger_in_warp(key);
    __syncwarp();
    if (lane < BEST) to[lane] = 0;
    __syncwarp();
    if (key != 0 && place < BEST) to[place] = key;
    __syncwarp();
}

// How many of `count` keys, a power of two up to the number of threads, are larger than this thread's, which it shares with its neighbours.
__device__ __forceinline__ int larger_in_block(const Key *keys, int count, Key &mine, int &part, int &parts) {
    parts = THREADS / count, part = threadIdx.x & (parts - 1);
    mine = keys[threadIdx.x / parts];
    int larger = 0;
#pragma unroll 8
    for (int i = part; i < count; i += parts) larger += keys[i] > mine;
    for (int d = 1; d < parts; d *= 2) larger += __shfl_xor_sync(~0u, larger, d);
    return larger;
}

}  // namespace
