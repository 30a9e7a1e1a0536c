// What a training step found, gathered where the update can read it.
#include "rows.cuh"

// In a GPU's memory from step to step; `Verdict` of cuda.rs.
struct Verdict {
    double loss, nll; // sums of this step so far
    float scale;      // of the gradient
    u32 bad;          // whether this step, or one before it, found a number that is not finite
};

constexpr int THREADS = 1024;

// Sum of x over the block, in thread 0; always the same tree.
__device__ __forceinline__ double block_sum(double x, double *scratch) {
    scratch[threadIdx.x] = x;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    }
    __syncthreads();
    double sum = scratch[0];
    __syncthreads();
    return sum;
}

// One block.
extern "C" __global__ void __launch_bounds__(THREADS) add_loss(Verdict *to, const float *nll, const float *weights, int n) {
    __shared__ double scratch[THREADS];
    double loss = 0.0, sum = 0.0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        loss += (double)weights[i] * (double)nll[i];
        sum += (double)nll[i];
    }
    loss = block_sum(loss, scratch);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) to->loss += loss, to->nll += sum;
}

// One block: the norm from `count` sums of squares, the scale that clips it, and the report [loss, nll, norm, bad] in the host's
// memory. Sums start again.
extern "C" __global__ void __launch_bounds__(THREADS)
    judge(Verdict *v, const double *squares, int count, float clip, double *report) {
    __shared__ double scratch[THREADS];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += squares[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x != 0) return;
    const double infinity = __longlong_as_double(0x7ff0000000000000ll);
    double norm = sqrt(sum);
    if (!(norm < infinity) || !(fabs(v->loss) < infinity)) v->bad = 1;
    v->scale = norm > (double)clip ? (float)((double)clip / norm) : 1.0f;
    report[0] = v->loss, report[1] = v->nll, report[2] = norm, report[3] = (double)v->bad;
    v->loss = v->nll = 0.0;
}
