// What the kernels of a decoding step are launched with; `repr(C)` twins are in `cuda.rs`. Activations are bf16, strides are in
// elements, rows of every matrix start 16-byte aligned. A row is one token of one sequence.
#pragma once
#include "prelude.cuh"

// y = e(p(x) wᵀ) for up to 16 rows: what p and e are says the kernel's name.
struct Product {
    const void* x;      // [rows, k]; of a gated product z
    const void* w;      // [n, k]; of swiglu [2 n, k]: gate, then up
    void* y;            // [rows, n]: bf16, or f32; of an adding product also read
    const float* scale; // [k]: weight of the norm
    const float* shift; // [k]: bias of the LayerNorm
    const void* gate;   // [rows, k], or null
    void* normed;       // [rows, k], written: p(x). Null: not wanted
    u32 x_stride, y_stride, gate_stride;
    u32 rows, n, k; // k a multiple of 8
    float eps;
};

// x + conv(norm(x)) in place, moving the windows on.
struct PreConv {
    void* x;             // [rows, cols]
    const float* scale;  // [cols]
    const float* weight; // [cols, taps]
    const float* bias;   // [cols]
    void* window;        // [slots, taps - 1, cols]
    const u32* segments; // [rows][first row, length, slot, phase]; length 0: nothing is done
    u32 cols, taps;      // taps <= 8
    float eps;
};

// A product of the norm of x + conv(norm(x)), the convolution having 4 taps; the windows are moved on by who reads `now`.
struct ConvProduct {
    Product product;         // `scale` is that of the second norm
    const float* conv_scale; // [k]: weight of the first norm
    const float* weight;     // [k, 4]
    const float* bias;       // [k]
    const void* window;      // [slots, 3, k]
    const u32* segments;     // [rows][first row, length, slot, phase]
    void* residual;          // [rows, k], written: x + conv(norm(x))
    void* now;               // [rows, k], written: norm(x), which comes next into the windows
};

DEVICE void unpack(float (&x)[8], const u32 (&pairs)[4]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) x[2 * i] = low_f32(pairs[i]), x[2 * i + 1] = high_f32(pairs[i]);
}
DEVICE void pack(u32 (&pairs)[4], const float (&x)[8]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) pairs[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}
DEVICE void load_row(float (&x)[8], const u16* at) {
    u32 pairs[4];
    load_global4(pairs, at);
    unpack(x, pairs);
}
DEVICE void load_floats(float (&x)[8], const float* at) {
    float part[4];
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        load_global4(part, at + 4 * h);
#pragma unroll
        for (u32 i = 0; i < 4; i++) x[4 * h + i] = part[i];
    }
}
DEVICE float all_lanes(float x) {
#pragma unroll
    for (u32 lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_WARP, x, lane);
    return x;
}

// gelu, tanh form.
DEVICE float gelu(float x) {
    const float e = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + (1.0f - 2.0f / (1.0f + __expf(2.0f * e))));
}

// The same in all 256 threads of a block, `sums` being 8 floats.
DEVICE float all_threads(float x, float* sums) {
    x = all_lanes(x);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; i++) x += sums[i];
    return x;
}
