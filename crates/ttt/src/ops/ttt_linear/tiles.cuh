// Layouts that the fast TTT-Linear kernels share. A block is one head of one sequence: HEAD_DIM / 16 warps, warp w owns 16 output
// columns [16 w, 16 w + 16) of W, as rows of Wᵀ [out, in] in f32 accumulators: n8 tile j holds in 8 j.. (PTX ISA, mma.m16n8k16; g, c
// as in prelude.cuh). A mini-batch is a tile of 16 tokens, zero behind the last: a zero row with lr = 0 changes nothing.
//
// Three layouts of a [16 tokens, 16 columns of the warp] block:
//   D    f32, accumulator of a [out, token] product: (g | g + 8, token 8 t + 2c | + 1)
//   A    bf16, operand [out, token], the packed D layout
//   row  lane = token + 16 half: 8 columns [16 w + 8 half, ..) of one token. LayerNorm sums are sums over a lane's 8 numbers, two
//        lanes and the warps; loads and stores are 16 bytes.
#pragma once
#include "params.cuh"

#ifndef HEAD_DIM
#error "compile with -D HEAD_DIM=64 (a multiple of 16 up to 128)"
#endif

constexpr u32 D = HEAD_DIM;
// Blocks an SM that registers must leave room for; more than fit in shared memory would only cost registers.
#ifdef BLOCKS_PER_SM
constexpr u32 FORWARD_BLOCKS = BLOCKS_PER_SM, BACKWARD_BLOCKS = BLOCKS_PER_SM;
#else
constexpr u32 BACKWARD_BLOCKS = D > 64 ? 1 : __CUDA_ARCH__ >= 900 ? 3 : __CUDA_ARCH__ == 800 ? 2 : 1;
constexpr u32 FORWARD_BLOCKS = D > 96 ? 1 : D > 64 ? (__CUDA_ARCH__ >= 900 ? 2 : 1) : __CUDA_ARCH__ >= 900 ? 3 : 2;
#endif
constexpr u32 TOKENS = 16;
constexpr u32 WARPS = D / 16;
constexpr u32 THREADS = 32 * WARPS;
constexpr u32 STEPS = D / 16;       // k16 steps of a product over d
constexpr u32 STATE = D * D + D;    // S
constexpr u32 PITCH = 2 * D + 16;   // bytes from row to row of a bf16 tile: no two of 8 rows share a bank
constexpr u32 TILE = TOKENS * PITCH;
constexpr u32 PATCH_PITCH = 20;     // floats from token to token of a warp's f32 patch [16, 16]
constexpr u32 PATCH = 4 * TOKENS * PATCH_PITCH;
constexpr u32 SMALL_PITCH = 48;       // bytes from token to token of a warp's bf16 tile [16, 16]
constexpr u32 ONES = 0x3f803f80u;   // bf16 1, 1
constexpr float INV_D = 1.0f / D;

struct Lane {
    u32 warp, lane, g, c, token, half;
    u32 row;   // ldmatrix row of a tile's first 16 columns; the four matrices are the parts of an A operand [token, column], or
               // transposed the parts b0, b1 of two B operands [token, column]: first and second 8 columns
    u32 row_b; // the same with the middle matrices swapped: two B operands [column, token], or transposed A [column, token]
    u32 own;   // from a tile's first column to this warp's first
    DEVICE Lane() {
        warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, token = lane % 16, half = lane / 16;
        row = token * PITCH + half * 16, row_b = (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16, own = 32 * warp;
    }
    // First of this lane's 8 columns.
    DEVICE u32 column() const { return 16 * warp + 8 * half; }
};

// d (+)= A B; the first step of a sum starts from c.
DEVICE void mma_step(u32 step, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    if (step == 0) mma_k16(d, a, b0, b1, c);
    else mma_k16(d, a, b0, b1);
}
DEVICE void mma_step(u32 step, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (step == 0) mma_k16(d, a, b0, b1, 0.0f, 0.0f, 0.0f, 0.0f);
    else mma_k16(d, a, b0, b1);
}

DEVICE void unpack8(float (&x)[8], const u32 (&pairs)[4]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) x[2 * i] = low_f32(pairs[i]), x[2 * i + 1] = high_f32(pairs[i]);
}
DEVICE void pack8(u32 (&pairs)[4], const float (&x)[8]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) pairs[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}
DEVICE u32 scale_pair(u32 pair, float by) { return pack_bf16(by * low_f32(pair), by * high_f32(pair)); }
DEVICE void load8(float (&x)[8], u32 at) {
    u32 pairs[4];
    load_shared4(pairs, at);
    unpack8(x, pairs);
}

// D layout into the warp's patch [token][column], and rows out of it. A __syncwarp stands between.
DEVICE void put_columns(u32 patch, const Lane& l, const float (&x)[2][4]) {
    const u32 at = patch + 4 * (2 * l.c * PATCH_PITCH + l.g);
#pragma unroll
    for (u32 t = 0; t < 2; t++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) store_shared(at + 4 * ((8 * t + i % 2) * PATCH_PITCH + i / 2 * 8), x[t][i]);
}
// The accumulator of a [token, column] product plus the warp's columns of a bf16 tile [token][column], rounded, in row layout.
// `add` is the tile's byte of the warp's first column; the patch is overwritten.
DEVICE void take_sum(u32 (&row)[4], u32 patch, const Lane& l, const float (&x)[2][4], u32 add) {
    u32 a[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) { // (g, t 0), (g + 8, t 0), (g, t 1), (g + 8, t 1)
        const u32 pair = load_shared_u32(add + (l.g + i % 2 * 8) * PITCH + i / 2 * 16 + 4 * l.c);
        a[i] = pack_bf16(x[i / 2][i % 2 * 2] + low_f32(pair), x[i / 2][i % 2 * 2 + 1] + high_f32(pair));
    }
    store_a_fragment(patch, SMALL_PITCH, a);
    __syncwarp();
    load_shared4(row, patch + l.token * SMALL_PITCH + l.half * 16);
}
DEVICE void load_floats(float (&x)[8], u32 at) {
    float part[4];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        load_shared4(part, at + 16 * i);
#pragma unroll
        for (u32 j = 0; j < 4; j++) x[4 * i + j] = part[j];
    }
}
DEVICE void take_row(float (&x)[8], u32 patch, const Lane& l) { load_floats(x, patch + 4 * (l.token * PATCH_PITCH + 8 * l.half)); }
// A row layout's columns of a [D] f32 table.
DEVICE void load_table(float (&x)[8], u32 table, const Lane& l) { load_floats(x, table + 4 * l.column()); }

// Sums of the two halves of a row: half 0 gets those of x, half 1 those of y.
DEVICE float fold(u32 half, float x, float y) {
    const float mine = half ? y : x, other = half ? x : y;
    return mine + __shfl_xor_sync(FULL_WARP, other, 16);
}

// Mean of γ², to all lanes.
DEVICE float mean_square(const float* gamma, const Lane& l) {
    float sum = 0.0f;
    for (u32 i = l.lane; i < D; i += 32) sum += gamma[i] * gamma[i];
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
    return sum * INV_D;
}

// The accumulators of Wᵀ from `[W | b]`, and back.
DEVICE void load_state(float (&w)[D / 8][4], float (&b)[4], const float* state, const Lane& l) {
    const float *at = state + 2 * l.c * D + 16 * l.warp + l.g, *bias = state + D * D + 16 * l.warp + l.g;
#pragma unroll
    for (u32 j = 0; j < D / 8; j++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) w[j][i] = at[(8 * j + i % 2) * D + i / 2 * 8];
#pragma unroll
    for (u32 i = 0; i < 4; i++) b[i] = bias[i / 2 * 8];
}
DEVICE void store_state(float* state, const float (&w)[D / 8][4], const float (&b)[4], const Lane& l) {
    float *at = state + 2 * l.c * D + 16 * l.warp + l.g, *bias = state + D * D + 16 * l.warp + l.g;
#pragma unroll
    for (u32 j = 0; j < D / 8; j++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) at[(8 * j + i % 2) * D + i / 2 * 8] = w[j][i];
    if (l.c == 0) bias[0] = b[0], bias[8] = b[2];
}
// A operand of Wᵀ for columns [16 s, 16 s + 16) of in.
DEVICE void pack_step(u32 (&a)[4], const float (&w)[D / 8][4], u32 s) {
    a[0] = pack_bf16(w[2 * s][0], w[2 * s][1]);
    a[1] = pack_bf16(w[2 * s][2], w[2 * s][3]);
    a[2] = pack_bf16(w[2 * s + 1][0], w[2 * s + 1][1]);
    a[3] = pack_bf16(w[2 * s + 1][2], w[2 * s + 1][3]);
}
// -tok of tokens 2c, 2c + 1, 2c + 8, 2c + 9.
DEVICE void load_neg_tau(float (&t)[4], const float* tok, u32 mini_batch, const Lane& l) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 token = 2 * l.c + i % 2 + i / 2 * 8;
        t[i] = token < mini_batch ? -tok[token] : 0.0f;
    }
}
// Wᵀ += Xᵀ y for X in A layout [out, token], y a tile [token, in]; b += sums of X over the tokens.
DEVICE void add_outer(float (&w)[D / 8][4], float (&b)[4], const u32 (&x)[4], u32 tile, const Lane& l) {
#pragma unroll
    for (u32 s = 0; s < STEPS; s++) {
        u32 r[4];
        ldmatrix_x4_trans(r, tile + l.row + 32 * s);
        mma_k16(w[2 * s], x, r[0], r[1]);
        mma_k16(w[2 * s + 1], x, r[2], r[3]);
    }
    mma_k16(b, x, ONES, ONES);
}

// bf16(tau * x) of an A operand: what the weights are moved by (backward.md 8.3).
DEVICE void scale_columns(u32 (&u)[4], const u32 (&x)[4], float tau) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) u[i] = scale_pair(x[i], tau);
}

// M = tril(q kᵀ + 1) as the kernels use it, bf16, the D layout [i, j] packed along j. What is above the diagonal as a block is left
// out: low is (i < 8, j < 8), cross (i >= 8, j < 8), high (i >= 8, j >= 8).
struct Causal {
    u32 low, cross, high;
    DEVICE static u32 mask(const Lane& l) { return 2 * l.c > l.g ? 0 : 2 * l.c == l.g ? 0x0000ffffu : 0xffffffffu; }
    // From D layouts [i, j < 8] and [i, j >= 8].
    DEVICE Causal(const float (&left)[4], const float (&right)[4], u32 mask) {
        low = pack_bf16(left[0], left[1]) & mask, cross = pack_bf16(left[2], left[3]), high = pack_bf16(right[2], right[3]) & mask;
    }
    DEVICE Causal(u32 a, u32 b, u32 c) { low = a, cross = b, high = c; }
    // y [out, i] = Ĝᵀ Mᵀ, in D layout
    DEVICE void apply(float (&y)[2][4], const u32 (&ghat)[4]) const {
        mma_k8(y[0], ghat[0], ghat[1], low);
        mma_step(0, y[1], ghat, cross, high);
    }
};
