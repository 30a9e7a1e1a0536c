// TTT-MLP forward for bf16 and mini-batches of up to 16: one block walks one head of one sequence, W1 and W2 stay in accumulators of
// D / 8 warps, 32 hidden units each (layouts in mlp_tiles.cuh). Between the barriers of a mini-batch:
//   before the 1st  Z1, X2, the warp's part of X2 W2
//   before the 2nd  a token's lanes add the parts of Z2 and make G2: six one-pass sums as in TTT-Linear's forward.cu
//   before the 3rd  U = G2 W2ᵀ, Ĝ1, Z̄1, X̄2; the warp's part of Z̄2, to which it adds its own part of -τ M2 Ĝ2, M2 = X̄2 X2ᵀ + 1 being a
//                   sum over hidden units too; both updates
//   after it        a token's lanes add the parts of Z̄2 and make z
//
// Launch: segments * heads blocks of 4 * HEAD_DIM threads, `Shared::BYTES` of dynamic shared memory.
#include "mlp_tiles.cuh"

constexpr u32 TILES = 2;
constexpr u32 MLP_WARPS = F / (16 * TILES), MLP_THREADS = 32 * MLP_WARPS;
constexpr u32 OWNERS = 2 * MLP_WARPS;                // lanes of a token, 4 columns each
constexpr u32 UNITS_PITCH = 32 * TILES + 16;         // bytes from token to token of a warp's patch [token, hidden]

struct Shared {
    static constexpr u32 STAGES = 3;
    static constexpr u32 K = 0, Q = TILE, V = 2 * TILE, LR = 3 * TILE, STAGE = 3 * TILE + 64;
    static constexpr u32 G2 = STAGES * STAGE;                        // [token][out] bf16
    static constexpr u32 GHAT2 = G2 + TILE;                          // [token][out] bf16
    static constexpr u32 UPDATE2 = GHAT2 + TILE;                     // [token][out] bf16: -tok_last Ĝ2
    static constexpr u32 W2 = UPDATE2 + TILE;                        // [hidden][out] bf16
    static constexpr u32 FIRST = W2 + F * PITCH;                     // per warp: parts of Z2; then Ĝ1 on its way out
    static constexpr u32 SECOND = FIRST + MLP_WARPS * SUM;           // per warp: parts of Z̄2
    static constexpr u32 WAITING = SECOND + MLP_WARPS * SUM;         // per thread: Z̄1
    static constexpr u32 GAMMA = WAITING + MLP_WARPS * 1024 * TILES; // [D] f32
    static constexpr u32 BETA = GAMMA + 4 * D;                       // [D] f32
    static constexpr u32 B2 = BETA + 4 * D;                          // [2][D] f32, one mini-batch after the other
    static constexpr u32 B1 = B2 + 8 * D;                            // [F] f32, a warp's own
    static constexpr u32 CAUSAL = B1 + 4 * F;                        // [3][lane]: M1, see Causal
    static constexpr u32 NEG_TAU = CAUSAL + 3 * 128;                 // [TOKENS] f32: -tok
    static constexpr u32 MEAN_G2 = NEG_TAU + 4 * TOKENS;             // f32: mean of gamma²
    static constexpr u32 BYTES = MEAN_G2 + 16;
};

KERNEL __launch_bounds__(MLP_THREADS, 1) ttt_mlp_forward(const __grid_constant__ MlpForwardParams p) {
    DYNAMIC_SHARED(memory);
    const u32 shared = shared_address(memory);
    const Lane l;
    const u32 head = blockIdx.x % p.heads, K = p.mini_batch;
    const Segment seg = p.segments[blockIdx.x / p.heads];
    const u32 phase = seg.phase, end = phase + seg.len; // positions of its tokens, from the start of the open mini-batch
    const u32 count = (end + K - 1) / K;
    if (seg.len == 0) return;
    // Computed where they are needed: registers are short.
    auto place = [&] { return (u64)p.segments[blockIdx.x / p.heads].slot * p.heads + head; };
    auto state_at = [&] { return p.weights + place() * MLP_STATE; };
    auto rows_at = [&](u32 i) { return p.rows + (place() * (K - 1) + i) * ROW; };

    auto fetch = [&](u32 m) {
        const u32 stage = shared + m % Shared::STAGES * Shared::STAGE, tid = threadIdx.x;
        // A half of the threads brings k and v, the other q.
        const u32 row = tid / (D / 8) % TOKENS, chunk = tid % (D / 8), position = m * K + row;
        const bool present = row < K && position >= phase && position < end;
        const u32 at = present ? seg.first_row + position - phase : 0, to = stage + row * PITCH + 16 * chunk, from = 2 * (head * D + 8 * chunk);
        if (tid < MLP_THREADS / 2) {
            copy_async_16(to + Shared::V, at_row(p.v, at, 2 * p.v_stride, from), present);
            if (row < K && position < phase) { // k of an earlier call
                const float* k = rows_at(position) + 8 * chunk;
                u32 pairs[4];
#pragma unroll
                for (u32 j = 0; j < 4; j++) pairs[j] = pack_bf16(k[2 * j], k[2 * j + 1]);
                store_shared4(to + Shared::K, pairs);
            } else {
                copy_async_16(to + Shared::K, at_row(p.k, at, 2 * p.k_stride, from), present);
            }
        } else {
            copy_async_16(to + Shared::Q, at_row(p.q, at, 2 * p.q_stride, from), present);
        }
        if (tid < TOKENS) {
            const u32 position = m * K + tid;
            const bool here = tid < K && position >= phase && position < end;
            copy_async_4(stage + Shared::LR + 4 * tid, at_row(p.lr, here ? seg.first_row + position - phase : 0, 4 * p.lr_stride, 4 * head), here);
        }
    };
#pragma unroll
    for (u32 i = 0; i < Shared::STAGES - 1; i++) {
        if (i < count) fetch(i);
        copy_async_commit();
    }

    const u32 unit = 16 * TILES * l.warp; // first hidden unit of the warp
    float w1[TILES][D / 8][4], w2[TILES][D / 8][4];
    load_units(w1, w2, state_at(), unit, l);
    const u32 b1 = shared + Shared::B1 + 4 * unit; // of the warp's units
    for (u32 i = l.lane; i < 16 * TILES; i += 32) store_shared(b1 + 4 * i, state_at()[D * F + unit + i]);
    const u32 w2_rows = shared + Shared::W2 + unit * PITCH, partial = 4 * (l.g * SUM_PITCH + 2 * l.c);
    u32 b2 = shared + Shared::B2; // the other half is next
    auto store = [&](float* to) {
        store_units(to, w1, w2, unit, l);
        for (u32 i = l.lane; i < 16 * TILES; i += 32) to[D * F + unit + i] = load_shared(b1 + 4 * i);
        if (threadIdx.x < D) to[MLP_STATE - D + threadIdx.x] = load_shared(b2 + 4 * threadIdx.x);
    };
    auto put_w2 = [&] {
#pragma unroll
        for (u32 t = 0; t < TILES; t++)
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) {
                u32 a[4];
                pack_step(a, w2[t], s);
                store_a_fragment(w2_rows + 16 * t * PITCH + 32 * s, PITCH, a);
            }
        __syncwarp();
    };
    put_w2();
    if (threadIdx.x < D) {
        store_shared(shared + Shared::GAMMA + 4 * threadIdx.x, p.gamma[head * D + threadIdx.x]);
        store_shared(shared + Shared::BETA + 4 * threadIdx.x, p.beta[head * D + threadIdx.x]);
        store_shared(shared + Shared::B2 + 4 * threadIdx.x, state_at()[MLP_STATE - D + threadIdx.x]);
    }
    {
        const float mean_g2 = mean_square(p.gamma + head * D, l);
        if (threadIdx.x == 0) store_shared(shared + Shared::MEAN_G2, mean_g2);
    }
    if (threadIdx.x < TOKENS) store_shared(shared + Shared::NEG_TAU + 4 * threadIdx.x, threadIdx.x < K ? -p.tok[threadIdx.x] : 0.0f);
    // This lane as one of a token's.
    const u32 token = l.warp * (TOKENS / MLP_WARPS) + l.lane / OWNERS, column = 4 * (l.lane % OWNERS);
    const u32 own_sum = 4 * (token * SUM_PITCH + column);
    auto add_parts = [&](float (&x)[4], u32 parts) {
        load_shared4(x, b2 + 4 * column);
#pragma unroll
        for (u32 w = 0; w < MLP_WARPS; w++) {
            float part[4];
            load_shared4(part, parts + w * SUM + own_sum);
#pragma unroll
            for (u32 i = 0; i < 4; i++) x[i] += part[i];
        }
    };

    copy_async_wait<Shared::STAGES - 2>();
    __syncthreads();
    for (u32 m = 0; m < count; m++) {
        const u32 stage = shared + m % Shared::STAGES * Shared::STAGE;
        const u32 tile_k = stage + Shared::K, tile_q = stage + Shared::Q;
        const bool complete = (m + 1) * K <= end;
        const u32 position = m * K + token;
        const bool fresh = token < K && position >= phase && position < end;
        const u64 row = seg.first_row + position - phase;
        const u32 own_tile = token * PITCH + 2 * column;

        // Z1ᵀ = W1ᵀ kᵀ + b1, and the part of Z̄1ᵀ that W1 gives.
        u32 x2[TILES][4];
        float slope[TILES][2][4]; // r gelu'(Z1)
        // Registers are short: Z̄1 waits in shared memory.
        const u32 waiting = shared + Shared::WAITING + l.warp * 1024 * TILES + 16 * l.lane;
        {
            float z[TILES][2][4], zbar[TILES][2][4];
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) {
                u32 k[4], q[4], a[4];
                ldmatrix_x4(k, tile_k + l.row_b + 32 * s);
                ldmatrix_x4(q, tile_q + l.row_b + 32 * s);
#pragma unroll
                for (u32 t = 0; t < TILES; t++) {
                    pack_step(a, w1[t], s);
                    float b[4];
                    if (s == 0) b[0] = b[1] = load_shared(b1 + 64 * t + 4 * l.g), b[2] = b[3] = load_shared(b1 + 64 * t + 4 * l.g + 32);
                    mma_step(s, z[t][0], a, k[0], k[1], b);
                    mma_step(s, z[t][1], a, k[2], k[3], b);
                    mma_step(s, zbar[t][0], a, q[0], q[1], b);
                    mma_step(s, zbar[t][1], a, q[2], q[3], b);
                }
            }
#pragma unroll
            for (u32 i = 0; i < 2 * TILES; i++) {
                const float(&x)[4] = zbar[i / 2][i % 2];
                store_shared4(waiting + 512 * i, x[0], x[1], x[2], x[3]);
            }
            float lr[2][2];
            load_shared2(lr[0], stage + Shared::LR + 8 * l.c);
            load_shared2(lr[1], stage + Shared::LR + 8 * l.c + 32);
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
#pragma unroll
                for (u32 i = 0; i < 8; i++) {
                    fast_gelu(z[t][i / 4][i % 4], z[t][i / 4][i % 4], slope[t][i / 4][i % 4]);
                    slope[t][i / 4][i % 4] *= lr[i / 4][i % 2];
                }
                pack_tile(x2[t], z[t]);
            }
        }
        {
            u32 x2_t[TILES][4];
#pragma unroll
            for (u32 t = 0; t < TILES; t++) transpose(x2_t[t], x2[t]);
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) {
                float y[2][4];
#pragma unroll
                for (u32 t = 0; t < TILES; t++) {
                    u32 w[4];
                    ldmatrix_x4_trans(w, w2_rows + 16 * t * PITCH + l.row + 32 * s);
                    mma_step(t, y[0], x2_t[t], w[0], w[1]);
                    mma_step(t, y[1], x2_t[t], w[2], w[3]);
                }
                put_partial(shared + Shared::FIRST + l.warp * SUM + partial + 64 * s, y);
            }
        }
        if (l.warp == MLP_WARPS - 1) { // M1 = tril(q kᵀ + 1), for all
            const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
            float qk[2][4];
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) {
                u32 k[4], q[4];
                ldmatrix_x4(k, tile_k + l.row_b + 32 * s);
                ldmatrix_x4(q, tile_q + l.row + 32 * s);
                mma_step(s, qk[0], q, k[0], k[1], ones);
                mma_step(s, qk[1], q, k[2], k[3], ones);
            }
            const Causal causal(qk[0], qk[1], Causal::mask(l));
            const u32 at = shared + Shared::CAUSAL + 4 * l.lane;
            store_shared_u32(at, causal.low), store_shared_u32(at + 128, causal.cross), store_shared_u32(at + 256, causal.high);
        }
        __syncthreads();
        if (m + Shared::STAGES - 1 < count) fetch(m + Shared::STAGES - 1);
        copy_async_commit();
        { // G2 and Ĝ2 of a token
            float x[4], w[4], gamma[4], sums[6] = {};
            add_parts(x, shared + Shared::FIRST);
            {
                float k[4], v[4];
                load4(k, tile_k + own_tile);
                load4(v, stage + Shared::V + own_tile);
                load_shared4(gamma, shared + Shared::GAMMA + 4 * column);
                load_shared4(w, shared + Shared::BETA + 4 * column);
#pragma unroll
                for (u32 i = 0; i < 4; i++) w[i] = gamma[i] * (w[i] - (v[i] - k[i]));
            }
            if (p.ghat && fresh) store_global4(p.sums + (row * p.heads + head) * 2 * D + column, x);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float gz = gamma[i] * gamma[i] * x[i];
                sums[0] += x[i], sums[1] += x[i] * x[i], sums[2] += gz, sums[3] += gz * x[i], sums[4] += w[i] * x[i], sums[5] += w[i];
            }
            lane_sums<OWNERS>(sums);
#pragma unroll
            for (u32 i = 0; i < 6; i++) sums[i] *= INV_D;
            const float mean_g2 = load_shared(shared + Shared::MEAN_G2), neg_tau_last = load_shared(shared + Shared::NEG_TAU + 4 * (K - 1));
            const float mu = sums[0], rs = fast_rsqrt(max(sums[1] - mu * mu, 0.0f) + EPS);
            const float mean_gx = rs * (rs * (sums[3] - 2.0f * mu * sums[2] + mu * mu * mean_g2) + sums[4] - mu * sums[5]);
            const float mean_g = rs * (sums[2] - mu * mean_g2) + sums[5];
            const float lr = load_shared(stage + Shared::LR + 4 * token);
            float g[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float xhat = x[i] * rs - mu * rs;
                g[i] = rs * ((gamma[i] * gamma[i] - mean_gx) * xhat + (w[i] - mean_g));
            }
            store_shared2_u32(shared + Shared::G2 + own_tile, pack_bf16(g[0], g[1]), pack_bf16(g[2], g[3]));
            u32 ghat[2] = {pack_bf16(lr * g[0], lr * g[1]), pack_bf16(lr * g[2], lr * g[3])};
            if (m == 0 && position < phase) { // a token of an earlier call
                const float* from = rows_at(position) + D + 2 * F + column;
                ghat[0] = pack_bf16(from[0], from[1]), ghat[1] = pack_bf16(from[2], from[3]);
            }
            store_shared2_u32(shared + Shared::GHAT2 + own_tile, ghat[0], ghat[1]);
            store_shared2_u32(shared + Shared::UPDATE2 + own_tile, scale_pair(ghat[0], neg_tau_last), scale_pair(ghat[1], neg_tau_last));
            if (p.ghat && fresh) *(u64*)((u16*)p.ghat + (row * p.heads + head) * (F + D) + F + column) = join(ghat[0], ghat[1]);
            if (p.rows && fresh && !complete) {
                float* to = rows_at(token) + column;
                float k[4];
                load4(k, tile_k + own_tile);
#pragma unroll
                for (u32 i = 0; i < 4; i++) to[i] = k[i], to[D + 2 * F + i] = i % 2 ? high_f32(ghat[i / 2]) : low_f32(ghat[i / 2]);
            }
        }
        __syncthreads();

        // Ĝ1ᵀ = r (G2 W2ᵀ)ᵀ gelu'(Z1)ᵀ
        u32 ghat1[TILES][4];
        {
            float u[TILES][2][4];
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) {
                u32 g[4];
                ldmatrix_x4(g, shared + Shared::G2 + l.row_b + 32 * s);
#pragma unroll
                for (u32 t = 0; t < TILES; t++) {
                    u32 a[4];
                    ldmatrix_x4(a, w2_rows + 16 * t * PITCH + l.row + 32 * s);
                    mma_step(s, u[t][0], a, g[0], g[1]);
                    mma_step(s, u[t][1], a, g[2], g[3]);
                }
            }
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
#pragma unroll
                for (u32 i = 0; i < 8; i++) u[t][i / 4][i % 4] *= slope[t][i / 4][i % 4];
                pack_tile(ghat1[t], u[t]);
            }
        }
        if (m == 0 && phase > 0) { // tokens of an earlier call
#pragma unroll
            for (u32 t = 0; t < TILES; t++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 first = 2 * l.c + i / 2 * 8;
                    const float* from = rows_at(first) + D + unit + 16 * t + l.g + i % 2 * 8;
                    if (first < phase)
                        ghat1[t][i] = pack_bf16(from[0], first + 1 < phase ? from[ROW] : high_f32(ghat1[t][i]));
                }
        }
        // Through a patch into rows: a lane then has 8 units of a token of each tile.
        const u32 patch = shared + Shared::FIRST + l.warp * SUM, mine = patch + l.token * UNITS_PITCH + 16 * l.half;
        auto put_rows = [&](const u32(&x)[TILES][4]) {
            __syncwarp();
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
                u32 a[4];
                transpose(a, x[t]);
                store_a_fragment(patch + 32 * t, UNITS_PITCH, a);
            }
            __syncwarp();
        };
        const u32 at = m * K + l.token;
        const bool here = l.token < K && at >= phase && at < end;
        if (p.ghat) {
            put_rows(ghat1);
            u16* to = (u16*)p.ghat + ((u64)(seg.first_row + at - phase) * p.heads + head) * (F + D) + unit + 8 * l.half;
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
                u32 x[4];
                load_shared4(x, mine + 32 * t);
                if (here) store_global4(to + 16 * t, x);
            }
        }
        if (p.rows && !complete) {
            float* to = rows_at(l.token) + D + unit + 8 * l.half;
            auto open = [&](float* to) {
#pragma unroll 1
                for (u32 i = 0; i < 2 * TILES; i++) {
                    float x[4];
                    load4(x, mine + i / 2 * 32 + i % 2 * 8);
                    if (here) store_global4(to + i / 2 * 16 + i % 2 * 4, x);
                }
            };
            put_rows(ghat1);
            open(to);
            put_rows(x2);
            open(to + F);
        }

        // X̄2, from Z̄1ᵀ = W1ᵀ qᵀ + b1 - τ ⊙ (M1 Ĝ1)ᵀ
        u32 xbar_t[TILES][4];
        {
            const u32 at = shared + Shared::CAUSAL + 4 * l.lane;
            const Causal causal(load_shared_u32(at), load_shared_u32(at + 128), load_shared_u32(at + 256));
            float neg_tau[2][2];
            load_shared2(neg_tau[0], shared + Shared::NEG_TAU + 8 * l.c);
            load_shared2(neg_tau[1], shared + Shared::NEG_TAU + 8 * l.c + 32);
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
                float y[2][4], zbar[2][4];
                u32 a[4];
                load_shared4(zbar[0], waiting + 1024 * t), load_shared4(zbar[1], waiting + 1024 * t + 512);
                causal.apply(y, ghat1[t]);
#pragma unroll
                for (u32 i = 0; i < 8; i++) y[i / 4][i % 4] = fast_gelu(zbar[i / 4][i % 4] + neg_tau[i / 4][i % 2] * y[i / 4][i % 4]);
                pack_tile(a, y);
                transpose(xbar_t[t], a);
            }
        }
        if (complete) { // W1ᵀ -= tok_last Ĝ1ᵀ k
            const float neg_tau_last = load_shared(shared + Shared::NEG_TAU + 4 * (K - 1));
#pragma unroll
            for (u32 t = 0; t < TILES; t++) scale_columns(ghat1[t], ghat1[t], neg_tau_last);
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) {
                u32 k[4];
                ldmatrix_x4_trans(k, tile_k + l.row + 32 * s);
#pragma unroll
                for (u32 t = 0; t < TILES; t++) {
                    mma_k16(w1[t][2 * s], ghat1[t], k[0], k[1]);
                    mma_k16(w1[t][2 * s + 1], ghat1[t], k[2], k[3]);
                }
            }
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
                const u32 at = b1 + 64 * t + 4 * l.g;
                float b[4];
                mma_step(0, b, ghat1[t], ONES, ONES);
                if (l.c == 0) store_shared(at, load_shared(at) + b[0]), store_shared(at + 32, load_shared(at + 32) + b[2]);
            }
        }
        u32 m2[4]; // the warp's part of -τ M2
        {
            const float one = l.warp == 0 ? 1.0f : 0.0f, ones[4] = {one, one, one, one};
            float y[2][4];
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
                u32 b[4];
                transpose(b, x2[t]);
                mma_step(t, y[0], xbar_t[t], b[0], b[2], ones);
                mma_step(t, y[1], xbar_t[t], b[1], b[3], ones);
            }
            const float tau0 = load_shared(shared + Shared::NEG_TAU + 4 * l.g), tau1 = load_shared(shared + Shared::NEG_TAU + 4 * l.g + 32);
            const u32 causal_mask = Causal::mask(l);
            m2[0] = pack_bf16(tau0 * y[0][0], tau0 * y[0][1]) & causal_mask, m2[1] = pack_bf16(tau1 * y[0][2], tau1 * y[0][3]);
            m2[2] = 0, m2[3] = pack_bf16(tau1 * y[1][2], tau1 * y[1][3]) & causal_mask;
        }
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) {
            float y[2][4];
            u32 g[4];
            ldmatrix_x4_trans(g, shared + Shared::GHAT2 + l.row + 32 * s);
            mma_step(0, y[0], m2, g[0], g[1]);
            mma_step(0, y[1], m2, g[2], g[3]);
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
                u32 w[4];
                ldmatrix_x4_trans(w, w2_rows + 16 * t * PITCH + l.row + 32 * s);
                mma_k16(y[0], xbar_t[t], w[0], w[1]);
                mma_k16(y[1], xbar_t[t], w[2], w[3]);
            }
            put_partial(shared + Shared::SECOND + l.warp * SUM + partial + 64 * s, y);
        }
        if (complete) { // W2 -= tok_last X2ᵀ Ĝ2
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) {
                u32 g[4];
                ldmatrix_x4_trans(g, shared + Shared::UPDATE2 + l.row + 32 * s);
#pragma unroll
                for (u32 t = 0; t < TILES; t++) {
                    mma_k16(w2[t][2 * s], x2[t], g[0], g[1]);
                    mma_k16(w2[t][2 * s + 1], x2[t], g[2], g[3]);
                }
            }
            __syncwarp();
            put_w2();
            if (l.warp < STEPS) {
                u32 a[4];
                float sum[4];
                ldmatrix_x4_trans(a, shared + Shared::UPDATE2 + l.row_b + 32 * l.warp);
                mma_step(0, sum, a, ONES, ONES);
                const u32 at = 4 * (16 * l.warp + l.g);
                const u32 b2_next = 2 * (shared + Shared::B2) + 4 * D - b2;
                if (l.c == 0) {
                    store_shared(b2_next + at, load_shared(b2 + at) + sum[0]);
                    store_shared(b2_next + at + 32, load_shared(b2 + at + 32) + sum[2]);
                }
            }
        }
        copy_async_wait<Shared::STAGES - 2>();
        __syncthreads();

        { // z of a token
            float x[4], sums[2] = {};
            add_parts(x, shared + Shared::SECOND);
            if (p.ghat && fresh) store_global4(p.sums + (row * p.heads + head) * 2 * D + D + column, x);
#pragma unroll
            for (u32 i = 0; i < 4; i++) sums[0] += x[i], sums[1] += x[i] * x[i];
            lane_sums<OWNERS>(sums);
            const float mu = sums[0] * INV_D, rs = fast_rsqrt(max(sums[1] * INV_D - mu * mu, 0.0f) + EPS);
            float q[4], gamma[4], out[4];
            load4(q, tile_q + own_tile);
            load_shared4(gamma, shared + Shared::GAMMA + 4 * column);
            load_shared4(out, shared + Shared::BETA + 4 * column);
#pragma unroll
            for (u32 i = 0; i < 4; i++) out[i] = q[i] + (gamma[i] * (x[i] * rs - mu * rs) + out[i]);
            if (fresh) *(u64*)((u16*)p.z + row * p.z_stride + head * D + column) = join(pack_bf16(out[0], out[1]), pack_bf16(out[2], out[3]));
        }
        if (complete) b2 = 2 * (shared + Shared::B2) + 4 * D - b2;
        if (p.ghat && ((m + 1) % p.group == 0 || m + 1 == count)) {
            const u64 first = p.segments[blockIdx.x / p.heads].first_checkpoint;
            float* saved = p.checkpoints + (first * p.heads + head * ((count + p.group - 1) / p.group) + m / p.group) * MLP_STATE;
            store(saved);
        }
    }
    if (end >= K) store(state_at());
}
