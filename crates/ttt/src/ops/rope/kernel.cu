// Rotary positions, in place: a thread turns V / 2 pairs of a row.
#include "rows.cuh"

template <int V>
__device__ __forceinline__ void turn(T *x, int xs, const float *cosine, const float *sine, const int *segments,
                                     const u32 *of_row, int rows, int cols, int head, int positions, float sign) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    const int *segment = segments + 4 * of_row[row];
    int position = (segment[3] + row - segment[0]) % positions;
    const float *c = cosine + position * head + col % head, *s = sine + position * head + col % head;
    T *at = x + (i64)row * xs + col;
    float v[V];
    if (V == 2) {
        v[0] = to_float(at[0]), v[1] = to_float(at[1]);
    } else {
        load<V>(v, at);
    }
#pragma unroll
    for (int j = 0; j < V; j += 2) {
        float a = v[j], b = v[j + 1];
        v[j] = a * c[j] + b * sign * s[j];
        v[j + 1] = b * c[j + 1] + a * sign * s[j + 1];
    }
    if (V == 2) {
        set(at[0], v[0]), set(at[1], v[1]);
    } else {
        store<V>(at, v);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    turn2(T *x, int xs, const float *cosine, const float *sine, const int *segments, const u32 *of_row, int rows, int cols,
          int head, int positions, float sign) {
    turn<2>(x, xs, cosine, sine, segments, of_row, rows, cols, head, positions, sign);
}
extern "C" __global__ void __launch_bounds__(256)
    turn8(T *x, int xs, const float *cosine, const float *sine, const int *segments, const u32 *of_row, int rows, int cols,
          int head, int positions, float sign) {
    turn<8>(x, xs, cosine, sine, segments, of_row, rows, cols, head, positions, sign);
}
