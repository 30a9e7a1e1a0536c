// y = (x - mean(x)) / sqrt(var(x) + eps) * w + b. Forward: a warp a row. Backward: a block a row, several one after the other.
#include "rows.cuh"

template <int V>
__device__ __forceinline__ void forward(T *y, const T *x, int xs, const float *w, const float *b, int rows, int cols,
                                        float eps) {
    int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (i64)row * xs, y += (i64)row * cols;
    float sum = 0.0f;
    for (int c = lane * V; c < cols; c += 32 * V) {
        float v[V];
        load<V>(v, x + c);
#pragma unroll
        for (int i = 0; i < V; i++) sum += v[i];
    }
    float mean = warp_sum(sum) / cols, squares = 0.0f;
    for (int c = lane * V; c < cols; c += 32 * V) {
        float v[V];
        load<V>(v, x + c);
#pragma unroll
        for (int i = 0; i < V; i++) squares += (v[i] - mean) * (v[i] - mean);
    }
    float r = rsqrtf(warp_sum(squares) / cols + eps);
    for (int c = lane * V; c < cols; c += 32 * V) {
        float v[V], u[V], a[V];
        load<V>(v, x + c);
        load<V>(u, w + c);
        load<V>(a, b + c);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = (v[i] - mean) * r * u[i] + a[i];
        store<V>(y + c, v);
    }
}

// partials[block] = [dw | db] of the block's rows. Dynamic shared memory: 2 cols floats.
template <int V>
__device__ __forceinline__ void backward(T *dx, const T *dy, int dys, const T *x, int xs, const float *w, float *partials,
                                         int rows, int cols, int rows_per_block, float eps) {
    extern __shared__ float dw[];
    __shared__ float scratch[32];
    float *db = dw + cols;
    int step = blockDim.x * V, at = threadIdx.x * V;
    for (int c = at; c < cols; c += step)
#pragma unroll
        for (int i = 0; i < V; i++) dw[c + i] = 0.0f, db[c + i] = 0.0f;
    int first = blockIdx.x * rows_per_block, last = min(rows, first + rows_per_block);
    for (int row = first; row < last; row++) {
        const T *xr = x + (i64)row * xs, *dyr = dy + (i64)row * dys;
        float sum = 0.0f, sum_p = 0.0f;
        for (int c = at; c < cols; c += step) {
            float a[V], d[V], u[V];
            load<V>(a, xr + c);
            load<V>(d, dyr + c);
            load<V>(u, w + c);
#pragma unroll
            for (int i = 0; i < V; i++) sum += a[i], sum_p += d[i] * u[i];
        }
        float mean = block_sum(sum, scratch) / cols, mean_p = block_sum(sum_p, scratch) / cols;
        float squares = 0.0f, dot = 0.0f;
        for (int c = at; c < cols; c += step) {
            float a[V], d[V], u[V];
            load<V>(a, xr + c);
            load<V>(d, dyr + c);
            load<V>(u, w + c);
#pragma unroll
            for (int i = 0; i < V; i++) squares += (a[i] - mean) * (a[i] - mean), dot += d[i] * u[i] * (a[i] - mean);
        }
        float r = rsqrtf(block_sum(squares, scratch) / cols + eps);
        float m = r * block_sum(dot, scratch) / cols;
        for (int c = at; c < cols; c += step) {
            float a[V], d[V], u[V];
            load<V>(a, xr + c);
            load<V>(d, dyr + c);
            load<V>(u, w + c);
#pragma unroll
            for (int i = 0; i < V; i++) {
                float xhat = (a[i] - mean) * r;
                dw[c + i] += d[i] * xhat;
                db[c + i] += d[i];
                a[i] = r * (d[i] * u[i] - mean_p - xhat * m);
            }
            store<V>(dx + (i64)row * cols + c, a);
        }
    }
    for (int c = at; c < cols; c += step)
#pragma unroll
        for (int i = 0; i < V; i++) {
            partials[(i64)blockIdx.x * 2 * cols + c + i] = dw[c + i];
            partials[(i64)blockIdx.x * 2 * cols + cols + c + i] = db[c + i];
        }
}

#define WIDTHS(name, params, args)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name##1 params { name<1> args; }                                 \
    extern "C" __global__ void __launch_bounds__(256) name##8 params { name<8> args; }

WIDTHS(forward, (T * y, const T *x, int xs, const float *w, const float *b, int rows, int cols, float eps),
       (y, x, xs, w, b, rows, cols, eps))
WIDTHS(backward,
       (T * dx, const T *dy, int dys, const T *x, int xs, const float *w, float *partials, int rows, int cols,
        int rows_per_block, float eps),
       (dx, dy, dys, x, xs, w, partials, rows, cols, rows_per_block, eps))
