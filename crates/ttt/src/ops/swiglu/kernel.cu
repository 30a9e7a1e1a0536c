// y = silu(gate) * up of [gate | up]. A thread for V neighbouring columns of y.
#include "rows.cuh"

template <int V> __device__ __forceinline__ void forward(T *y, const T *x, int xs, int rows, int cols) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    float gate[V], up[V];
    load<V>(gate, x + (i64)row * xs + col);
    load<V>(up, x + (i64)row * xs + cols + col);
#pragma unroll
    for (int j = 0; j < V; j++) up[j] *= gate[j] / (1.0f + __expf(-gate[j]));
    store<V>(y + (i64)row * cols + col, up);
}

template <int V>
__device__ __forceinline__ void backward(T *dx, const T *dy, int dys, const T *x, int xs, int rows, int cols) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    float gate[V], up[V], d[V];
    load<V>(gate, x + (i64)row * xs + col);
    load<V>(up, x + (i64)row * xs + cols + col);
    load<V>(d, dy + (i64)row * dys + col);
#pragma unroll
    for (int j = 0; j < V; j++) {
        float s = 1.0f / (1.0f + __expf(-gate[j]));
        float dgate = d[j] * up[j] * s * (1.0f + gate[j] * (1.0f - s));
        up[j] = d[j] * gate[j] * s;
        gate[j] = dgate;
    }
    store<V>(dx + (i64)row * 2 * cols + col, gate);
    store<V>(dx + (i64)row * 2 * cols + cols + col, up);
}

#define WIDTHS(name, params, args)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name##1 params { name<1> args; }                                 \
    extern "C" __global__ void __launch_bounds__(256) name##8 params { name<8> args; }

WIDTHS(forward, (T * y, const T *x, int xs, int rows, int cols), (y, x, xs, rows, cols))
WIDTHS(backward, (T * dx, const T *dy, int dys, const T *x, int xs, int rows, int cols), (dx, dy, dys, x, xs, rows, cols))
