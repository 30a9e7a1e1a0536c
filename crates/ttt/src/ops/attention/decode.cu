// Causal attention of one token for each of some segments, over a cache: keys and values are read once, by all multiprocessors. A
// block has a part of the keys of a head; parts are joined in order by attention_join. Grid: segments x heads x splits, of which as
// many work as the keys that there are ask for: results do not depend on the room that a cache has.
#include "attention.cuh"

constexpr u32 PIECES = (CHUNKS + 7) / 8; // 16-byte chunks of a row that a lane has
constexpr u32 AT_ONCE = 4;               // rows of keys and of values that a lane has under way
constexpr u32 KEYS = THREADS / 8;        // rows that a block looks at side by side, eight lanes each
constexpr u32 PART = D + 2;
constexpr u32 FEWEST = 128; // keys that are worth a block of their own

DEVICE u32 parts_of(u32 keys, const AttentionParams& p) { return min(p.splits, (keys + FEWEST - 1) / FEWEST); }

DEVICE void unpack(float (&x)[8], const u32 (&pairs)[4]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) x[2 * i] = low_f32(pairs[i]), x[2 * i + 1] = high_f32(pairs[i]);
}

KERNEL __launch_bounds__(THREADS) attention_decode(const __grid_constant__ AttentionParams p) {
    DYNAMIC_SHARED(memory);
    float* const joined = (float*)memory; // [warps, D + 2]
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, piece = lane % 8, group = threadIdx.x / 8;
    const u32 split = blockIdx.x % p.splits, head = blockIdx.x / p.splits % p.heads;
    const Segment s = p.segments[blockIdx.x / p.splits / p.heads];
    if (s.len == 0) return;
    const u32 kv_head = head / (p.heads / p.kv_heads), keys = s.phase + 1;
    const u32 splits = parts_of(keys, p), each = ((keys + splits - 1) / splits + KEYS - 1) / KEYS * KEYS;
    if (split >= splits) return;
    const u32 from = split * each, to = min(keys, from + each);

    float q[PIECES][8], o[PIECES][8], top = HIDDEN, sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) {
        u32 pairs[4] = {0, 0, 0, 0};
        if (piece + 8 * i < CHUNKS)
            load_global4(pairs, (const u16*)p.q + (u64)s.first_row * p.q_stride + head * D + 8 * (piece + 8 * i));
        unpack(q[i], pairs);
#pragma unroll
        for (u32 e = 0; e < 8; e++) q[i][e] *= p.scale * LOG2E, o[i][e] = 0.0f;
    }
    for (u32 first = from; first < to; first += KEYS * AT_ONCE) {
        u32 k[AT_ONCE][PIECES][4], v[AT_ONCE][PIECES][4];
#pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++) {
            const u32 key = min(first + n * KEYS + group, to - 1);
            const u16* at = key_row<u16>(p.k, p.k_stride, p.keys, p, s, key) + kv_head * D + 8 * piece;
            const u16* value = key_row<u16>(p.v, p.v_stride, p.values, p, s, key) + kv_head * D + 8 * piece;
#pragma unroll
            for (u32 i = 0; i < PIECES; i++) {
                const bool there = piece + 8 * i < CHUNKS;
                load_global4(k[n][i], at + (there ? 64 * i : 0));
                load_global4(v[n][i], value + (there ? 64 * i : 0));
            }
        }
        float x[AT_ONCE], most = top;
#pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++) {
            x[n] = 0.0f;
#pragma unroll
            for (u32 i = 0; i < PIECES; i++) {
                float row[8];
                unpack(row, k[n][i]);
#pragma unroll
                for (u32 e = 0; e < 8; e++) x[n] += q[i][e] * row[e]; // q is 0 where there is no chunk
            }
#pragma unroll
            for (u32 step = 1; step < 8; step *= 2) x[n] += __shfl_xor_sync(FULL_WARP, x[n], step);
            if (first + n * KEYS + group >= to) x[n] = HIDDEN;
            most = max(most, x[n]);
        }
        const float before = fast_exp2(top - most);
        top = most, sum *= before;
#pragma unroll
        for (u32 i = 0; i < PIECES; i++)
#pragma unroll
            for (u32 e = 0; e < 8; e++) o[i][e] *= before;
#pragma unroll
        for (u32 n = 0; n < AT_ONCE; n++) {
            const float w = first + n * KEYS + group < to ? fast_exp2(x[n] - most) : 0.0f;
            sum += w;
#pragma unroll
            for (u32 i = 0; i < PIECES; i++) {
                float row[8];
                unpack(row, v[n][i]);
#pragma unroll
                for (u32 e = 0; e < 8; e++) o[i][e] += w * row[e];
            }
        }
    }

    // The four rows of a warp, then the warps.
    float most = max(top, __shfl_xor_sync(FULL_WARP, top, 8));
    most = max(most, __shfl_xor_sync(FULL_WARP, most, 16));
    const float by = fast_exp2(top - most);
    sum *= by;
    sum += __shfl_xor_sync(FULL_WARP, sum, 8);
    sum += __shfl_xor_sync(FULL_WARP, sum, 16);
    float* own = joined + warp * PART;
#pragma unroll
    for (u32 i = 0; i < PIECES; i++)
#pragma unroll
        for (u32 e = 0; e < 8; e++) {
            float y = o[i][e] * by;
            y += __shfl_xor_sync(FULL_WARP, y, 8);
            y += __shfl_xor_sync(FULL_WARP, y, 16);
            if (lane < 8 && piece + 8 * i < CHUNKS) own[8 * (piece + 8 * i) + e] = y;
        }
    if (lane == 0) own[D] = most, own[D + 1] = sum;
    __syncthreads();
    const u32 c = threadIdx.x;
    if (c >= D) return;
    float highest = joined[D], all = 0.0f, y = 0.0f;
    for (u32 w = 1; w < THREADS / 32; w++) highest = max(highest, joined[w * PART + D]);
    for (u32 w = 0; w < THREADS / 32; w++) {
        const float scale = fast_exp2(joined[w * PART + D] - highest);
        all += scale * joined[w * PART + D + 1], y += scale * joined[w * PART + c];
    }
    const u64 task = (u64)s.first_row * p.heads + head;
    if (splits > 1) {
        float* part = p.parts + (task * p.splits + split) * PART;
        part[c] = y;
        if (c == 0) part[D] = highest, part[D + 1] = all;
        return;
    }
    ((u16*)p.o)[(u64)s.first_row * p.o_stride + head * D + c] = bf16_bits(y / all);
    if (c == 0) p.log_sum[task] = LN2 * (highest + fast_log2(all));
}

// Grid: segments x heads.
KERNEL __launch_bounds__(THREADS) attention_join(const __grid_constant__ AttentionParams p) {
    const Segment s = p.segments[blockIdx.x / p.heads];
    const u32 head = blockIdx.x % p.heads, c = threadIdx.x;
    const u32 splits = parts_of(s.phase + 1, p);
    if (s.len == 0 || c >= D || splits == 1) return;
    const u64 task = (u64)s.first_row * p.heads + head;
    const float* part = p.parts + task * p.splits * PART;
    float highest = part[D], all = 0.0f, y = 0.0f;
    for (u32 i = 1; i < splits; i++) highest = max(highest, part[i * PART + D]);
    for (u32 i = 0; i < splits; i++) {
        const float scale = fast_exp2(part[i * PART + D] - highest);
        all += scale * part[i * PART + D + 1], y += scale * part[i * PART + c];
    }
    ((u16*)p.o)[(u64)s.first_row * p.o_stride + head * D + c] = bf16_bits(y / all);
    if (c == 0) p.log_sum[task] = LN2 * (highest + fast_log2(all));
}
