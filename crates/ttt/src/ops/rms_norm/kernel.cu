// y = x / sqrt(mean(x^2) + eps) * w. Forward: a warp a row. Backward: a block a row, several rows one after the other.
#include "rows.cuh"

template <int V>
__device__ __forceinline__ void forward(T *y, const T *x, int xs, const float *w, int rows, int cols, float eps) {
    int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (i64)row * xs, y += (i64)row * cols;
    float sum = 0.0f;
    for (int c = lane * V; c < cols; c += 32 * V) {
        float v[V];
        load<V>(v, x + c);
#pragma unroll
        for (int i = 0; i < V; i++) sum += v[i] * v[i];
    }
    float r = rsqrtf(warp_sum(sum) / cols + eps);
    for (int c = lane * V; c < cols; c += 32 * V) {
        float v[V], u[V];
        load<V>(v, x + c);
        load<V>(u, w + c);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] *= r * u[i];
        store<V>(y + c, v);
    }
}

// residual, which may be null, is added to dx. partials[block, c] = sum over the block's rows of dy * xhat. Dynamic shared memory: cols floats.
template <int V>
__device__ __forceinline__ void backward(T *dx, const T *dy, int dys, const T *x, int xs, const float *w, const T *residual, int rs,
                                         float *partials, int rows, int cols, int rows_per_block, float eps) {
    extern __shared__ float dw[];
    __shared__ float scratch[32];
    int step = blockDim.x * V, at = threadIdx.x * V;
    for (int c = at; c < cols; c += step)
#pragma unroll
        for (int i = 0; i < V; i++) dw[c + i] = 0.0f;
    int first = blockIdx.x * rows_per_block, last = min(rows, first + rows_per_block);
    for (int row = first; row < last; row++) {
        const T *xr = x + (i64)row * xs, *dyr = dy + (i64)row * dys;
        float squares = 0.0f, dot = 0.0f;
        for (int c = at; c < cols; c += step) {
            float a[V], d[V], u[V];
            load<V>(a, xr + c);
            load<V>(d, dyr + c);
            load<V>(u, w + c);
#pragma unroll
            for (int i = 0; i < V; i++) squares += a[i] * a[i], dot += d[i] * u[i] * a[i];
        }
        float r = rsqrtf(block_sum(squares, scratch) / cols + eps);
        float m = r * r * block_sum(dot, scratch) / cols;
        for (int c = at; c < cols; c += step) {
            float a[V], d[V], u[V];
            load<V>(a, xr + c);
            load<V>(d, dyr + c);
            load<V>(u, w + c);
#pragma unroll
            for (int i = 0; i < V; i++) {
                dw[c + i] += d[i] * r * a[i];
                a[i] = r * (d[i] * u[i] - a[i] * m);
            }
            if (residual) {
                load<V>(d, residual + (i64)row * rs + c);
#pragma unroll
                for (int i = 0; i < V; i++) a[i] += d[i];
            }
            store<V>(dx + (i64)row * cols + c, a);
        }
    }
    for (int c = at; c < cols; c += step)
#pragma unroll
        for (int i = 0; i < V; i++) partials[(i64)blockIdx.x * cols + c + i] = dw[c + i];
}

#define WIDTHS(name, params, args)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name##1 params { name<1> args; }                                 \
    extern "C" __global__ void __launch_bounds__(256) name##8 params { name<8> args; }

WIDTHS(forward, (T * y, const T *x, int xs, const float *w, int rows, int cols, float eps), (y, x, xs, w, rows, cols, eps))
WIDTHS(backward,
       (T * dx, const T *dy, int dys, const T *x, int xs, const float *w, const T *residual, int rs, float *partials, int rows,
        int cols, int rows_per_block, float eps),
       (dx, dy, dys, x, xs, w, residual, rs, partials, rows, cols, rows_per_block, eps))
