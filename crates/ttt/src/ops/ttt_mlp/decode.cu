// One token of many sequences, each at a phase of its own: W1 and W2 are read once, and written when the token completes its mini-batch
// (W1 is then read again). All segments have len 1. Rounds where the forward rounds; any mini-batch up to 64.
//
// A thread has one hidden unit: a column of W1, a row of W2. W2 waits in shared memory for its three products. Rows of the open mini-batch
// are read where they are needed, from L2.
//
// Launch: segments * heads blocks of 4 * HEAD_DIM threads, `Shared::BYTES` of dynamic shared memory.
#include "mlp_tiles.cuh"

constexpr u32 MLP_THREADS = F, MLP_WARPS = F / 32;
constexpr u32 W2_PITCH = D + 4;                 // floats from row to row of W2: no two of 8 rows share a bank
constexpr u32 LANE_COLUMNS = (D + 31) / 32;
constexpr u32 GROUPS = 16, GROUP_ROWS = F / GROUPS; // threads that share 4 columns of W2; rows of a thread
constexpr u32 BATCH = 16;                       // loads of W1 under way

struct Shared { // floats
    static constexpr u32 W2 = 0, PARTS = F * W2_PITCH, K = PARTS + MLP_WARPS * D, Q = K + D, X2 = Q + D, XBAR = X2 + F, G2 = XBAR + F;
    static constexpr u32 GHAT2 = G2 + D, M1 = GHAT2 + D, M2 = M1 + 64, BYTES = 4 * (M2 + 64);
};

DEVICE void columns_of_f32(float (&x)[4], const float* at) { x[0] = at[0], x[1] = at[1], x[2] = at[2], x[3] = at[3]; }

// Blocks an SM: as many as shared memory has room for.
constexpr u32 DECODE_BLOCKS = D > 64 ? 1 : __CUDA_ARCH__ >= 900 ? 3 : 2;

KERNEL __launch_bounds__(MLP_THREADS, DECODE_BLOCKS) ttt_mlp_decode(const __grid_constant__ MlpForwardParams p) {
    DYNAMIC_SHARED(memory);
    float* const shared = (float*)memory;
    float *w2 = shared + Shared::W2, *parts = shared + Shared::PARTS, *k = shared + Shared::K, *q = shared + Shared::Q;
    float *x2 = shared + Shared::X2, *xbar = shared + Shared::XBAR, *g2 = shared + Shared::G2, *ghat2 = shared + Shared::GHAT2;
    float *m1 = shared + Shared::M1, *m2 = shared + Shared::M2;
    const u32 K = p.mini_batch, head = blockIdx.x % p.heads, tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const Segment seg = p.segments[blockIdx.x / p.heads];
    if (seg.len == 0) return; // a sequence that has ended
    const u32 phase = seg.phase, row = seg.first_row;
    const u64 place = (u64)seg.slot * p.heads + head;
    float* state = p.weights + place * MLP_STATE;
    float* rows = p.rows + place * (K - 1) * ROW;

#pragma unroll
    for (u32 i = 0; i < D / 4; i++) {
        const u32 at = tid + i * MLP_THREADS;
        copy_async_16(shared_address(w2 + at / (D / 4) * W2_PITCH + 4 * (at % (D / 4))), state + D * F + F + 4 * at, true);
    }
    copy_async_commit();
    for (u32 i = 32 * tid; i < phase * ROW; i += 32 * MLP_THREADS) prefetch(rows + i);
    if (tid < 2 * D) {
        const u32 column = 2 * (head * D + tid % D);
        const u16 x = tid < D ? *at_row((const u16*)p.k, row, 2 * p.k_stride, column) : *at_row((const u16*)p.q, row, 2 * p.q_stride, column);
        k[tid] = bf16_f32(x); // q lies behind k
    }
    const float lr = *at_row(p.lr, row, 4 * p.lr_stride, 4 * head), tau = p.tok[phase], bias = state[D * F + tid];
    // The first warp does what follows the products: its lanes' columns.
    float gamma[LANE_COLUMNS], beta[LANE_COLUMNS], v[LANE_COLUMNS], b2[LANE_COLUMNS];
#pragma unroll
    for (u32 i = 0; i < LANE_COLUMNS; i++) {
        const u32 c = lane + 32 * i;
        gamma[i] = p.gamma[head * D + c], beta[i] = p.beta[head * D + c], b2[i] = state[MLP_STATE - D + c];
        v[i] = bf16_f32(*at_row((const u16*)p.v, row, 2 * p.v_stride, 2 * (head * D + c)));
    }

    // Z1 and the part of Z̄1 that W1 gives
    float zk = bias, zq = bias;
#pragma unroll
    for (u32 first = 0; first < D; first += BATCH) {
        float w[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) w[i] = state[(first + i) * F + tid];
        if (first == 0) __syncthreads(); // k and q have come
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            const float x = round_bf16(w[i]);
            zk += k[first + i] * x, zq += q[first + i] * x;
        }
    }
    float y, slope;
    fast_gelu(zk, y, slope);
    x2[tid] = round_bf16(y);
    for (u32 j = warp; j <= phase; j += MLP_WARPS) {
        const float* kj = j < phase ? rows + j * ROW : k;
        float dot[1] = {};
        for (u32 c = lane; c < D; c += 32) dot[0] += q[c] * kj[c];
        lane_sums<32>(dot);
        if (lane == 0) m1[j] = round_bf16(dot[0] + 1.0f);
    }
    copy_async_wait<0>();
    __syncthreads();

    // Parts of x W2, [warp][D]; a thread has 4 columns of GROUP_ROWS rows.
    const u32 out = 4 * (tid % (D / 4)), unit = tid / (D / 4) * GROUP_ROWS;
    auto product = [&](const float* x) {
        float sum[4] = {};
#pragma unroll 4
        for (u32 r = 0; r < GROUP_ROWS; r++) {
            float w[4];
            columns_of_f32(w, w2 + (unit + r) * W2_PITCH + out);
#pragma unroll
            for (u32 i = 0; i < 4; i++) sum[i] += x[unit + r] * round_bf16(w[i]);
        }
#pragma unroll
        for (u32 step = D / 4; step < 32; step *= 2)
#pragma unroll
            for (u32 i = 0; i < 4; i++) sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], step);
        if (lane < D / 4) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) parts[warp * D + out + i] = sum[i];
        }
    };
    auto add_parts = [&](u32 i) {
        float sum = b2[i];
#pragma unroll
        for (u32 w = 0; w < MLP_WARPS; w++) sum += parts[w * D + lane + 32 * i];
        return sum;
    };
    product(x2);
    __syncthreads();
    if (warp == 0) { // as in forward.cu
        float z[LANE_COLUMNS], wi[LANE_COLUMNS], sums[7] = {};
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; i++) {
            z[i] = add_parts(i);
            wi[i] = gamma[i] * (beta[i] - (v[i] - k[lane + 32 * i]));
            const float gz = gamma[i] * gamma[i] * z[i];
            sums[0] += z[i], sums[1] += z[i] * z[i], sums[2] += gz, sums[3] += gz * z[i], sums[4] += wi[i] * z[i], sums[5] += wi[i];
            sums[6] += gamma[i] * gamma[i];
        }
        lane_sums<32>(sums);
#pragma unroll
        for (u32 i = 0; i < 7; i++) sums[i] *= INV_D;
        const float mu = sums[0], rs = fast_rsqrt(max(sums[1] - mu * mu, 0.0f) + EPS);
        const float mean_gx = rs * (rs * (sums[3] - 2.0f * mu * sums[2] + mu * mu * sums[6]) + sums[4] - mu * sums[5]);
        const float mean_g = rs * (sums[2] - mu * sums[6]) + sums[5];
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; i++) {
            const u32 c = lane + 32 * i;
            const float g = rs * ((gamma[i] * gamma[i] - mean_gx) * (z[i] * rs - mu * rs) + (wi[i] - mean_g));
            const float gh = round_bf16(lr * g);
            g2[c] = round_bf16(g), ghat2[c] = gh;
            if (phase + 1 < K) rows[phase * ROW + c] = k[c], rows[phase * ROW + D + 2 * F + c] = gh;
        }
    }
    __syncthreads();

    float u = 0.0f;
#pragma unroll 4
    for (u32 c = 0; c < D; c += 4) {
        float w[4];
        columns_of_f32(w, w2 + tid * W2_PITCH + c);
#pragma unroll
        for (u32 i = 0; i < 4; i++) u += g2[c + i] * round_bf16(w[i]);
    }
    const float ghat1 = round_bf16(u * (slope * lr));
    {
        float sum = m1[phase] * ghat1;
#pragma unroll 8
        for (u32 j = 0; j < phase; j++) sum += m1[j] * rows[j * ROW + D + tid];
        xbar[tid] = round_bf16(fast_gelu(zq - tau * sum));
    }
    if (phase + 1 < K) rows[phase * ROW + D + tid] = ghat1, rows[phase * ROW + D + F + tid] = x2[tid];
    __syncthreads();

    for (u32 j = warp; j <= phase; j += MLP_WARPS) {
        const float* xj = j < phase ? rows + j * ROW + D + F : x2;
        float dot[1] = {};
#pragma unroll
        for (u32 c = 0; c < F; c += 32) dot[0] += xbar[c + lane] * xj[c + lane];
        lane_sums<32>(dot);
        if (lane == 0) m2[j] = round_bf16(dot[0] + 1.0f);
    }
    product(xbar);
    __syncthreads();
    if (warp == 0) {
        float zbar[LANE_COLUMNS], sums[2] = {};
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; i++) {
            const u32 c = lane + 32 * i;
            float sum = m2[phase] * ghat2[c];
#pragma unroll 8
            for (u32 j = 0; j < phase; j++) sum += m2[j] * rows[j * ROW + D + 2 * F + c];
            zbar[i] = add_parts(i) - tau * sum;
            sums[0] += zbar[i], sums[1] += zbar[i] * zbar[i];
        }
        lane_sums<32>(sums);
        const float mean = sums[0] * INV_D, rs = fast_rsqrt(max(sums[1] * INV_D - mean * mean, 0.0f) + EPS);
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; i++) {
            const u32 c = lane + 32 * i;
            *at_row((u16*)p.z, row, 2 * p.z_stride, 2 * (head * D + c)) = bf16_bits(q[c] + (gamma[i] * (zbar[i] * rs - mean * rs) + beta[i]));
        }
    }
    if (phase + 1 < K) return;

    // The mini-batch is complete; its last token's row was kept nowhere.
    const float tau_last = p.tok[K - 1];
    float db = 0.0f;
    for (u32 first = 0; first < D; first += 16) {
        float w[16];
#pragma unroll
        for (u32 i = 0; i < 16; i++) w[i] = state[(first + i) * F + tid];
        for (u32 j = 0; j < K; j++) {
            const float by = round_bf16(tau_last * (j < phase ? rows[j * ROW + D + tid] : ghat1));
            const float* kj = (j < phase ? rows + j * ROW : k) + first;
#pragma unroll
            for (u32 i = 0; i < 16; i++) w[i] -= kj[i] * by;
            if (first == 0) db += by;
        }
#pragma unroll
        for (u32 i = 0; i < 16; i++) state[(first + i) * F + tid] = w[i];
    }
    state[D * F + tid] = bias - db;
    for (u32 r = 0; r < GROUP_ROWS; r += 4) {
        float w[4][4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) columns_of_f32(w[i], w2 + (unit + r + i) * W2_PITCH + out);
        for (u32 j = 0; j < K; j++) {
            const float* gj = (j < phase ? rows + j * ROW + D + 2 * F : ghat2) + out;
            const float* xj = (j < phase ? rows + j * ROW + D + F : x2) + unit + r;
            float by[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) by[i] = round_bf16(tau_last * gj[i]);
#pragma unroll
            for (u32 i = 0; i < 4; i++)
#pragma unroll
                for (u32 c = 0; c < 4; c++) w[i][c] -= xj[i] * by[c];
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) store_global4(state + D * F + F + (unit + r + i) * D + out, w[i]);
    }
    if (tid < D) {
        float sum = state[MLP_STATE - D + tid];
        for (u32 j = 0; j < K; j++) sum -= round_bf16(tau_last * (j < phase ? rows[j * ROW + D + 2 * F + tid] : ghat2[tid]));
        state[MLP_STATE - D + tid] = sum;
    }
}
