// What stands between the products of a decoding step, a row at a time.
#include "step.cuh"

constexpr u32 MAX_TAPS = 8;

// x + conv(norm(x)) in place. A block of 256 threads a row.
KERNEL __launch_bounds__(256) pre_conv(const __grid_constant__ PreConv p) {
    DYNAMIC_SHARED(memory);
    float* sums = (float*)memory; // [8]
    const u32 row = blockIdx.x;
    overlap_next();
    const u32 len = p.segments[4 * row + 1], slot = p.segments[4 * row + 2];
    overlap_wait();
    if (len == 0) return;
    u16* x = (u16*)p.x + (u64)row * p.cols;
    const u32 memory_rows = p.taps - 1;
    u16* window = (u16*)p.window + (u64)slot * memory_rows * p.cols;
    const float* weights = p.weight;
    float sum = 0.0f, v[8];
    for (u32 c = 8 * threadIdx.x; c < p.cols; c += 8 * 256) {
        load_row(v, x + c);
#pragma unroll
        for (u32 j = 0; j < 8; j++) sum += v[j] * v[j];
    }
    const float r = rsqrtf(all_threads(sum, sums) / p.cols + p.eps);
    // A thread's columns: everything is loaded before anything is stored.
    for (u32 c = 8 * threadIdx.x; c < p.cols; c += 8 * 256) {
        float now[8], y[8];
        u32 old[MAX_TAPS - 1][4];
        load_row(v, x + c);
        load_floats(now, p.scale + c);
        load_floats(y, p.bias + c);
#pragma unroll
        for (u32 i = 0; i < MAX_TAPS - 1; i++)
            if (i < memory_rows) load_global4(old[i], window + i * p.cols + c);
#pragma unroll
        for (u32 j = 0; j < 8; j++) now[j] = round_bf16(v[j] * (r * now[j]));
        if (p.taps == 4) {
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                float w[4];
                load_global4(w, weights + 4 * (c + j));
#pragma unroll
                for (u32 i = 0; i < 3; i++) y[j] += w[i] * (j % 2 ? high_f32(old[i][j / 2]) : low_f32(old[i][j / 2]));
                y[j] += w[3] * now[j];
            }
        } else {
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
#pragma unroll
                for (u32 i = 0; i < MAX_TAPS - 1; i++)
                    if (i < memory_rows) y[j] += weights[(c + j) * p.taps + i] * (j % 2 ? high_f32(old[i][j / 2]) : low_f32(old[i][j / 2]));
                y[j] += weights[(c + j) * p.taps + memory_rows] * now[j];
            }
        }
        u32 pairs[4];
#pragma unroll
        for (u32 i = 1; i < MAX_TAPS - 1; i++)
            if (i < memory_rows) store_global4(window + (i - 1) * p.cols + c, old[i]);
        pack(pairs, now);
        if (memory_rows > 0) store_global4(window + (memory_rows - 1) * p.cols + c, pairs);
#pragma unroll
        for (u32 j = 0; j < 8; j++) v[j] += round_bf16(y[j]);
        pack(pairs, v);
        store_global4(x + c, pairs);
    }
}

// y = gelu(gate) * LayerNorm(x), without a gate the norm alone; or x / sqrt(mean(x²) + eps) * scale. A block of 256 threads a row, 64
// bytes of shared memory; `n` is not used. The first 8 columns of a thread stay in registers.
template <bool GATED> DEVICE void norm_row(const Product& p) {
    DYNAMIC_SHARED(scratch);
    const u32 row = blockIdx.x, first = 8 * threadIdx.x;
    const u16* x = (const u16*)p.x + (u64)row * p.x_stride;
    const u16* gate = GATED && p.gate ? (const u16*)p.gate + (u64)row * p.gate_stride : (const u16*)0;
    float scale[8], shift[8], held[8], open[8], v[8], sum = 0.0f, mean = 0.0f;
    if (first < p.k) {
        load_floats(scale, p.scale + first);
        if (GATED) load_floats(shift, p.shift + first);
    }
    overlap_next();
    overlap_wait();
    if (first < p.k) {
        load_row(held, x + first);
        if (gate) load_row(open, gate + first);
    }
    auto column = [&](u32 c) {
        if (c != first) return load_row(v, x + c);
#pragma unroll
        for (u32 i = 0; i < 8; i++) v[i] = held[i];
    };
    if (GATED) {
        for (u32 c = first; c < p.k; c += 8 * 256) {
            column(c);
#pragma unroll
            for (u32 i = 0; i < 8; i++) mean += v[i];
        }
        mean = all_threads(mean, (float*)scratch + 8) / p.k;
    }
    for (u32 c = first; c < p.k; c += 8 * 256) {
        column(c);
#pragma unroll
        for (u32 i = 0; i < 8; i++) sum += (v[i] - mean) * (v[i] - mean);
    }
    const float r = rsqrtf(all_threads(sum, (float*)scratch) / p.k + p.eps);
    for (u32 c = first; c < p.k; c += 8 * 256) {
        column(c);
        if (c != first) {
            load_floats(scale, p.scale + c);
            if (GATED) load_floats(shift, p.shift + c);
            if (gate) load_row(open, gate + c);
        }
        u32 pairs[4];
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            v[i] = (v[i] - mean) * (r * scale[i]);
            if (GATED) v[i] += shift[i];
            if (gate) v[i] = round_bf16(v[i]) * gelu(open[i]);
        }
        pack(pairs, v);
        store_global4((u16*)p.y + (u64)row * p.y_stride + c, pairs);
    }
}
KERNEL __launch_bounds__(256) gated_norm(const __grid_constant__ Product p) { norm_row<true>(p); }
KERNEL __launch_bounds__(256) rms_norm(const __grid_constant__ Product p) { norm_row<false>(p); }
