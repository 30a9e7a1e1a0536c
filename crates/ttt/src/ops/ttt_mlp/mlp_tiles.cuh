// Layouts that the fast TTT-MLP kernels share; Lane, tiles and products are those of TTT-Linear (tiles.cuh). A warp owns TILES times 16
// of the F hidden units: those rows of W1ᵀ [hidden, in] and of W2 [hidden, out], both in f32 accumulators, 16 units a tile. So Z1, G1
// and both updates stay in the warp, and W2ᵀ is a copy in shared memory that only its warp reads. Sums over hidden units (Z2, Z̄2 and,
// backward, everything that goes back to tokens) are partial sums [token, column] of each warp in shared memory, which are added in the
// order of the warps.
//
// Three layouts of a [16 hidden units, 16 tokens] block:
//   D    f32, accumulator of a [hidden, token] product: (unit g | g + 8, token 8 t + 2c | + 1)
//   A    bf16, operand [hidden, token], the packed D layout
//   T    bf16, operand [token, hidden], A transposed: also the two B operands [hidden, token], parts 0 2 and 1 3
#pragma once
#include "mlp_params.cuh"
#include "tiles.cuh"

constexpr u32 F = 4 * D;
constexpr u32 MLP_STATE = 2 * D * F + F + D;
constexpr u32 ROW = 2 * D + 2 * F;       // numbers of a token of an open mini-batch
constexpr u32 SUM_PITCH = D + 8;         // floats from token to token of partial sums
constexpr u32 SUM = 4 * TOKENS * SUM_PITCH;

DEVICE void pack_tile(u32 (&a)[4], const float (&x)[2][4]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) a[i] = pack_bf16(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
}
DEVICE void transpose(u32 (&t)[4], const u32 (&a)[4]) {
    t[0] = movmatrix(a[0]), t[1] = movmatrix(a[2]), t[2] = movmatrix(a[1]), t[3] = movmatrix(a[3]);
}

DEVICE u64 join(u32 low, u32 high) { return low | (u64)high << 32; }

constexpr float GELU_C = 0.7978845608f, GELU_A = 0.044715f;
// gelu (tanh form), its first and second derivative.
DEVICE float fast_gelu(float x) {
    const float half = 0.5f * x;
    return half + half * fast_tanh(x * (GELU_C + GELU_C * GELU_A * (x * x)));
}
DEVICE void fast_gelu(float x, float& y, float& d1) {
    const float x2 = x * x, th = fast_tanh(x * (GELU_C + GELU_C * GELU_A * x2)), half = 0.5f + 0.5f * th;
    y = x * half;
    d1 = half + (0.5f - 0.5f * th * th) * (x * (GELU_C + 3.0f * GELU_C * GELU_A * x2));
}

// A warp's rows of W1ᵀ and W2 from `[W1 | b1 | W2 | b2]`, and back; `unit` is the first.
template <u32 TILES>
DEVICE void load_units(float (&w1)[TILES][D / 8][4], float (&w2)[TILES][D / 8][4], const float* state, u32 unit, const Lane& l) {
    const float* at1 = state + 2 * l.c * F + unit + l.g;
    const float* at2 = state + D * F + F + (unit + l.g) * D + 2 * l.c;
#pragma unroll
    for (u32 t = 0; t < TILES; t++)
#pragma unroll
        for (u32 j = 0; j < D / 8; j++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                w1[t][j][i] = at1[(8 * j + i % 2) * F + 16 * t + i / 2 * 8];
                w2[t][j][i] = at2[(16 * t + i / 2 * 8) * D + 8 * j + i % 2];
            }
}
template <u32 TILES>
DEVICE void store_units(float* state, const float (&w1)[TILES][D / 8][4], const float (&w2)[TILES][D / 8][4], u32 unit, const Lane& l) {
    float* at1 = state + 2 * l.c * F + unit + l.g;
    float* at2 = state + D * F + F + (unit + l.g) * D + 2 * l.c;
#pragma unroll
    for (u32 t = 0; t < TILES; t++)
#pragma unroll
        for (u32 j = 0; j < D / 8; j++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                at1[(8 * j + i % 2) * F + 16 * t + i / 2 * 8] = w1[t][j][i];
                if (i % 2 == 0)
                    *(u64*)(at2 + (16 * t + i / 2 * 8) * D + 8 * j) = join(__float_as_uint(w2[t][j][i]), __float_as_uint(w2[t][j][i + 1]));
            }
}

DEVICE void fast_gelu(float x, float& y, float& d1, float& d2) {
    const float x2 = x * x, th = fast_tanh(x * (GELU_C + GELU_C * GELU_A * x2)), half = 0.5f + 0.5f * th;
    const float kappa = GELU_C + 3.0f * GELU_C * GELU_A * x2, sech2 = 1.0f - th * th;
    y = x * half;
    d1 = half + 0.5f * sech2 * (x * kappa);
    d2 = sech2 * ((GELU_C + 6.0f * GELU_C * GELU_A * x2) - x * th * (kappa * kappa));
}

// w += x y for x in A layout [unit, token], y a tile [token, column].
DEVICE void add_product(float (&w)[D / 8][4], const u32 (&x)[4], u32 tile, const Lane& l) {
#pragma unroll
    for (u32 s = 0; s < STEPS; s++) {
        u32 y[4];
        ldmatrix_x4_trans(y, tile + l.row + 32 * s);
        mma_k16(w[2 * s], x, y[0], y[1]);
        mma_k16(w[2 * s + 1], x, y[2], y[3]);
    }
}

// Four bf16 of a tile, and back.
DEVICE void load4(float (&x)[4], u32 at) {
    u32 pairs[2];
    load_shared2(pairs, at);
    x[0] = low_f32(pairs[0]), x[1] = high_f32(pairs[0]), x[2] = low_f32(pairs[1]), x[3] = high_f32(pairs[1]);
}

// Sum over N neighbouring lanes, to all of them.
template <u32 N, u32 COUNT> DEVICE void lane_sums(float (&sums)[COUNT]) {
#pragma unroll
    for (u32 step = N / 2; step > 0; step /= 2)
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) sums[i] += __shfl_xor_sync(FULL_WARP, sums[i], step);
}

// Partial sums [token, 16 columns] of the warp from the accumulators of two products of 8 columns; `at` is column 2c of token g.
DEVICE void put_partial(u32 at, const float (&y)[2][4]) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        store_shared2(at + 32 * i, y[i][0], y[i][1]);
        store_shared2(at + 32 * i + 8 * 4 * SUM_PITCH, y[i][2], y[i][3]);
    }
}
