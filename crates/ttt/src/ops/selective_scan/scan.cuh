// What the scan's kernels share. A warp works on two channels of SPAN tokens: a lane holds PER tokens that follow each other, and
// what crosses lanes is a scan of pairs (product of decays, state), since the recurrence is associative. So all of a sequence's
// tokens are in flight at once, however few sequences and channels there are.
#pragma once
#include "element.cuh"

#ifndef WARPS
#define WARPS 8 // of a block
#endif
constexpr u32 PER = 8, SPAN = 32 * PER;
constexpr u32 MAX_STATES = 16;
constexpr u32 THREADS = 32 * WARPS, GROUP = 2 * WARPS; // channels that a block works on at once
constexpr u32 PITCH = SPAN + 4;                        // of a row of a tile: channels or states lie four banks apart

// Matrices are row-major, strides in elements. States are [slots, N, channels] or null; kept states [.., N, channels], those of a
// segment's span i at row first / SPAN + segment + i, which no other segment has.
struct ScanParams {
    const T *x, *dt, *b, *c;
    const float *a_log, *d, *dt_bias;
    const u32* segments; // {first row, length, slot, phase}
    float* state;
    float* kept;
    T* y;                // [rows, channels]
    u32 x_stride, dt_stride, b_stride, c_stride, a_stride, channels, states;
};
struct ScanGradParams {
    ScanParams in; // its state holds the gradient of the states, null without any
    const T* dy;
    T *dx, *ddt;
    float* selected;   // [blocks of channels, 2 N, rows]: parts of dB and dC
    float* parameters; // [segments, channels N | channels | channels]: parts of dA_log, dD, ddt_bias
    u32 dy_stride, dx_stride, ddt_stride, rows, groups; // groups of channels a block works on, one after the other
};

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// ln(1 + e^x): of e = e^-|x| <= 1 the logarithm of 1 + e as a series in e / (2 + e) <= 1/3, exact to 1e-7 where it is small too.
DEVICE float softplus(float x) {
    const float e = __expf(-fabsf(x)), z = __fdividef(e, 2.0f + e), q = z * z;
    float p = 2.0f / 13.0f;
    p = p * q + 2.0f / 11.0f;
    p = p * q + 2.0f / 9.0f;
    p = p * q + 2.0f / 7.0f;
    p = p * q + 2.0f / 5.0f;
    p = p * q + 2.0f / 3.0f;
    p = p * q + 2.0f;
    return p * z + fmaxf(x, 0.0f);
}

// Where token t of a span lies in a row of a tile: a lane reads its tokens as two times four, without bank conflicts.
DEVICE u32 place(u32 t) { return (t / 4 % 2 * 32 + t / PER) * 4 + t % 4; }
DEVICE void load_lane(float (&x)[PER], const float* row, u32 lane) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const float4 four = *(const float4*)(row + (half * 32 + lane) * 4);
        x[4 * half] = four.x, x[4 * half + 1] = four.y, x[4 * half + 2] = four.z, x[4 * half + 3] = four.w;
    }
}
DEVICE void store_lane(float* row, u32 lane, const float (&x)[PER]) {
#pragma unroll
    for (u32 half = 0; half < 2; half++)
        *(float4*)(row + (half * 32 + lane) * 4) = make_float4(x[4 * half], x[4 * half + 1], x[4 * half + 2], x[4 * half + 3]);
}

// The segment and the first channel of a block of `width` channels.
struct Place {
    u32 segment, block, first_row, len, slot;
};
DEVICE Place place_of(const u32* segments, u32 blocks) {
    Place at;
    at.segment = blockIdx.x / blocks, at.block = blockIdx.x % blocks;
    const u32* s = segments + 4 * at.segment;
    at.first_row = s[0], at.len = s[1], at.slot = s[2];
    return at;
}

// What a thread moves between rows of a matrix and a tile of WIDTH rows: one column of it, every STEP-th token, so that addresses on
// both sides grow by a constant.
template <u32 WIDTH> struct Walk {
    static constexpr u32 STEP = THREADS / WIDTH, COUNT = (SPAN + STEP - 1) / STEP, ALONG = STEP / 2;
    static_assert(THREADS % WIDTH == 0 && STEP % 8 == 0, "a step keeps a token's place among the lane's");
    u32 column = threadIdx.x % WIDTH, t = threadIdx.x / WIDTH;
    DEVICE float* in(float* tile) const { return tile + column * PITCH + place(t); }
};
// Rows row .. row + count of columns first .. limit of x, WIDTH at most, into `rows` rows of a tile; zeros where there is nothing.
// LOADS of a thread are under way at once.
template <u32 WIDTH, u32 LOADS> DEVICE void stage(float* tile, u32 rows, const T* x, u32 stride, u32 row, u32 count, u32 first, u32 limit) {
    const Walk<WIDTH> w;
    if (w.column >= rows) return;
    const T* const from = x + (u64)(row + w.t) * stride + first + w.column;
    float* const to = w.in(tile);
    const bool there = first + w.column < limit;
#pragma unroll LOADS
    for (u32 i = 0; i < Walk<WIDTH>::COUNT; i++) {
        const u32 t = w.t + i * Walk<WIDTH>::STEP;
        const float value = there && t < count ? number(from[(u64)(i * Walk<WIDTH>::STEP) * stride]) : 0.0f;
        if (SPAN % Walk<WIDTH>::STEP == 0 || t < SPAN) to[i * Walk<WIDTH>::ALONG] = value;
    }
}
// The same of step sizes; 0, which changes no state, where there is no token.
template <u32 LOADS> DEVICE void stage_steps(float* tile, const ScanParams& p, u32 row, u32 count, u32 first) {
    const Walk<GROUP> w;
    const u32 channel = first + w.column;
    const bool there = channel < p.channels;
    const T* const from = p.dt + (u64)(row + w.t) * p.dt_stride + channel;
    float* const to = w.in(tile);
    const float bias = there ? p.dt_bias[channel] : 0.0f;
#pragma unroll LOADS
    for (u32 i = 0; i < Walk<GROUP>::COUNT; i++) {
        const bool token = there && w.t + i * Walk<GROUP>::STEP < count;
        to[i * Walk<GROUP>::ALONG] = token ? softplus(number(from[(u64)(i * Walk<GROUP>::STEP) * p.dt_stride]) + bias) : 0.0f;
    }
}
// A tile of a group's channels into rows row .. row + count of y.
template <u32 STORES> DEVICE void unstage(T* y, u32 stride, const float* tile, u32 row, u32 count, u32 first, u32 channels) {
    const Walk<GROUP> w;
    if (first + w.column >= channels) return;
    T* const to = y + (u64)(row + w.t) * stride + first + w.column;
    const float* const from = tile + w.column * PITCH + place(w.t);
#pragma unroll STORES
    for (u32 i = 0; i < Walk<GROUP>::COUNT; i++)
        if (w.t + i * Walk<GROUP>::STEP < count) put(to[(u64)(i * Walk<GROUP>::STEP) * stride], from[i * Walk<GROUP>::ALONG]);
}
// A times log2(e) of a group of channels, [N, GROUP].
DEVICE void stage_decays(float* a, const ScanParams& p, u32 first) {
    for (u32 e = threadIdx.x; e < p.states * GROUP; e += THREADS) {
        const u32 channel = first + e % GROUP;
        a[e] = channel < p.channels ? -LOG2_E * expf(p.a_log[(u64)channel * p.a_stride + e / GROUP]) : 0.0f;
    }
}
// [N, GROUP] from and to rows of `channels`.
DEVICE void load_group(float* to, const float* from, u32 states, u32 first, u32 channels) {
    for (u32 e = threadIdx.x; e < states * GROUP; e += THREADS) {
        const u32 channel = first + e % GROUP;
        to[e] = from && channel < channels ? from[(u64)(e / GROUP) * channels + channel] : 0.0f;
    }
}
DEVICE void store_group(float* to, const float* from, u32 states, u32 first, u32 channels) {
    for (u32 e = threadIdx.x; e < states * GROUP; e += THREADS) {
        const u32 channel = first + e % GROUP;
        if (channel < channels) to[(u64)(e / GROUP) * channels + channel] = from[e];
    }
}

// The state before a lane's tokens from `state`, that before the warp's. a: decays, ub: what the tokens bring. `product` is that of
// the lane's decays; `end` the state after the lane's tokens.
DEVICE float scan_forward_lanes(const float (&a)[PER], const float (&ub)[PER], float state, u32 lane, float& product, float& end) {
    float run = lane == 0 ? state : 0.0f, decay = 1.0f;
#pragma unroll
    for (u32 i = 0; i < PER; i++) run = a[i] * run + ub[i], decay *= a[i];
    product = decay;
#pragma unroll
    for (u32 d = 1; d < 32; d *= 2) {
        const float before = __shfl_up_sync(FULL_WARP, run, d), longer = __shfl_up_sync(FULL_WARP, decay, d);
        if (lane >= d) run = decay * before + run, decay *= longer;
    }
    end = run;
    const float before = __shfl_up_sync(FULL_WARP, run, 1);
    return lane == 0 ? state : before;
}
// The same from the last token to the first: `start` is what goes to the token before the lane's.
DEVICE float scan_backward_lanes(const float (&a)[PER], const float (&ae)[PER], float state, u32 lane, float product, float& start) {
    float run = lane == 31 ? state : 0.0f, decay = product;
#pragma unroll
    for (u32 i = PER; i-- > 0;) run = a[i] * run + ae[i];
#pragma unroll
    for (u32 d = 1; d < 32; d *= 2) {
        const float after = __shfl_down_sync(FULL_WARP, run, d), longer = __shfl_down_sync(FULL_WARP, decay, d);
        if (lane + d < 32) run = decay * after + run, decay *= longer;
    }
    start = run;
    const float after = __shfl_down_sync(FULL_WARP, run, 1);
    return lane == 31 ? state : after;
}
