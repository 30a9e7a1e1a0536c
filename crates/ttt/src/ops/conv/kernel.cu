// Causal depthwise convolution. segments: {first row, length, slot, phase}; a window is [slots, taps - 1, cols] or null.
#include "rows.cuh"

// What tap `tap` meets at token t: a row of x, of the window, or null (zeros).
__device__ __forceinline__ const T *input(const T *x, int xs, const T *window, const int *segment, int cols, int memory, int t,
                                          int tap) {
    int at = t + tap - memory;
    if (at >= 0) return x + (i64)(segment[0] + at) * xs;
    return window ? window + ((i64)segment[2] * memory + t + tap) * cols : (const T *)0;
}

template <int V>
__device__ __forceinline__ void forward(T *y, const T *x, int xs, const float *w, int ws, const float *bias, const T *window,
                                        const int *segments, const u32 *of_row, int rows, int cols, int taps) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    const int *segment = segments + 4 * of_row[row];
    int t = row - segment[0];
    float sum[V], v[V];
    load<V>(sum, bias + col);
    for (int tap = 0; tap < taps; tap++) {
        const T *from = input(x, xs, window, segment, cols, taps - 1, t, tap);
        if (!from) continue;
        load<V>(v, from + col);
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] += w[(i64)(col + j) * ws + tap] * v[j];
    }
    store<V>(y + (i64)row * cols + col, sum);
}

// Input t was met by tap taps - 1 - ahead at token t + ahead.
template <int V>
__device__ __forceinline__ void backward_input(T *dx, const T *dy, int dys, const float *w, int ws, const int *segments,
                                               const u32 *of_row, int rows, int cols, int taps) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    const int *segment = segments + 4 * of_row[row];
    int left = segment[0] + segment[1] - row;
    float sum[V], v[V];
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] = 0.0f;
    for (int ahead = 0; ahead < taps && ahead < left; ahead++) {
        load<V>(v, dy + (i64)(row + ahead) * dys + col);
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] += w[(i64)(col + j) * ws + taps - 1 - ahead] * v[j];
    }
    store<V>(dx + (i64)row * cols + col, sum);
}

#define WIDTHS(name, params, args)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name##1 params { name<1> args; }                                 \
    extern "C" __global__ void __launch_bounds__(256) name##8 params { name<8> args; }

WIDTHS(forward,
       (T * y, const T *x, int xs, const float *w, int ws, const float *bias, const T *window, const int *segments,
        const u32 *of_row, int rows, int cols, int taps),
       (y, x, xs, w, ws, bias, window, segments, of_row, rows, cols, taps))
WIDTHS(backward_input,
       (T * dx, const T *dy, int dys, const float *w, int ws, const int *segments, const u32 *of_row, int rows, int cols,
        int taps),
       (dx, dy, dys, w, ws, segments, of_row, rows, cols, taps))

// partials[block y] = [dw (cols x taps) | dbias (cols)] of the block's rows; a thread a column, at most 8 taps.
extern "C" __global__ void __launch_bounds__(128)
    backward_weight(float *partials, const T *dy, int dys, const T *x, int xs, const T *window, const int *segments,
                    const u32 *of_row, int rows, int cols, int taps, int rows_per_block) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= cols) return;
    float dw[8], dbias = 0.0f;
#pragma unroll
    for (int tap = 0; tap < 8; tap++) dw[tap] = 0.0f;
    int first = blockIdx.y * rows_per_block, last = min(rows, first + rows_per_block);
    for (int row = first; row < last; row++) {
        const int *segment = segments + 4 * of_row[row];
        int t = row - segment[0];
        float d = to_float(dy[(i64)row * dys + col]);
        dbias += d;
#pragma unroll
        for (int tap = 0; tap < 8; tap++) {
            if (tap >= taps) break;
            const T *from = input(x, xs, window, segment, cols, taps - 1, t, tap);
            if (from) dw[tap] += d * to_float(from[col]);
        }
    }
    float *to = partials + (i64)blockIdx.y * cols * (taps + 1);
#pragma unroll
    for (int tap = 0; tap < 8; tap++)
        if (tap < taps) to[(i64)col * taps + tap] = dw[tap];
    to[(i64)cols * taps + col] = dbias;
}

// Moves a segment's window on. A thread a column, a block row a segment: rows move down in order, so none is overwritten early.
extern "C" __global__ void __launch_bounds__(128)
    advance(T *window, const T *x, int xs, const int *segments, int cols, int memory) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    const int *segment = segments + 4 * blockIdx.y;
    int len = segment[1];
    if (col >= cols || len == 0) return;
    T *own = window + (i64)segment[2] * memory * cols + col;
    for (int i = 0; i < memory; i++) {
        int t = i + len - memory;
        own[(i64)i * cols] = t >= 0 ? x[(i64)(segment[0] + t) * xs + col] : own[(i64)(i + len) * cols];
    }
}

// Gradient of the windows: row i was met by tap i - t at token t.
extern "C" __global__ void __launch_bounds__(128)
    backward_window(T *dwindow, const T *dy, int dys, const float *w, int ws, const int *segments, int cols, int memory) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    const int *segment = segments + 4 * blockIdx.y;
    if (col >= cols) return;
    for (int i = 0; i < memory; i++) {
        float sum = 0.0f;
        for (int t = 0; t < segment[1] && t <= i; t++)
            sum += w[(i64)col * ws + i - t] * to_float(dy[(i64)(segment[0] + t) * dys + col]);
        set(dwindow[((i64)segment[2] * memory + i) * cols + col], sum);
    }
}

// The backward of `advance`: adds the gradient of the final windows to dx and to the surviving rows of the old windows.
extern "C" __global__ void __launch_bounds__(128)
    backward_advance(T *dx, int dxs, T *dwindow, const T *dfinal, const int *segments, int cols, int memory) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    const int *segment = segments + 4 * blockIdx.y;
    if (col >= cols) return;
    i64 first = (i64)segment[2] * memory;
    for (int i = 0; i < memory; i++) {
        int t = i + segment[1] - memory;
        T *to = t >= 0 ? dx + (i64)(segment[0] + t) * dxs + col : dwindow + (first + i + segment[1]) * cols + col;
        set(*to, to_float(*to) + to_float(dfinal[(first + i) * cols + col]));
    }
}
