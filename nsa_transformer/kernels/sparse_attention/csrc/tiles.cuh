// Groups of 16 keys and values of a warp: from memory to shared memory, their products with 16 heads by mma.sync m16n8k16, and the softmax over them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace {

constexpr int HEADS = 16;  // rows of a product: query heads of a key/value head, the rest zeros
constexpr int KEYS = 16;   // of a group
constexpr float INFINITE = __builtin_inff();

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

template <int N>
__device__ __forceinline__ void clear(float (&acc)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
}

// Of 16 heads and 16 keys: products [16, 16] as two tiles of mma's accumulators.
template <typename T, int D>
__device__ __forceinline__ void score(float (&s)[2][4], const uint32_t (&q)[D / 16][4], uint32_t keys, int lane) {
    clear(s);
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

// 16 rows of keys or values, of BYTES each, into the L2 cache.
template <int BYTES>
__device__ __forceinline__ void fetch_ahead(const char *from, int lane) {
    if (lane * 128 < KEYS * BYTES) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + lane * 128) : "memory");
}

}  // namespace
