// TTT-Linear backward for bf16 and mini-batches of up to 16: one block walks one head of one sequence from its end, W and dW stay in
// accumulators. W goes back by undoing updates with the saved Ĝ and is read again at each checkpoint (backward.md 6.2, 8.3).
//
// Steps of a mini-batch, numbered as in backward.md 3.2 (layouts in tiles.cuh). Products that contract over the head's columns across
// warps read bf16 copies in shared memory: W, dW', dZ̄, dZ, Ĝ; a warp then owns 16 columns of dq and dk.
//   before the 1st barrier  undo; Z, Z̄, P = k dW' + db', M; ten sums: six of Z, and of Z̄, Z̄², p, pZ̄ with p = γ dz
//   before the 2nd          (1) dZ̄; (2) dĜ; (3) dĜ -= τ P; five sums: of dĜ, dĜ x̂, dĜ γe, γ² dĜ, γ² x̂ dĜ (backward.md 3.3)
//   before the 3rd          (4) dlr, (5) dZ, dv; (2) N, dτ, dq; (3) the part of dk through dW'; (6) dW, db
//   after it                (6) dk += dZ Wᵀ
//
// Launch: segments * heads * parts blocks of 2 * HEAD_DIM threads, `Shared::BYTES` of dynamic shared memory.
#include "chain.cuh"

struct Shared {
    static constexpr u32 STAGES = 2;
    static constexpr u32 K = 0, Q = TILE, V = 2 * TILE, DZ = 3 * TILE, GHAT = 4 * TILE, LR = 5 * TILE, STAGE = 5 * TILE + 64;
    static constexpr u32 W = STAGES * STAGE;               // [out][in] bf16
    static constexpr u32 DW = W + D * PITCH;               // [out][in] bf16
    static constexpr u32 DZBAR = DW + D * PITCH;           // [token][out] bf16
    static constexpr u32 DZIN = DZBAR + TILE;              // [token][out] bf16: dZ
    static constexpr u32 DE = DZIN + TILE;                 // [token][out] bf16: de = -dv, read by its warp alone
    static constexpr u32 PATCHES = DE + TILE;              // two per warp
    static constexpr u32 FIRST = PATCHES + WARPS * 2 * PATCH; // [warp][half][token][4] f32
    static constexpr u32 REST = FIRST + WARPS * 32 * 16;   // [warp][half][token] f32
    static constexpr u32 SECOND = REST + WARPS * 32 * 4;   // [warp][half][token][4] f32
    static constexpr u32 GAMMA = SECOND + WARPS * 32 * 16; // [D] f32
    static constexpr u32 BETA = GAMMA + 4 * D;             // [D] f32
    static constexpr u32 NEG_TAU = BETA + 4 * D;           // [TOKENS] f32: -tok
    static constexpr u32 DGAMMA = NEG_TAU + 4 * TOKENS;    // [2][thread][4] f32: a lane's own sums, in row layout
    static constexpr u32 BYTES = DGAMMA + THREADS * 32;
};

// PREPARE: only what the chain reads and does not depend on dW, into records (chain.cuh), for all parts but the first.
template <bool PREPARE> DEVICE void backward(const BackwardParams& p) {
    DYNAMIC_SHARED(memory);
    const u32 shared = shared_address(memory);
    const Lane l;
    const u32 part = blockIdx.x % p.parts, task = blockIdx.x / p.parts;
    if (PREPARE && part == 0) return;
    const u32 head = task % p.heads, K = p.mini_batch;
    const Segment seg = p.segments[task / p.heads];
    const u32 all = (seg.len + K - 1) / K, checkpoints = (all + p.group - 1) / p.group; // mini-batches
    // From mini-batch count - 1 down to begin. A part behind the end still writes its zeros.
    const u32 begin = min(all, part * p.split), count = p.split ? min(all, begin + p.split) : all;
    const u32 patch = shared + Shared::PATCHES + l.warp * 2 * PATCH, patch2 = patch + PATCH;

    const u32 load_row = threadIdx.x / (D / 8), load_chunk = threadIdx.x % (D / 8);
    const u32 load_column = 2 * (head * D + 8 * load_chunk), store_column = 2 * (head * D + l.column()); // bytes
    auto fetch = [&](u32 m) {
        const u32 stage = shared + m % Shared::STAGES * Shared::STAGE, position = m * K + load_row;
        const bool present = load_row < K && position < seg.len;
        const u32 row = present ? seg.first_row + position : 0;
        const u32 to = stage + load_row * PITCH + 16 * load_chunk;
        copy_async_16(to + Shared::K, at_row(p.k, row, 2 * p.k_stride, load_column), present);
        copy_async_16(to + Shared::Q, at_row(p.q, row, 2 * p.q_stride, load_column), present);
        copy_async_16(to + Shared::V, at_row(p.v, row, 2 * p.v_stride, load_column), present);
        copy_async_16(to + Shared::DZ, at_row(p.dz, row, 2 * p.dz_stride, load_column), present);
        copy_async_16(to + Shared::GHAT, at_row(p.ghat, row, 2 * p.ghat_stride, load_column), present);
        if (threadIdx.x < TOKENS) {
            const u32 at = m * K + threadIdx.x;
            const bool here = threadIdx.x < K && at < seg.len;
            const u32 lr_row = here ? seg.first_row + at : 0;
            copy_async_4(stage + Shared::LR + 4 * threadIdx.x, at_row(p.lr, lr_row, 4 * p.lr_stride, 4 * head), here);
        }
    };
#pragma unroll
    for (u32 i = 0; i < Shared::STAGES; i++) {
        if (begin + i < count) fetch(count - 1 - i);
        copy_async_commit();
    }

    float w[D / 8][4], b[4], dw[D / 8][4], db[4];
    if (!PREPARE) load_state(dw, db, (p.split && begin < count ? p.boundaries + (u64)blockIdx.x * STATE : p.dstate + (u64)task * STATE), l);
    const float mean_g2 = mean_square(p.gamma + head * D, l);
    if (threadIdx.x < D) store_shared(shared + Shared::GAMMA + 4 * threadIdx.x, p.gamma[head * D + threadIdx.x]);
    if (threadIdx.x < D) store_shared(shared + Shared::BETA + 4 * threadIdx.x, p.beta[head * D + threadIdx.x]);
    if (threadIdx.x < TOKENS) store_shared(shared + Shared::NEG_TAU + 4 * threadIdx.x, threadIdx.x < K ? -p.tok[threadIdx.x] : 0.0f);
    const u32 causal_mask = Causal::mask(l);

    float dbeta[4] = {}, dtok[2] = {}, dtok_last = 0.0f; // dbeta: of outputs g, g, g + 8, g + 8
    const u32 dgamma_at = shared + Shared::DGAMMA + 16 * threadIdx.x;
    store_shared4(dgamma_at, 0.0f, 0.0f, 0.0f, 0.0f);
    store_shared4(dgamma_at + 16 * THREADS, 0.0f, 0.0f, 0.0f, 0.0f);
    auto add_dgamma = [&](const float (&x)[8]) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            float sum[4];
            load_shared4(sum, dgamma_at + 16 * THREADS * i);
            store_shared4(dgamma_at + 16 * THREADS * i, sum[0] + x[4 * i], sum[1] + x[4 * i + 1], sum[2] + x[4 * i + 2], sum[3] + x[4 * i + 3]);
        }
    };

    u32 checkpoint = count; // W is read where the mini-batches below this begin
    copy_async_wait<Shared::STAGES - 1>();
    __syncthreads();
    for (u32 m = count; m-- > begin;) {
        const u32 stage = shared + m % Shared::STAGES * Shared::STAGE;
        const u32 tile_k = stage + Shared::K, tile_q = stage + Shared::Q, tile_ghat = stage + Shared::GHAT;
        const bool commits = (m + 1) * K <= seg.len;
        const float tau_last = commits ? p.tok[K - 1] : 0.0f;
        if (m + 1 == checkpoint) {
            checkpoint = m / p.group;
            load_state(w, b, p.checkpoints + ((u64)seg.first_checkpoint * p.heads + (u64)head * checkpoints + checkpoint) * STATE, l);
            checkpoint *= p.group;
        }

        u32 ghat[4];
        ldmatrix_x4_trans(ghat, tile_ghat + l.row_b + l.own);
        {
            u32 update[4];
            scale_columns(update, ghat, tau_last);
            add_outer(w, b, update, tile_k, l);
        }
        float z[2][4], zbar[2][4], dg[2][4], qk[2][4];
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) {
            u32 a[4], k[4], q[4];
            ldmatrix_x4(k, tile_k + l.row_b + 32 * s);
            ldmatrix_x4(q, tile_q + l.row_b + 32 * s);
            pack_step(a, w, s);
            if (!PREPARE) store_a_fragment(shared + Shared::W + 16 * l.warp * PITCH + 32 * s, PITCH, a);
            mma_step(s, z[0], a, k[0], k[1], b);
            mma_step(s, z[1], a, k[2], k[3], b);
            mma_step(s, zbar[0], a, q[0], q[1], b);
            mma_step(s, zbar[1], a, q[2], q[3], b);
            if (!PREPARE) {
                pack_step(a, dw, s);
                store_a_fragment(shared + Shared::DW + 16 * l.warp * PITCH + 32 * s, PITCH, a);
                mma_step(s, dg[0], a, k[0], k[1], db);
                mma_step(s, dg[1], a, k[2], k[3], db);
            }
            ldmatrix_x4(q, tile_q + l.row + 32 * s);
            mma_step(s, qk[0], q, k[0], k[1]);
            mma_step(s, qk[1], q, k[2], k[3]);
        }
#pragma unroll
        for (u32 i = 0; i < 8; i++) qk[i / 4][i % 4] += 1.0f;
        const Causal causal(qk[0], qk[1], causal_mask);
        {
            float y[2][4];
            causal.apply(y, ghat);
            float neg_tau[2][2];
            load_shared2(neg_tau[0], shared + Shared::NEG_TAU + 8 * l.c);
            load_shared2(neg_tau[1], shared + Shared::NEG_TAU + 8 * l.c + 32);
#pragma unroll
            for (u32 i = 0; i < 8; i++) zbar[i / 4][i % 4] += neg_tau[i / 4][i % 2] * y[i / 4][i % 4];
        }
        put_columns(patch, l, z);
        put_columns(patch2, l, zbar);
        // (3) dĜ = -τ_last P, and dτ_last = -Σ P ⊙ Ĝ
        if (!PREPARE && commits) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                dtok_last -= dg[i / 2][i % 2 * 2] * low_f32(ghat[i]) + dg[i / 2][i % 2 * 2 + 1] * high_f32(ghat[i]);
            }
        }
#pragma unroll
        for (u32 i = 0; i < 8; i++) dg[i / 4][i % 4] = PREPARE ? 0.0f : dg[i / 4][i % 4] * -tau_last;
        __syncwarp();

        // Sums of the forward's LayerNorms.
        float x[8], e[8], zb[8], dz[8]; // Z then x̂, β - t then e, Z̄
        take_row(x, patch, l);
        take_row(zb, patch2, l);
        load8(dz, stage + Shared::DZ + l.row + l.own);
        float sums[10] = {};
        {
            float k[8], v[8], gamma[8];
            load8(k, tile_k + l.row + l.own);
            load8(v, stage + Shared::V + l.row + l.own);
            load_table(e, shared + Shared::BETA, l);
            load_table(gamma, shared + Shared::GAMMA, l);
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                e[i] -= v[i] - k[i];
                const float gz = gamma[i] * gamma[i] * x[i], wi = gamma[i] * e[i], pi = gamma[i] * dz[i];
                sums[0] += x[i];
                sums[1] += x[i] * x[i];
                sums[2] += gz;
                sums[3] += gz * x[i];
                sums[4] += wi * x[i];
                sums[5] += wi;
                sums[6] += zb[i];
                sums[7] += zb[i] * zb[i];
                sums[8] += pi;
                sums[9] += pi * zb[i];
            }
        }
        const u32 at4 = (l.half * 16 + l.token) * 16, at1 = (l.half * 16 + l.token) * 4;
        store_shared4(shared + Shared::FIRST + l.warp * 512 + at4, fold(l.half, sums[0], sums[3]), fold(l.half, sums[1], sums[4]),
                      fold(l.half, sums[2], sums[5]), fold(l.half, sums[6], sums[8]));
        store_shared(shared + Shared::REST + l.warp * 128 + at1, fold(l.half, sums[7], sums[9]));
        __syncthreads();
        float total[5] = {};
#pragma unroll
        for (u32 i = 0; i < WARPS; i++) {
            float part[4];
            load_shared4(part, shared + Shared::FIRST + i * 512 + at4);
#pragma unroll
            for (u32 j = 0; j < 4; j++) total[j] += part[j];
            total[4] += load_shared(shared + Shared::REST + i * 128 + at1);
        }
        float mean[10];
#pragma unroll
        for (u32 j = 0; j < 5; j++) {
            mean[j] = __shfl_sync(FULL_WARP, total[j], l.token) * INV_D;
            mean[5 + j] = __shfl_sync(FULL_WARP, total[j], l.token + 16) * INV_D;
        }
        // mean: Z, Z², γ²Z, Z̄, Z̄² | γ²Z², wZ, w, p, pZ̄
        const float mu = mean[0], rs = fast_rsqrt(max(mean[1] - mu * mu, 0.0f) + EPS);
        const float mean_g2x2 = rs * rs * (mean[5] - 2.0f * mu * mean[2] + mu * mu * mean_g2);
        const float mean_g2x = rs * (mean[2] - mu * mean_g2);
        const float mean_gx = mean_g2x2 + rs * (mean[6] - mu * mean[7]);
        const float mean_g = mean_g2x + mean[7];
        const float mu_out = mean[3], rs_out = fast_rsqrt(max(mean[4] - mu_out * mu_out, 0.0f) + EPS);
        const float mean_p = mean[8], mean_px = rs_out * (mean[9] - mu_out * mean_p);
        u32 packed[4];
        {
            // (1) dZ̄ = rs (p - mean p - x̂ mean p x̂), as a sum of p, Z̄ and 1
            float dzbar[8], dgamma[8], gamma[8];
            load_table(gamma, shared + Shared::GAMMA, l);
            const float by_z = -rs_out * rs_out * mean_px, by_1 = -rs_out * mean_p - mu_out * by_z;
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                dzbar[i] = rs_out * (gamma[i] * dz[i]) + (by_z * zb[i] + by_1);
                dgamma[i] = dz[i] * (zb[i] * rs_out - mu_out * rs_out);
                x[i] = x[i] * rs - mu * rs;
                e[i] += gamma[i] * x[i];
            }
            if (!PREPARE) add_dgamma(dgamma);
            pack8(packed, dzbar);
        }
        store_shared4(shared + Shared::DZBAR + l.row + l.own, packed);
        __syncwarp();
        // (2) dĜᵀ -= (τ ⊙ dZ̄)ᵀ M, with B operand [i, j] from M's D layout
        u32 dzbar[4];
        ldmatrix_x4_trans(dzbar, shared + Shared::DZBAR + l.row_b + l.own);
        {
            const float tau0 = load_shared(shared + Shared::NEG_TAU + 4 * l.g), tau1 = load_shared(shared + Shared::NEG_TAU + 4 * l.g + 32);
            const u32 m00 = movmatrix(scale_pair(causal.low, tau0)), m10 = movmatrix(scale_pair(causal.cross, tau1));
            const u32 m11 = movmatrix(scale_pair(causal.high, tau1));
            mma_k16(dg[0], dzbar, m00, m10);
            mma_k16(dg[1], dzbar, 0, m11);
        }
        put_columns(patch, l, dg);
        __syncwarp();
        float dgr[8];
        take_row(dgr, patch, l);
        if (PREPARE) {
            u8* record = (u8*)p.prepared + ((u64)task * p.parts * p.split + m) * Record::BYTES;
            pack8(packed, x);
            store_global4(record + Record::XHAT + 16 * threadIdx.x, packed);
            pack8(packed, e);
            store_global4(record + Record::E + 16 * threadIdx.x, packed);
            pack8(packed, dgr);
            store_global4(record + Record::DGHAT + 16 * threadIdx.x, packed);
            store_global4(record + Record::DZBAR + 16 * threadIdx.x, dzbar);
            if (threadIdx.x < TOKENS) {
                float* row = (float*)(record + Record::ROWS) + 8 * l.token;
                row[0] = rs, row[1] = mean_gx, row[2] = mean_g, row[3] = mean_g2x, row[4] = mean_g2x2;
                row[5] = load_shared(stage + Shared::LR + 4 * l.token);
            }
            copy_async_wait<Shared::STAGES - 2>();
            __syncthreads();
            if (m >= begin + Shared::STAGES) fetch(m - Shared::STAGES);
            copy_async_commit();
            continue;
        }
        sums[0] = 0.0f, sums[1] = 0.0f, sums[2] = 0.0f, sums[3] = 0.0f, sums[4] = 0.0f;
        {
            float gamma[8];
            load_table(gamma, shared + Shared::GAMMA, l);
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                const float gd = gamma[i] * dgr[i], g2d = gamma[i] * gd;
                sums[0] += dgr[i];
                sums[1] += dgr[i] * x[i];
                sums[2] += gd * e[i];
                sums[3] += g2d;
                sums[4] += g2d * x[i];
            }
        }
        store_shared4(shared + Shared::SECOND + l.warp * 512 + at4, fold(l.half, sums[0], sums[3]), fold(l.half, sums[1], sums[4]),
                      fold(l.half, sums[2], 0.0f), 0.0f);
        __syncthreads();
#pragma unroll
        for (u32 j = 0; j < 3; j++) total[j] = 0.0f;
#pragma unroll
        for (u32 i = 0; i < WARPS; i++) {
            float part[4];
            load_shared4(part, shared + Shared::SECOND + i * 512 + at4);
#pragma unroll
            for (u32 j = 0; j < 3; j++) total[j] += part[j];
        }
#pragma unroll
        for (u32 j = 0; j < 3; j++) mean[j] = __shfl_sync(FULL_WARP, total[j], l.token) * INV_D;
#pragma unroll
        for (u32 j = 0; j < 2; j++) mean[3 + j] = __shfl_sync(FULL_WARP, total[j], l.token + 16) * INV_D;

        const bool present = l.token < K && m * K + l.token < seg.len;
        const u32 row = seg.first_row + m * K + l.token;
        {
            float de[8];
            const float r = load_shared(stage + Shared::LR + 4 * l.token);
            const float mean_dgg = rs * (mean[2] - mean_g * mean[0] - mean_gx * mean[1]); // of dĜ G
            if (threadIdx.x < TOKENS && present) *at_row(p.dlr, row, 4 * p.dlr_stride, 4 * head) = mean_dgg * D; // (4)
            const float a1 = r * mean[0], a2 = r * mean[1], a3 = r * mean_dgg;
            const float a4 = rs * (r * mean[3] - a1 * mean_g2 - a2 * mean_g2x - mean_gx * a1 - a2 * mean_g);
            const float a5 = rs * (r * mean[4] - a1 * mean_g2x - a2 * mean_g2x2 - 2.0f * mean_gx * a2) + a3;
            // (5) u = rs (dG - a1 - a2 x̂); dZ = rs (γ² u - rs (m dG + a2 γe) - a4 - a5 x̂)
            const float u_d = rs * r, u_x = -rs * a2, u_1 = -rs * a1;
            const float z_d = -rs * rs * mean_gx * r, z_e = -rs * rs * a2, z_x = -rs * a5, z_1 = -rs * a4;
            float dzin[8], dgamma[8], gamma[8];
            load_table(gamma, shared + Shared::GAMMA, l);
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                const float u = u_d * dgr[i] + (u_x * x[i] + u_1);
                de[i] = gamma[i] * u;
                dzin[i] = rs * (gamma[i] * de[i]) + (z_d * dgr[i] + (z_e * (gamma[i] * e[i]) + (z_x * x[i] + z_1)));
                dgamma[i] = u * (gamma[i] * x[i] + e[i]);
            }
            if (!PREPARE) add_dgamma(dgamma);
            pack8(packed, dzin);
            store_shared4(shared + Shared::DZIN + l.row + l.own, packed);
            pack8(packed, de);
            store_shared4(shared + Shared::DE + l.row + l.own, packed);
#pragma unroll
            for (u32 i = 0; i < 4; i++) packed[i] ^= 0x80008000u;
            if (present) store_global4(at_row(p.dv, row, 2 * p.dv_stride, store_column), packed);
        }

        // (2) N = tril(dZ̄ Ĝᵀ), the parts of dq and dk that contract over out with W and dW'
        float n[2][4], dq[2][4], dk[2][4];
        u32 wt[STEPS][4];
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) {
            u32 a[4], gh[4], dwt[4];
            ldmatrix_x4(a, shared + Shared::DZBAR + l.row + 32 * s);
            ldmatrix_x4(gh, tile_ghat + l.row_b + 32 * s);
            ldmatrix_x4_trans(wt[s], shared + Shared::W + 16 * s * PITCH + l.row + l.own);
            ldmatrix_x4_trans(dwt, shared + Shared::DW + 16 * s * PITCH + l.row + l.own);
            mma_step(s, n[0], a, gh[0], gh[1]);
            mma_step(s, n[1], a, gh[2], gh[3]);
            ldmatrix_x4(gh, tile_ghat + l.row + 32 * s);
            mma_step(s, dq[0], a, wt[s][0], wt[s][1]);
            mma_step(s, dq[1], a, wt[s][2], wt[s][3]);
            mma_step(s, dk[0], gh, dwt[0], dwt[1]);
            mma_step(s, dk[1], gh, dwt[2], dwt[3]);
        }
#pragma unroll
        for (u32 i = 0; i < 8; i++) dk[i / 4][i % 4] *= -tau_last; // (3)
        {
            const float tau0 = load_shared(shared + Shared::NEG_TAU + 4 * l.g), tau1 = load_shared(shared + Shared::NEG_TAU + 4 * l.g + 32);
            dtok[0] -= low_f32(causal.low) * n[0][0] + high_f32(causal.low) * n[0][1];
            dtok[1] -= low_f32(causal.cross) * n[0][2] + high_f32(causal.cross) * n[0][3] + low_f32(causal.high) * n[1][2]
                       + high_f32(causal.high) * n[1][3];
            const u32 m00 = pack_bf16(tau0 * n[0][0], tau0 * n[0][1]) & causal_mask; // dM
            const u32 m10 = pack_bf16(tau1 * n[0][2], tau1 * n[0][3]);
            const u32 m11 = pack_bf16(tau1 * n[1][2], tau1 * n[1][3]) & causal_mask;
            const u32 dm[4] = {m00, m10, 0, m11}, dmt[4] = {movmatrix(m00), 0, movmatrix(m10), movmatrix(m11)};
            u32 k[4], q[4];
            ldmatrix_x4_trans(k, tile_k + l.row + l.own);
            ldmatrix_x4_trans(q, tile_q + l.row + l.own);
            mma_k16(dq[0], dm, k[0], k[1]);
            mma_k16(dq[1], dm, k[2], k[3]);
            mma_k16(dk[0], dmt, q[0], q[1]);
            mma_k16(dk[1], dmt, q[2], q[3]);
        }
        __syncwarp(); // DE
        take_sum(packed, patch, l, dq, stage + Shared::DZ + l.own);
        if (present) store_global4(at_row(p.dq, row, 2 * p.dq_stride, store_column), packed);
        // (6) dW' -> dW
        {
            u32 dzin[4], columns[4];
            ldmatrix_x4_trans(columns, stage + Shared::DZ + l.row_b + l.own);
            mma_k16(dbeta, columns, ONES, ONES);
            ldmatrix_x4_trans(columns, shared + Shared::DE + l.row_b + l.own);
            mma_k16(dbeta, columns, ONES, ONES);
            ldmatrix_x4_trans(dzin, shared + Shared::DZIN + l.row_b + l.own);
            add_outer(dw, db, dzbar, tile_q, l);
            add_outer(dw, db, dzin, tile_k, l);
        }
        copy_async_wait<Shared::STAGES - 2>();
        __syncthreads();
        if (m >= begin + Shared::STAGES) fetch(m - Shared::STAGES);
        copy_async_commit();
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) { // (6)
            u32 a[4];
            ldmatrix_x4(a, shared + Shared::DZIN + l.row + 32 * s);
            mma_k16(dk[0], a, wt[s][0], wt[s][1]);
            mma_k16(dk[1], a, wt[s][2], wt[s][3]);
        }
        take_sum(packed, patch2, l, dk, shared + Shared::DE + l.own);
        __syncwarp(); // the patches are written again
        if (present) store_global4(at_row(p.dk, row, 2 * p.dk_stride, store_column), packed);
    }

    if (PREPARE) return;
    if (part == 0) store_state(p.dstate + (u64)task * STATE, dw, db, l);
    float* partials = p.partials + (u64)blockIdx.x * (K + 2 * D);
    float dgamma[8];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        float sum[4];
        load_shared4(sum, dgamma_at + 16 * THREADS * i);
#pragma unroll
        for (u32 j = 0; j < 4; j++) dgamma[4 * i + j] = sum[j];
    }
    // Sums over the tokens of a row layout; then over lanes and warps for tok.
#pragma unroll
    for (u32 step = 1; step < 16; step *= 2)
#pragma unroll
        for (u32 i = 0; i < 8; i++) dgamma[i] += __shfl_xor_sync(FULL_WARP, dgamma[i], step);
    if (l.token == 0) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) partials[K + l.column() + i] = dgamma[i];
    }
    if (l.c == 0) partials[K + D + 16 * l.warp + l.g] = dbeta[0], partials[K + D + 16 * l.warp + l.g + 8] = dbeta[2];
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        if (step < 4) {
            dtok[0] += __shfl_xor_sync(FULL_WARP, dtok[0], step);
            dtok[1] += __shfl_xor_sync(FULL_WARP, dtok[1], step);
        }
        dtok_last += __shfl_xor_sync(FULL_WARP, dtok_last, step);
    }
    __syncthreads();
    if (l.lane == 0) store_shared(shared + 4 * l.warp, dtok_last);
    __syncthreads();
    if (l.warp == 0 && l.c == 0) {
        float last = 0.0f;
        for (u32 i = 0; i < WARPS; i++) last += load_shared(shared + 4 * i);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 token = l.g + 8 * i;
            if (token < K) partials[token] = dtok[i] + (token == K - 1 ? last : 0.0f);
        }
    }
}

KERNEL __launch_bounds__(THREADS, BACKWARD_BLOCKS) ttt_linear_backward(const __grid_constant__ BackwardParams p) { backward<false>(p); }
KERNEL __launch_bounds__(THREADS, BACKWARD_BLOCKS) ttt_linear_backward_prepare(const __grid_constant__ BackwardParams p) {
    backward<true>(p);
}
