// Products of few rows with a weight matrix that is read once, at the speed of the memory: y = e(p(x) wᵀ).
//
// A block of 8 warps makes 16 outputs (a tile) of all rows at a time; its warps split k, 32 numbers at a time, and their sums meet in
// shared memory in a fixed order. A lane's 16 bytes of a weight row are operands of two mma steps: the sum's terms are permuted, the
// same way in w and x. Weights are under way before the kernel ahead is done (`overlap_wait`).
//
// Launch: 256 threads; dynamic shared memory: 5120 NT bytes for the sums, and for what stands before a product `rows` rows of
// `pitch(k)` bytes. NT: rows / 8, rounded up to a power of two.
#include "step.cuh"

enum Before { PLAIN, RMS_NORM, GATED_NORM };
enum Behind { BF16, F32, ADD, SWIGLU };

constexpr u32 WARPS = 8, DEPTH = 4, TOKEN_PITCH = 20;

// Bytes from row to row: two rows a quarter warp reads lie in different banks.
DEVICE u32 pitch(u32 k) { return (2 * k + 127) / 128 * 128 + 64; }

template <u32 NT, Before BEFORE, Behind BEHIND> DEVICE void product(const Product& p) {
    DYNAMIC_SHARED(memory);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const u32 per_tile = BEHIND == SWIGLU ? 8 : 16, tiles = (p.n + per_tile - 1) / per_tile;
    float* sums = (float*)memory; // [WARPS][8 NT][TOKEN_PITCH]
    u8* rows = memory + 5120 * NT;

    u32 w[DEPTH][2][4];
    const u32 own = ((p.k + 31) / 32 + WARPS - 1 - warp) / WARPS; // pieces of 32 numbers of this warp: every 8th
    auto load = [&](u32 (&to)[2][4], u32 tile, u32 piece) {
        const u32 at = 32 * (warp + WARPS * piece) + 8 * c;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            u32 row = BEHIND == SWIGLU ? 8 * tile + g : 16 * tile + g + 8 * half;
            row = (row < p.n ? row : p.n - 1) + (BEHIND == SWIGLU ? half * p.n : 0);
            if (at < p.k) {
                load_constant4(to[half], (const u16*)p.w + ((u64)row * p.k + at));
            } else {
#pragma unroll
                for (u32 i = 0; i < 4; i++) to[half][i] = 0;
            }
        }
    };
    auto load_first = [&](u32 tile) {
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++)
            if (d < own) load(w[d], tile, d);
    };
    if (blockIdx.x < tiles) load_first(blockIdx.x);
    overlap_next();
    overlap_wait();

    if (BEFORE != PLAIN) {
        for (u32 row = warp; row < p.rows; row += WARPS) {
            u16* to = (u16*)(rows + row * pitch(p.k));
            const u16* x = (const u16*)p.x + (u64)row * p.x_stride;
            if (BEFORE == RMS_NORM) rms_norm_row(to, x, p.scale, p.k, p.eps);
            else gated_norm_row(to, x, p.scale, p.shift, p.gate ? (const u16*)p.gate + (u64)row * p.gate_stride : (const u16*)0, p.k, p.eps);
            if (p.normed && blockIdx.x == 0) {
                __syncwarp();
                for (u32 i = 8 * lane; i < p.k; i += 256) *(uint4*)((u16*)p.normed + (u64)row * p.k + i) = *(const uint4*)(to + i);
            }
        }
        __syncthreads();
    }

    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float sum[NT][4] = {};
        for (u32 first = 0; first < own; first += DEPTH) {
#pragma unroll
            for (u32 d = 0; d < DEPTH; d++) {
                if (first + d >= own) break;
                const u32 at = 32 * (warp + WARPS * (first + d)) + 8 * c;
                u32 a[2][4] = {{w[d][0][0], w[d][1][0], w[d][0][1], w[d][1][1]}, {w[d][0][2], w[d][1][2], w[d][0][3], w[d][1][3]}};
                if (first + d + DEPTH < own) load(w[d], tile, first + d + DEPTH);
#pragma unroll
                for (u32 t = 0; t < NT; t++) {
                    const u32 row = 8 * t + g;
                    u32 x[4] = {0, 0, 0, 0};
                    if (row < p.rows && at < p.k) {
                        if (BEFORE == PLAIN) load_global4(x, (const u16*)p.x + ((u64)row * p.x_stride + at));
                        else load_shared4(x, shared_address(rows + row * pitch(p.k) + 2 * at));
                    }
                    mma_k16(sum[t], a[0], x[0], x[1]);
                    mma_k16(sum[t], a[1], x[2], x[3]);
                }
            }
        }
        if (tile + gridDim.x < tiles) load_first(tile + gridDim.x);
        // The sums of the tile before have been read.
        if (tile != blockIdx.x) __syncthreads();
#pragma unroll
        for (u32 t = 0; t < NT; t++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) sums[(warp * 8 * NT + 8 * t + 2 * c + i % 2) * TOKEN_PITCH + g + i / 2 * 8] = sum[t][i];
        __syncthreads();
        auto total = [&](u32 token, u32 output) {
            float x = 0.0f;
#pragma unroll
            for (u32 v = 0; v < WARPS; v++) x += sums[(v * 8 * NT + token) * TOKEN_PITCH + output];
            return x;
        };
        for (u32 i = threadIdx.x; i < 8 * NT * per_tile; i += 32 * WARPS) {
            const u32 token = i / per_tile, output = i % per_tile, n = per_tile * tile + output;
            if (token >= p.rows || n >= p.n) continue;
            const u64 at = (u64)token * p.y_stride + n;
            float x = total(token, output);
            if (BEHIND == F32) {
                ((float*)p.y)[at] = x;
                continue;
            }
            u16* y = (u16*)p.y + at;
            if (BEHIND == ADD) x += bf16_f32(*y);
            if (BEHIND == SWIGLU) {
                const float gate = round_bf16(x), up = round_bf16(total(token, output + 8));
                x = up * (gate / (1.0f + __expf(-gate)));
            }
            *y = bf16_bits(x);
        }
    }
}

#define PRODUCT(name, nt, before, behind, blocks)                                                                                     \
    KERNEL __launch_bounds__(256, blocks) name(const __grid_constant__ Product p) { product<nt, before, behind>(p); }

PRODUCT(norm_product, 1, RMS_NORM, BF16, 3)
PRODUCT(norm_product_swiglu, 1, RMS_NORM, SWIGLU, 3)
PRODUCT(gated_product_add, 1, GATED_NORM, ADD, 2)
PRODUCT(product_bf16_8, 1, PLAIN, BF16, 3)
PRODUCT(product_f32_8, 1, PLAIN, F32, 3)
PRODUCT(product_add_8, 1, PLAIN, ADD, 3)
PRODUCT(product_bf16_16, 2, PLAIN, BF16, 2)
PRODUCT(product_f32_16, 2, PLAIN, F32, 2)
PRODUCT(product_add_16, 2, PLAIN, ADD, 2)
PRODUCT(product_swiglu_16, 2, PLAIN, SWIGLU, 2)
PRODUCT(product_bf16_32, 4, PLAIN, BF16, 2)
PRODUCT(product_f32_32, 4, PLAIN, F32, 2)
PRODUCT(product_add_32, 4, PLAIN, ADD, 2)
PRODUCT(product_swiglu_32, 4, PLAIN, SWIGLU, 2)
PRODUCT(product_bf16_64, 8, PLAIN, BF16, 2)
PRODUCT(product_f32_64, 8, PLAIN, F32, 2)
PRODUCT(product_add_64, 8, PLAIN, ADD, 2)
PRODUCT(product_swiglu_64, 8, PLAIN, SWIGLU, 2)
