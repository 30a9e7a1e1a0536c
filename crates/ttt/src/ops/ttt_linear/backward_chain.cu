// The serial part of a decoupled TTT-Linear backward: P = k dW' + db', dĜ, dZ, dW, from the records of the preparation; one barrier a
// mini-batch. Leaves dW at the end of every part. A block a segment and head, 2 * HEAD_DIM threads, `Shared::BYTES` of dynamic shared
// memory.
#include "chain.cuh"

struct Shared {
    static constexpr u32 STAGES = 4;
    static constexpr u32 K = 0, Q = TILE, RECORD = 2 * TILE, STAGE = RECORD + Record::BYTES;
    static constexpr u32 DZ = STAGES * STAGE;                  // per warp [16, 16] bf16
    static constexpr u32 PATCHES = DZ + WARPS * 16 * SMALL_PITCH; // per warp
    static constexpr u32 SUMS = PATCHES + WARPS * PATCH;       // [2, one mini-batch after the other][warp][half][token][4] f32
    static constexpr u32 BYTES = SUMS + 2 * WARPS * 512;
};

KERNEL __launch_bounds__(THREADS, 1) ttt_linear_backward_chain(const __grid_constant__ BackwardParams p) {
    DYNAMIC_SHARED(memory);
    const u32 shared = shared_address(memory);
    const Lane l;
    const u32 task = blockIdx.x, head = task % p.heads, K = p.mini_batch;
    const Segment seg = p.segments[task / p.heads];
    const u32 count = (seg.len + K - 1) / K, begin = p.split; // the first part is left to the parts' kernel
    if (count == 0) return;
    const u8* records = (const u8*)p.prepared + (u64)task * p.parts * p.split * Record::BYTES;
    float* boundary = p.boundaries + ((u64)task * p.parts + (count - 1) / p.split) * STATE;
    const u32 patch = shared + Shared::PATCHES + l.warp * PATCH, dz_tile = shared + Shared::DZ + l.warp * 16 * SMALL_PITCH;

    const u32 load_row = threadIdx.x / (D / 8), load_chunk = threadIdx.x % (D / 8);
    const u32 load_column = 2 * (head * D + 8 * load_chunk); // bytes
    auto fetch = [&](u32 m) {
        const u32 stage = shared + m % Shared::STAGES * Shared::STAGE, position = m * K + load_row;
        const bool present = load_row < K && position < seg.len;
        const u32 row = present ? seg.first_row + position : 0, to = stage + load_row * PITCH + 16 * load_chunk;
        copy_async_16(to + Shared::K, at_row(p.k, row, 2 * p.k_stride, load_column), present);
        copy_async_16(to + Shared::Q, at_row(p.q, row, 2 * p.q_stride, load_column), present);
        const u8* record = records + (u64)m * Record::BYTES + 16 * threadIdx.x;
        const u32 at = stage + Shared::RECORD + 16 * threadIdx.x;
#pragma unroll
        for (u32 i = 0; i < 4; i++) copy_async_16(at + 16 * THREADS * i, record + 16 * THREADS * i, true);
        if (threadIdx.x < 2 * TOKENS) copy_async_16(at + Record::ROWS, record + Record::ROWS, true);
    };
#pragma unroll
    for (u32 i = 0; i < Shared::STAGES - 1; i++) {
        if (begin + i < count) fetch(count - 1 - i);
        copy_async_commit();
    }

    float dw[D / 8][4], db[4], gamma[8];
    load_state(dw, db, p.dstate + (u64)task * STATE, l);
    store_state(boundary, dw, db, l);
    const float mean_g2 = mean_square(p.gamma + head * D, l), tok_last = p.tok[K - 1];
#pragma unroll
    for (u32 i = 0; i < 8; i++) gamma[i] = p.gamma[head * D + l.column() + i];
    u32 until_boundary = (count - 1) % p.split + 1; // mini-batches of the part

    copy_async_wait<Shared::STAGES - 2>();
    __syncthreads();
    for (u32 m = count; m-- > begin;) {
        const u32 stage = shared + m % Shared::STAGES * Shared::STAGE, mine = stage + Shared::RECORD + 16 * threadIdx.x;
        const u32 tile_k = stage + Shared::K;
        const float tau_last = (m + 1) * K <= seg.len ? tok_last : 0.0f;
        float dg[2][4]; // Pᵀ
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) {
            u32 a[4], k[4];
            pack_step(a, dw, s);
            ldmatrix_x4(k, tile_k + l.row_b + 32 * s);
            mma_step(s, dg[0], a, k[0], k[1], db);
            mma_step(s, dg[1], a, k[2], k[3], db);
        }
        float x[8], e[8], rows[2][4], d[8];
        load8(x, mine + Record::XHAT);
        load8(e, mine + Record::E);
        put_columns(patch, l, dg);
        __syncwarp();
        take_row(d, patch, l);
        float sums[5] = {};
        {
            float rest[8];
            load8(rest, mine + Record::DGHAT);
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                d[i] = rest[i] - tau_last * d[i];
                const float gd = gamma[i] * d[i], g2d = gamma[i] * gd;
                sums[0] += d[i];
                sums[1] += d[i] * x[i];
                sums[2] += gd * e[i];
                sums[3] += g2d;
                sums[4] += g2d * x[i];
            }
        }
        const u32 exchange = shared + Shared::SUMS + m % 2 * WARPS * 512 + (l.half * 16 + l.token) * 16;
        store_shared4(exchange + l.warp * 512, fold(l.half, sums[0], sums[3]), fold(l.half, sums[1], sums[4]),
                      fold(l.half, sums[2], 0.0f), 0.0f);
        load_shared4(rows[0], stage + Shared::RECORD + Record::ROWS + 32 * l.token);
        load_shared4(rows[1], stage + Shared::RECORD + Record::ROWS + 32 * l.token + 16);
        {
            u32 dzbar[4];
            load_shared4(dzbar, mine + Record::DZBAR);
            add_outer(dw, db, dzbar, stage + Shared::Q, l);
        }
        copy_async_wait<Shared::STAGES - 3>(); // the next mini-batch has come
        __syncthreads();
        float total[3] = {}, mean[5];
#pragma unroll
        for (u32 i = 0; i < WARPS; i++) {
            float part[4];
            load_shared4(part, exchange + i * 512);
#pragma unroll
            for (u32 j = 0; j < 3; j++) total[j] += part[j];
        }
#pragma unroll
        for (u32 j = 0; j < 3; j++) mean[j] = __shfl_sync(FULL_WARP, total[j], l.token) * INV_D;
#pragma unroll
        for (u32 j = 0; j < 2; j++) mean[3 + j] = __shfl_sync(FULL_WARP, total[j], l.token + 16) * INV_D;
        // As in backward.cu.
        const float rs = rows[0][0], mean_gx = rows[0][1], mean_g = rows[0][2], mean_g2x = rows[0][3], mean_g2x2 = rows[1][0];
        const float r = rows[1][1], a1 = r * mean[0], a2 = r * mean[1];
        const float a3 = r * rs * (mean[2] - mean_g * mean[0] - mean_gx * mean[1]);
        const float a4 = rs * (r * mean[3] - a1 * mean_g2 - a2 * mean_g2x - mean_gx * a1 - a2 * mean_g);
        const float a5 = rs * (r * mean[4] - a1 * mean_g2x - a2 * mean_g2x2 - 2.0f * mean_gx * a2) + a3;
        const float u_d = rs * r, u_x = -rs * a2, u_1 = -rs * a1;
        const float z_d = -rs * rs * mean_gx * r, z_e = -rs * rs * a2, z_x = -rs * a5, z_1 = -rs * a4;
        u32 packed[4];
        {
            float dz[8];
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                const float u = u_d * d[i] + (u_x * x[i] + u_1);
                dz[i] = rs * (gamma[i] * (gamma[i] * u)) + (z_d * d[i] + (z_e * (gamma[i] * e[i]) + (z_x * x[i] + z_1)));
            }
            pack8(packed, dz);
        }
        store_shared4(dz_tile + l.token * SMALL_PITCH + l.half * 16, packed);
        __syncwarp();
        u32 dz[4];
        ldmatrix_x4_trans(dz, dz_tile + (l.lane % 8 + l.half * 8) * SMALL_PITCH + l.lane / 8 % 2 * 16);
        add_outer(dw, db, dz, tile_k, l);
        if (--until_boundary == 0) {
            boundary -= STATE;
            store_state(boundary, dw, db, l);
            until_boundary = p.split;
        }
        if (m >= begin + Shared::STAGES - 1) fetch(m - (Shared::STAGES - 1));
        copy_async_commit();
    }
}
