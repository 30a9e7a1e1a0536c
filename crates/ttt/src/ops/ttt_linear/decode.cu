// One token of many sequences, each at a phase of its own: W is read once, and written when the token completes its mini-batch. All
// segments have len 1. Rounds where the forward rounds; any mini-batch up to 64.
//
// Launch: segments * heads blocks of 2 * HEAD_DIM threads, `shared_floats(K)` f32 of dynamic shared memory: 20 d + (2 d + 1) K. A
// thread holds 4 columns of every 8th row of W.
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

KERNEL __launch_bounds__(THREADS, D <= 64 ? 6 : 1) ttt_linear_decode(const __grid_constant__ ForwardParams p) {
    DYNAMIC_SHARED(memory);
    const u32 K = p.mini_batch, task = blockIdx.x, head = task % p.heads, tid = threadIdx.x, lane = tid % 32;
    float* keys = (float*)memory;    // [K][2 D]: k and Ĝ of the open mini-batch
    float* k = keys + K * 2 * D;     // [D]
    float* q = k + D;                // [D]
    float* parts = q + D;            // [GROUPS][k, q][D]
    float* product = parts + 16 * D; // [k W + b, q W + b][D]
    float* m = product + 2 * D;      // [K]: q kᵀ + 1
    const Segment seg = p.segments[task / p.heads];
    const u32 phase = seg.phase, row = seg.first_row;
    const u64 place = (u64)seg.slot * p.heads + head;
    float* state = p.weights + place * STATE;
    float* rows = p.rows + place * (K - 1) * 2 * D;

    const u32 out = 4 * (tid % (D / 4)), group = tid / (D / 4);
    float w[ROWS][4];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) load_global4(w[r], state + (group + GROUPS * r) * D + out);
    // All loads are under way before the first is waited for.
    for (u32 i = 4 * tid; i < phase * 2 * D; i += 4 * THREADS) copy_async_16(shared_address(keys + i), rows + i, true);
    copy_async_commit();
    const u32 column = 2 * (head * D + tid % D);
    const u16 element = tid < D ? *at_row((const u16*)p.k, row, 2 * p.k_stride, column) : *at_row((const u16*)p.q, row, 2 * p.q_stride, column);
    const float lr = *at_row(p.lr, row, 4 * p.lr_stride, 4 * head);
    const float tau = p.tok[phase], bias = state[D * D + tid % D];
    // The first warp does what follows the products: its lanes' columns.
    float gamma[LANE_COLUMNS], beta[LANE_COLUMNS], v[LANE_COLUMNS];
#pragma unroll
    for (u32 i = 0; i < LANE_COLUMNS; i++) {
        const u32 c = lane + 32 * i;
        const bool here = tid < 32 && c < D;
        gamma[i] = here ? p.gamma[head * D + c] : 0.0f, beta[i] = here ? p.beta[head * D + c] : 0.0f;
        v[i] = here ? bf16_f32(*at_row((const u16*)p.v, row, 2 * p.v_stride, 2 * (head * D + c))) : 0.0f;
    }
    (tid < D ? k : q)[tid % D] = bf16_f32(element);
    if (tid < D) keys[phase * 2 * D + tid] = bf16_f32(element);
    copy_async_wait<0>();
    __syncthreads();

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
            if (c < D)
                *at_row((u16*)p.z, row, 2 * p.z_stride, 2 * (head * D + c)) = bf16_bits(q[c] + (gamma[i] * (zbar[i] * rs_out - mean * rs_out) + beta[i]));
        }
    }
    if (phase + 1 < K) return;
    __syncthreads();
    const float tau_last = p.tok[K - 1];
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
