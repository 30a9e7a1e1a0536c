// How well inner models fit: the squared error of f(k) - v of the last token of each full mini-batch, under three weights.
#include "rows.cuh"

struct Segment {
    u32 first_row, len, slot, phase, first_checkpoint;
};

struct Params {
    const T *k, *v;
    const float *gamma, *beta; // [h, d]
    const Segment *segments;
    const float *initial, *start; // [slots, h, S]: the learned weights, and those before the pass
    const float *after;           // after each mini-batch: for each segment, for each head
    float *errors;                // [segments, h, mini_batches, 3], sums over columns
    u32 k_stride, v_stride, heads, head_dim, mini_batch, mini_batches, mlp;
};

constexpr float EPS = 1e-6f;

__device__ __forceinline__ float gelu(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * x * (1.0f + 0.044715f * x * x)));
}

// y = b + x W, of `in` numbers in shared memory.
__device__ __forceinline__ void product(float *y, const float *x, const float *w, const float *b, int in, int out) {
    for (int c = threadIdx.x; c < out; c += blockDim.x) {
        float sum = b[c];
        for (int i = 0; i < in; i++) sum += x[i] * w[i * out + c];
        y[c] = sum;
    }
    __syncthreads();
}

// A block for each segment, head and mini-batch. Shared memory: k, hidden units, Z, 32 for sums.
extern "C" __global__ void __launch_bounds__(128) inner_errors(Params p) {
    extern __shared__ float shared[];
    const int d = p.head_dim, f = 4 * d, m = blockIdx.x % p.mini_batches, task = blockIdx.x / p.mini_batches;
    const int head = task % p.heads;
    const Segment s = p.segments[task / p.heads];
    float *errors = p.errors + (i64)blockIdx.x * 3;
    if ((m + 1) * p.mini_batch > s.len) {
        if (threadIdx.x < 3) errors[threadIdx.x] = 0.0f;
        return;
    }
    const int S = p.mlp ? 2 * d * f + f + d : d * d + d;
    float *k = shared, *hidden = k + d, *z = hidden + f, *scratch = z + d;
    const i64 row = s.first_row + (m + 1) * (i64)p.mini_batch - 1;
    const T *v = p.v + row * p.v_stride + head * d;
    for (int c = threadIdx.x; c < d; c += blockDim.x) k[c] = to_float(p.k[row * p.k_stride + head * d + c]);
    __syncthreads();
    const i64 slot = ((i64)s.slot * p.heads + head) * S;
    const int count = (s.len + p.mini_batch - 1) / p.mini_batch;
    const float *after = p.after + ((i64)s.first_checkpoint * p.heads + (i64)head * count + m) * S;
    const float *before = m == 0 ? p.start + slot : after - S;
    for (int which = 0; which < 3; which++) {
        const float *w = which == 0 ? p.initial + slot : which == 1 ? before : after;
        if (p.mlp) {
            product(hidden, k, w, w + d * f, d, f);
            for (int c = threadIdx.x; c < f; c += blockDim.x) hidden[c] = gelu(hidden[c]);
            __syncthreads();
            w += d * f + f;
            product(z, hidden, w, w + f * d, f, d);
        } else {
            product(z, k, w, w + d * d, d, d);
        }
        float sum = 0.0f;
        for (int c = threadIdx.x; c < d; c += blockDim.x) sum += z[c];
        const float mean = block_sum(sum, scratch) / d;
        sum = 0.0f;
        for (int c = threadIdx.x; c < d; c += blockDim.x) sum += (z[c] - mean) * (z[c] - mean);
        const float rs = rsqrtf(block_sum(sum, scratch) / d + EPS);
        sum = 0.0f;
        for (int c = threadIdx.x; c < d; c += blockDim.x) {
            float e = p.gamma[head * d + c] * (z[c] - mean) * rs + p.beta[head * d + c] + k[c] - to_float(v[c]);
            sum += e * e;
        }
        sum = block_sum(sum, scratch);
        if (threadIdx.x == 0) errors[which] = sum;
        __syncthreads();
    }
}
