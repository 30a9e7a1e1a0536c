// Causal attention backward. Scores are computed again from log_sum, in two kernels without any sum across blocks: one has ROWS
// queries of a head and walks over keys (dq, and delta = dout · o for the other), one has ROWS keys of a head of keys and values and
// walks over the queries of all heads that read it (dk, dv). Grids: segments x heads x blocks.
#include "attention.cuh"

struct QueryShared {
    static constexpr u32 TILE = STEP * PITCH, STAGE = 2 * TILE, QUERIES = 2 * STAGE, DOUT = QUERIES + ROWS * PITCH,
                         BYTES = DOUT + ROWS * PITCH;
};

KERNEL __launch_bounds__(THREADS, 2) attention_backward_queries(const __grid_constant__ AttentionParams p) {
    DYNAMIC_SHARED(memory);
    using S = QueryShared;
    const u32 shared = shared_address(memory);
    const Lane l;
    const Task task(p, p.heads);
    const Segment s = p.segments[task.segment];
    const u32 first = (p.blocks - 1 - task.block) * ROWS; // token of the segment
    if (first >= s.len) return;
    const u32 kv_head = task.head / (p.heads / p.kv_heads);
    const u32 end = s.phase + min(s.len, first + ROWS);
    const u32 steps = (end + STEP - 1) / STEP;

    auto load = [&](u32 step) {
        const u32 stage = shared + (step & 1) * S::STAGE;
        copy_keys(stage, stage + S::TILE, STEP, p, s, kv_head, step * STEP, end);
    };
    copy_rows(shared + S::QUERIES, ROWS, p.q, p.q_stride, task.head, s.first_row + first, s.first_row + s.len);
    copy_rows(shared + S::DOUT, ROWS, p.dout, p.dout_stride, task.head, s.first_row + first, s.first_row + s.len);
    load(0);
    copy_async_commit();

    const u32 own = first + 16 * TILES * l.warp, seen = s.phase + own;
    const float scale = p.scale * LOG2E;
    u32 q[TILES][STEPS][4], dout[TILES][STEPS][4];
    float dq[TILES][D / 8][4], log_sum[TILES][2], delta[TILES][2];
#pragma unroll
    for (u32 t = 0; t < TILES; t++)
#pragma unroll
        for (u32 j = 0; j < D / 8; j++) dq[t][j][0] = dq[t][j][1] = dq[t][j][2] = dq[t][j][3] = 0.0f;

    for (u32 step = 0; step < steps; step++) {
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) load(step + 1);
        copy_async_commit();
        if (step == 0) {
#pragma unroll
            for (u32 t = 0; t < TILES; t++) {
#pragma unroll
                for (u32 i = 0; i < STEPS; i++) {
                    load_a(q[t][i], shared + S::QUERIES, TILES * l.warp + t, i, l);
                    load_a(dout[t][i], shared + S::DOUT, TILES * l.warp + t, i, l);
                }
#pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    const u32 token = own + 16 * t + l.g + 8 * r, row = s.first_row + token;
                    float dot = 0.0f;
                    log_sum[t][r] = 0.0f;
                    if (token < s.len) {
                        const u32* o = (const u32*)((const u16*)p.o + (u64)row * p.o_stride + task.head * D) + l.c;
#pragma unroll
                        for (u32 i = 0; i < STEPS; i++)
#pragma unroll
                            for (u32 e = 0; e < 2; e++) {
                                const u32 pair = o[8 * i + 4 * e], with = dout[t][i][r + 2 * e];
                                dot += low_f32(pair) * low_f32(with) + high_f32(pair) * high_f32(with);
                            }
                        log_sum[t][r] = LOG2E * p.log_sum[(u64)row * p.heads + task.head];
                    }
                    dot += __shfl_xor_sync(FULL_WARP, dot, 1);
                    dot += __shfl_xor_sync(FULL_WARP, dot, 2);
                    delta[t][r] = dot;
                    if (l.c == 0 && token < s.len) p.delta[(u64)row * p.heads + task.head] = dot;
                }
            }
        }
        const u32 key = step * STEP, keys = shared + (step & 1) * S::STAGE, values = keys + S::TILE;
        // Where every key is seen, nothing is asked, so that products and weights of neighbouring columns overlap.
        const u32 edge = key + STEP - 1 > seen;
#pragma unroll
        for (u32 EDGE = 0; EDGE < 2; EDGE++) {
            if (EDGE != edge) continue;
#pragma unroll 2
            for (u32 j = 0; j < STEP / 16; j++) {
                if (EDGE && key + 16 * j > seen + 16 * TILES - 1) break; // behind all of this warp's queries
                float x[TILES][2][4], dx[TILES][2][4];
#pragma unroll
                for (u32 i = 0; i < STEPS; i++) {
                    u32 b[4], c[4];
                    load_b(b, keys, j, i, l);
                    load_b(c, values, j, i, l);
#pragma unroll
                    for (u32 t = 0; t < TILES; t++)
#pragma unroll
                        for (u32 n = 0; n < 2; n++) {
                            if (i == 0) {
                                mma_k16(x[t][n], q[t][i], b[2 * n], b[2 * n + 1], 0.0f, 0.0f, 0.0f, 0.0f);
                                mma_k16(dx[t][n], dout[t][i], c[2 * n], c[2 * n + 1], 0.0f, 0.0f, 0.0f, 0.0f);
                            } else {
                                mma_k16(x[t][n], q[t][i], b[2 * n], b[2 * n + 1]);
                                mma_k16(dx[t][n], dout[t][i], c[2 * n], c[2 * n + 1]);
                            }
                        }
                }
                u32 a[TILES][4];
#pragma unroll
                for (u32 t = 0; t < TILES; t++) {
#pragma unroll
                    for (u32 n = 0; n < 2; n++)
#pragma unroll
                        for (u32 e = 0; e < 4; e++) {
                            const u32 query = seen + 16 * t + l.g + e / 2 * 8, at = key + 16 * j + 8 * n + 2 * l.c + e % 2;
                            float w = fast_exp2(__fmaf_rn(x[t][n][e], scale, -log_sum[t][e / 2]));
                            if (EDGE && at > query) w = 0.0f;
                            dx[t][n][e] = w * (dx[t][n][e] - delta[t][e / 2]);
                        }
                    pack_a(a[t], dx[t][0], dx[t][1]);
                }
#pragma unroll
                for (u32 i = 0; i < STEPS; i++) {
                    u32 b[4];
                    load_b_rows(b, keys, j, i, l);
#pragma unroll
                    for (u32 t = 0; t < TILES; t++) {
                        mma_k16(dq[t][2 * i], a[t], b[0], b[1]);
                        mma_k16(dq[t][2 * i + 1], a[t], b[2], b[3]);
                    }
                }
            }
        }
    }

#pragma unroll
    for (u32 t = 0; t < TILES; t++)
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const u32 token = own + 16 * t + l.g + 8 * r;
            if (token >= s.len) continue;
            u32* to = (u32*)((u16*)p.dq + (u64)(s.first_row + token) * p.dq_stride + task.head * D) + l.c;
#pragma unroll
            for (u32 j = 0; j < D / 8; j++) to[4 * j] = pack_bf16(dq[t][j][2 * r] * p.scale, dq[t][j][2 * r + 1] * p.scale);
        }
}

struct KeyShared {
    static constexpr u32 TILE = STEP * PITCH, NUMBERS = 2 * TILE, STAGE = NUMBERS + 8 * STEP, KEYS = 2 * STAGE,
                         VALUES = KEYS + ROWS * PITCH, BYTES = VALUES + ROWS * PITCH;
};

// Steps over the columns for which a warp holds its values in registers; beyond, they are read from shared memory each time.
#ifndef HELD
constexpr u32 HELD = D == 96 ? STEPS : D == 64 ? 2 : 6;
#endif

KERNEL __launch_bounds__(THREADS, 2) attention_backward_keys(const __grid_constant__ AttentionParams p) {
    DYNAMIC_SHARED(memory);
    using S = KeyShared;
    const u32 shared = shared_address(memory);
    const Lane l;
    const Task task(p, p.kv_heads);
    Segment s = load_segment(p, task.segment);
    const u32 first = (p.dkeys ? 0 : s.phase) + task.block * ROWS, end = s.phase + s.len; // keys; the past gets gradients or not
    if (first >= end) return;
    const u32 group = p.heads / p.kv_heads;
    const u32 from = first > s.phase ? (first - s.phase) / STEP * STEP : 0; // the block of queries that sees the first key
    u32 head = task.head * group, token = from, stage = shared; // of the next copy

    auto load = [&] {
        const u32 row = s.first_row + token, last = s.first_row + s.len;
        copy_rows(stage, STEP, p.q, p.q_stride, head, row, last);
        copy_rows(stage + S::TILE, STEP, p.dout, p.dout_stride, head, row, last);
        // What there is of a query: log_sum for the first 64 threads, delta for the others.
        const u32 i = threadIdx.x % STEP, at = row + i;
        const float* number = (threadIdx.x < STEP ? p.log_sum : p.delta) + (u64)min(at, last - 1) * p.heads + head;
        copy_async_4(stage + S::NUMBERS + 8 * i + threadIdx.x / STEP * 4, number, at < last);
        token += STEP;
        if (token >= s.len) token = from, head++;
    };
    copy_keys(shared + S::KEYS, shared + S::VALUES, ROWS, p, s, task.head, first, end);
    load();
    copy_async_commit();

    const u32 own = first + 16 * TILES * l.warp; // this warp's first key
    const float scale = p.scale * LOG2E;
    u32 k[TILES][STEPS][4], v[TILES][HELD][4];
    float dk[TILES][D / 8][4], dv[TILES][D / 8][4];
#pragma unroll
    for (u32 t = 0; t < TILES; t++)
#pragma unroll
        for (u32 j = 0; j < D / 8; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) dk[t][j][e] = dv[t][j][e] = 0.0f;

    u32 number = s.phase + from; // of the first query
    bool begins = true;
    for (u32 left = (s.len - from + STEP - 1) / STEP * group; left; left--) {
        copy_async_wait<0>();
        __syncthreads();
        const u32 queries = stage, douts = queries + S::TILE, numbers = queries + S::NUMBERS, next = s.phase + token;
        stage ^= shared ^ shared + S::STAGE;
        if (left > 1) load();
        copy_async_commit();
        if (begins) {
            begins = false;
#pragma unroll
            for (u32 t = 0; t < TILES; t++)
#pragma unroll
                for (u32 i = 0; i < STEPS; i++) {
                    load_a(k[t][i], shared + S::KEYS, TILES * l.warp + t, i, l);
                    if (i < HELD) load_a(v[t][i], shared + S::VALUES, TILES * l.warp + t, i, l);
                }
        }
#pragma unroll
        for (u32 j = 0; j < STEP / 16; j++) {
            if (number + 16 * j + 15 < own) continue; // before all of this warp's keys
            const bool edge = own + 16 * TILES - 1 > number + 16 * j;
            u32 a[TILES][4], da[TILES][4];
            // Transposed, [key, query], so that what comes out is an A operand.
            float x[TILES][2][4], dx[TILES][2][4];
#pragma unroll
            for (u32 i = 0; i < STEPS; i++) {
                u32 b[4], c[4], last[TILES][4];
                load_b(b, queries, j, i, l);
                load_b(c, douts, j, i, l);
#pragma unroll
                for (u32 t = 0; t < TILES; t++) {
                    if (i >= HELD) load_a(last[t], shared + S::VALUES, TILES * l.warp + t, i, l);
#pragma unroll
                    for (u32 n = 0; n < 2; n++) {
                        if (i == 0) {
                            mma_k16(x[t][n], k[t][i], b[2 * n], b[2 * n + 1], 0.0f, 0.0f, 0.0f, 0.0f);
                            mma_k16(dx[t][n], v[t][i], c[2 * n], c[2 * n + 1], 0.0f, 0.0f, 0.0f, 0.0f);
                        } else {
                            mma_k16(x[t][n], k[t][i], b[2 * n], b[2 * n + 1]);
                            mma_k16(dx[t][n], i < HELD ? v[t][i < HELD ? i : 0] : last[t], c[2 * n], c[2 * n + 1]);
                        }
                    }
                }
            }
#pragma unroll
            for (u32 n = 0; n < 2; n++) {
                float of[4]; // log_sum and delta of two queries
                load_shared4(of, numbers + 8 * (16 * j + 8 * n + 2 * l.c));
#pragma unroll
                for (u32 t = 0; t < TILES; t++) {
#pragma unroll
                    for (u32 e = 0; e < 4; e++) {
                        const u32 at = own + 16 * t + l.g + e / 2 * 8, query = number + 16 * j + 8 * n + 2 * l.c + e % 2;
                        float w = fast_exp2(__fmaf_rn(x[t][n][e], scale, -LOG2E * of[e % 2 * 2]));
                        if (edge && at > query) w = 0.0f;
                        x[t][n][e] = w;
                        dx[t][n][e] = w * (dx[t][n][e] - of[e % 2 * 2 + 1]);
                    }
                    a[t][2 * n] = pack_bf16(x[t][n][0], x[t][n][1]), a[t][2 * n + 1] = pack_bf16(x[t][n][2], x[t][n][3]);
                    da[t][2 * n] = pack_bf16(dx[t][n][0], dx[t][n][1]), da[t][2 * n + 1] = pack_bf16(dx[t][n][2], dx[t][n][3]);
                }
            }
#pragma unroll
            for (u32 i = 0; i < STEPS; i++) {
                u32 b[4], c[4];
                load_b_rows(b, douts, j, i, l);
                load_b_rows(c, queries, j, i, l);
#pragma unroll
                for (u32 t = 0; t < TILES; t++)
#pragma unroll
                    for (u32 n = 0; n < 2; n++) {
                        mma_k16(dv[t][2 * i + n], a[t], b[2 * n], b[2 * n + 1]);
                        mma_k16(dk[t][2 * i + n], da[t], c[2 * n], c[2 * n + 1]);
                    }
            }
        }
        number = next;
    }

    s = load_segment(p, task.segment); // again: registers
#pragma unroll
    for (u32 t = 0; t < TILES; t++)
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const u32 key = own + 16 * t + l.g + 8 * r;
            if (key >= end) continue;
            const u64 row = s.first_row + key - s.phase, past = ((u64)s.slot * p.dcapacity + key) * p.cache_stride + task.head * D;
            auto put = [&](const float(&x)[D / 8][4], void* to, u32 stride, void* before, float by) {
                u32* add = before ? (u32*)((u16*)before + past) + l.c : nullptr;
                u32* out = key < s.phase ? add : (u32*)((u16*)to + row * stride + task.head * D) + l.c;
#pragma unroll
                for (u32 j = 0; j < D / 8; j++) {
                    float left = by * x[j][2 * r], right = by * x[j][2 * r + 1];
                    if (add) left += low_f32(add[4 * j]), right += high_f32(add[4 * j]);
                    // What is handed on is no gradient of what came before any more.
                    if (add && key >= s.phase) add[4 * j] = 0;
                    out[4 * j] = pack_bf16(left, right);
                }
            };
            put(dk[t], p.dk, p.dk_stride, p.dkeys, p.scale);
            put(dv[t], p.dv, p.dv_stride, p.dvalues, 1.0f);
        }
}
