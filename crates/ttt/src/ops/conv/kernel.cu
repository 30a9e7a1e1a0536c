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

// Four taps, 8 columns a thread, several rows one after the other: weights and the rows of the window stay in registers, so each
// row is read once. Threads: (chunks of rows) x (cols / 8), columns running fastest.
struct Place {
    int col, first, last;
};
__device__ __forceinline__ bool chunk_of(Place &p, int rows, int cols, int rows_per_thread) {
    i64 i = thread_index(), wide = cols / 8;
    p.col = (int)(i % wide) * 8;
    i64 first = i / wide * rows_per_thread;
    if (first >= rows) return false;
    p.first = (int)first, p.last = min(rows, p.first + rows_per_thread);
    return true;
}
__device__ __forceinline__ void load_weights(float (&w)[4][8], const float *from, int col) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float4 taps = ((const float4 *)from)[col + j];
        w[0][j] = taps.x, w[1][j] = taps.y, w[2][j] = taps.z, w[3][j] = taps.w;
    }
}
// What taps 0 to 2 meet at token t.
__device__ __forceinline__ void load_history(float (&h)[3][8], const T *x, int xs, const T *window, const int *segment, int cols,
                                             int t, int col) {
#pragma unroll
    for (int tap = 0; tap < 3; tap++) {
        const T *from = input(x, xs, window, segment, cols, 3, t, tap);
        if (from) {
            load<8>(h[tap], from + col);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) h[tap][j] = 0.0f;
        }
    }
}

extern "C" __global__ void __launch_bounds__(128)
    forward_taps4(T *y, const T *x, int xs, const float *w, const float *bias, const T *window, const int *segments,
                  const u32 *of_row, int rows, int cols, int rows_per_thread) {
    Place p;
    if (!chunk_of(p, rows, cols, rows_per_thread)) return;
    float weights[4][8], h[3][8], b[8];
    load_weights(weights, w, p.col);
    load<8>(b, bias + p.col);
    for (int row = p.first; row < p.last; row++) {
        const int *segment = segments + 4 * of_row[row];
        int t = row - segment[0];
        if (t == 0 || row == p.first) load_history(h, x, xs, window, segment, cols, t, p.col);
        float now[8], sum[8];
        load<8>(now, x + (i64)row * xs + p.col);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum[j] = b[j] + weights[0][j] * h[0][j] + weights[1][j] * h[1][j] + weights[2][j] * h[2][j] + weights[3][j] * now[j];
            h[0][j] = h[1][j], h[1][j] = h[2][j], h[2][j] = now[j];
        }
        store<8>(y + (i64)row * cols + p.col, sum);
    }
}

// From the last row of a chunk to the first; h holds the rows 1 to 3 ahead, or zeros behind the segment's end.
extern "C" __global__ void __launch_bounds__(128)
    backward_input_taps4(T *dx, const T *dy, int dys, const float *w, const int *segments, const u32 *of_row, int rows, int cols,
                         int rows_per_thread) {
    Place p;
    if (!chunk_of(p, rows, cols, rows_per_thread)) return;
    float weights[4][8], h[3][8];
    load_weights(weights, w, p.col);
    for (int row = p.last - 1; row >= p.first; row--) {
        const int *segment = segments + 4 * of_row[row];
        int left = segment[0] + segment[1] - row;
        if (left == 1 || row == p.last - 1) {
#pragma unroll
            for (int ahead = 1; ahead < 4; ahead++) {
                if (ahead < left) {
                    load<8>(h[ahead - 1], dy + (i64)(row + ahead) * dys + p.col);
                } else {
#pragma unroll
                    for (int j = 0; j < 8; j++) h[ahead - 1][j] = 0.0f;
                }
            }
        }
        float now[8], sum[8];
        load<8>(now, dy + (i64)row * dys + p.col);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum[j] = weights[3][j] * now[j] + weights[2][j] * h[0][j] + weights[1][j] * h[1][j] + weights[0][j] * h[2][j];
            h[2][j] = h[1][j], h[1][j] = h[0][j], h[0][j] = now[j];
        }
        store<8>(dx + (i64)row * cols + p.col, sum);
    }
}

// partials[chunk] = [dw (cols x 4) | dbias (cols)] of the chunk's rows.
extern "C" __global__ void __launch_bounds__(128)
    backward_weight_taps4(float *partials, const T *dy, int dys, const T *x, int xs, const T *window, const int *segments,
                          const u32 *of_row, int rows, int cols, int rows_per_thread) {
    Place p;
    if (!chunk_of(p, rows, cols, rows_per_thread)) return;
    float dw[4][8], dbias[8], h[3][8];
#pragma unroll
    for (int j = 0; j < 8; j++) dw[0][j] = dw[1][j] = dw[2][j] = dw[3][j] = dbias[j] = 0.0f;
    for (int row = p.first; row < p.last; row++) {
        const int *segment = segments + 4 * of_row[row];
        int t = row - segment[0];
        if (t == 0 || row == p.first) load_history(h, x, xs, window, segment, cols, t, p.col);
        float now[8], d[8];
        load<8>(now, x + (i64)row * xs + p.col);
        load<8>(d, dy + (i64)row * dys + p.col);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            dw[0][j] += d[j] * h[0][j], dw[1][j] += d[j] * h[1][j], dw[2][j] += d[j] * h[2][j], dw[3][j] += d[j] * now[j];
            dbias[j] += d[j];
            h[0][j] = h[1][j], h[1][j] = h[2][j], h[2][j] = now[j];
        }
    }
    float *to = partials + (i64)(p.first / rows_per_thread) * cols * 5;
#pragma unroll
    for (int j = 0; j < 8; j++) ((float4 *)to)[p.col + j] = make_float4(dw[0][j], dw[1][j], dw[2][j], dw[3][j]);
    store<8>(to + (i64)cols * 4 + p.col, dbias);
}

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
