// Decoding: Native Sparse Attention of one new token of each sequence against its cache, in one launch.
//
// A pair of sequence and key/value head is the work of a cluster of C blocks of four warps. Every warp reads groups of 16 keys through a ring of its own, with
// no barrier among warps, and attends them for all heads of the group by mma.sync m16n8k16. What the blocks of a cluster have to tell each other (largest
// scores and sums, the best selection blocks, sums of values) they write into each other's shared memory, then meet at a barrier of the cluster.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int HEADS = 16;    // rows of a product: query heads of a key/value head, the rest zeros
constexpr int KEYS = 16;     // of a group
constexpr int NOTE = HEADS + 4;  // floats of a note, of 16 heads, and of what keeps the notes that eight threads read out of each other's banks
constexpr int NOTES = 5 * NOTE;  // of a group of compressed keys: shares of its 4 selection blocks and the largest score
constexpr int STRIDE = 16, BLOCK = 32, SELECT = 64, ROWS = 64, TOKENS = ROWS * STRIDE;
constexpr int MOST_CHOSEN = 32;
constexpr int MOST_BLOCKS = 16;  // of a cluster
constexpr int BEST = 16;         // selection blocks that a warp, and then a block of the cluster, proposes
constexpr float INFINITE = __builtin_inff();

}  // namespace

extern "C" struct NsaDecode {
    const void *q, *gates;
    void *out;
    int *chosen;
    const void *k_cmp, *v_cmp, *k_slc, *v_slc, *k_win, *v_win, *k_scale, *v_scale, *k_recent, *v_recent;
    const int *pages, *lengths;
    float *notes;  // of all blocks, where shared memory does not hold them
    float scale;   // times log2 e
    int pairs, cluster, kv_heads, group, max_pages, most_groups, num_selected, num_initial, num_local, window, ring, threshold, recent;
    int width, bfloat16, float_gates, fp8;
};

namespace {

__device__ __forceinline__ uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

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

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
    return x;
}

template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Two e4m3 numbers as float16, which holds them to the bit.
__device__ __forceinline__ uint32_t widen(uint32_t two) {
    uint32_t r;
    asm("{.reg .b16 t; cvt.u16.u32 t, %1; cvt.rn.f16x2.e4m3x2 %0, t;}" : "=r"(r) : "r"(two));
    return r;
}

template <typename T>
__device__ __forceinline__ float to_float(T x) {
    return static_cast<float>(x);
}

// The rows of a group whose bit is set in `there`, zeros elsewhere. 16 bytes of a row lie at a place that its number moves, so that eight rows are read without
// two of them in one bank: what moves is exclusive-ored into an address, since slots begin at multiples of 128 bytes.
template <int BYTES>
__device__ __forceinline__ void fetch(uint32_t to, const char *from, uint32_t there, int lane) {
    constexpr int CHUNKS = BYTES / 16, AT_ONCE = 32 / CHUNKS;  // rows that a warp copies at once
    const int row = lane / CHUNKS;
    const uint32_t first = to + row * BYTES + ((lane % CHUNKS ^ row) << 4), bits = there >> row;
#pragma unroll
    for (int i = 0; i < KEYS; i += AT_ONCE) copy_async((first ^ (i & 7) << 4) + i * BYTES, from + lane * 16 + i * BYTES, bits >> i & 1);
}

// The same for e4m3, whose rows are read by 16 bytes of a thread.
template <int BYTES>
__device__ __forceinline__ int small_place(int row, int chunk) {
    constexpr int MASK = BYTES / 16 - 1;
    return row * BYTES + ((chunk ^ ((((row >> 1) & 3) << 1 ^ (row & 1) << 2) & MASK)) << 4);
}

template <int BYTES>
__device__ __forceinline__ void fetch_small(uint32_t to, const char *from, int lane) {
    constexpr int CHUNKS = BYTES / 16;
#pragma unroll
    for (int at = lane; at < KEYS * CHUNKS; at += 32) copy_async(to + small_place<BYTES>(at / CHUNKS, at % CHUNKS), from + at * 16, true);
}

// Of 16 heads and 16 keys: products [16, 16] as two tiles of mma's accumulators.
template <typename T, int D>
__device__ __forceinline__ void score(float (&s)[2][4], const uint32_t (&q)[D / 16][4], uint32_t keys, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[0][i] = s[1][i] = 0.f;
    const int row = (lane & 7) + (lane >> 4) * 8, half = lane >> 3 & 1;
    const uint32_t first = keys + row * D * 2 + ((half ^ (row & 7)) << 4);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        uint32_t r[4];
        load_matrices(r, (first ^ (2 * step & 7) << 4) + (step & 4) * 32);
        multiply<T>(s[0], q[step], r[0], r[1]);
        multiply<T>(s[1], q[step], r[2], r[3]);
    }
}

template <typename T, int D>
__device__ __forceinline__ void add_values(float (&acc)[D / 8][4], const uint32_t (&p)[4], uint32_t values, int lane) {
    const int row = (lane & 7) + (lane >> 3 & 1) * 8, half = lane >> 4;
    const uint32_t first = values + row * D * 2 + ((half ^ (row & 7)) << 4);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        uint32_t r[4];
        load_transposed(r, (first ^ (2 * step & 7) << 4) + (step & 4) * 32);
        multiply<T>(acc[2 * step], p, r[0], r[1]);
        multiply<T>(acc[2 * step + 1], p, r[2], r[3]);
    }
}

// An online softmax over keys of a warp; a thread has two heads, lane / 4 and that + 8, and of their sums its own columns alone.
struct Softmax {
    float peak[2] = {-INFINITE, -INFINITE};
    float total[2] = {0.f, 0.f};

    // Scores in base 2 become weights; what is left of earlier sums goes to `fade`.
    __device__ __forceinline__ void step(float (&s)[2][4], float (&fade)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(peak[r], fmaxf(top, __shfl_xor_sync(~0u, top, 2)));
            const float shift = top == -INFINITE ? 0.f : top;
            fade[r] = exp2_fast(peak[r] - shift);
            peak[r] = top;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                s[n][2 * r] = exp2_fast(s[n][2 * r] - shift);
                s[n][2 * r + 1] = exp2_fast(s[n][2 * r + 1] - shift);
            }
        }
    }

    __device__ __forceinline__ void add(const float (&p)[2][4], const float (&fade)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) total[r] = total[r] * fade[r] + (p[0][2 * r] + p[0][2 * r + 1] + p[1][2 * r] + p[1][2 * r + 1]);
    }

    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] += __shfl_xor_sync(~0u, total[r], 1);
            total[r] += __shfl_xor_sync(~0u, total[r], 2);
        }
    }
};

template <int N>
__device__ __forceinline__ void scale_rows(float (&acc)[N][4], const float (&by)[2]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        acc[n][0] *= by[0];
        acc[n][1] *= by[0];
        acc[n][2] *= by[1];
        acc[n][3] *= by[1];
    }
}

template <int N>
__device__ __forceinline__ void fade_rows(float (&acc)[N][4], const float (&fade)[2]) {
    if (__any_sync(~0u, fade[0] != 1.f || fade[1] != 1.f)) scale_rows(acc, fade);
}

template <int N>
__device__ __forceinline__ void clear(float (&acc)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
}

template <typename T>
__device__ __forceinline__ void weights(uint32_t (&a)[4], const float (&p)[2][4]) {
    a[0] = pack<T>(p[0][0], p[0][1]);
    a[1] = pack<T>(p[0][2], p[0][3]);
    a[2] = pack<T>(p[1][0], p[1][1]);
    a[3] = pack<T>(p[1][2], p[1][3]);
}

// Bits of a group's rows below `count`.
__device__ __forceinline__ uint32_t first_rows(int count) { return count >= KEYS ? 0xFFFFu : count <= 0 ? 0u : (1u << count) - 1; }

// Scores of a group in base 2, -inf where its row is not there.
__device__ __forceinline__ void finish_scores(float (&s)[2][4], float scale, uint32_t there, int lane) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = there >> (8 * n + 2 * (lane & 3) + (i & 1)) & 1 ? s[n][i] * scale : -INFINITE;
}


#ifdef NSA_TRACE
#define MARK(n) do { if (threadIdx.x == 0) { long long now_; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now_)); a.trace[(static_cast<int64_t>(pair) * C + rank) * 16 + n] = now_; } } while (0)
#else
#define MARK(n)
#endif


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

// 16 rows of keys or values, of BYTES each, into the L2 cache.
template <int BYTES>
__device__ __forceinline__ void fetch_ahead(const char *from, int lane) {
    if (lane * 128 < KEYS * BYTES) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + lane * 128) : "memory");
}

template <typename T, int D, int SLOTS, bool FP8>
__global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ NsaDecode a) {
    constexpr int HALF = KEYS * D * 2, SLOT = 2 * HALF;       // bytes of the keys of a group; of them and their values
    constexpr int RING = SLOTS * SLOT + (FP8 ? 128 : 0);      // of a warp
    constexpr int PADDED = D + 8;                             // of a row of sums
    static_assert(HEADS * PADDED * 4 <= RING);
    extern __shared__ __align__(128) char memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
    const int C = gridDim.x, W = C * WARPS, rank = blockIdx.x, me = rank * WARPS + warp;
    const int pair = blockIdx.y, sequence = pair / a.kv_heads, kv_head = pair - sequence * a.kv_heads;
    MARK(0);
    const int length = a.lengths[sequence];
    Told *const told = reinterpret_cast<Told *>(memory);
    char *const rings = memory + sizeof(Told);
    float *const exchange = reinterpret_cast<float *>(rings + WARPS * RING);  // notes, if they fit; at the end sums [C][16 D / C]
    float *const notes = a.notes == nullptr ? exchange : a.notes + (static_cast<int64_t>(pair) * C + rank) * a.most_groups * NOTES;
    float *const peaks = notes + a.most_groups * 4 * NOTE;
    const uint32_t slots = shared_address(rings + warp * RING);
    T *const out = static_cast<T *>(a.out) + static_cast<int64_t>(pair) * a.group * D;
    int *const chosen = a.chosen + pair * a.num_selected;
    if (length <= 0) {
        for (int i = threadIdx.x + rank * THREADS; i < a.group * D; i += C * THREADS) out[i] = T(0.f);
        if (rank == 0 && threadIdx.x < a.num_selected) chosen[threadIdx.x] = -1;
        return;
    }
    told->best[threadIdx.x] = 0;
    cluster_arrive();  // waited for before anything is told: by then every block of the cluster has begun
    const int *const table = a.pages + static_cast<int64_t>(sequence) * a.max_pages;

    // What the warps of the cluster share: groups of compressed keys, then those of the window, a run of both for each.
    const int visible = length >= BLOCK ? (length - BLOCK) / STRIDE + 1 : 0, groups = (visible + KEYS - 1) / KEYS, all = groups + a.ring / KEYS;
    const int shift = 31 - __clz(W);
    const int first = static_cast<int>(static_cast<int64_t>(all) * me >> shift), last = static_cast<int>(static_cast<int64_t>(all) * (me + 1) >> shift);
    const int first_here = min(groups, static_cast<int>(static_cast<int64_t>(all) * (me - warp) >> shift));
    const int end_here = min(groups, static_cast<int>(static_cast<int64_t>(all) * (me - warp + WARPS) >> shift));
    const bool precedes = first > 0 && first < min(last, groups);  // the key before the run reaches into its first block
    // Pages of the run: a lane knows one of 32.
    const int first_page = max(first - 1, 0) / (ROWS / KEYS);
    int known = 0, page_of_lane = first < groups ? table[min(first_page + lane, a.max_pages - 1)] : 0;
    const int newest_place = (length - 1) % a.ring;

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
        if (head < a.group) gate = a.float_gates ? static_cast<const float *>(a.gates)[at] : to_float(static_cast<const T *>(a.gates)[at]);
        told->gates[branch][head] = gate;
    }

    float sums[D / 8][4], acc[D / 8][4], s[2][4], fade[2];
    uint32_t p[4];
    clear(acc);
    clear(sums);
    Softmax now, scan;
    Softmax window;
    int units = 0, wide_units = 0, wide = 0, small_from = 0, small = 0;
    int begin = precedes ? first - 1 : first, end = last;
    float before[2] = {-INFINITE, -INFINITE};  // scores of the key before a group, in lanes of the last columns
#pragma unroll 1
    for (int run = 0; run < 2; ++run) {
        const int turn_at = run == 0 ? min(max(groups, first), last) : end + 1;
        uint32_t masks[SLOTS];
        int slot_in = 0, slot_out = 0;
#pragma unroll 1
        for (int item = begin - (SLOTS - 1);; ++item) {
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
            // Ask for the group that is SLOTS - 1 further on.
            __syncwarp();
            const int next = item + SLOTS - 1;
            uint32_t there = 0;
            if (next < end) {
                const char *keys, *values;
                int64_t row;
                if (run == 0 && next < groups) {
                    const int place = next / (ROWS / KEYS) - first_page;
                    if (place / 32 != known) {
                        known = place / 32;
                        page_of_lane = table[min(first_page + known * 32 + lane, a.max_pages - 1)];
                    }
                    const int page = __shfl_sync(~0u, page_of_lane, place % 32);
                    row = (static_cast<int64_t>(page) * a.kv_heads + kv_head) * ROWS + next % (ROWS / KEYS) * KEYS;
                    there = next < first ? 1u << (KEYS - 1) : first_rows(visible - next * KEYS);
                    keys = static_cast<const char *>(a.k_cmp), values = static_cast<const char *>(a.v_cmp);
                } else if (run == 0) {
                    const int place = (next - groups) * KEYS;
                    row = static_cast<int64_t>(pair) * a.ring + place;
                    int age = newest_place - place - (lane & 15);  // tokens since the one that lies here
                    if (age < 0) age += a.ring;
                    there = __ballot_sync(~0u, age < a.window && age < length) & 0xFFFFu;
                    keys = static_cast<const char *>(a.k_win), values = static_cast<const char *>(a.v_win);
                } else {
                    const int unit = me + next * W, quarter = unit % 4;
                    const int2 block = told->units[warp][unit / 4];
                    row = static_cast<int64_t>(block.x) * SELECT + quarter * KEYS;
                    there = first_rows(block.y - quarter * KEYS);
                    keys = static_cast<const char *>(FP8 ? a.k_recent : a.k_slc), values = static_cast<const char *>(FP8 ? a.v_recent : a.v_slc);
                }
                const uint32_t to = slots + slot_in * SLOT;
                fetch<D * 2>(to, keys + row * (D * 2), there, lane);
                fetch<D * 2>(to + HALF, values + row * (D * 2), there, lane);
            }
            commit();
            slot_in = slot_in + 1 == SLOTS ? 0 : slot_in + 1;
#pragma unroll
            for (int i = 0; i + 1 < SLOTS; ++i) masks[i] = masks[i + 1];
            masks[SLOTS - 1] = there;
            if (item < begin) continue;
            wait_copies<SLOTS - 1>();
            __syncwarp();
            const uint32_t slot = slots + slot_out * SLOT;
            slot_out = slot_out + 1 == SLOTS ? 0 : slot_out + 1;
            score<T, D>(s, q, slot, lane);
            finish_scores(s, a.scale, masks[0], lane);
            const float next_before[2] = {s[1][1], s[1][3]};
            if (run == 0 && item < first) {
                before[0] = next_before[0], before[1] = next_before[1];
                continue;
            }
            now.step(s, fade);
            now.add(s, fade);
            if (run == 0 && item < groups) {
                float *const note = notes + (item - first_here) * 4 * NOTE;
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
                if (t < 2) peaks[(item - first_here) * NOTE + head] = t ? now.peak[1] : now.peak[0];
            }
            weights<T>(p, s);
            fade_rows(acc, fade);
            add_values<T, D>(acc, p, slot + HALF, lane);
        }
        now.finish();
        if (run == 1) break;
        MARK(1);
        scan.finish();
        window = now;
        leave_sums(told->of_warps[0][warp], scan, lane);
        leave_sums(told->of_warps[1][warp], window, lane);
        cluster_wait();
        __syncthreads();
        tell_sums(told, 0, 2, 2, rank, C);
        cluster_arrive();
        const int newest = (length - 1) / SELECT, free = a.num_selected - a.num_initial - a.num_local;
        const bool full = newest >= a.num_selected, choose = full && free > 0;
        if (full)  // forced blocks are known
#pragma unroll 1
            for (int unit = me; unit < 4 * (a.num_initial + a.num_local); unit += W) {
                const int number = unit / 4, quarter = unit % 4, block = number < a.num_local ? newest - number : number - a.num_local;
                if (FP8 && number < a.num_local && block >= (length - a.threshold) / SELECT) {
                    const int64_t row = (static_cast<int64_t>(pair) * a.recent + block * SELECT % a.recent + quarter * KEYS) * (D * 2);
                    fetch_ahead<D * 2>(static_cast<const char *>(a.k_recent) + row, lane);
                    fetch_ahead<D * 2>(static_cast<const char *>(a.v_recent) + row, lane);
                } else {
                    constexpr int BYTES = FP8 ? D : D * 2;
                    const int64_t page = static_cast<int64_t>(table[block * SELECT / TOKENS]) * a.kv_heads + kv_head;
                    const int64_t row = (page * TOKENS + block * SELECT % TOKENS + quarter * KEYS) * BYTES;
                    fetch_ahead<BYTES>(static_cast<const char *>(a.k_slc) + row, lane);
                    fetch_ahead<BYTES>(static_cast<const char *>(a.v_slc) + row, lane);
                }
            }
        cluster_wait();
        MARK(2);
        sum_up(told, 0, 2, 2, C, a.group);
        __syncthreads();
        MARK(3);

        // ---- The most important blocks: of each warp, then of this block, which proposes them to all.
        if (choose) {
            const int count = 4 * (end_here - first_here);
#pragma unroll 1
            for (int chunk = 0; chunk < count || chunk == 0; chunk += 2 * THREADS) {
                Key keys[2];
#pragma unroll 1
                for (int i = 0; i < 2; ++i) {
                    const int at = chunk + warp * 64 + i * 32 + lane, block = 4 * first_here + at;
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
        MARK(4);
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
        MARK(5);

        // ---- All blocks choose alike: the forced ones of the newest, the most important, the other forced ones.
        if (choose) {
            Key mine;
            int part, parts;
            const int place = larger_in_block(told->best, C * BEST, mine, part, parts);
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
        MARK(6);
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
        MARK(7);
    }
    MARK(8);
    // ---- Those in e4m3. Sums over them are apart from those over rings, whose weights are of another size; those are laid aside meanwhile.
    Softmax selected = now, ringed = now;
    if constexpr (FP8) {
        wait_copies<0>();
        float *const aside = reinterpret_cast<float *>(rings + warp * RING);
        constexpr int TAKEN = D / 8 * 4 * 32 * 4, SMALL = KEYS * 2 * D + 64, LEFT = (RING - TAKEN) / SMALL;
        static_assert(LEFT >= 2);
        if (wide > 0)
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) aside[(n * 4 + i) * 32 + lane] = acc[n][i];
        __syncwarp();
        auto issue_small = [&](int number) {
            if (number < small) {
                const uint32_t to = slots + TAKEN + number % LEFT * SMALL;
                const int unit = small_from + number * W, quarter = unit % 4;
                const int64_t row = static_cast<int64_t>(told->units[warp][unit / 4].x) * SELECT + quarter * KEYS;
                fetch_small<D>(to, static_cast<const char *>(a.k_slc) + row * D, lane);
                fetch_small<D>(to + KEYS * D, static_cast<const char *>(a.v_slc) + row * D, lane);
                if (lane < 4) {
                    const char *const scales = static_cast<const char *>(lane < 2 ? a.k_scale : a.v_scale);
                    copy_async(to + KEYS * (D + D) + lane * 16, scales + row * 2 + lane % 2 * 16, true);
                }
            }
            commit();
        };
#pragma unroll
        for (int i = 0; i < LEFT - 1; ++i) issue_small(i);
        // Queries in float16, times a power of two that brings the largest to 2^14 … 2^15, with columns in the order that keys are read in: 16 in a row.
        float largest = 0.f;
#pragma unroll
        for (int step = 0; step < D / 16; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const T *const two = reinterpret_cast<const T *>(&q[step][i]);
                largest = fmaxf(largest, fmaxf(fabsf(to_float(two[0])), fabsf(to_float(two[1]))));
            }
        const int exponent = max(static_cast<int>(__reduce_max_sync(~0u, __float_as_uint(largest)) >> 23), 15);
        const float fit = __uint_as_float(static_cast<uint32_t>(268 - exponent) << 23), back = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
        const float scale = a.scale * back;
        static_assert(D % 64 == 0);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int step = 0; step < D / 16; ++step) {
                const int head = g + 8 * i;
                uint2 four = make_uint2(0, 0);
                if (head < a.group) four = *reinterpret_cast<const uint2 *>(queries + head * D + step / 4 * 64 + 16 * t + step % 4 * 4);
                const T *const low = reinterpret_cast<const T *>(&four.x), *const high = reinterpret_cast<const T *>(&four.y);
                q[step][i] = pack<__half>(to_float(low[0]) * fit, to_float(low[1]) * fit);
                q[step][i + 2] = pack<__half>(to_float(high[0]) * fit, to_float(high[1]) * fit);
            }
        clear(acc);
        selected = Softmax();
        for (int number = 0; number < small; ++number) {
            __syncwarp();
            issue_small(number + LEFT - 1);
            wait_copies<LEFT - 1>();
            __syncwarp();
            const uint32_t keys = slots + TAKEN + number % LEFT * SMALL, values = keys + KEYS * D;
#pragma unroll
            for (int i = 0; i < 4; ++i) s[0][i] = s[1][i] = 0.f;
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int part = 0; part < D / 64; ++part) {
                    const uint4 x = load_shared(keys + small_place<D>(g + 8 * n, part * 4 + t));
                    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                    for (int i = 0; i < 4; ++i) multiply<__half>(s[n], q[part * 4 + i], widen(words[i]), widen(words[i] >> 16));
                }
            float worth[2][2];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                uint32_t of_keys, of_values;
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(of_keys) : "r"(values + KEYS * D + 16 * n + 4 * t) : "memory");
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(of_values) : "r"(values + KEYS * D + 32 + 16 * n + 4 * t) : "memory");
#pragma unroll
                for (int i = 0; i < 2; ++i) {  // scales are bfloat16
                    const float factor = __uint_as_float(i ? of_keys & 0xFFFF0000u : of_keys << 16) * scale;
                    const float bonus = log2_fast(__uint_as_float(i ? of_values & 0xFFFF0000u : of_values << 16));
                    worth[n][i] = exp2_fast(-bonus);
                    s[n][i] = s[n][i] * factor + bonus;
                    s[n][i + 2] = s[n][i + 2] * factor + bonus;
                }
            }
            selected.step(s, fade);
#pragma unroll
            for (int r = 0; r < 2; ++r)
                selected.total[r] = selected.total[r] * fade[r] + (s[0][2 * r] * worth[0][0] + s[0][2 * r + 1] * worth[0][1] + s[1][2 * r] * worth[1][0] +
                                                                   s[1][2 * r + 1] * worth[1][1]);
            weights<__half>(p, s);
            fade_rows(acc, fade);
            // A thread reads D / 8 columns of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: column n of them is a product's n-th tile.
#pragma unroll
            for (int part = 0; part < D / 128 + (D % 128 != 0); ++part) {
                constexpr int BYTES = D >= 128 ? 16 : 8;
                uint32_t rows[4][4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = 2 * t + (i & 1) + 8 * (i >> 1);
                    if constexpr (BYTES == 16) {
                        const uint4 x = load_shared(values + small_place<D>(row, part * 8 + g));
                        rows[i][0] = x.x, rows[i][1] = x.y, rows[i][2] = x.z, rows[i][3] = x.w;
                    } else {
                        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                                     : "=r"(rows[i][0]), "=r"(rows[i][1])
                                     : "r"(values + small_place<D>(row, g / 2) + g % 2 * 8)
                                     : "memory");
                    }
                }
#pragma unroll
                for (int word = 0; word < BYTES / 4; ++word) {
                    const uint32_t low[2] = {__byte_perm(rows[0][word], rows[1][word], 0x5140), __byte_perm(rows[0][word], rows[1][word], 0x7362)};
                    const uint32_t high[2] = {__byte_perm(rows[2][word], rows[3][word], 0x5140), __byte_perm(rows[2][word], rows[3][word], 0x7362)};
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        multiply<__half>(acc[part * 16 + word * 4 + i], p, widen(i & 1 ? low[i / 2] >> 16 : low[i / 2]), widen(i & 1 ? high[i / 2] >> 16 : high[i / 2]));
                }
            }
        }
        selected.finish();
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
    MARK(9);
    leave_sums(told->of_warps[0][warp], both, lane);
    __syncthreads();
    tell_sums(told, 1, 0, 1, rank, C);
    cluster_arrive();
    cluster_wait();
    MARK(10);
    sum_up(told, 1, 0, 1, C, a.group);
    __syncthreads();
    float *const slab = reinterpret_cast<float *>(rings + warp * RING);
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
        if constexpr (FP8) {  // their columns are in another order: through memory
            constexpr int RUN = D / 8;
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int n = 0; n < D / 8; n += 4)
                    *reinterpret_cast<float4 *>(slab + (g + 8 * (i / 2)) * PADDED + (2 * t + (i & 1)) * RUN + n) =
                        make_float4(acc[n][i] * by[i / 2], acc[n + 1][i] * by[i / 2], acc[n + 2][i] * by[i / 2], acc[n + 3][i] * by[i / 2]);
            __syncwarp();
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float2 x = *reinterpret_cast<const float2 *>(slab + (g + 8 * r) * PADDED + 8 * n + 2 * t);
                    sums[n][2 * r] += x.x, sums[n][2 * r + 1] += x.y;
                }
            __syncwarp();
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
                *reinterpret_cast<float2 *>(slab + (g + 8 * r) * PADDED + 8 * n + 2 * t) = make_float2(sums[n][2 * r], sums[n][2 * r + 1]);
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
            const float *const from = reinterpret_cast<const float *>(rings + w * RING) + row * PADDED + column;
            const float4 y = *reinterpret_cast<const float4 *>(from);
            x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
        }
        store_there(of_block(shared_address(exchange + (rank * PART + at % PART) * 4), at / PART), x);
    }
    MARK(11);
    cluster_arrive();
    cluster_wait();
    MARK(12);
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
    MARK(13);
}

// ---- The host's part: what decode.py calls.

constexpr int SLOTS = 2;             // groups of keys and values in a warp's ring
constexpr int SHARED = 227 << 10;    // bytes of shared memory that a block may take

// Bytes of shared memory that a block takes, without its notes.
template <int D, bool FP8>
constexpr int TAKEN = static_cast<int>(sizeof(Told)) + WARPS * (SLOTS * KEYS * D * 4 + (FP8 ? 128 : 0));

// Whether a block's notes lie in its shared memory, and not in `NsaDecode::notes`.
template <int D, bool FP8>
bool holds_notes(const NsaDecode &a) {
    return TAKEN<D, FP8> + static_cast<int64_t>(a.most_groups) * NOTES * 4 <= SHARED;
}

// Gives `use` the kernel of a step and how it is launched.
template <typename T, int D, bool FP8, typename Use>
cudaError_t launch(const NsaDecode &a, cudaStream_t stream, Use use) {
    const auto kernel = decode<T, D, SLOTS, FP8>;
    const int notes = holds_notes<D, FP8>(a) ? a.most_groups * NOTES * 4 : 0;
    // The most that a launch may ask for, and not what this one does: another thread may be about to launch with more.
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    if (error == cudaSuccess && a.cluster > 8) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(a.cluster, a.pairs);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = TAKEN<D, FP8> + (notes > HEADS * D * 4 ? notes : HEADS * D * 4);
    config.stream = stream;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim = {static_cast<unsigned>(a.cluster), 1, 1};
    config.attrs = attribute;
    config.numAttrs = 1;
    return use(config, kernel);
}

template <typename T, typename Use>
cudaError_t launch_widths(const NsaDecode &a, cudaStream_t stream, Use use) {
    if (a.width == 128) return a.fp8 ? launch<T, 128, true>(a, stream, use) : launch<T, 128, false>(a, stream, use);
    if (a.width == 64) return a.fp8 ? launch<T, 64, true>(a, stream, use) : launch<T, 64, false>(a, stream, use);
    return cudaErrorInvalidValue;
}

template <typename Use>
cudaError_t launch_types(const NsaDecode &a, cudaStream_t stream, Use use) {
    return a.bfloat16 ? launch_widths<__nv_bfloat16>(a, stream, use) : launch_widths<__half>(a, stream, use);
}

}  // namespace

// Of the sources and flags that this was built from.
extern "C" unsigned long long nsa_sources() { return NSA_SOURCES; }

// Floats of `notes` in global memory, 0 where shared memory holds them.
extern "C" long long nsa_decode_notes(const NsaDecode *a) {
    const bool held = a->width == 128 ? (a->fp8 ? holds_notes<128, true>(*a) : holds_notes<128, false>(*a))
                                      : (a->fp8 ? holds_notes<64, true>(*a) : holds_notes<64, false>(*a));
    return held ? 0 : static_cast<long long>(a->pairs) * a->cluster * a->most_groups * NOTES;
}

// How many clusters of `cluster` blocks the current device runs at once, or minus the error.
extern "C" int nsa_decode_clusters(const NsaDecode *a) {
    int clusters = 0;
    const cudaError_t error =
        launch_types(*a, nullptr, [&](const cudaLaunchConfig_t &config, auto kernel) { return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config); });
    return error == cudaSuccess ? clusters : -static_cast<int>(error);
}

// A step on a stream of the current device; what went wrong, or null.
extern "C" const char *nsa_decode(const NsaDecode *a, void *stream) {
    if (a->notes == nullptr && nsa_decode_notes(a) > 0) return "no memory was given for the notes";
    const cudaError_t error = launch_types(*a, static_cast<cudaStream_t>(stream), [&](const cudaLaunchConfig_t &config, auto kernel) {
        return cudaLaunchKernelEx(&config, kernel, *a);
    });
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
