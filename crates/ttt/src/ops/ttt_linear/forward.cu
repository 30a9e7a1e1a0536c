// TTT-Linear forward for bf16 and mini-batches of up to 16: one block walks one head of one sequence, W stays in accumulators.
//
// For a mini-batch (layouts in tiles.cuh): Zᵀ = Wᵀ kᵀ goes through the warp's f32 patch into rows; six one-pass sums (of Z, Z²,
// γ²Z, γ²Z², wZ, w with w = γ(β - t)) cross the warps in one exchange and give mean, variance, mean g and mean g x̂ at once
// (backward.md 3.3); Ĝ goes back as bf16 and is the A operand of Z̄ and of the update. Z̄ has an exchange of its own.
//
// Launch: segments * heads * parts (chain: segments * heads) blocks of 2 * HEAD_DIM threads, `Shared::BYTES` of dynamic shared memory.
#include "tiles.cuh"

struct Shared {
    static constexpr u32 STAGES = 4;
    static constexpr u32 K = 0, Q = TILE, V = 2 * TILE, LR = 3 * TILE, STAGE = 3 * TILE + 64;
    static constexpr u32 GHAT = STAGES * STAGE;              // per warp
    static constexpr u32 PATCHES = GHAT + WARPS * 16 * SMALL_PITCH;   // per warp
    static constexpr u32 INNER = PATCHES + WARPS * PATCH;    // [2 in the chain, one mini-batch after the other][warp][half][token][4] f32
    static constexpr u32 OUTPUT = INNER + WARPS * 32 * 16;   // [warp][half][token] f32
    static constexpr u32 GAMMA = OUTPUT + WARPS * 32 * 16;   // [D] f32; wide heads read gamma and beta again instead of holding them
    static constexpr u32 BETA = GAMMA + 4 * D;               // [D] f32
    static constexpr u32 BYTES = BETA + 4 * D;
};

// CHAIN: only what moves W, up to the start of the last part.
template <bool CHAIN> DEVICE void forward(const ForwardParams& p) {
    DYNAMIC_SHARED(memory);
    const u32 shared = shared_address(memory);
    const Lane l;
    const u32 parts = CHAIN ? 1 : p.parts, part = blockIdx.x % parts, task = blockIdx.x / parts;
    const u32 head = task % p.heads, K = p.mini_batch;
    const Segment seg = p.segments[task / p.heads];
    const u32 phase = seg.phase, end = phase + seg.len; // positions of its tokens, from the start of the open mini-batch
    const u32 all = (end + K - 1) / K; // mini-batches
    const u32 begin = CHAIN ? 0 : part * p.split;
    const u32 count = CHAIN ? (all - 1) / p.split * p.split : p.split ? min(all, begin + p.split) : all; // up to here
    if (seg.len == 0 || begin >= (CHAIN ? all : count)) return; // a chain of one part still leaves its start
    float* boundary = p.boundaries + ((u64)task * p.parts + part) * STATE;
    const u64 place = (u64)seg.slot * p.heads + head;
    float* state = p.weights + place * STATE;
    float* rows = p.rows + place * (K - 1) * 2 * D; // not read when p.rows is null
    // The last part writes rows while the first may still read them, so the parts read a copy.
    float* opened = p.opened + (u64)task * (K - 1) * 2 * D;
    const float* restore = CHAIN || !p.split ? rows : opened;
    if (CHAIN && phase > 0) {
        for (u32 i = threadIdx.x; i < phase * 2 * D; i += THREADS) opened[i] = rows[i];
    }
    const u32 checkpoints = (all + p.group - 1) / p.group;
    float* saved = p.checkpoints + ((u64)seg.first_checkpoint * p.heads + (u64)head * checkpoints + begin / p.group) * STATE;
    const u32 patch = shared + Shared::PATCHES + l.warp * PATCH;
    const u32 ghat_tile = shared + Shared::GHAT + l.warp * 16 * SMALL_PITCH;

    // Loads of mini-batch m: a thread brings 16 bytes of each tile.
    const u32 load_row = threadIdx.x / (D / 8), load_chunk = threadIdx.x % (D / 8);
    const u32 load_column = 2 * (head * D + 8 * load_chunk), store_column = 2 * (head * D + l.column()); // bytes
    auto fetch = [&](u32 m) {
        const u32 stage = shared + m % Shared::STAGES * Shared::STAGE, position = m * K + load_row;
        const bool present = load_row < K && position >= phase && position < end;
        const u32 row = present ? seg.first_row + position - phase : 0;
        const u32 to = stage + load_row * PITCH + 16 * load_chunk;
        const bool restored = load_row < K && position < phase; // only in the first mini-batch
        if (!restored) copy_async_16(to + Shared::K, at_row(p.k, row, 2 * p.k_stride, load_column), present);
        if (!CHAIN) copy_async_16(to + Shared::Q, at_row(p.q, row, 2 * p.q_stride, load_column), present);
        copy_async_16(to + Shared::V, at_row(p.v, row, 2 * p.v_stride, load_column), present);
        if (threadIdx.x < TOKENS) {
            const u32 at = m * K + threadIdx.x;
            const bool here = threadIdx.x < K && at >= phase && at < end;
            const u32 lr_row = here ? seg.first_row + at - phase : 0;
            copy_async_4(stage + Shared::LR + 4 * threadIdx.x, at_row(p.lr, lr_row, 4 * p.lr_stride, 4 * head), here);
        }
        if (restored) {
            const float* from = restore + position * 2 * D + 8 * load_chunk;
            u32 pairs[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) pairs[i] = pack_bf16(from[2 * i], from[2 * i + 1]);
            store_shared4(to + Shared::K, pairs);
        }
    };
    auto fetch_next = [&](u32 m) {
        if (m + Shared::STAGES - 1 < count) fetch(m + Shared::STAGES - 1);
        copy_async_commit();
    };
#pragma unroll
    for (u32 i = 0; i < Shared::STAGES - 1; i++) {
        if (begin + i < count) fetch(begin + i);
        copy_async_commit();
    }

    float w[D / 8][4], b[4];
    load_state(w, b, !CHAIN && p.split ? boundary : state, l);
    u32 until_checkpoint = CHAIN ? p.split : p.group;
    if (CHAIN) store_state(boundary, w, b, l);
    float gamma[8], beta[8];
    const float mean_g2 = mean_square(p.gamma + head * D, l);
#pragma unroll
    for (u32 i = 0; i < 8; i++) gamma[i] = p.gamma[head * D + l.column() + i], beta[i] = p.beta[head * D + l.column() + i];
    if (D > 64 && threadIdx.x < D) {
        store_shared(shared + Shared::GAMMA + 4 * threadIdx.x, p.gamma[head * D + threadIdx.x]);
        store_shared(shared + Shared::BETA + 4 * threadIdx.x, p.beta[head * D + threadIdx.x]);
    }
    auto load_norm = [&] {
        if (D > 64) load_table(gamma, shared + Shared::GAMMA, l), load_table(beta, shared + Shared::BETA, l);
    };
    float neg_tau[4];
    load_neg_tau(neg_tau, p.tok, K, l);
    const u32 causal_mask = Causal::mask(l);
    const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    const float neg_tau_last = -p.tok[K - 1];

    copy_async_wait<Shared::STAGES - 2>();
    __syncthreads();
    for (u32 m = begin; m < count; m++) {
        const u32 stage = shared + m % Shared::STAGES * Shared::STAGE;
        const u32 tile_k = stage + Shared::K, tile_q = stage + Shared::Q;
        const bool complete = (m + 1) * K <= end;

        // Zᵀ = Wᵀ kᵀ + b, the part of Z̄ᵀ that W gives, and M.
        float z[2][4], zbar[2][4], qk[2][4];
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) {
            u32 a[4], k[4], q[4];
            pack_step(a, w, s);
            ldmatrix_x4(k, tile_k + l.row_b + 32 * s);
            mma_step(s, z[0], a, k[0], k[1], b);
            mma_step(s, z[1], a, k[2], k[3], b);
            if (CHAIN) continue;
            ldmatrix_x4(q, tile_q + l.row_b + 32 * s);
            mma_step(s, zbar[0], a, q[0], q[1], b);
            mma_step(s, zbar[1], a, q[2], q[3], b);
            ldmatrix_x4(q, tile_q + l.row + 32 * s);
            mma_step(s, qk[0], q, k[0], k[1], ones);
            mma_step(s, qk[1], q, k[2], k[3], ones);
        }
        const Causal causal(qk[0], qk[1], causal_mask);
        float zr[8], wr[8], sums[6] = {};
        { // while the products run
            float v[8];
            load_norm();
            load8(wr, tile_k + l.row + l.own);
            load8(v, stage + Shared::V + l.row + l.own);
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                wr[i] = gamma[i] * (beta[i] - (v[i] - wr[i]));
                sums[5] += wr[i];
            }
        }
        const float lr = load_shared(stage + Shared::LR + 4 * l.token);
        put_columns(patch, l, z);
        __syncwarp();
        take_row(zr, patch, l);
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            const float gz = gamma[i] * gamma[i] * zr[i];
            sums[0] += zr[i];
            sums[1] += zr[i] * zr[i];
            sums[2] += gz;
            sums[3] += gz * zr[i];
            sums[4] += wr[i] * zr[i];
        }
        const u32 exchange = shared + Shared::INNER + (CHAIN ? m % 2 * WARPS * 512 : 0) + (l.half * 16 + l.token) * 16;
        store_shared4(exchange + l.warp * 512, fold(l.half, sums[0], sums[3]), fold(l.half, sums[1], sums[4]),
                      fold(l.half, sums[2], sums[5]), 0.0f);
        if (CHAIN) copy_async_wait<Shared::STAGES - 3>(); // the next mini-batch has come
        __syncthreads();
        float total[3] = {};
#pragma unroll
        for (u32 i = 0; i < WARPS; i++) {
            float part[4];
            load_shared4(part, exchange + i * 512);
#pragma unroll
            for (u32 j = 0; j < 3; j++) total[j] += part[j];
        }
        float mean[6];
#pragma unroll
        for (u32 j = 0; j < 3; j++) {
            mean[j] = __shfl_sync(FULL_WARP, total[j], l.token) * INV_D;
            mean[3 + j] = __shfl_sync(FULL_WARP, total[j], l.token + 16) * INV_D;
        }
        const float mu = mean[0], rs = fast_rsqrt(max(mean[1] - mu * mu, 0.0f) + EPS);
        const float mean_gx = rs * (rs * (mean[3] - 2.0f * mu * mean[2] + mu * mu * mean_g2) + mean[4] - mu * mean[5]);
        const float mean_g = rs * (mean[2] - mu * mean_g2) + mean[5];
        const float scale = rs * lr;
        u32 packed[4];
        {
            float ghat[8];
            load_norm();
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                const float xhat = zr[i] * rs - mu * rs;
                ghat[i] = scale * ((gamma[i] * gamma[i] - mean_gx) * xhat + (wr[i] - mean_g));
            }
            pack8(packed, ghat);
        }
        const u32 position = m * K + l.token;
        const bool fresh = l.token < K && position >= phase && position < end;
        if (m == 0 && position < phase) { // a token of an earlier call
            const float* from = restore + position * 2 * D + D + l.column();
#pragma unroll
            for (u32 i = 0; i < 4; i++) packed[i] = pack_bf16(from[2 * i], from[2 * i + 1]);
        }
        store_shared4(ghat_tile + l.token * SMALL_PITCH + l.half * 16, packed);
        if (!CHAIN && p.ghat && fresh)
            store_global4(at_row(p.ghat, seg.first_row + position - phase, 2 * p.ghat_stride, store_column), packed);
        if (!CHAIN && p.rows && fresh && !complete) {
            float k[8], ghat[8];
            load8(k, tile_k + l.row + l.own);
            unpack8(ghat, packed);
            float* to = rows + l.token * 2 * D + l.column();
#pragma unroll
            for (u32 i = 0; i < 8; i++) to[i] = k[i], to[D + i] = ghat[i];
        }
        __syncwarp();
        u32 ghat[4];
        ldmatrix_x4_trans(ghat, ghat_tile + (l.lane % 8 + l.half * 8) * SMALL_PITCH + l.lane / 8 % 2 * 16);

        if (CHAIN) { // complete: only the last mini-batch of a segment is not
            u32 update[4];
            scale_columns(update, ghat, neg_tau_last);
            add_outer(w, b, update, tile_k, l);
            if (--until_checkpoint == 0) {
                boundary += STATE;
                store_state(boundary, w, b, l);
                until_checkpoint = p.split;
            }
            fetch_next(m);
            continue;
        }

        // Z̄ᵀ = Wᵀ qᵀ + b - τ ⊙ (M Ĝ)ᵀ
        float y[2][4];
        causal.apply(y, ghat);
#pragma unroll
        for (u32 i = 0; i < 8; i++) zbar[i / 4][i % 4] += neg_tau[i / 4 * 2 + i % 2] * y[i / 4][i % 4];
        put_columns(patch, l, zbar);
        if (complete) {
            u32 update[4];
            scale_columns(update, ghat, neg_tau_last);
            add_outer(w, b, update, tile_k, l);
        }
        __syncwarp();
        fetch_next(m);
        take_row(zr, patch, l);
        sums[0] = 0.0f, sums[1] = 0.0f;
#pragma unroll
        for (u32 i = 0; i < 8; i++) sums[0] += zr[i], sums[1] += zr[i] * zr[i];
        store_shared(shared + Shared::OUTPUT + 4 * threadIdx.x, fold(l.half, sums[0], sums[1]));
        copy_async_wait<Shared::STAGES - 2>();
        __syncthreads();
        float sum = 0.0f;
#pragma unroll
        for (u32 i = 0; i < WARPS; i++) sum += load_shared(shared + Shared::OUTPUT + 4 * (32 * i + l.lane));
        const float mu_out = __shfl_sync(FULL_WARP, sum, l.token) * INV_D;
        const float square = __shfl_sync(FULL_WARP, sum, l.token + 16) * INV_D;
        const float rs_out = fast_rsqrt(max(square - mu_out * mu_out, 0.0f) + EPS);
        if (fresh) {
            float q[8], out[8];
            load_norm();
            load8(q, tile_q + l.row + l.own);
#pragma unroll
            for (u32 i = 0; i < 8; i++) out[i] = q[i] + (gamma[i] * (zr[i] * rs_out - mu_out * rs_out) + beta[i]);
            pack8(packed, out);
            store_global4(at_row(p.z, seg.first_row + position - phase, 2 * p.z_stride, store_column), packed);
        }
        if (p.checkpoints && (--until_checkpoint == 0 || m + 1 == count)) {
            store_state(saved, w, b, l);
            saved += STATE;
            until_checkpoint = p.group;
        }
    }
    if (!CHAIN && count == all && end >= K) store_state(state, w, b, l);
}

KERNEL __launch_bounds__(THREADS, FORWARD_BLOCKS) ttt_linear_forward(const __grid_constant__ ForwardParams p) { forward<false>(p); }
KERNEL __launch_bounds__(THREADS, 1) ttt_linear_forward_chain(const __grid_constant__ ForwardParams p) { forward<true>(p); }
