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
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < p.cols; c += 256) sum += bf16_f32(x[c]) * bf16_f32(x[c]);
    sum = all_lanes(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; i++) sum += sums[i];
    const float r = rsqrtf(sum / p.cols + p.eps);
    for (u32 c = threadIdx.x; c < p.cols; c += 256) {
        const float before = bf16_f32(x[c]), now = round_bf16(before * (r * p.scale[c]));
        float y = p.bias[c];
#pragma unroll
        for (u32 i = 0; i < MAX_TAPS - 1; i++) {
            if (i >= memory_rows) break;
            const u16 old = window[i * p.cols + c];
            y += p.weight[c * p.taps + i] * bf16_f32(old);
            if (i > 0) window[(i - 1) * p.cols + c] = old;
        }
        y += p.weight[c * p.taps + memory_rows] * now;
        if (memory_rows > 0) window[(memory_rows - 1) * p.cols + c] = bf16_bits(now);
        x[c] = bf16_bits(before + round_bf16(y));
    }
}

// gelu(gate) * LayerNorm(x): a warp a row, 8 rows a block. `n` is not used.
KERNEL __launch_bounds__(256) gated_norm(const __grid_constant__ Product p) {
    overlap_next();
    overlap_wait();
    const u32 row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= p.rows) return;
    const u16* gate = p.gate ? (const u16*)p.gate + (u64)row * p.gate_stride : (const u16*)0;
    gated_norm_row((u16*)p.y + (u64)row * p.y_stride, (const u16*)p.x + (u64)row * p.x_stride, p.scale, p.shift, gate, p.k, p.eps);
}
// x / sqrt(mean(x²) + eps) * scale, likewise.
KERNEL __launch_bounds__(256) rms_norm(const __grid_constant__ Product p) {
    overlap_next();
    overlap_wait();
    const u32 row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row < p.rows) rms_norm_row((u16*)p.y + (u64)row * p.y_stride, (const u16*)p.x + (u64)row * p.x_stride, p.scale, p.k, p.eps);
}
