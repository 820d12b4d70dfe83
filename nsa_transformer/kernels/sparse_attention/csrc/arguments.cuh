// What the host hands to the kernel, and the geometry that the kernel is written for.
#pragma once

extern "C" struct NsaDecode {
    const void *q, *gates;  // [B, Hq, D], [B, Hq, 3]
    void *out;              // [B, Hq, D]
    int *chosen;            // [B, Hkv, num_selected]
    const void *k_cmp, *v_cmp, *k_slc, *v_slc, *k_win, *v_win, *k_scale, *v_scale, *k_recent, *v_recent;  // as in `PagedKeysValues`
    const int *pages, *lengths;
    float *notes;  // NOTES floats for each of most_groups groups of every block, where shared memory does not hold them; else null
    float scale;   // of scores, times log2 e
    int pairs;     // of sequence and key/value head
    int cluster, kv_heads, group, max_pages;
    int most_groups;  // of 16 compressed keys that a block of a cluster may have
    int num_selected, num_initial, num_local, window, ring, threshold, recent;
    int width, bfloat16, float_gates, fp8;
};

namespace {

constexpr int STRIDE = 16, BLOCK = 32, SELECT = 64;  // tokens
constexpr int ROWS = 64, TOKENS = ROWS * STRIDE;     // compressed keys and tokens of a page

}  // namespace
