// Parameters of the attention kernels, and where keys and values lie.
//
// Queries and keys are counted from the beginning of a sequence: token t of a segment is number phase + t. Keys and values before
// the phase lie in the cache, [slot, capacity, g d], the others in the batch.
#pragma once
#include "prelude.cuh"

struct Segment {
    u32 first_row, len, slot, phase;
};

// Strides in elements. What a kernel does not name may be null.
struct AttentionParams {
    const void *q, *k, *v, *keys, *values;
    const Segment* segments;
    const u32* of_row; // index of each row's segment
    void* o;
    float* log_sum; // [rows, heads]
    const void* dout;
    float* delta; // [rows, heads]: dout · o
    void *dq, *dk, *dv, *dkeys, *dvalues;
    float* parts; // decoding: o, top and sum of each part, [rows, heads, splits, d + 2]
    u32 q_stride, k_stride, v_stride, o_stride, dout_stride, dq_stride, dk_stride, dv_stride;
    u32 cache_stride, capacity, dcapacity;
    u32 heads, kv_heads, head_dim, count, rows;
    u32 blocks;  // of the longest segment
    u32 together; // heads and segments whose blocks lie side by side, so that their keys and values stay in L2
    u32 splits;
    float scale; // 1 / √d
};

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float HIDDEN = -1e30f; // score of a key that a query does not see

// Row `key` of the keys or values of a segment, elements of type E.
template <class E>
DEVICE const E* key_row(const void* own, u32 stride, const void* cache, const AttentionParams& p, const Segment& s, u32 key) {
    if (key < s.phase) return (const E*)cache + ((u64)s.slot * p.capacity + key) * p.cache_stride;
    return (const E*)own + (u64)(s.first_row + key - s.phase) * stride;
}

DEVICE Segment load_segment(const AttentionParams& p, u32 i) {
    u32 x[4];
    load_global4(x, p.segments + i);
    return {x[0], x[1], x[2], x[3]};
}
