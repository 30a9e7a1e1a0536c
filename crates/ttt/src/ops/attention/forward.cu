// Causal attention forward: a block has ROWS queries of a head, a warp 16 TILES of them with their output in registers, and walks
// over keys and values STEP at a time, the softmax carried along (online). Grid: segments x heads x blocks.
#include "attention.cuh"

struct ForwardShared {
    static constexpr u32 TILE = STEP * PITCH, STAGE = 2 * TILE, QUERIES = 2 * STAGE, BYTES = QUERIES + ROWS * PITCH;
};

// Weights may grow to 2^GROWTH before the measure of their row is changed: far from what f32 holds, and rare.
constexpr float GROWTH = 8.0f;

KERNEL __launch_bounds__(THREADS, 2) attention_forward(const __grid_constant__ AttentionParams p) {
    DYNAMIC_SHARED(memory);
    using S = ForwardShared;
    const u32 shared = shared_address(memory);
    const Lane l;
    const Task task(p, p.heads);
    const Segment s = p.segments[task.segment];
    const u32 first = (p.blocks - 1 - task.block) * ROWS; // token of the segment
    if (first >= s.len) return;
    const u32 kv_head = task.head / (p.heads / p.kv_heads);
    const u32 end = s.phase + min(s.len, first + ROWS); // keys that the block sees
    const u32 steps = (end + STEP - 1) / STEP;

    auto load = [&](u32 step) {
        const u32 stage = shared + (step & 1) * S::STAGE;
        copy_keys(stage, stage + S::TILE, STEP, p, s, kv_head, step * STEP, end);
    };
    copy_rows(shared + S::QUERIES, ROWS, p.q, p.q_stride, task.head, s.first_row + first, s.first_row + s.len);
    load(0);
    copy_async_commit();

    const u32 own = first + 16 * TILES * l.warp; // this warp's first token
    const u32 seen = s.phase + own;              // and its number
    const float scale = p.scale * LOG2E;
    u32 q[TILES][STEPS][4];
    float o[TILES][D / 8][4], top[TILES][2], sum[TILES][2];
#pragma unroll
    for (u32 t = 0; t < TILES; t++) {
        top[t][0] = top[t][1] = HIDDEN, sum[t][0] = sum[t][1] = 0.0f;
#pragma unroll
        for (u32 j = 0; j < D / 8; j++) o[t][j][0] = o[t][j][1] = o[t][j][2] = o[t][j][3] = 0.0f;
    }

    for (u32 step = 0; step < steps; step++) {
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) load(step + 1);
        copy_async_commit();
        if (step == 0) {
#pragma unroll
            for (u32 t = 0; t < TILES; t++)
#pragma unroll
                for (u32 i = 0; i < STEPS; i++) load_a(q[t][i], shared + S::QUERIES, TILES * l.warp + t, i, l);
        }
        const u32 key = step * STEP, keys = shared + (step & 1) * S::STAGE, values = keys + S::TILE;
        if (key > seen + 16 * TILES - 1) continue; // behind all of this warp's queries

        float x[TILES][STEP / 8][4];
#pragma unroll
        for (u32 i = 0; i < STEPS; i++)
#pragma unroll
            for (u32 j = 0; j < STEP / 16; j++) {
                u32 b[4];
                load_b(b, keys, j, i, l);
#pragma unroll
                for (u32 t = 0; t < TILES; t++) {
                    if (i == 0) {
                        mma_k16(x[t][2 * j], q[t][i], b[0], b[1], 0.0f, 0.0f, 0.0f, 0.0f);
                        mma_k16(x[t][2 * j + 1], q[t][i], b[2], b[3], 0.0f, 0.0f, 0.0f, 0.0f);
                    } else {
                        mma_k16(x[t][2 * j], q[t][i], b[0], b[1]);
                        mma_k16(x[t][2 * j + 1], q[t][i], b[2], b[3]);
                    }
                }
            }
        if (key + STEP - 1 > seen) {
#pragma unroll
            for (u32 t = 0; t < TILES; t++)
#pragma unroll
                for (u32 j = 0; j < STEP / 8; j++)
#pragma unroll
                    for (u32 e = 0; e < 4; e++) {
                        const u32 query = seen + 16 * t + l.g + e / 2 * 8, at = key + 8 * j + 2 * l.c + e % 2;
                        if (at > query) x[t][j][e] = HIDDEN;
                    }
        }
        // What was summed up before is brought to another measure only when a score would be too large for the old one.
        bool large = false;
        float most[TILES][2];
#pragma unroll
        for (u32 t = 0; t < TILES; t++)
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                most[t][r] = max(x[t][0][2 * r], x[t][0][2 * r + 1]);
#pragma unroll
                for (u32 j = 1; j < STEP / 8; j++) most[t][r] = max(most[t][r], max(x[t][j][2 * r], x[t][j][2 * r + 1]));
                large |= (most[t][r] - top[t][r]) * scale > GROWTH;
            }
        if (__any_sync(FULL_WARP, large)) {
#pragma unroll
            for (u32 t = 0; t < TILES; t++)
#pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    float now = max(most[t][r], __shfl_xor_sync(FULL_WARP, most[t][r], 1));
                    now = max(max(now, __shfl_xor_sync(FULL_WARP, now, 2)), top[t][r]);
                    const float before = fast_exp2((top[t][r] - now) * scale);
                    top[t][r] = now, sum[t][r] *= before;
#pragma unroll
                    for (u32 j = 0; j < D / 8; j++) o[t][j][2 * r] *= before, o[t][j][2 * r + 1] *= before;
                }
        }
        float by[TILES][2];
#pragma unroll
        for (u32 t = 0; t < TILES; t++) by[t][0] = -top[t][0] * scale, by[t][1] = -top[t][1] * scale;
#pragma unroll
        for (u32 j = 0; j < STEP / 16; j++) {
            u32 a[TILES][4];
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
#pragma unroll
                for (u32 n = 2 * j; n < 2 * j + 2; n++)
#pragma unroll
                    for (u32 e = 0; e < 4; e++) {
                        x[t][n][e] = fast_exp2(__fmaf_rn(x[t][n][e], scale, by[t][e / 2]));
                        sum[t][e / 2] += x[t][n][e];
                    }
                pack_a(a[t], x[t][2 * j], x[t][2 * j + 1]);
            }
#pragma unroll
            for (u32 i = 0; i < STEPS; i++) {
                u32 b[4];
                load_b_rows(b, values, j, i, l);
#pragma unroll
                for (u32 t = 0; t < TILES; t++) {
                    mma_k16(o[t][2 * i], a[t], b[0], b[1]);
                    mma_k16(o[t][2 * i + 1], a[t], b[2], b[3]);
                }
            }
        }
    }

#pragma unroll
    for (u32 t = 0; t < TILES; t++)
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            float all = sum[t][r];
            all += __shfl_xor_sync(FULL_WARP, all, 1);
            all += __shfl_xor_sync(FULL_WARP, all, 2);
            const u32 token = own + 16 * t + l.g + 8 * r, row = s.first_row + token;
            if (token >= s.len) continue;
            const float by = 1.0f / all;
            u32* to = (u32*)((u16*)p.o + (u64)row * p.o_stride + task.head * D) + l.c;
#pragma unroll
            for (u32 j = 0; j < D / 8; j++) to[4 * j] = pack_bf16(o[t][j][2 * r] * by, o[t][j][2 * r + 1] * by);
            if (l.c == 0) p.log_sum[(u64)row * p.heads + task.head] = LN2 * (top[t][r] * scale + fast_log2(all));
        }
}
