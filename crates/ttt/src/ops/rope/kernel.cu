// Rotary positions, in place: a thread turns V / 2 pairs of neighbours of a row, or V pairs of halves.
#include "rows.cuh"

template <int V>
__device__ __forceinline__ void turn(T *x, int xs, const float *cosine, const float *sine, const int *segments,
                                     const u32 *of_row, int rows, int cols, int head, int positions, float sign) {
    i64 i = thread_index(), per_row = cols / V;
    int row = (int)(i / per_row), col = (int)(i % per_row) * V;
    if (row >= rows) return;
    // Without segments the tables have a row for each row.
    int position = row;
    if (segments) {
        const int *segment = segments + 4 * of_row[row];
        position = (segment[3] + row - segment[0]) % positions;
    }
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

template <int V>
__device__ __forceinline__ void turn_halves(T *x, int xs, const float *cosine, const float *sine, int rows, int cols, int head,
                                            float sign) {
    int half = head / 2, per_row = cols / 2 / V;
    i64 i = thread_index();
    int row = (int)(i / per_row), pair = (int)(i % per_row) * V; // of all heads
    if (row >= rows) return;
    int channel = pair % half;
    T *at = x + (i64)row * xs + pair / half * head + channel;
    // Behind the middle the sine is positive, and the cosine the same.
    const float *c = cosine + (i64)row * head + half + channel, *s = sine + (i64)row * head + half + channel;
    float a[V], b[V];
    load<V>(a, at), load<V>(b, at + half);
#pragma unroll
    for (int j = 0; j < V; j++) {
        float first = a[j], second = b[j], sj = sign * s[j];
        a[j] = first * c[j] - second * sj;
        b[j] = second * c[j] + first * sj;
    }
    store<V>(at, a), store<V>(at + half, b);
}

extern "C" __global__ void __launch_bounds__(256)
    halves1(T *x, int xs, const float *cosine, const float *sine, int rows, int cols, int head, float sign) {
    turn_halves<1>(x, xs, cosine, sine, rows, cols, head, sign);
}
extern "C" __global__ void __launch_bounds__(256)
    halves8(T *x, int xs, const float *cosine, const float *sine, int rows, int cols, int head, float sign) {
    turn_halves<8>(x, xs, cosine, sine, rows, cols, head, sign);
}

// Cosines and sines of the positions of a batch, [rows, head]: a thread for a pair of channels, `apart` columns from each other and
// `step` from the next pair. `speed` is log2 θ, in two parts because arguments are f32. Angles are counted in turns, in f64.
extern "C" __global__ void __launch_bounds__(256)
    angles(float *cosine, float *sine, const int *segments, const u32 *of_row, int rows, int head, int step, int apart, float speed,
           float speed_rest) {
    i64 i = thread_index();
    int row = (int)(i / (head / 2)), pair = (int)(i % (head / 2));
    if (row >= rows) return;
    const int *segment = segments + 4 * of_row[row];
    const double half_turn = 0.31830988618379067153776752674503;
    double position = segment[3] + row - segment[0];
    double turns = position * exp2(-((double)speed + (double)speed_rest) * (2 * pair) / head) * half_turn; // half turns
    float s, c;
    sincospif((float)(turns - 2.0 * rint(0.5 * turns)), &s, &c);
    i64 first = (i64)row * head + pair * step, second = first + apart;
    cosine[first] = cosine[second] = c;
    sine[first] = -s, sine[second] = s;
}
