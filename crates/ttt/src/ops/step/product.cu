// Products of few rows with a weight matrix that is read once, at the speed of the memory: y = e(p(x) wᵀ).
//
// A block of 8 warps makes 16 outputs (a tile) of all rows at a time, or 8 where there are too few outputs for all multiprocessors; its
// warps split k, 32 numbers at a time, and their sums meet in shared memory in a fixed order. A lane's 16 bytes of a weight row are operands of two mma steps: the sum's terms are permuted, the
// same way in w and x. Weights are under way before the kernel ahead is done (`overlap_wait`).
//
// Launch: 256 threads; dynamic shared memory: 5120 NT bytes for the sums, and for what stands before a product 64 bytes and `rows`
// rows of `pitch(k)` bytes. NT: rows / 8, rounded up to a power of two.
#include "step.cuh"

enum Before { PLAIN, RMS_NORM, GATED_NORM, CONV_NORM };
enum Behind { BF16, F32, ADD, SWIGLU };

constexpr u32 WARPS = 8, TOKEN_PITCH = 20, WEIGHT_REGISTERS = 32;

// Bytes from row to row: two rows a quarter warp reads lie in different banks.
DEVICE u32 pitch(u32 k) { return (2 * k + 127) / 128 * 128 + 64; }

// A row of at most 8 through its norm, several warps a row: few rows are spread over all. What is loaded before the wait, and after.
template <Before BEFORE> struct Norm {
    static constexpr u32 HELD = 4; // pieces of 8 columns that a lane keeps in registers
    const Product& p;
    u32 per, row, first, step;
    float scale[8], shift[8], inverse;
    DEVICE Norm(const Product& params) : p(params) {
        const u32 warp = threadIdx.x / 32;
        per = p.rows <= 1 ? 8 : p.rows <= 2 ? 4 : p.rows <= 4 ? 2 : 1;
        row = warp / per, first = 8 * (32 * (warp % per) + threadIdx.x % 32), step = 256 * per;
        inverse = 1.0f / (float)p.k;
        if (here(first)) constants(first);
    }
    DEVICE bool here(u32 c) const { return row < p.rows && c < p.k; }
    DEVICE void constants(u32 c) {
        load_floats(scale, p.scale + c);
        if (BEFORE == GATED_NORM) load_floats(shift, p.shift + c);
    }
    // The same in all lanes of the row's warps.
    DEVICE float all_of_row(float x, float* parts) const {
        const u32 warp = threadIdx.x / 32;
        x = all_lanes(x);
        if (threadIdx.x % 32 == 0) parts[warp] = x;
        __syncthreads();
        if (per > 1) {
            x = 0.0f;
#pragma unroll
            for (u32 i = 0; i < WARPS; i++) x += i < per ? parts[(warp / per * per + i) % WARPS] : 0.0f;
        }
        return x;
    }
    // Calls `work` with the values of each piece of 8 columns.
    template <class F> DEVICE void each(const u16* x, const u32 (&held)[HELD][4], const F& work) const {
        float v[8];
#pragma unroll
        for (u32 j = 0; j < HELD; j++)
            if (here(first + j * step)) unpack(v, held[j]), work(v, first + j * step);
        for (u32 c = first + HELD * step; here(c); c += step) load_row(v, x + c), work(v, c);
    }
    // `parts`: 16 floats.
    DEVICE void run(u8* rows, u32 pitch, float* parts) {
        const u16* x = (const u16*)p.x + (u64)row * p.x_stride;
        const u16* gate = BEFORE == GATED_NORM && p.gate ? (const u16*)p.gate + (u64)row * p.gate_stride : (const u16*)0;
        u32 held[HELD][4], open[4];
#pragma unroll
        for (u32 j = 0; j < HELD; j++)
            if (here(first + j * step)) load_global4(held[j], x + first + j * step);
        if (gate && here(first)) load_global4(open, gate + first);
        float sum = 0.0f, mean = 0.0f;
        if (BEFORE == GATED_NORM) {
            each(x, held, [&](float (&v)[8], u32) {
#pragma unroll
                for (u32 i = 0; i < 8; i++) mean += v[i];
            });
            mean = all_of_row(mean, parts + 8) * inverse;
        }
        each(x, held, [&](float (&v)[8], u32) {
#pragma unroll
            for (u32 i = 0; i < 8; i++) sum += (v[i] - mean) * (v[i] - mean);
        });
        const float r = rsqrtf(all_of_row(sum, parts) * inverse + p.eps);
        each(x, held, [&](float (&v)[8], u32 c) {
            u32 pairs[4];
            if (c != first) constants(c);
#pragma unroll
            for (u32 i = 0; i < 8; i++) v[i] = (v[i] - mean) * (r * scale[i]);
            if (BEFORE == GATED_NORM) {
#pragma unroll
                for (u32 i = 0; i < 8; i++) v[i] += shift[i];
                if (gate) {
                    if (c != first) load_global4(open, gate + c);
                    float a[8];
                    unpack(a, open);
#pragma unroll
                    for (u32 i = 0; i < 8; i++) v[i] = round_bf16(v[i]) * gelu(a[i]);
                }
            }
            pack(pairs, v);
            store_shared4(shared_address(rows + row * pitch + 2 * c), pairs);
            if (p.normed && blockIdx.x == 0) store_global4((u16*)p.normed + (u64)row * p.k + c, pairs);
        });
    }
};

// x + conv(norm(x)), then another norm, of a row of at most 8.
struct ConvNorm {
    const ConvProduct& p;
    Norm<RMS_NORM> norm;
    float taps[8][4];
    u32 slot;
    DEVICE ConvNorm(const ConvProduct& params) : p(params), norm(params.product) {
        slot = norm.row < p.product.rows ? p.segments[4 * norm.row + 2] : 0;
        if (norm.here(norm.first)) load_taps(norm.first);
    }
    DEVICE void load_taps(u32 c) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) load_global4(taps[i], p.weight + 4 * (c + i));
    }
    DEVICE void run(u8* rows, u32 pitch, float* parts) {
        const u32 k = p.product.k;
        const u16* x = (const u16*)p.product.x + (u64)norm.row * p.product.x_stride;
        const u64 at = (u64)norm.row * k;
        float v[8], sum = 0.0f;
        for (u32 c = norm.first; norm.here(c); c += norm.step) {
            load_row(v, x + c);
#pragma unroll
            for (u32 i = 0; i < 8; i++) sum += v[i] * v[i];
        }
        const float r = rsqrtf(norm.all_of_row(sum, parts + 8) * norm.inverse + p.product.eps);
        sum = 0.0f;
        for (u32 c = norm.first; norm.here(c); c += norm.step) {
            float now[8], y[8];
            u32 pairs[4], old[3][4];
            load_row(v, x + c);
            load_floats(now, p.conv_scale + c);
            load_floats(y, p.bias + c);
            if (c != norm.first) load_taps(c);
#pragma unroll
            for (u32 i = 0; i < 3; i++) load_global4(old[i], (const u16*)p.window + ((u64)slot * 3 + i) * k + c);
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                now[j] = round_bf16(v[j] * (r * now[j]));
#pragma unroll
                for (u32 i = 0; i < 3; i++) y[j] += taps[j][i] * (j % 2 ? high_f32(old[i][j / 2]) : low_f32(old[i][j / 2]));
                y[j] += taps[j][3] * now[j];
                v[j] = round_bf16(v[j] + round_bf16(y[j]));
                sum += v[j] * v[j];
            }
            if (blockIdx.x == 0) pack(pairs, now), store_global4((u16*)p.now + at + c, pairs);
            pack(pairs, v);
            if (blockIdx.x == 0) store_global4((u16*)p.residual + at + c, pairs);
            store_shared4(shared_address(rows + norm.row * pitch + 2 * c), pairs);
        }
        const float r2 = rsqrtf(norm.all_of_row(sum, parts) * norm.inverse + p.product.eps);
        for (u32 c = norm.first; norm.here(c); c += norm.step) {
            u32 pairs[4];
            load_shared4(pairs, shared_address(rows + norm.row * pitch + 2 * c));
            unpack(v, pairs);
            if (c != norm.first) norm.constants(c);
#pragma unroll
            for (u32 i = 0; i < 8; i++) v[i] *= r2 * norm.scale[i];
            pack(pairs, v);
            store_shared4(shared_address(rows + norm.row * pitch + 2 * c), pairs);
            if (blockIdx.x == 0) store_global4((u16*)p.product.normed + at + c, pairs);
        }
    }
};

DEVICE const Product& product_of(const Product& p) { return p; }
DEVICE const Product& product_of(const ConvProduct& p) { return p.product; }

template <u32 NT, Before BEFORE, Behind BEHIND, class Params> DEVICE void product(const Params& params) {
    const Product& p = product_of(params);
    DYNAMIC_SHARED(memory);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    constexpr bool HALF = BEHIND == ADD; // 8 outputs: the lower rows of A are zeros
    constexpr u32 HALVES = HALF ? 1 : 2, DEPTH = WEIGHT_REGISTERS / (4 * HALVES); // pieces of weights under way
    constexpr u32 per_tile = HALF || BEHIND == SWIGLU ? 8 : 16;
    const u32 tiles = (p.n + per_tile - 1) / per_tile;
    float* sums = (float*)memory; // [WARPS][8 NT][TOKEN_PITCH]
    u8* rows = memory + 5120 * NT + 64;

    u32 w[DEPTH][HALVES][4];
    const u32 own = ((p.k + 31) / 32 + WARPS - 1 - warp) / WARPS; // pieces of 32 numbers of this warp: every 8th
    auto load = [&](u32 (&to)[HALVES][4], u32 tile, u32 piece) {
        const u32 at = 32 * (warp + WARPS * piece) + 8 * c;
#pragma unroll
        for (u32 half = 0; half < HALVES; half++) {
            u32 row = per_tile * tile + g + (BEHIND == SWIGLU ? 0 : 8 * half);
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
    if constexpr (BEFORE == CONV_NORM) {
        ConvNorm before(params);
        overlap_next();
        overlap_wait();
        before.run(rows, pitch(p.k), (float*)(memory + 5120 * NT));
        __syncthreads();
    } else if constexpr (BEFORE != PLAIN) {
        Norm<BEFORE> norm(p);
        overlap_next();
        overlap_wait();
        norm.run(rows, pitch(p.k), (float*)(memory + 5120 * NT));
        __syncthreads();
    } else {
        overlap_next();
        overlap_wait();
    }

    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float sum[NT][4] = {};
        for (u32 first = 0; first < own; first += DEPTH) {
#pragma unroll
            for (u32 d = 0; d < DEPTH; d++) {
                if (first + d >= own) break;
                const u32 at = 32 * (warp + WARPS * (first + d)) + 8 * c;
                u32 a[2][4];
#pragma unroll
                for (u32 i = 0; i < 4; i++) a[i / 2][i % 2 * 2] = w[d][0][i], a[i / 2][i % 2 * 2 + 1] = HALF ? 0 : w[d][HALVES - 1][i];
                // All loads of these terms before the first product of them.
                u32 x[NT][4];
#pragma unroll
                for (u32 t = 0; t < NT; t++) {
                    const u32 row = 8 * t + g;
                    const bool here = row < p.rows && at < p.k;
#pragma unroll
                    for (u32 i = 0; i < 4; i++) x[t][i] = 0;
                    if (!here) continue;
                    if (BEFORE == PLAIN) load_global4(x[t], (const u16*)p.x + ((u64)row * p.x_stride + at));
                    else load_shared4(x[t], shared_address(rows + row * pitch(p.k) + 2 * at));
                }
                if (first + d + DEPTH < own) load(w[d], tile, first + d + DEPTH);
#pragma unroll
                for (u32 t = 0; t < NT; t++) {
                    mma_k16(sum[t], a[0], x[t][0], x[t][1]);
                    mma_k16(sum[t], a[1], x[t][2], x[t][3]);
                }
            }
        }
        if (tile + gridDim.x < tiles) load_first(tile + gridDim.x);
        // The sums of the tile before have been read.
        if (tile != blockIdx.x) __syncthreads();
#pragma unroll
        for (u32 t = 0; t < NT; t++)
#pragma unroll
            for (u32 i = 0; i < 2 * HALVES; i++) sums[(warp * 8 * NT + 8 * t + 2 * c + i % 2) * TOKEN_PITCH + g + i / 2 * 8] = sum[t][i];
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

KERNEL __launch_bounds__(256, 2) conv_norm_product(const __grid_constant__ ConvProduct p) { product<1, CONV_NORM, BF16>(p); }
PRODUCT(norm_product, 1, RMS_NORM, BF16, 2)
PRODUCT(norm_product_swiglu, 1, RMS_NORM, SWIGLU, 2)
PRODUCT(gated_product_add, 1, GATED_NORM, ADD, 2)
PRODUCT(product_bf16_8, 1, PLAIN, BF16, 3)
PRODUCT(product_f32_8, 1, PLAIN, F32, 3)
PRODUCT(product_add_8, 1, PLAIN, ADD, 3)
PRODUCT(product_bf16_16, 2, PLAIN, BF16, 2)
PRODUCT(product_f32_16, 2, PLAIN, F32, 2)
PRODUCT(product_add_16, 2, PLAIN, ADD, 2)
PRODUCT(product_swiglu_16, 2, PLAIN, SWIGLU, 2)
