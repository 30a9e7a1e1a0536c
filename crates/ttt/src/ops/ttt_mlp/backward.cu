// TTT-MLP backward for bf16 and mini-batches of up to 16: two blocks (a cluster) walk one head of one sequence from its end. Each has
// half of the hidden units, 16 a warp, with W1, W2, dW1 and dW2 in accumulators (layouts in mlp_tiles.cuh). W goes back by undoing updates
// with the saved Ĝ and is read again at each checkpoint (backward.md 6.2, 8.3); Z2 and Z̄2 were kept. What goes back to tokens is a sum
// over hidden units: of the warps in shared memory, then of the two blocks through it. A block finishes half of the tokens.
//
// Steps of a mini-batch, numbered as in backward.md 4.2:
//   before the 1st exchange  tokens: G2, (a) dZ̄2. Units: W1 undone, Z1, X2, W1ᵀ qᵀ
//   before the 2nd           W2 undone, Z̄1, U; (b), (c), (d), (e), (f), dU; parts of dĜ2, dU W2, dq; sums of the block
//   before the 3rd           tokens: dlr, (h) dZ2, dv, dq
//   before the 4th           (i), (j), (k), parts of dk; sums of the block
//   after it                 tokens: dk
//
// An exchange is what a block writes into the other's shared memory, counted there by a barrier. Every exchange is written again only after
// the other block's next one has come, which it sends when it has read this one.
//
// Launch: 2 * segments * heads blocks of 4 * HEAD_DIM threads, `Shared::BYTES` of dynamic shared memory. Needs clusters: Hopper.
#include "mlp_tiles.cuh"

constexpr u32 RANKS = 2;
constexpr u32 MLP_WARPS = F / (16 * RANKS), MLP_THREADS = 32 * MLP_WARPS, UNITS = F / RANKS; // of a block
constexpr u32 OWNERS = D / 2;                // lanes of a token, 2 columns each
constexpr u32 OWN = TOKENS / RANKS;          // tokens that a block finishes
constexpr u32 UNITS_PITCH = 2 * UNITS + 16;  // bytes from token to token of a bf16 tile [token, unit of the block]

struct Shared {
    static constexpr u32 STAGES = 2;
    static constexpr u32 K = 0, Q = TILE, V = 2 * TILE, DZ = 3 * TILE, GHAT2 = 4 * TILE, GHAT1 = 5 * TILE;
    static constexpr u32 SUMS = GHAT1 + TOKENS * UNITS_PITCH; // [OWN][2 D] f32: Z2 and Z̄2, then x̂ and e, then de
    static constexpr u32 LR = SUMS + OWN * 8 * D, STAGE = LR + 64;
    static constexpr u32 G2 = STAGES * STAGE;                 // [token][out] bf16
    static constexpr u32 DZBAR2 = G2 + TILE;                  // [token][out] bf16
    static constexpr u32 DZ2 = DZBAR2 + TILE;                 // [token][out] bf16
    static constexpr u32 UPDATE2 = DZ2 + TILE;                // [token][out] bf16: tok_last Ĝ2
    static constexpr u32 W1 = UPDATE2 + TILE;                 // [unit][in] bf16
    static constexpr u32 W2 = W1 + UNITS * PITCH;             // [unit][out] bf16
    static constexpr u32 DW = W2 + UNITS * PITCH;             // dW2 [unit][out], then dW1 [unit][in] bf16
    static constexpr u32 PARTS = DW + UNITS * PITCH;          // [dĜ2 and dk, dU W2, dq] of each warp
    static constexpr u32 OTHER = PARTS + 3 * MLP_WARPS * SUM; // [dĜ2, dU W2, dq, dk][OWN][D] f32: the other block's sums
    static constexpr u32 DLR = OTHER + 4 * OWN * 4 * D;       // [RANKS][warp][TOKENS] f32: parts of dlr, for tokens of this block
    static constexpr u32 GAMMA = DLR + RANKS * MLP_WARPS * 4 * TOKENS; // [D] f32
    static constexpr u32 BETA = GAMMA + 4 * D;                // [D] f32
    static constexpr u32 DB2 = BETA + 4 * D;                  // [D] f32
    static constexpr u32 B1 = DB2 + 4 * D;                    // [UNITS] f32
    static constexpr u32 DB1 = B1 + 4 * UNITS;                // [UNITS] f32
    static constexpr u32 CAUSAL = DB1 + 4 * UNITS;            // [3][lane]: M1, see Causal
    static constexpr u32 NEG_TAU = CAUSAL + 3 * 128;          // [TOKENS] f32: -tok
    static constexpr u32 MEAN_G2 = NEG_TAU + 4 * TOKENS;      // f32: mean of gamma²
    static constexpr u32 ROWS = MEAN_G2 + 16;                 // [OWN][8] f32: 1 / s and means of an own token
    static constexpr u32 BARRIERS = ROWS + OWN * 32;          // of the four exchanges
    static constexpr u32 DGAMMA = BARRIERS + 32;              // [thread][4] f32: a lane's own sums of dgamma and dbeta
    static constexpr u32 BYTES = DGAMMA + MLP_THREADS * 16;
};
enum Exchange { TILES_OF_TOKENS, SUMS_OF_UNITS, DZ2_OF_TOKENS, DK_OF_UNITS };

KERNEL CLUSTER(2) __launch_bounds__(MLP_THREADS, 1) ttt_mlp_backward(const __grid_constant__ MlpBackwardParams p) {
    DYNAMIC_SHARED(memory);
    const u32 shared = shared_address(memory);
    const Lane l;
    const u32 rank = cluster_rank(), task = blockIdx.x / RANKS, head = task % p.heads, K = p.mini_batch;
    const Segment seg = p.segments[task / p.heads];
    const u32 count = (seg.len + K - 1) / K;

    auto fetch = [&](u32 m) {
        const u32 stage = shared + m % Shared::STAGES * Shared::STAGE, tid = threadIdx.x;
        auto row_of = [&](u32 token, bool& present) {
            present = token < K && m * K + token < seg.len;
            return present ? seg.first_row + m * K + token : 0;
        };
        bool present;
        { // a half of the threads brings k, v and Ĝ2, the other q and dz
            const u32 token = tid / (D / 8) % TOKENS, chunk = tid % (D / 8), row = row_of(token, present);
            const u32 to = stage + token * PITCH + 16 * chunk, from = 2 * (head * D + 8 * chunk);
            if (tid < MLP_THREADS / 2) {
                copy_async_16(to + Shared::K, at_row(p.k, row, 2 * p.k_stride, from), present);
                copy_async_16(to + Shared::V, at_row(p.v, row, 2 * p.v_stride, from), present);
                copy_async_16(to + Shared::GHAT2, (const u16*)p.ghat + ((u64)row * p.heads + head) * (F + D) + F + 8 * chunk, present);
            } else {
                copy_async_16(to + Shared::Q, at_row(p.q, row, 2 * p.q_stride, from), present);
                copy_async_16(to + Shared::DZ, at_row(p.dz, row, 2 * p.dz_stride, from), present);
            }
        }
        {
            const u32 token = tid / (UNITS / 8), chunk = tid % (UNITS / 8), row = row_of(token, present);
            copy_async_16(stage + Shared::GHAT1 + token * UNITS_PITCH + 16 * chunk,
                          (const u16*)p.ghat + ((u64)row * p.heads + head) * (F + D) + rank * UNITS + 8 * chunk, present);
        }
        {
            const u32 token = rank * OWN + tid / (D / 2), chunk = tid % (D / 2), row = row_of(token, present);
            copy_async_16(stage + Shared::SUMS + 16 * tid, p.sums + ((u64)row * p.heads + head) * 2 * D + 4 * chunk, present);
        }
        if (tid < TOKENS) {
            const u32 row = row_of(tid, present);
            copy_async_4(stage + Shared::LR + 4 * tid, at_row(p.lr, row, 4 * p.lr_stride, 4 * head), present);
        }
    };
#pragma unroll
    for (u32 i = 0; i < Shared::STAGES; i++) {
        if (i < count) fetch(count - 1 - i);
        copy_async_commit();
    }

    const u32 unit = rank * UNITS + 16 * l.warp; // first hidden unit of the warp
    float w1[1][D / 8][4], w2[1][D / 8][4], dw1[1][D / 8][4], dw2[1][D / 8][4];
    float* dstate = p.dstate + (u64)task * MLP_STATE;
    load_units(dw1, dw2, dstate, unit, l);
    for (u32 i = threadIdx.x; i < UNITS; i += MLP_THREADS) store_shared(shared + Shared::DB1 + 4 * i, dstate[D * F + rank * UNITS + i]);
    if (threadIdx.x < D) {
        store_shared(shared + Shared::GAMMA + 4 * threadIdx.x, p.gamma[head * D + threadIdx.x]);
        store_shared(shared + Shared::BETA + 4 * threadIdx.x, p.beta[head * D + threadIdx.x]);
        store_shared(shared + Shared::DB2 + 4 * threadIdx.x, dstate[MLP_STATE - D + threadIdx.x]);
    }
    {
        const float mean_g2 = mean_square(p.gamma + head * D, l);
        if (threadIdx.x == 0) store_shared(shared + Shared::MEAN_G2, mean_g2);
    }
    if (threadIdx.x < TOKENS) store_shared(shared + Shared::NEG_TAU + 4 * threadIdx.x, threadIdx.x < K ? -p.tok[threadIdx.x] : 0.0f);

    const u32 copy = 16 * l.warp * PITCH;                       // the warp's rows of a bf16 copy of weights
    const u32 partial = l.warp * SUM + 4 * (l.g * SUM_PITCH + 2 * l.c);
    const u32 units = 32 * l.warp + l.token * UNITS_PITCH + l.half * 16;                                       // as Lane::row
    const u32 units_b = 32 * l.warp + (l.lane % 8 + l.lane / 16 * 8) * UNITS_PITCH + l.lane / 8 % 2 * 16;     // as Lane::row_b
    const u32 bias = 4 * (16 * l.warp + l.g);
    // This lane as one of a token's; the token is own + OWN * rank.
    const u32 own = l.warp * (OWN / MLP_WARPS) + l.lane / OWNERS, column = 2 * (l.lane % OWNERS);
    const u32 dgamma_at = shared + Shared::DGAMMA + 16 * threadIdx.x;
    store_shared4(dgamma_at, 0.0f, 0.0f, 0.0f, 0.0f);
    float dtok[2] = {}, dtok_last = 0.0f;

    // Sums over the block's warps of PARTS[which]: of the token that this lane's block finishes; those of the other's go there.
    auto barrier = [&](Exchange which) { return shared + Shared::BARRIERS + 8 * which; };
    auto block_sum = [&](float (&sum)[2], u32 which, u32 other, Exchange exchange) {
        const u32 from = shared + Shared::PARTS + which * MLP_WARPS * SUM + 4 * column;
        float theirs[2] = {};
        sum[0] = 0.0f, sum[1] = 0.0f;
#pragma unroll 4 // all eight at once spill
        for (u32 w = 0; w < MLP_WARPS; w++) {
            float part[2];
            load_shared2(part, from + w * SUM + 4 * (own + OWN * rank) * SUM_PITCH);
            sum[0] += part[0], sum[1] += part[1];
            load_shared2(part, from + w * SUM + 4 * (own + OWN * (1 - rank)) * SUM_PITCH);
            theirs[0] += part[0], theirs[1] += part[1];
        }
        store_async2(cluster_address(shared + Shared::OTHER + ((other * OWN + own) * D + column) * 4, 1 - rank), theirs[0], theirs[1],
                     cluster_address(barrier(exchange), 1 - rank));
    };
    auto add_other = [&](float (&sum)[2], u32 other) {
        float part[2];
        load_shared2(part, shared + Shared::OTHER + ((other * OWN + own) * D + column) * 4);
        sum[0] += part[0], sum[1] += part[1];
    };
    // An own token's two columns of a tile that both blocks have.
    auto put_both = [&](u32 tile, float x, float y, Exchange exchange) {
        const u32 pair = pack_bf16(x, y), at = shared + tile + (own + OWN * rank) * PITCH + 2 * column;
        store_shared_u32(at, pair);
        store_async_u32(cluster_address(at, 1 - rank), pair, cluster_address(barrier(exchange), 1 - rank));
    };

    auto add_dgamma = [&](float x, float y, float z, float w) {
        float sum[4];
        load_shared4(sum, dgamma_at);
        store_shared4(dgamma_at, sum[0] + x, sum[1] + y, sum[2] + z, sum[3] + w);
    };

    if (threadIdx.x == 0) {
        for (u32 i = 0; i < 4; i++) barrier_init(shared + Shared::BARRIERS + 8 * i, 1);
        barrier_publish();
    }
    u32 checkpoint = count; // W is read where the mini-batches below this begin
    copy_async_wait<Shared::STAGES - 1>();
    cluster_sync();
    for (u32 m = count; m-- > 0;) {
        const u32 stage = shared + m % Shared::STAGES * Shared::STAGE;
        const u32 tile_k = stage + Shared::K, tile_q = stage + Shared::Q, tile_ghat1 = stage + Shared::GHAT1, tile_ghat2 = stage + Shared::GHAT2;
        const u32 parity = (count - 1 - m) % 2;
        if (threadIdx.x == 0) {
            barrier_expect(barrier(TILES_OF_TOKENS), 4 * OWN * D);
            barrier_expect(barrier(SUMS_OF_UNITS), 3 * 4 * OWN * D + 4 * OWN * MLP_WARPS);
            barrier_expect(barrier(DZ2_OF_TOKENS), 2 * OWN * D);
            barrier_expect(barrier(DK_OF_UNITS), 4 * OWN * D);
        }
        const bool commits = (m + 1) * K <= seg.len;
        const float neg_tau_last = commits ? load_shared(shared + Shared::NEG_TAU + 4 * (K - 1)) : 0.0f;
        const u32 token = own + OWN * rank, own_tile = token * PITCH + 2 * column;
        const bool present = token < K && m * K + token < seg.len;
        const u32 row = seg.first_row + m * K + token;
        if (m + 1 == checkpoint) {
            const u32 checkpoints = (count + p.group - 1) / p.group, first = p.segments[task / p.heads].first_checkpoint;
            checkpoint = m / p.group;
            const float* from = p.checkpoints + ((u64)first * p.heads + head * checkpoints + checkpoint) * MLP_STATE;
            load_units(w1, w2, from, unit, l);
            if (l.lane < 16) store_shared(shared + Shared::B1 + 64 * l.warp + 4 * l.lane, from[D * F + unit + l.lane]);
            __syncwarp();
            checkpoint *= p.group;
        }

        // Registers are short: what a lane will need again waits in shared memory, where it is the only one to look.
        const u32 own_x = stage + Shared::SUMS + (own * 2 * D + column) * 4, own_e = own_x + 4 * D, rows = shared + Shared::ROWS + 32 * own;
        const u32 waiting = shared + Shared::PARTS + (2 * MLP_WARPS + l.warp) * SUM + 16 * l.lane, waiting_d1 = waiting - MLP_WARPS * SUM; // before dq and dU W2
        // Tokens: statistics of both LayerNorms, G2 and (a) dZ̄2. One-pass sums as in TTT-Linear's backward.cu.
        {
            float x[2], e[2], zb[2], gamma[2], dz[2], sums[10] = {};
            load_shared2(x, own_x);
            load_shared2(zb, own_e);
            load_shared2(gamma, shared + Shared::GAMMA + 4 * column);
            load_shared2(e, shared + Shared::BETA + 4 * column);
            const u32 kk = load_shared_u32(tile_k + own_tile), vv = load_shared_u32(stage + Shared::V + own_tile);
            const u32 dd = load_shared_u32(stage + Shared::DZ + own_tile);
            e[0] -= low_f32(vv) - low_f32(kk), e[1] -= high_f32(vv) - high_f32(kk);
            dz[0] = low_f32(dd), dz[1] = high_f32(dd);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const float gz = gamma[i] * gamma[i] * x[i], wi = gamma[i] * e[i], pi = gamma[i] * dz[i];
                sums[0] += x[i], sums[1] += x[i] * x[i], sums[2] += gz, sums[3] += gz * x[i], sums[4] += wi * x[i], sums[5] += wi;
                sums[6] += zb[i], sums[7] += zb[i] * zb[i], sums[8] += pi, sums[9] += pi * zb[i];
            }
            lane_sums<OWNERS>(sums);
#pragma unroll
            for (u32 i = 0; i < 10; i++) sums[i] *= INV_D;
            const float mean_g2 = load_shared(shared + Shared::MEAN_G2), mu = sums[0];
            const float rs = fast_rsqrt(max(sums[1] - mu * mu, 0.0f) + EPS);
            const float mean_g2x2 = rs * rs * (sums[3] - 2.0f * mu * sums[2] + mu * mu * mean_g2);
            const float mean_g2x = rs * (sums[2] - mu * mean_g2);
            const float mean_gx = mean_g2x2 + rs * (sums[4] - mu * sums[5]);
            const float mean_g = mean_g2x + sums[5];
            const float mu_out = sums[6], rs_out = fast_rsqrt(max(sums[7] - mu_out * mu_out, 0.0f) + EPS);
            const float mean_p = sums[8], mean_px = rs_out * (sums[9] - mu_out * mean_p);
            float dzbar[2], g2[2];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const float xo = zb[i] * rs_out - mu_out * rs_out;
                dzbar[i] = rs_out * (gamma[i] * dz[i] - mean_p - xo * mean_px);
                sums[i] = dz[i] * xo;
                x[i] = x[i] * rs - mu * rs;
                e[i] += gamma[i] * x[i];
                g2[i] = rs * (gamma[i] * e[i] - mean_g - mean_gx * x[i]);
            }
            add_dgamma(sums[0], sums[1], dz[0], dz[1]);
            store_shared2(own_x, x[0], x[1]);
            store_shared2(own_e, e[0], e[1]);
            if (column == 0) store_shared4(rows, rs, mean_gx, mean_g, mean_g2x), store_shared(rows + 16, mean_g2x2);
            put_both(Shared::G2, g2[0], g2[1], TILES_OF_TOKENS);
            put_both(Shared::DZBAR2, dzbar[0], dzbar[1], TILES_OF_TOKENS);
        }
        // tok_last Ĝ2, as the forward rounded it; both blocks make all of it.
        for (u32 i = threadIdx.x; i < TOKENS * D / 2; i += MLP_THREADS) {
            const u32 at = i / (D / 2) * PITCH + 4 * (i % (D / 2));
            store_shared_u32(shared + Shared::UPDATE2 + at, scale_pair(load_shared_u32(tile_ghat2 + at), -neg_tau_last));
        }

        // Units: W1 undone; Z1, X2 and the part of Z̄1 that W1 gives.
        u32 ghat1[4], x2[4];
        ldmatrix_x4_trans(ghat1, tile_ghat1 + units_b);
        if (commits) {
            u32 update[4];
            scale_columns(update, ghat1, -neg_tau_last);
            float b[4];
            mma_step(0, b, update, ONES, ONES);
            add_product(w1[0], update, tile_k, l);
            const u32 at = shared + Shared::B1 + bias;
            if (l.c == 0) store_shared(at, load_shared(at) + b[0]), store_shared(at + 32, load_shared(at + 32) + b[2]);
            __syncwarp();
        }
        {
            float b[4], z[2][4], zbar[2][4], d1[2][4], d2[2][4];
            b[0] = b[1] = load_shared(shared + Shared::B1 + bias), b[2] = b[3] = load_shared(shared + Shared::B1 + bias + 32);
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) {
                u32 a[4], k[4], q[4];
                pack_step(a, w1[0], s);
                store_a_fragment(shared + Shared::W1 + copy + 32 * s, PITCH, a);
                ldmatrix_x4(k, tile_k + l.row_b + 32 * s);
                ldmatrix_x4(q, tile_q + l.row_b + 32 * s);
                mma_step(s, z[0], a, k[0], k[1], b);
                mma_step(s, z[1], a, k[2], k[3], b);
                mma_step(s, zbar[0], a, q[0], q[1], b);
                mma_step(s, zbar[1], a, q[2], q[3], b);
            }
#pragma unroll
            for (u32 i = 0; i < 8; i++) fast_gelu(z[i / 4][i % 4], z[i / 4][i % 4], d1[i / 4][i % 4], d2[i / 4][i % 4]);
            pack_tile(x2, z);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                store_shared4(waiting + 512 * i, zbar[i][0], zbar[i][1], zbar[i][2], zbar[i][3]);
                store_shared4(waiting_d1 + 512 * i, d1[i][0], d1[i][1], d1[i][2], d1[i][3]);
                store_shared4(waiting + 1024 + 512 * i, d2[i][0], d2[i][1], d2[i][2], d2[i][3]);
            }
        }
        if (l.warp == MLP_WARPS - 1) { // M1 = tril(q kᵀ + 1), for all warps
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
        barrier_sleep(barrier(TILES_OF_TOKENS), parity);

        // W2 undone; the part of (b) that W2 gives, Ĝ2 dW2'ᵀ, N2.
        if (commits) add_product(w2[0], x2, shared + Shared::UPDATE2, l);
        float dx[2][4], v[2][4], n2[2][4];
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) {
            u32 a[4], b[4], dzbar[4];
            pack_step(a, w2[0], s);
            store_a_fragment(shared + Shared::W2 + copy + 32 * s, PITCH, a);
            ldmatrix_x4(b, shared + Shared::DZBAR2 + l.row_b + 32 * s);
            mma_step(s, dx[0], a, b[0], b[1]);
            mma_step(s, dx[1], a, b[2], b[3]);
            pack_step(a, dw2[0], s);
            store_a_fragment(shared + Shared::DW + copy + 32 * s, PITCH, a);
            ldmatrix_x4(b, tile_ghat2 + l.row_b + 32 * s);
            mma_step(s, v[0], a, b[0], b[1]);
            mma_step(s, v[1], a, b[2], b[3]);
            ldmatrix_x4(dzbar, shared + Shared::DZBAR2 + l.row + 32 * s);
            mma_step(s, n2[0], dzbar, b[0], b[1]);
            mma_step(s, n2[1], dzbar, b[2], b[3]);
        }
        // (e) of dX2, and of dτ_last: Σ X2 dW2' Ĝ2
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float(&y)[4] = v[i / 2];
            const u32 j = i % 2 * 2;
            if (commits) dtok_last -= low_f32(x2[i]) * y[j] + high_f32(x2[i]) * y[j + 1];
            y[j] *= neg_tau_last, y[j + 1] *= neg_tau_last;
        }
        float(&dx2)[2][4] = v;
        const float tau0 = load_shared(shared + Shared::NEG_TAU + 4 * l.g), tau1 = load_shared(shared + Shared::NEG_TAU + 4 * l.g + 32);
        const u32 mask = Causal::mask(l);
        u32 xbar[4], x2_t[4], dm1[3]; // X̄2; X2 transposed; the warp's part of dM1
        float dbar1[2][4];
        {
            float y[2][4], zbar[2][4];
            load_shared4(zbar[0], waiting), load_shared4(zbar[1], waiting + 512);
            const u32 at = shared + Shared::CAUSAL + 4 * l.lane;
            const Causal causal(load_shared_u32(at), load_shared_u32(at + 128), load_shared_u32(at + 256));
            float neg_tau[2][2];
            load_shared2(neg_tau[0], shared + Shared::NEG_TAU + 8 * l.c);
            load_shared2(neg_tau[1], shared + Shared::NEG_TAU + 8 * l.c + 32);
            causal.apply(y, ghat1);
#pragma unroll
            for (u32 i = 0; i < 8; i++)
                fast_gelu(zbar[i / 4][i % 4] + neg_tau[i / 4][i % 2] * y[i / 4][i % 4], y[i / 4][i % 4], dbar1[i / 4][i % 4]);
            pack_tile(xbar, y);
        }
        u32 m2_t[4]; // (-τ M2)ᵀ, the warp's part
        {
            u32 xbar_t[4];
            const float one = unit == 0 ? 1.0f : 0.0f, ones[4] = {one, one, one, one};
            float m2[2][4];
            transpose(x2_t, x2);
            transpose(xbar_t, xbar);
            mma_step(0, m2[0], xbar_t, x2_t[0], x2_t[2], ones);
            mma_step(0, m2[1], xbar_t, x2_t[1], x2_t[3], ones);
            const Causal causal(m2[0], m2[1], mask);
            dtok[0] -= low_f32(causal.low) * n2[0][0] + high_f32(causal.low) * n2[0][1];
            dtok[1] -= low_f32(causal.cross) * n2[0][2] + high_f32(causal.cross) * n2[0][3] + low_f32(causal.high) * n2[1][2]
                       + high_f32(causal.high) * n2[1][3];
            m2_t[0] = movmatrix(scale_pair(causal.low, tau0)), m2_t[1] = 0;
            m2_t[2] = movmatrix(scale_pair(causal.cross, tau1)), m2_t[3] = movmatrix(scale_pair(causal.high, tau1));
        }
        __syncwarp(); // the copies of W2 and dW2
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) { // part of dĜ2
            u32 b[4];
            float y[2][4];
            ldmatrix_x4_trans(b, shared + Shared::DW + copy + l.row + 32 * s);
            mma_step(0, y[0], x2_t, b[0], b[1]);
            mma_step(0, y[1], x2_t, b[2], b[3]);
#pragma unroll
            for (u32 i = 0; i < 8; i++) y[i / 4][i % 4] *= neg_tau_last;
            ldmatrix_x4_trans(b, shared + Shared::DZBAR2 + l.row + 32 * s);
            mma_k16(y[0], m2_t, b[0], b[1]);
            mma_k16(y[1], m2_t, b[2], b[3]);
            put_partial(shared + Shared::PARTS + partial + 64 * s, y);
        }
        u32 dzbar1[4];
        {
            // (b) dM2
            const u32 low = pack_bf16(tau0 * n2[0][0], tau0 * n2[0][1]) & mask, cross = pack_bf16(tau1 * n2[0][2], tau1 * n2[0][3]);
            const u32 high = pack_bf16(tau1 * n2[1][2], tau1 * n2[1][3]) & mask;
            mma_k16(dx[0], x2, low, 0);
            mma_k16(dx[1], x2, cross, high);
            mma_k16(dx2[0], xbar, movmatrix(low), movmatrix(cross));
            mma_k16(dx2[1], xbar, 0, movmatrix(high));
            // (c)
#pragma unroll
            for (u32 i = 0; i < 8; i++) dx[i / 4][i % 4] *= dbar1[i / 4][i % 4];
            pack_tile(dzbar1, dx);
        }
        float dg[2][4]; // dĜ1
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) { // (e)
            u32 a[4], k[4];
            pack_step(a, dw1[0], s);
            ldmatrix_x4(k, tile_k + l.row_b + 32 * s);
            if (s == 0) {
                const float b0 = load_shared(shared + Shared::DB1 + bias), b1 = load_shared(shared + Shared::DB1 + bias + 32);
                const float b[4] = {b0, b0, b1, b1};
                mma_k16(dg[0], a, k[0], k[1], b);
                mma_k16(dg[1], a, k[2], k[3], b);
            } else {
                mma_k16(dg[0], a, k[0], k[1]);
                mma_k16(dg[1], a, k[2], k[3]);
            }
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float(&y)[4] = dg[i / 2];
            const u32 j = i % 2 * 2;
            if (commits) dtok_last -= low_f32(ghat1[i]) * y[j] + high_f32(ghat1[i]) * y[j + 1];
            y[j] *= neg_tau_last, y[j + 1] *= neg_tau_last;
        }
        {
            // (d) N1, dM1, dτ, dĜ1
            u32 gh[4], dzbar1_t[4];
            float n1[2][4];
            transpose(dzbar1_t, dzbar1);
            ldmatrix_x4(gh, tile_ghat1 + units_b);
            mma_step(0, n1[0], dzbar1_t, gh[0], gh[1]);
            mma_step(0, n1[1], dzbar1_t, gh[2], gh[3]);
            const u32 at = shared + Shared::CAUSAL + 4 * l.lane;
            const Causal causal(load_shared_u32(at), load_shared_u32(at + 128), load_shared_u32(at + 256));
            dtok[0] -= low_f32(causal.low) * n1[0][0] + high_f32(causal.low) * n1[0][1];
            dtok[1] -= low_f32(causal.cross) * n1[0][2] + high_f32(causal.cross) * n1[0][3] + low_f32(causal.high) * n1[1][2]
                       + high_f32(causal.high) * n1[1][3];
            dm1[0] = pack_bf16(tau0 * n1[0][0], tau0 * n1[0][1]) & mask, dm1[1] = pack_bf16(tau1 * n1[0][2], tau1 * n1[0][3]);
            dm1[2] = pack_bf16(tau1 * n1[1][2], tau1 * n1[1][3]) & mask;
            mma_k16(dg[0], dzbar1, movmatrix(scale_pair(causal.low, tau0)), movmatrix(scale_pair(causal.cross, tau1)));
            mma_k16(dg[1], dzbar1, 0, movmatrix(scale_pair(causal.high, tau1)));
        }
        u32 du[4];
        float d1[2][4];
        {
            // (f) part of dlr, dG1 in dg; (g) dU
            float u[2][4], d2[2][4];
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) {
                u32 a[4], b[4];
                ldmatrix_x4(a, shared + Shared::W2 + copy + l.row + 32 * s);
                ldmatrix_x4(b, shared + Shared::G2 + l.row_b + 32 * s);
                mma_step(s, u[0], a, b[0], b[1]);
                mma_step(s, u[1], a, b[2], b[3]);
            }
            load_shared4(d1[0], waiting_d1), load_shared4(d1[1], waiting_d1 + 512);
            load_shared4(d2[0], waiting + 1024), load_shared4(d2[1], waiting + 1536);
            float lr[2][2], dlr[2][2] = {};
            load_shared2(lr[0], stage + Shared::LR + 8 * l.c);
            load_shared2(lr[1], stage + Shared::LR + 8 * l.c + 32);
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                float &g = dg[i / 4][i % 4], &y = u[i / 4][i % 4];
                dlr[i / 4][i % 2] += g * (y * d1[i / 4][i % 4]);
                g *= lr[i / 4][i % 2];
                const float curve = d2[i / 4][i % 4] * g * y;
                y = g * d1[i / 4][i % 4];
                dx2[i / 4][i % 4] = dx2[i / 4][i % 4] * d1[i / 4][i % 4] + curve; // what of dZ1 does not wait for dZ2
            }
            pack_tile(du, u);
            // Over g, halving: a lane is left with token 8 (g / 4) + 2c + g / 2 % 2.
            const bool upper = l.g & 4, odd = l.g & 2;
            float a = upper ? dlr[1][0] : dlr[0][0], b = upper ? dlr[1][1] : dlr[0][1];
            a += __shfl_xor_sync(FULL_WARP, upper ? dlr[0][0] : dlr[1][0], 16);
            b += __shfl_xor_sync(FULL_WARP, upper ? dlr[0][1] : dlr[1][1], 16);
            float sum = (odd ? b : a) + __shfl_xor_sync(FULL_WARP, odd ? a : b, 8);
            sum += __shfl_xor_sync(FULL_WARP, sum, 4);
            const u32 at = shared + Shared::DLR + ((rank * MLP_WARPS + l.warp) * TOKENS + 8 * upper + 2 * l.c + odd) * 4;
            if (l.g % 2 == 0) {
                if (upper == rank) store_shared(at, sum);
                else store_async(cluster_address(at, upper), sum, cluster_address(barrier(SUMS_OF_UNITS), upper));
            }
        }
        {
            u32 x[4];
            transpose(x, du);
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) { // part of dU W2
                u32 b[4];
                float y[2][4];
                ldmatrix_x4_trans(b, shared + Shared::W2 + copy + l.row + 32 * s);
                mma_step(0, y[0], x, b[0], b[1]);
                mma_step(0, y[1], x, b[2], b[3]);
                put_partial(shared + Shared::PARTS + MLP_WARPS * SUM + partial + 64 * s, y);
            }
            const u32 dm[4] = {dm1[0], dm1[1], 0, dm1[2]};
            transpose(x, dzbar1);
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) { // part of dq
                u32 b[4];
                float y[2][4];
                ldmatrix_x4_trans(b, shared + Shared::W1 + copy + l.row + 32 * s);
                mma_step(0, y[0], x, b[0], b[1]);
                mma_step(0, y[1], x, b[2], b[3]);
                ldmatrix_x4_trans(b, tile_k + l.row + 32 * s);
                mma_k16(y[0], dm, b[0], b[1]);
                mma_k16(y[1], dm, b[2], b[3]);
                put_partial(shared + Shared::PARTS + 2 * MLP_WARPS * SUM + partial + 64 * s, y);
            }
        }
        __syncthreads();
        float dghat2[2], duw[2], dq[2];
        block_sum(dghat2, 0, 0, SUMS_OF_UNITS);
        block_sum(duw, 1, 1, SUMS_OF_UNITS);
        block_sum(dq, 2, 2, SUMS_OF_UNITS);
        barrier_sleep(barrier(SUMS_OF_UNITS), parity);

        // Tokens: dlr, dG2, (h) dZ2, dv, dq
        {
            float de[2], xhat[2], e[2], means[4];
            load_shared2(xhat, own_x);
            load_shared2(e, own_e);
            load_shared4(means, rows);
            const float rs = means[0], mean_gx = means[1], mean_g = means[2], mean_g2x = means[3], mean_g2x2 = load_shared(rows + 16);
            add_other(dghat2, 0);
            add_other(duw, 1);
            add_other(dq, 2);
            float gamma[2], db2[2], dg2[2], sums[6] = {};
            load_shared2(gamma, shared + Shared::GAMMA + 4 * column);
            load_shared2(db2, shared + Shared::DB2 + 4 * column);
            const float lr = load_shared(stage + Shared::LR + 4 * token);
            const u32 gh = load_shared_u32(tile_ghat2 + own_tile), dz = load_shared_u32(stage + Shared::DZ + own_tile);
            if (commits) dtok_last -= db2[0] * low_f32(gh) + db2[1] * high_f32(gh);
            const u32 lane = l.lane % OWNERS;
            if (lane < RANKS * MLP_WARPS) sums[5] = load_shared(shared + Shared::DLR + (lane * TOKENS + token) * 4);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                dghat2[i] += neg_tau_last * db2[i];
                sums[5] += dghat2[i] * (rs * (gamma[i] * e[i] - mean_g - mean_gx * xhat[i]));
                dg2[i] = lr * dghat2[i] + duw[i];
                const float gd = gamma[i] * dg2[i], g2d = gamma[i] * gd;
                sums[0] += dg2[i], sums[1] += dg2[i] * xhat[i], sums[2] += gd * e[i], sums[3] += g2d, sums[4] += g2d * xhat[i];
            }
            lane_sums<OWNERS>(sums);
            if (lane == 0 && present) *at_row(p.dlr, row, 4 * p.dlr_stride, 4 * head) = sums[5];
            const float mean_g2 = load_shared(shared + Shared::MEAN_G2);
            const float a1 = sums[0] * INV_D, a2 = sums[1] * INV_D, a3 = rs * (sums[2] * INV_D - mean_g * a1 - mean_gx * a2);
            const float a4 = rs * (sums[3] * INV_D - a1 * mean_g2 - a2 * mean_g2x - mean_gx * a1 - a2 * mean_g);
            const float a5 = rs * (sums[4] * INV_D - a1 * mean_g2x - a2 * mean_g2x2 - 2.0f * mean_gx * a2) + a3;
            float dz2[2];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const float un = rs * (dg2[i] - a1 - a2 * xhat[i]);
                de[i] = gamma[i] * un;
                dz2[i] = rs * (gamma[i] * de[i] - rs * (mean_gx * dg2[i] + a2 * (gamma[i] * e[i])) - a4 - a5 * xhat[i]);
                sums[i] = un * (gamma[i] * xhat[i] + e[i]);
            }
            add_dgamma(sums[0], sums[1], de[0], de[1]);
            put_both(Shared::DZ2, dz2[0], dz2[1], DZ2_OF_TOKENS);
            store_shared2(own_x, de[0], de[1]);
            if (present) {
                const u32 at = 2 * (head * D + column);
                *at_row((u32*)p.dv, row, 2 * p.dv_stride, at) = pack_bf16(-de[0], -de[1]);
                *at_row((u32*)p.dq, row, 2 * p.dq_stride, at) = pack_bf16(dq[0] + low_f32(dz), dq[1] + high_f32(dz));
            }
        }
        __syncthreads();
        barrier_sleep(barrier(DZ2_OF_TOKENS), parity);

        // (i), (j) dZ1
        u32 dz1[4], dz1_t[4];
        float dz[2][4];
#pragma unroll
        for (u32 s = 0; s < STEPS; s++) {
            u32 a[4], b[4];
            pack_step(a, w2[0], s);
            ldmatrix_x4(b, shared + Shared::DZ2 + l.row_b + 32 * s);
            mma_step(s, dz[0], a, b[0], b[1]);
            mma_step(s, dz[1], a, b[2], b[3]);
            pack_step(a, dw1[0], s);
            store_a_fragment(shared + Shared::DW + copy + 32 * s, PITCH, a);
        }
#pragma unroll
        for (u32 i = 0; i < 8; i++) dz[i / 4][i % 4] = dz[i / 4][i % 4] * d1[i / 4][i % 4] + dx2[i / 4][i % 4];
        pack_tile(dz1, dz);
        transpose(dz1_t, dz1);
        // Part of dk; (k)
        __syncwarp();
        {
            u32 gh[4];
            const u32 dm_t[4] = {movmatrix(dm1[0]), 0, movmatrix(dm1[1]), movmatrix(dm1[2])};
            ldmatrix_x4(gh, tile_ghat1 + units);
#pragma unroll
            for (u32 s = 0; s < STEPS; s++) {
                u32 b[4];
                float y[2][4];
                ldmatrix_x4_trans(b, shared + Shared::DW + copy + l.row + 32 * s);
                mma_step(0, y[0], gh, b[0], b[1]);
                mma_step(0, y[1], gh, b[2], b[3]);
#pragma unroll
                for (u32 i = 0; i < 8; i++) y[i / 4][i % 4] *= neg_tau_last;
                ldmatrix_x4_trans(b, shared + Shared::W1 + copy + l.row + 32 * s);
                mma_k16(y[0], dz1_t, b[0], b[1]);
                mma_k16(y[1], dz1_t, b[2], b[3]);
                ldmatrix_x4_trans(b, tile_q + l.row + 32 * s);
                mma_k16(y[0], dm_t, b[0], b[1]);
                mma_k16(y[1], dm_t, b[2], b[3]);
                put_partial(shared + Shared::PARTS + partial + 64 * s, y);
                mma_k16(dw1[0][2 * s], dzbar1, b[0], b[1]);
                mma_k16(dw1[0][2 * s + 1], dzbar1, b[2], b[3]);
            }
        }
        add_product(dw1[0], dz1, tile_k, l);
        {
            float b[4];
            mma_step(0, b, dzbar1, ONES, ONES);
            mma_k16(b, dz1, ONES, ONES);
            const u32 at = shared + Shared::DB1 + bias;
            if (l.c == 0) store_shared(at, load_shared(at) + b[0]), store_shared(at + 32, load_shared(at + 32) + b[2]);
        }
        add_product(dw2[0], xbar, shared + Shared::DZBAR2, l);
        add_product(dw2[0], x2, shared + Shared::DZ2, l);
        add_product(dw2[0], du, shared + Shared::G2, l);
        if (l.warp < STEPS) {
            u32 a[4];
            float b[4];
            ldmatrix_x4_trans(a, shared + Shared::DZBAR2 + l.row_b + 32 * l.warp);
            mma_step(0, b, a, ONES, ONES);
            ldmatrix_x4_trans(a, shared + Shared::DZ2 + l.row_b + 32 * l.warp);
            mma_k16(b, a, ONES, ONES);
            const u32 at = shared + Shared::DB2 + bias;
            if (l.c == 0) store_shared(at, load_shared(at) + b[0]), store_shared(at + 32, load_shared(at + 32) + b[2]);
        }
        float de[2], dk[2];
        load_shared2(de, own_x); // before the next tiles may come
        copy_async_wait<Shared::STAGES - 2>();
        __syncthreads();
        if (m >= Shared::STAGES) fetch(m - Shared::STAGES);
        copy_async_commit();
        block_sum(dk, 0, 3, DK_OF_UNITS);
        barrier_sleep(barrier(DK_OF_UNITS), parity);
        add_other(dk, 3);
        if (present) *at_row((u32*)p.dk, row, 2 * p.dk_stride, 2 * (head * D + column)) = pack_bf16(dk[0] + de[0], dk[1] + de[1]);
    }

    store_units(dstate, dw1, dw2, unit, l);
    for (u32 i = threadIdx.x; i < UNITS; i += MLP_THREADS) dstate[D * F + rank * UNITS + i] = load_shared(shared + Shared::DB1 + 4 * i);
    if (rank == 0 && threadIdx.x < D) dstate[MLP_STATE - D + threadIdx.x] = load_shared(shared + Shared::DB2 + 4 * threadIdx.x);
    // Sums of both blocks in the first, in a fixed order: [rank][dtok of each warp | dtok_last of each warp | dgamma, dbeta of each own token]
    constexpr u32 LEN = MLP_WARPS * TOKENS + MLP_WARPS + 2 * OWN * D;
    const u32 ends = cluster_address(shared + Shared::PARTS + rank * LEN * 4, 0);
    cluster_sync(); // the last parts of dk were read
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        if (step < 4) {
            dtok[0] += __shfl_xor_sync(FULL_WARP, dtok[0], step);
            dtok[1] += __shfl_xor_sync(FULL_WARP, dtok[1], step);
        }
        dtok_last += __shfl_xor_sync(FULL_WARP, dtok_last, step);
    }
    if (l.c == 0) store_cluster(ends + 4 * (l.warp * TOKENS + l.g), dtok[0]), store_cluster(ends + 4 * (l.warp * TOKENS + l.g + 8), dtok[1]);
    if (l.lane == 0) store_cluster(ends + 4 * (MLP_WARPS * TOKENS + l.warp), dtok_last);
    const u32 sums_at = ends + 4 * (MLP_WARPS * (TOKENS + 1) + own * D + column);
    float sums[4];
    load_shared4(sums, dgamma_at);
    store_cluster2(sums_at, sums[0], sums[1]);
    store_cluster2(sums_at + 4 * OWN * D, sums[2], sums[3]);
    cluster_sync();
    if (rank > 0) return;
    float* partials = p.partials + (u64)task * (K + 2 * D);
    const u32 parts = shared + Shared::PARTS;
    for (u32 i = threadIdx.x; i < 2 * D; i += MLP_THREADS) {
        float sum = 0.0f;
        for (u32 r = 0; r < RANKS; r++)
            for (u32 t = 0; t < OWN; t++) sum += load_shared(parts + 4 * (r * LEN + MLP_WARPS * (TOKENS + 1) + (i / D * OWN + t) * D + i % D));
        partials[K + i] = sum;
    }
    if (threadIdx.x < K) {
        float sum = 0.0f;
        for (u32 r = 0; r < RANKS; r++)
            for (u32 w = 0; w < MLP_WARPS; w++) {
                sum += load_shared(parts + 4 * (r * LEN + w * TOKENS + threadIdx.x));
                if (threadIdx.x == K - 1) sum += load_shared(parts + 4 * (r * LEN + MLP_WARPS * TOKENS + w));
            }
        partials[threadIdx.x] = sum;
    }
}
