// silu(a) = a / (1 + e^-a), alone and as a gate. A thread for V neighbouring columns.
#include "rows.cuh"

__device__ __forceinline__ float sigmoid(float a) { return 1.0f / (1.0f + __expf(-a)); }

template <int V> __device__ __forceinline__ void forward(T *y, const T *x, int xs, int rows, int cols) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    float a[V];
    load<V>(a, x + (i64)row * xs + col);
#pragma unroll
    for (int j = 0; j < V; j++) a[j] *= sigmoid(a[j]);
    store<V>(y + (i64)row * cols + col, a);
}

template <int V>
__device__ __forceinline__ void backward(T *dx, const T *dy, int dys, const T *x, int xs, int rows, int cols) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    float a[V], d[V];
    load<V>(a, x + (i64)row * xs + col);
    load<V>(d, dy + (i64)row * dys + col);
#pragma unroll
    for (int j = 0; j < V; j++) {
        float s = sigmoid(a[j]);
        d[j] *= s * (1.0f + a[j] * (1.0f - s));
    }
    store<V>(dx + (i64)row * cols + col, d);
}

template <int V>
__device__ __forceinline__ void gate(T *y, const T *gate, int gs, const T *x, int xs, int rows, int cols) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    float a[V], v[V];
    load<V>(a, gate + (i64)row * gs + col);
    load<V>(v, x + (i64)row * xs + col);
#pragma unroll
    for (int j = 0; j < V; j++) v[j] *= a[j] * sigmoid(a[j]);
    store<V>(y + (i64)row * cols + col, v);
}

template <int V>
__device__ __forceinline__ void backward_gate(T *dx, T *dgate, int dgs, const T *dy, int dys, const T *gate, int gs, const T *x,
                                              int xs, int rows, int cols) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    float a[V], v[V], d[V];
    load<V>(a, gate + (i64)row * gs + col);
    load<V>(v, x + (i64)row * xs + col);
    load<V>(d, dy + (i64)row * dys + col);
#pragma unroll
    for (int j = 0; j < V; j++) {
        float s = sigmoid(a[j]);
        v[j] *= d[j] * s * (1.0f + a[j] * (1.0f - s));
        d[j] *= a[j] * s;
    }
    store<V>(dgate + (i64)row * dgs + col, v);
    store<V>(dx + (i64)row * cols + col, d);
}

#define WIDTHS(name, params, args)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name##1 params { name<1> args; }                                 \
    extern "C" __global__ void __launch_bounds__(256) name##8 params { name<8> args; }

WIDTHS(forward, (T * y, const T *x, int xs, int rows, int cols), (y, x, xs, rows, cols))
WIDTHS(backward, (T * dx, const T *dy, int dys, const T *x, int xs, int rows, int cols), (dx, dy, dys, x, xs, rows, cols))
WIDTHS(gate, (T * y, const T *a, int gs, const T *x, int xs, int rows, int cols), (y, a, gs, x, xs, rows, cols))
WIDTHS(backward_gate,
       (T * dx, T *dgate, int dgs, const T *dy, int dys, const T *a, int gs, const T *x, int xs, int rows, int cols),
       (dx, dgate, dgs, dy, dys, a, gs, x, xs, rows, cols))
