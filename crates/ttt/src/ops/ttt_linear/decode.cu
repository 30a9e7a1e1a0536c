// One token of many sequences, each at a phase of its own: W is read once, and written when the token completes its mini-batch. All
// segments have len 1. Rounds where the forward rounds; any mini-batch up to 64. `ttt_linear_decode` reads q, k, v and learning rates;
// `ttt_linear_step` makes them from the projections first.
//
// Launch: segments * heads blocks of 2 * HEAD_DIM threads, 20 d + (2 d + 1) K + d / 16 f32 of dynamic shared memory. A thread holds
// 4 columns of every 8th row of W, and one component of k or q.
#include "tiles.cuh"

constexpr u32 GROUPS = 8;        // threads that share columns
constexpr u32 ROWS = D / GROUPS; // rows of W of a thread
constexpr u32 LANE_COLUMNS = (D + 31) / 32;

DEVICE void warp_sums(float* sums, u32 n) {
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2)
#pragma unroll
        for (u32 i = 0; i < n; i++) sums[i] += __shfl_xor_sync(FULL_WARP, sums[i], step);
}

// Rotated q and k, v and learning rates lie in memory.
struct FromMatrices {
    const ForwardParams& p;
    Segment seg;
    u32 head;
    u16 element;
    float lr, tau_now;
    DEVICE FromMatrices(const ForwardParams& params, u32 task) : p(params), seg(p.segments[task / p.heads]), head(task % p.heads) {}
    DEVICE bool begin() {
        const u32 column = 2 * (head * D + threadIdx.x % D);
        element = threadIdx.x < D ? *at_row((const u16*)p.k, seg.first_row, 2 * p.k_stride, column)
                                  : *at_row((const u16*)p.q, seg.first_row, 2 * p.q_stride, column);
        lr = *at_row(p.lr, seg.first_row, 4 * p.lr_stride, 4 * head), tau_now = p.tok[seg.phase];
        return seg.len > 0;
    }
    DEVICE float component(float*) { return bf16_f32(element); }
    DEVICE float value(u32 c) const { return bf16_f32(*at_row((const u16*)p.v, seg.first_row, 2 * p.v_stride, 2 * (head * D + c))); }
    DEVICE void keep() const {}
    DEVICE float rate(const float*) const { return lr; }
    DEVICE float tau() const { return tau_now; }
    DEVICE float tau_last() const { return p.tok[p.mini_batch - 1]; }
    DEVICE u16* output(u32 c) const { return at_row((u16*)p.z, seg.first_row, 2 * p.z_stride, 2 * (head * D + c)); }
};

// They are made here: a thread's component of k or q by its convolution and RoPE, the rate by a dot product of the block.
struct FromProjections {
    static constexpr u32 MAX_MEMORY = 7;
    const StepParams& p;
    Segment seg;
    u32 head, width, channel;
    float now;
    float cosine, sine, own_tau;
    DEVICE FromProjections(const StepParams& params, u32 task) : p(params), head(task % p.heads) {
        overlap_next();
        const u32* s = p.segments + 4 * (task / p.heads);
        seg.first_row = s[0], seg.len = s[1], seg.slot = s[2], seg.phase = s[3];
        width = p.heads * D, channel = head * D + threadIdx.x % D;
    }
    DEVICE u32 side() const { return threadIdx.x < D ? 0 : 1; }
    DEVICE u16* window(u32 i) const { return (u16*)p.window + ((u64)seg.slot * (p.taps - 1) + i) * width + channel; }
    DEVICE const u16* projected(u32 column) const { return (const u16*)p.projected + (u64)seg.first_row * p.stride + column; }
    DEVICE float tau_of(u32 i) const { return max(0.0f, 1.0f / (float)(i + 1) + p.token_idx[i]); }
    DEVICE bool begin() {
        cosine = p.cosine[seg.phase * D + threadIdx.x % D], sine = p.sine[seg.phase * D + threadIdx.x % D];
        own_tau = tau_of(seg.phase);
        overlap_wait();
        return seg.len > 0;
    }
    // Also leaves the warps' parts of the rate's dot product.
    DEVICE float component(float* parts) {
        float y;
        if (p.taps_of[0]) {
            const float* taps = p.taps_of[side()] + channel * p.taps;
            now = bf16_f32(*projected(channel)), y = p.bias_of[side()][channel];
#pragma unroll
            for (u32 i = 0; i < MAX_MEMORY; i++)
                if (i + 1 < p.taps) y += taps[i] * bf16_f32(*window(i));
            y = round_bf16(y + taps[p.taps - 1] * now);
        } else {
            y = bf16_f32(*projected((1 - side()) * width + channel));
        }
        float dot = 0.0f;
        for (u32 c = 8 * threadIdx.x; c < width; c += 8 * THREADS) {
            u32 x[4], w[4];
            load_global4(x, (const u16*)p.normed + (u64)seg.first_row * width + c);
            load_constant4(w, (const u16*)p.rate_weight + (u64)head * width + c);
#pragma unroll
            for (u32 i = 0; i < 4; i++) dot += low_f32(x[i]) * low_f32(w[i]) + high_f32(x[i]) * high_f32(w[i]);
        }
        warp_sums(&dot, 1);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = dot;
        const float other = __shfl_xor_sync(FULL_WARP, y, 1);
        return round_bf16(y * cosine + other * sine);
    }
    DEVICE float value(u32 c) const { return bf16_f32(*projected((p.taps_of[0] ? 1 : 2) * width + head * D + c)); }
    // Moves the windows on, once both of a channel's threads have read what they need.
    DEVICE void keep() const {
        if (threadIdx.x >= D) return;
        if (p.taps_of[0]) shift((u16*)p.window, p.taps, bf16_bits(now));
        if (p.pre_now) shift((u16*)p.pre_window, p.pre_taps, ((const u16*)p.pre_now)[(u64)seg.first_row * width + channel]);
    }
    DEVICE void shift(u16* windows, u32 taps, u16 next) const {
        if (taps < 2) return;
        u16* own = windows + (u64)seg.slot * (taps - 1) * width + channel;
#pragma unroll
        for (u32 i = 1; i < MAX_MEMORY; i++)
            if (i + 1 < taps) own[(i - 1) * width] = own[i * width];
        own[(taps - 2) * width] = next;
    }
    DEVICE float rate(const float* parts) const {
        float logit = p.rate_bias[head];
#pragma unroll
        for (u32 i = 0; i < WARPS; i++) logit += parts[i];
        return p.rate_scale / (1.0f + __expf(-logit));
    }
    DEVICE float tau() const { return own_tau; }
    DEVICE float tau_last() const { return tau_of(p.mini_batch - 1); }
    DEVICE u16* output(u32 c) const { return (u16*)p.z + (u64)seg.first_row * width + head * D + c; }
};

template <class Params, class Source> DEVICE void one_token(const Params& p) {
    DYNAMIC_SHARED(memory);
    const u32 K = p.mini_batch, tid = threadIdx.x, lane = tid % 32;
    float* keys = (float*)memory;    // [K][2 D]: k and Ĝ of the open mini-batch
    float* k = keys + K * 2 * D;     // [D]
    float* q = k + D;                // [D]
    float* parts = q + D;            // [GROUPS][k, q][D]
    float* product = parts + 16 * D; // [k W + b, q W + b][D]
    float* m = product + 2 * D;      // [K]: q kᵀ + 1
    float* rates = m + K;            // [WARPS]
    Source source(p, blockIdx.x);
    const u32 head = source.head, phase = source.seg.phase;
    const u64 place = (u64)source.seg.slot * p.heads + head;
    float* state = p.weights + place * STATE;
    float* rows = p.rows + place * (K - 1) * 2 * D;

    const u32 out = 4 * (tid % (D / 4)), group = tid / (D / 4);
    float w[ROWS][4];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) load_global4(w[r], state + (group + GROUPS * r) * D + out);
    // All loads are under way before the first is waited for.
    for (u32 i = 4 * tid; i < phase * 2 * D; i += 4 * THREADS) copy_async_16(shared_address(keys + i), rows + i, true);
    copy_async_commit();
    const float bias = state[D * D + tid % D];
    // The first warp does what follows the products: its lanes' columns.
    float gamma[LANE_COLUMNS], beta[LANE_COLUMNS], v[LANE_COLUMNS];
#pragma unroll
    for (u32 i = 0; i < LANE_COLUMNS; i++) {
        const u32 c = lane + 32 * i;
        const bool here = tid < 32 && c < D;
        gamma[i] = here ? p.gamma[head * D + c] : 0.0f, beta[i] = here ? p.beta[head * D + c] : 0.0f;
    }
    if (!source.begin()) return;
#pragma unroll
    for (u32 i = 0; i < LANE_COLUMNS; i++) v[i] = tid < 32 && lane + 32 * i < D ? source.value(lane + 32 * i) : 0.0f;
    const float component = source.component(rates);
    (tid < D ? k : q)[tid % D] = component;
    if (tid < D) keys[phase * 2 * D + tid] = component;
    copy_async_wait<0>();
    __syncthreads();
    source.keep();

    {
        float zk[4] = {}, zq[4] = {};
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            const float kr = k[group + GROUPS * r], qr = q[group + GROUPS * r];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const float x = round_bf16(w[r][j]);
                zk[j] += kr * x, zq[j] += qr * x;
            }
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++) parts[group * 2 * D + out + j] = zk[j], parts[group * 2 * D + D + out + j] = zq[j];
    }
    for (u32 j = tid / 32; j <= phase; j += WARPS) {
        float dot = 0.0f;
        for (u32 c = lane; c < D; c += 32) dot += q[c] * keys[j * 2 * D + c];
        warp_sums(&dot, 1);
        if (lane == 0) m[j] = round_bf16(dot + 1.0f);
    }
    __syncthreads();
    {
        float sum = bias;
#pragma unroll
        for (u32 i = 0; i < GROUPS; i++) sum += parts[i * 2 * D + tid];
        product[tid] = sum;
    }
    __syncthreads();

    if (tid < 32) {
        const float lr = source.rate(rates), tau = source.tau();
        float z[LANE_COLUMNS], wi[LANE_COLUMNS], zbar[LANE_COLUMNS], sums[7] = {};
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; i++) {
            const u32 c = lane + 32 * i;
            z[i] = c < D ? product[c] : 0.0f;
            wi[i] = c < D ? gamma[i] * (beta[i] - (v[i] - k[c])) : 0.0f;
            const float gz = gamma[i] * gamma[i] * z[i];
            sums[0] += z[i], sums[1] += z[i] * z[i], sums[2] += gz, sums[3] += gz * z[i], sums[4] += wi[i] * z[i], sums[5] += wi[i];
            sums[6] += gamma[i] * gamma[i];
        }
        warp_sums(sums, 7);
#pragma unroll
        for (u32 i = 0; i < 7; i++) sums[i] *= INV_D;
        // As in forward.cu.
        const float mu = sums[0], rs = fast_rsqrt(max(sums[1] - mu * mu, 0.0f) + EPS);
        const float mean_gx = rs * (rs * (sums[3] - 2.0f * mu * sums[2] + mu * mu * sums[6]) + sums[4] - mu * sums[5]);
        const float mean_g = rs * (sums[2] - mu * sums[6]) + sums[5];
        float output[2] = {};
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; i++) {
            const u32 c = lane + 32 * i;
            if (c >= D) continue;
            const float xhat = z[i] * rs - mu * rs;
            const float ghat = round_bf16(lr * rs * ((gamma[i] * gamma[i] - mean_gx) * xhat + (wi[i] - mean_g)));
            keys[phase * 2 * D + D + c] = ghat;
            if (phase + 1 < K) rows[phase * 2 * D + c] = k[c], rows[phase * 2 * D + D + c] = ghat;
            float sum = m[phase] * ghat;
            for (u32 j = 0; j < phase; j++) sum += m[j] * keys[j * 2 * D + D + c];
            zbar[i] = product[D + c] - tau * sum;
            output[0] += zbar[i], output[1] += zbar[i] * zbar[i];
        }
        warp_sums(output, 2);
        const float mean = output[0] * INV_D, rs_out = fast_rsqrt(max(output[1] * INV_D - mean * mean, 0.0f) + EPS);
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; i++) {
            const u32 c = lane + 32 * i;
            if (c < D) *source.output(c) = bf16_bits(q[c] + (gamma[i] * (zbar[i] * rs_out - mean * rs_out) + beta[i]));
        }
    }
    if (phase + 1 < K) return;
    __syncthreads();
    const float tau_last = source.tau_last();
    float db = 0.0f;
    for (u32 j = 0; j < K; j++) {
        float u[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) u[i] = round_bf16(tau_last * keys[j * 2 * D + D + out + i]);
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            const float kj = keys[j * 2 * D + group + GROUPS * r];
#pragma unroll
            for (u32 i = 0; i < 4; i++) w[r][i] -= kj * u[i];
        }
        db += round_bf16(tau_last * keys[j * 2 * D + D + tid % D]);
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) store_global4(state + (group + GROUPS * r) * D + out, w[r]);
    if (tid < D) state[D * D + tid] = bias - db;
}

KERNEL __launch_bounds__(THREADS, D <= 64 ? 6 : 1) ttt_linear_decode(const __grid_constant__ ForwardParams p) {
    one_token<ForwardParams, FromMatrices>(p);
}
KERNEL __launch_bounds__(THREADS, D <= 64 ? 6 : 1) ttt_linear_step(const __grid_constant__ StepParams p) {
    one_token<StepParams, FromProjections>(p);
}
