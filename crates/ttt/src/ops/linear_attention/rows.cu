// Linear attention with a normaliser: feature map, division, and their gradients. A warp a row and head. See chunks.cuh.
#include "chunks.cuh"

DEVICE float feature(float x) { return x > 0.0f ? x + 1.0f : __expf(x); }

struct FeatureParams {
    const T *q, *k;
    float *q_features, *k_features; // [rows, columns]
    u32 q_stride, k_stride, rows, columns;
};
KERNEL __launch_bounds__(256) features(const __grid_constant__ FeatureParams p) {
    const u64 e = (u64)blockIdx.x * 256 + threadIdx.x;
    if (e >= (u64)p.rows * p.columns) return;
    const u64 row = e / p.columns, column = e % p.columns;
    p.q_features[e] = feature(number(p.q[row * p.q_stride + column]));
    p.k_features[e] = feature(number(p.k[row * p.k_stride + column]));
}

struct NormaliseParams {
    Layout layout;
    const float *numerators, *q_features; // [rows, columns]
    Operand sums, weights;                // of features up to the chunk [d]; of queries and keys of the chunk [CHUNK, CHUNK]
    T* y;                                 // [rows, columns]; null: the gradients
    const T* dy;
    float *dnumerators, *dtotals;         // [rows, columns], [rows, heads]
    u32 dy_stride;
    float eps;
};
// Blocks: layout x 8 groups of 8 rows; a warp a row.
KERNEL __launch_bounds__(256) normalise(const __grid_constant__ NormaliseParams p) {
    ChunkPlace at;
    if (!chunk_of(at, p.layout, CHUNK / 8)) return;
    const u32 lane = threadIdx.x % 32, t = at.rest * 8 + threadIdx.x / 32, d = p.layout.width, columns = p.layout.heads * d;
    if (t >= at.count) return;
    const u64 row = at.row + t, own = row * columns + at.head * d;
    const u64 sums = start_of(p.sums, at, p.layout), weights = start_of(p.weights, at, p.layout) + t * CHUNK;
    float total = 0.0f;
    for (u32 c = lane; c < d; c += 32) total += p.q_features[own + c] * read(p.sums, sums + c);
    for (u32 j = lane; j <= t; j += 32) total += read(p.weights, weights + j);
    total = sum_lanes(total) + p.eps;
    const float inverse = 1.0f / total;
    if (p.y) {
        for (u32 c = lane; c < d; c += 32) put(p.y[own + c], p.numerators[own + c] * inverse);
        return;
    }
    float product = 0.0f;
    for (u32 c = lane; c < d; c += 32) {
        const float dy = number(p.dy[row * p.dy_stride + at.head * d + c]) * inverse;
        p.dnumerators[own + c] = dy;
        product += dy * p.numerators[own + c];
    }
    product = sum_lanes(product);
    if (lane == 0) p.dtotals[row * p.layout.heads + at.head] = -product * inverse;
}

struct FeatureGradParams {
    Layout layout;
    const float *q_features, *k_features, *dq_features, *dk_features, *dtotals;
    Operand sums; // of features up to the chunk [d]
    T *dq, *dk;
    u32 dq_stride, dk_stride;
};
// Through the feature map: its slope is 1 above 0 and itself below, so the smaller of both. Blocks as `normalise`.
KERNEL __launch_bounds__(256) feature_gradients(const __grid_constant__ FeatureGradParams p) {
    ChunkPlace at;
    if (!chunk_of(at, p.layout, CHUNK / 8)) return;
    const u32 lane = threadIdx.x % 32, t = at.rest * 8 + threadIdx.x / 32, d = p.layout.width;
    if (t >= at.count) return;
    const u64 row = at.row + t, own = (row * p.layout.heads + at.head) * d, sums = start_of(p.sums, at, p.layout);
    const float dtotal = p.dtotals[row * p.layout.heads + at.head];
    for (u32 c = lane; c < d; c += 32) {
        const float dq = p.dq_features[own + c] + dtotal * read(p.sums, sums + c);
        put(p.dq[row * p.dq_stride + at.head * d + c], dq * fminf(p.q_features[own + c], 1.0f));
        put(p.dk[row * p.dk_stride + at.head * d + c], p.dk_features[own + c] * fminf(p.k_features[own + c], 1.0f));
    }
}
