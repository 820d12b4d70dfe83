// Attention of a warp to chosen blocks that lie in pages as e4m3, with a bfloat16 scale for each row of keys and of values.
#pragma once

#include "arguments.cuh"
#include "tiles.cuh"

namespace {

// A row of e4m3 is read by 16 bytes of a thread. Which of its chunks lies where depends on the row, so that no two of those that are read at once share a bank.
template <int BYTES>
__device__ __forceinline__ int small_place(int row, int chunk) {
    constexpr int MASK = BYTES / 16 - 1;
    return row * BYTES + ((chunk ^ ((((row >> 1) & 3) << 1 ^ (row & 1) << 2) & MASK)) << 4);
}

template <int BYTES>
__device__ __forceinline__ void fetch_small(uint32_t to, const char *from, int lane) {
#pragma unroll
    for (int at = lane; at < BYTES; at += 32) copy_async(to + small_place<BYTES>(at / (BYTES / 16), at % (BYTES / 16)), from + at * 16, true);
}

// Two e4m3 numbers as float16, which holds them to the bit.
__device__ __forceinline__ uint32_t widen(uint32_t two) {
    uint32_t r;
    asm("{.reg .b16 t; cvt.u16.u32 t, %1; cvt.rn.f16x2.e4m3x2 %0, t;}" : "=r"(r) : "r"(two));
    return r;
}

__device__ __forceinline__ uint32_t load_word(uint32_t from) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}

__host__ __device__ constexpr int small_slot(int D) { return KEYS * 2 * D + 64; }  // bytes of a group, with its scales

// Groups `from`, from + step, ... (`count` of them) of `units`: of each block its place, in blocks, and how many rows are there (all of them). Sums [16, D] go
// to acc, of which a thread has other columns than elsewhere: acc[n][i] is column (2 t + i % 2) D / 8 + n.
//
// Products are in float16: queries times a power of two that brings the largest to 2^14 ... 2^15. A key's scale multiplies its score. log2 of a value's is
// added to it: so weights are for what is stored and at most 1, whatever the scales, and their sum takes it back. LEFT slots from `slots` on.
template <typename T, int D, int LEFT>
__device__ __forceinline__ void attend_e4m3(float (&acc)[D / 8][4], Softmax &softmax, uint32_t (&q)[D / 16][4], const T *queries, const NsaDecode &a,
                                            const int2 *units, int from, int count, int step, uint32_t slots, int lane) {
    static_assert(D == 64 || D == 128);
    static_assert(LEFT >= 2);
    constexpr int SLOT = small_slot(D);
    const int g = lane >> 2, t = lane & 3;
    auto ask = [&](int number) {
        if (number < count) {
            const uint32_t to = slots + number % LEFT * SLOT;
            const int unit = from + number * step;
            const int64_t row = static_cast<int64_t>(units[unit / 4].x) * SELECT + unit % 4 * KEYS;
            fetch_small<D>(to, static_cast<const char *>(a.k_slc) + row * D, lane);
            fetch_small<D>(to + KEYS * D, static_cast<const char *>(a.v_slc) + row * D, lane);
            const char *const scales = static_cast<const char *>(lane < 2 ? a.k_scale : a.v_scale) + row * 2;
            if (lane < 4) copy_async(to + KEYS * 2 * D + lane * 16, scales + lane % 2 * 16, true);
        }
        commit();
    };
#pragma unroll
    for (int i = 0; i < LEFT - 1; ++i) ask(i);

    // While that is under way: queries in float16, with columns in the order that keys are read in, 16 in a row.
    float largest = 0.f;
#pragma unroll
    for (int n = 0; n < D / 16; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const T *const two = reinterpret_cast<const T *>(&q[n][i]);
            largest = fmaxf(largest, fmaxf(fabsf(static_cast<float>(two[0])), fabsf(static_cast<float>(two[1]))));
        }
    const int exponent = max(static_cast<int>(__reduce_max_sync(~0u, __float_as_uint(largest)) >> 23), 15);  // with its bias of 127
    const float fit = __uint_as_float(static_cast<uint32_t>(268 - exponent) << 23), back = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
    const float scale = a.scale * back;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            const int head = g + 8 * i;
            uint2 four = make_uint2(0, 0);
            if (head < a.group) four = *reinterpret_cast<const uint2 *>(queries + head * D + n / 4 * 64 + 16 * t + n % 4 * 4);
            const T *const low = reinterpret_cast<const T *>(&four.x), *const high = reinterpret_cast<const T *>(&four.y);
            q[n][i] = pack<__half>(static_cast<float>(low[0]) * fit, static_cast<float>(low[1]) * fit);
            q[n][i + 2] = pack<__half>(static_cast<float>(high[0]) * fit, static_cast<float>(high[1]) * fit);
        }

    float s[2][4], fade[2];
    uint32_t p[4];
    clear(acc);
    softmax = Softmax();
    for (int number = 0; number < count; ++number) {
        __syncwarp();
        ask(number + LEFT - 1);
        wait_copies<LEFT - 1>();
        __syncwarp();
        const uint32_t keys = slots + number % LEFT * SLOT, values = keys + KEYS * D, scales = values + KEYS * D;
        clear(s);
        float worth[2][2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int part = 0; part < D / 64; ++part) {
                const uint4 x = load_shared(keys + small_place<D>(g + 8 * n, part * 4 + t));
                const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) multiply<__half>(s[n], q[part * 4 + i], widen(words[i]), widen(words[i] >> 16));
            }
            const uint32_t of_keys = load_word(scales + 16 * n + 4 * t), of_values = load_word(scales + 32 + 16 * n + 4 * t);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float factor = __uint_as_float(i ? of_keys & 0xFFFF0000u : of_keys << 16) * scale;
                const float bonus = log2_fast(__uint_as_float(i ? of_values & 0xFFFF0000u : of_values << 16));
                worth[n][i] = exp2_fast(-bonus);
                s[n][i] = s[n][i] * factor + bonus;
                s[n][i + 2] = s[n][i + 2] * factor + bonus;
            }
        }
        softmax.step(s, fade);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float more = s[0][2 * r] * worth[0][0] + s[0][2 * r + 1] * worth[0][1] + s[1][2 * r] * worth[1][0] + s[1][2 * r + 1] * worth[1][1];
            softmax.total[r] = softmax.total[r] * fade[r] + more;
        }
        weights<__half>(p, s);
        fade_rows(acc, fade);
        // Of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 a thread reads D / 8 columns: the n-th of them is its column of a product's n-th tile.
        uint32_t rows[4][D / 32];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 2 * t + (i & 1) + 8 * (i >> 1);
            if constexpr (D == 128) {
                const uint4 x = load_shared(values + small_place<D>(row, g));
                rows[i][0] = x.x, rows[i][1] = x.y, rows[i][2] = x.z, rows[i][3] = x.w;
            } else {
                const uint32_t place = values + small_place<D>(row, g / 2) + g % 2 * 8;
                rows[i][0] = load_word(place), rows[i][1] = load_word(place + 4);
            }
        }
#pragma unroll
        for (int word = 0; word < D / 32; ++word) {
            const uint32_t low[2] = {__byte_perm(rows[0][word], rows[1][word], 0x5140), __byte_perm(rows[0][word], rows[1][word], 0x7362)};
            const uint32_t high[2] = {__byte_perm(rows[2][word], rows[3][word], 0x5140), __byte_perm(rows[2][word], rows[3][word], 0x7362)};
#pragma unroll
            for (int i = 0; i < 4; ++i) multiply<__half>(acc[word * 4 + i], p, widen(low[i / 2] >> i % 2 * 16), widen(high[i / 2] >> i % 2 * 16));
        }
    }
    softmax.finish();
}

}  // namespace
