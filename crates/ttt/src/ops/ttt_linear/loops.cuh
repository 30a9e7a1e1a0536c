// Loops of the plain kernels: a block of 256 threads over elements or rows, bf16 and f32 alike.
#pragma once
#include "prelude.cuh"

constexpr u32 THREADS = 256;

template <bool BF16> struct Elements;
template <> struct Elements<true> {
    typedef u16 Type;
    static DEVICE float load(const void* p, i64 at) { return bf16_f32(((const u16*)p)[at]); }
    static DEVICE void store(void* p, i64 at, float x) { ((u16*)p)[at] = bf16_bits(x); }
    static DEVICE float round(float x) { return round_bf16(x); }
};
template <> struct Elements<false> {
    typedef float Type;
    static DEVICE float load(const void* p, i64 at) { return ((const float*)p)[at]; }
    static DEVICE void store(void* p, i64 at, float x) { ((float*)p)[at] = x; }
    static DEVICE float round(float x) { return x; }
};

DEVICE float warp_sum(float x) {
    for (u32 step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

// f(i) for every i < n, over the block's threads.
template <class F> DEVICE void each(u32 n, F f) {
    for (u32 i = threadIdx.x; i < n; i += THREADS) f(i);
}
// f(i) for every i < n, by whole warps.
template <class F> DEVICE void each_row(u32 n, F f) {
    for (u32 i = threadIdx.x / 32; i < n; i += THREADS / 32) f(i);
}
// Sum over c < d of f(c), to all lanes of the warp.
template <class F> DEVICE float row_sum(u32 d, F f) {
    float sum = 0.0f;
    for (u32 c = threadIdx.x & 31; c < d; c += 32) sum += f(c);
    return warp_sum(sum);
}
template <class F> DEVICE float dot(u32 n, F f) {
    float sum = 0.0f;
    for (u32 i = 0; i < n; i++) sum += f(i);
    return sum;
}
