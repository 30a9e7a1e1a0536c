// AdamW over a flat buffer, the copy for products written on the way; sizes of gradients; the first bad element.
#include "rows.cuh"

struct Factors {
    float beta1, rest1, beta2, rest2, unbias1, unbias2, eps, weight_decay, lr, grad_scale;
};

__device__ __forceinline__ float update(float p, float g, float &m, float &v, const Factors &f) {
    g *= f.grad_scale;
    m = f.beta1 * m + f.rest1 * g;
    v = f.beta2 * v + f.rest2 * g * g;
    return p - f.lr * (m * f.unbias1 / (sqrtf(v * f.unbias2) + f.eps) + f.weight_decay * p);
}

// The end of `Verdict` of ops/verdict/kernel.cu.
struct Verdict {
    double loss, nll;
    float scale;
    u32 bad;
};

// Four elements a thread; n is a multiple of 4. operands may be null; so may verdict, which otherwise has the scale of the gradient
// and says whether there is an update.
extern "C" __global__ void __launch_bounds__(256)
    adamw(float4 *params, const float4 *grads, float4 *m, float4 *v, uint2 *operands, int quarter, float beta1, float rest1,
          float beta2, float rest2, float unbias1, float unbias2, float eps, float weight_decay, float lr, float grad_scale,
          const Verdict *verdict) {
    i64 i = thread_index();
    if (i >= quarter) return;
    if (verdict) {
        if (verdict->bad) return;
        grad_scale = verdict->scale;
    }
    Factors f = {beta1, rest1, beta2, rest2, unbias1, unbias2, eps, weight_decay, lr, grad_scale};
    float4 p = params[i], g = grads[i], mm = m[i], vv = v[i];
    p.x = update(p.x, g.x, mm.x, vv.x, f);
    p.y = update(p.y, g.y, mm.y, vv.y, f);
    p.z = update(p.z, g.z, mm.z, vv.z, f);
    p.w = update(p.w, g.w, mm.w, vv.w, f);
    params[i] = p, m[i] = mm, v[i] = vv;
    if (operands) operands[i] = make_uint2(pack(p.x, p.y), pack(p.z, p.w));
}

// sums[block] = sum of the squares of every gridDim-th group of 4; n is a multiple of 4.
extern "C" __global__ void __launch_bounds__(256) sum_of_squares(double *sums, const float4 *x, int quarter) {
    __shared__ double scratch[256];
    double sum = 0.0;
    for (i64 i = thread_index(); i < quarter; i += (i64)gridDim.x * 256) {
        float4 a = x[i];
        sum += (double)(a.x * a.x + a.y * a.y) + (double)(a.z * a.z + a.w * a.w);
    }
    scratch[threadIdx.x] = sum;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = scratch[0];
}

// *first = the smallest index, row by row, of an element that is infinite or not a number; unchanged when there is none.
extern "C" __global__ void __launch_bounds__(256) first_non_finite(u32 *first, const T *x, int xs, int rows, int cols) {
    i64 i = thread_index();
    if (i >= (i64)rows * cols) return;
    float value = to_float(x[i / cols * xs + i % cols]);
    if (!(fabsf(value) < __int_as_float(0x7f800000))) atomicMin(first, (u32)i);
}
