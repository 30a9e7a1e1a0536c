// Negative log likelihood of a row of logits and, in place, its gradient. A block of 512 threads a row.
#include "rows.cuh"

// Running maximum and sum of exponentials below it.
struct Running {
    float max, sum;
};

__device__ __forceinline__ Running join(Running a, Running b) {
    float m = fmaxf(a.max, b.max);
    // A part that has seen nothing has a maximum of -inf and a sum of 0.
    float sa = a.sum > 0.0f ? a.sum * __expf(a.max - m) : 0.0f, sb = b.sum > 0.0f ? b.sum * __expf(b.max - m) : 0.0f;
    Running r = {m, sa + sb};
    return r;
}

template <int V, bool GRADIENT, class L>
__device__ __forceinline__ void row(L *logits, const u32 *targets, const float *weights, float *nll, int cols) {
    __shared__ float maxima[16], sums[16];
    L *own = logits + (i64)blockIdx.x * cols;
    Running r = {-__int_as_float(0x7f800000), 0.0f};
    bool bad = false;
    for (int c = threadIdx.x * V; c < cols; c += 512 * V) {
        float v[V];
        load<V>(v, own + c);
        float m = v[0];
#pragma unroll
        for (int i = 0; i < V; i++) m = fmaxf(m, v[i]), bad |= v[i] != v[i];
        Running part = {m, 0.0f};
#pragma unroll
        for (int i = 0; i < V; i++) part.sum += __expf(v[i] - m);
        r = join(r, part);
    }
    if (bad) r.sum = r.max = __int_as_float(0x7fc00000);
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        Running other = {__shfl_xor_sync(0xffffffffu, r.max, lane), __shfl_xor_sync(0xffffffffu, r.sum, lane)};
        bad |= other.sum != other.sum;
        r = join(r, other);
        if (bad) r.sum = r.max = __int_as_float(0x7fc00000);
    }
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = r.max, sums[threadIdx.x / 32] = r.sum;
    u32 target = targets[blockIdx.x];
    float at_target = to_float(own[target]);
    __syncthreads();
    r.max = maxima[0], r.sum = sums[0];
    bad = r.sum != r.sum;
    for (int i = 1; i < 16; i++) {
        Running other = {maxima[i], sums[i]};
        bad |= other.sum != other.sum;
        r = join(r, other);
    }
    if (bad) r.sum = r.max = __int_as_float(0x7fc00000);
    if (threadIdx.x == 0) nll[blockIdx.x] = logf(r.sum) + (r.max - at_target);
    if (!GRADIENT) return;
    float weight = weights[blockIdx.x], scale = weight / r.sum;
    for (int c = threadIdx.x * V; c < cols; c += 512 * V) {
        float v[V];
        load<V>(v, own + c);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = __expf(v[i] - r.max) * scale - (c + i == (int)target ? weight : 0.0f);
        store<V>(own + c, v);
    }
}

#define WIDTHS(name, L, gradient)                                                                                      \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        name##1(L * logits, const u32 *targets, const float *weights, float *nll, int cols) {                          \
        row<1, gradient>(logits, targets, weights, nll, cols);                                                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        name##8(L * logits, const u32 *targets, const float *weights, float *nll, int cols) {                          \
        row<8, gradient>(logits, targets, weights, nll, cols);                                                         \
    }

WIDTHS(likelihood, float, false)
WIDTHS(gradient, T, true)
