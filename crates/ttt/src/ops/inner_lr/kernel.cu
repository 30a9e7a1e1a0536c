// What follows the gate's product: lr = scale * sigmoid(logit + bias) and its backward; and the token scale
// tok_i = max(0, 1/(i + 1) + idx_i).
#include "rows.cuh"

// lr holds the logits and is overwritten.
extern "C" __global__ void __launch_bounds__(256) gate(float *lr, const float *bias, int rows, int heads, float scale) {
    i64 i = thread_index();
    if (i >= (i64)rows * heads) return;
    lr[i] = scale / (1.0f + __expf(-(lr[i] + bias[i % heads])));
}

// da = dlr * lr * (1 - lr * inverse), inverse = 1 / scale (0 when scale is); partials[block, h] = sum of da over the block's
// rows. A thread a head: threads of a block beyond `heads` split the rows. Dynamic shared memory: blockDim floats.
extern "C" __global__ void __launch_bounds__(256)
    gate_backward(T *da, float *partials, const float *dlr, int dls, const float *lr, int ls, int rows, int heads,
                  int rows_per_block, float inverse) {
    extern __shared__ float sums[];
    int parts = blockDim.x / heads, head = threadIdx.x % heads, part = threadIdx.x / heads;
    int first = blockIdx.x * rows_per_block, last = min(rows, first + rows_per_block);
    float sum = 0.0f;
    if (part < parts)
        for (int row = first + part; row < last; row += parts) {
            float l = lr[(i64)row * ls + head], d = dlr[(i64)row * dls + head] * l * (1.0f - l * inverse);
            set(da[(i64)row * heads + head], d);
            sum += d;
        }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0) {
        for (int p = 1; p < parts; p++) sum += sums[p * heads + head];
        partials[(i64)blockIdx.x * heads + head] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) token_scale(float *tok, const float *idx, int n) {
    i64 i = thread_index();
    if (i < n) tok[i] = fmaxf(0.0f, 1.0f / (float)(i + 1) + idx[i]);
}

extern "C" __global__ void __launch_bounds__(256) token_scale_backward(float *didx, const float *dtok, const float *idx, int n) {
    i64 i = thread_index();
    if (i < n && 1.0f / (float)(i + 1) + idx[i] > 0.0f) didx[i] += dtok[i];
}
