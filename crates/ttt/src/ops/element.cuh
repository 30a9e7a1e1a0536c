// T, the type of activations: float, or bf16 as bits with TTT_BF16.
#pragma once
#include "prelude.cuh"

#ifdef TTT_BF16
typedef u16 T;
DEVICE float number(u16 x) { return bf16_f32(x); }
DEVICE void put(u16& to, float x) { to = bf16_bits(x); }
#else
typedef float T;
DEVICE void put(float& to, float x) { to = x; }
#endif
DEVICE float number(float x) { return x; }

// Sum over a warp, in every lane, always the same tree.
DEVICE float sum_lanes(float x) {
#pragma unroll
    for (u32 d = 16; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}
