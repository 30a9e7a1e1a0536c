// Addition, copying, gathering rows, changing types, adding up partial sums. One thread for V neighbouring elements.
#include "rows.cuh"

// Splits the index of this thread into row and first column; false when there is none.
template <int V> __device__ __forceinline__ bool place(int rows, int cols, int &row, int &col) {
    i64 i = thread_index(), per_row = cols / V;
    row = (int)(i / per_row), col = (int)(i % per_row) * V;
    return i < per_row * rows;
}

template <int V, class Y, class X> __device__ __forceinline__ void copy(Y *y, int ys, const X *x, int xs, int rows, int cols) {
    int row, col;
    if (!place<V>(rows, cols, row, col)) return;
    float v[V];
    load<V>(v, x + (i64)row * xs + col);
    store<V>(y + (i64)row * ys + col, v);
}

template <int V> __device__ __forceinline__ void add(T *y, int ys, const T *x, int xs, int rows, int cols) {
    int row, col;
    if (!place<V>(rows, cols, row, col)) return;
    float a[V], b[V];
    load<V>(a, y + (i64)row * ys + col);
    load<V>(b, x + (i64)row * xs + col);
#pragma unroll
    for (int i = 0; i < V; i++) a[i] += b[i];
    store<V>(y + (i64)row * ys + col, a);
}

// y[i] = x[i % period].
template <int V>
__device__ __forceinline__ void repeat(T *y, int ys, const T *x, int xs, int period, int rows, int cols) {
    int row, col;
    if (!place<V>(rows, cols, row, col)) return;
    float v[V];
    load<V>(v, x + (i64)(row % period) * xs + col);
    store<V>(y + (i64)row * ys + col, v);
}

// y[i] = x[index[i]].
template <int V>
__device__ __forceinline__ void gather(T *y, int ys, const T *x, int xs, const u32 *index, int rows, int cols) {
    int row, col;
    if (!place<V>(rows, cols, row, col)) return;
    float v[V];
    load<V>(v, x + (i64)index[row] * xs + col);
    store<V>(y + (i64)row * ys + col, v);
}

// y[index[i]] = x[i].
template <int V>
__device__ __forceinline__ void scatter(T *y, int ys, const T *x, int xs, const u32 *index, int rows, int cols) {
    int row, col;
    if (!place<V>(rows, cols, row, col)) return;
    float v[V];
    load<V>(v, x + (i64)row * xs + col);
    store<V>(y + (i64)index[row] * ys + col, v);
}

#define WIDTHS(name, params, args)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name##1 params { name<1> args; }                                 \
    extern "C" __global__ void __launch_bounds__(256) name##8 params { name<8> args; }

WIDTHS(copy, (T * y, int ys, const T *x, int xs, int rows, int cols), (y, ys, x, xs, rows, cols))
WIDTHS(add, (T * y, int ys, const T *x, int xs, int rows, int cols), (y, ys, x, xs, rows, cols))
WIDTHS(repeat, (T * y, int ys, const T *x, int xs, int period, int rows, int cols), (y, ys, x, xs, period, rows, cols))
WIDTHS(gather, (T * y, int ys, const T *x, int xs, const u32 *index, int rows, int cols), (y, ys, x, xs, index, rows, cols))
WIDTHS(scatter, (T * y, int ys, const T *x, int xs, const u32 *index, int rows, int cols), (y, ys, x, xs, index, rows, cols))

extern "C" __global__ void __launch_bounds__(256) to_bf16_1(bf16 *y, int ys, const float *x, int xs, int rows, int cols) {
    copy<1>(y, ys, x, xs, rows, cols);
}
extern "C" __global__ void __launch_bounds__(256) to_bf16_8(bf16 *y, int ys, const float *x, int xs, int rows, int cols) {
    copy<8>(y, ys, x, xs, rows, cols);
}
extern "C" __global__ void __launch_bounds__(256) to_f32_1(float *y, int ys, const bf16 *x, int xs, int rows, int cols) {
    copy<1>(y, ys, x, xs, rows, cols);
}
extern "C" __global__ void __launch_bounds__(256) to_f32_8(float *y, int ys, const bf16 *x, int xs, int rows, int cols) {
    copy<8>(y, ys, x, xs, rows, cols);
}

// y[i] = value, or value / (i + 1) with `harmonic`.
extern "C" __global__ void __launch_bounds__(256) fill(float *y, int count, float value, int harmonic) {
    i64 i = thread_index();
    if (i < count) y[i] = harmonic ? value / (float)(i + 1) : value;
}

// y[c] += sum over `count` rows of width `width` of their column first + c / piece * step + c % piece, always in the same order:
// 32 threads a column, each every 32nd row. Blocks of 32 x 32 threads.
extern "C" __global__ void __launch_bounds__(1024)
    add_up(float *y, const float *partials, int count, int width, int first, int piece, int step, int cols) {
    __shared__ float sums[32][33];
    int lane = threadIdx.x % 32, part = threadIdx.x / 32, col = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (col < cols) {
        const float *from = partials + first + (i64)(col / piece) * step + col % piece;
#pragma unroll 4
        for (int i = part; i < count; i += 32) sum += from[(i64)i * width];
    }
    sums[part][lane] = sum;
    __syncthreads();
    if (part == 0 && col < cols) {
#pragma unroll
        for (int i = 1; i < 32; i++) sum += sums[i][lane];
        y[col] += sum;
    }
}
