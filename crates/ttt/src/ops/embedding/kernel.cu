// Gradient of a table of embeddings, without atomics: the rows of one id are cut into pieces of at most 64, each added up in
// order, then the pieces of an id in order.
#include "rows.cuh"

// sums[piece] = sum of dy[order[i]] for i from bounds[piece] to bounds[piece + 1]. A block a piece.
extern "C" __global__ void __launch_bounds__(256)
    pieces(float *sums, const T *dy, int dys, const u32 *order, const u32 *bounds, int cols) {
    int first = bounds[blockIdx.x], last = bounds[blockIdx.x + 1];
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        float sum = 0.0f;
#pragma unroll 4
        for (int i = first; i < last; i++) sum += to_float(dy[(i64)order[i] * dys + c]);
        sums[(i64)blockIdx.x * cols + c] = sum;
    }
}

// table[ids[i]] += sum of the pieces from bounds[i] to bounds[i + 1]. A block an id.
extern "C" __global__ void __launch_bounds__(256)
    add_pieces(float *table, int ts, const float *sums, const u32 *ids, const u32 *bounds, int cols) {
    int first = bounds[blockIdx.x], last = bounds[blockIdx.x + 1];
    float *row = table + (i64)ids[blockIdx.x] * ts;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        float sum = 0.0f;
#pragma unroll 4
        for (int i = first; i < last; i++) sum += sums[(i64)i * cols + c];
        row[c] += sum;
    }
}
