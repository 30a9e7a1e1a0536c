// y = gelu(gate) * x, tanh form of gelu. A thread for V neighbouring columns.
#include "rows.cuh"

// tanh(c (a + 0.044715 a^3)), c = sqrt(2 / pi), as 1 - 2 / (e^2u + 1): exact to a few units in the last place, and at both ends.
__device__ __forceinline__ float tanh_of(float a) {
    float u = 0.7978845608028654f * (a + 0.044715f * a * a * a);
    return 1.0f - 2.0f / (1.0f + __expf(2.0f * u));
}

template <int V>
__device__ __forceinline__ void forward(T *y, const T *gate, int gs, const T *x, int xs, int rows, int cols) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    float a[V], v[V];
    load<V>(a, gate + (i64)row * gs + col);
    load<V>(v, x + (i64)row * xs + col);
#pragma unroll
    for (int j = 0; j < V; j++) v[j] *= 0.5f * a[j] * (1.0f + tanh_of(a[j]));
    store<V>(y + (i64)row * cols + col, v);
}

template <int V>
__device__ __forceinline__ void backward(T *dx, T *dgate, int dgs, const T *dy, int dys, const T *gate, int gs, const T *x,
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
        float th = tanh_of(a[j]);
        float slope = 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * a[j] * a[j]);
        float derivative = 0.5f * (1.0f + th) + 0.5f * a[j] * (1.0f - th * th) * slope;
        v[j] *= d[j] * derivative;
        a[j] = 0.5f * a[j] * (1.0f + th) * d[j];
    }
    store<V>(dx + (i64)row * cols + col, a);
    store<V>(dgate + (i64)row * dgs + col, v);
}

#define WIDTHS(name, params, args)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name##1 params { name<1> args; }                                 \
    extern "C" __global__ void __launch_bounds__(256) name##8 params { name<8> args; }

WIDTHS(forward, (T * y, const T *gate, int gs, const T *x, int xs, int rows, int cols), (y, gate, gs, x, xs, rows, cols))
WIDTHS(backward,
       (T * dx, T *dgate, int dgs, const T *dy, int dys, const T *gate, int gs, const T *x, int xs, int rows, int cols),
       (dx, dgate, dgs, dy, dys, gate, gs, x, xs, rows, cols))
