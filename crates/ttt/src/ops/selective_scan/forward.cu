// The selective scan, forward: whole sequences, and a few tokens of many.
#include "scan.cuh"

// Blocks: segments x groups of channels. Shared memory: tiles of B and C [N], of x and the step sizes [GROUP], A and the states.
KERNEL __launch_bounds__(THREADS, 2) scan_forward(const __grid_constant__ ScanParams p) {
    DYNAMIC_SHARED(raw);
    const u32 n = p.states, lane = threadIdx.x % 32, own = threadIdx.x / 32 * 2;
    float *b_tile = (float*)raw, *c_tile = b_tile + n * PITCH, *x_tile = c_tile + n * PITCH, *d_tile = x_tile + GROUP * PITCH;
    float *decays = d_tile + GROUP * PITCH, *states = decays + n * GROUP;
    const Place at = place_of(p.segments, (p.channels + GROUP - 1) / GROUP);
    if (at.len == 0) return;
    const u32 first = at.block * GROUP;
    float* const slot = p.state ? p.state + (u64)at.slot * n * p.channels : nullptr;
    stage_decays(decays, p, first);
    load_group(states, slot, n, first, p.channels);
    for (u32 done = 0; done < at.len; done += SPAN) {
        const u32 row = at.first_row + done, count = min(at.len - done, SPAN);
        __syncthreads(); // states are written, tiles are read
        if (p.kept) {
            const u64 span = at.first_row / SPAN + at.segment + done / SPAN;
            store_group(p.kept + span * n * p.channels, states, n, first, p.channels);
        }
        stage<MAX_STATES, 16>(b_tile, n, p.b, p.b_stride, row, count, 0, n);
        stage<MAX_STATES, 16>(c_tile, n, p.c, p.c_stride, row, count, 0, n);
        stage<GROUP, 16>(x_tile, GROUP, p.x, p.x_stride, row, count, first, p.channels);
        stage_steps<16>(d_tile, p, row, count, first);
        __syncthreads();
        float delta[2][PER], u[2][PER], y[2][PER];
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            load_lane(delta[j], d_tile + (own + j) * PITCH, lane);
            load_lane(u[j], x_tile + (own + j) * PITCH, lane);
            const float skip = first + own + j < p.channels ? p.d[first + own + j] : 0.0f;
#pragma unroll
            for (u32 i = 0; i < PER; i++) y[j][i] = skip * u[j][i], u[j][i] *= delta[j][i];
        }
        for (u32 s = 0; s < n; s++) {
            float b[PER], c[PER];
            load_lane(b, b_tile + s * PITCH, lane);
            load_lane(c, c_tile + s * PITCH, lane);
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                const float decay = decays[s * GROUP + own + j];
                float a[PER], ub[PER], product, end;
#pragma unroll
                for (u32 i = 0; i < PER; i++) a[i] = fast_exp2(delta[j][i] * decay), ub[i] = u[j][i] * b[i];
                float h = scan_forward_lanes(a, ub, states[s * GROUP + own + j], lane, product, end);
                if (lane == 31) states[s * GROUP + own + j] = end;
#pragma unroll
                for (u32 i = 0; i < PER; i++) h = a[i] * h + ub[i], y[j][i] += c[i] * h;
            }
        }
#pragma unroll
        for (u32 j = 0; j < 2; j++) store_lane(x_tile + (own + j) * PITCH, lane, y[j]);
        __syncthreads();
        unstage<16>(p.y, p.channels, x_tile, row, count, first, p.channels);
    }
    __syncthreads();
    if (slot) store_group(slot, states, n, first, p.channels);
}

// A few tokens of each segment, one after the other: a thread a channel, its states in registers. Blocks: segments x 128 channels.
KERNEL __launch_bounds__(128, 4) scan_step(const __grid_constant__ ScanParams p) {
    const Place at = place_of(p.segments, (p.channels + 127) / 128);
    const u32 channel = at.block * 128 + threadIdx.x, n = p.states;
    if (at.len == 0 || channel >= p.channels) return;
    float* const slot = p.state ? p.state + (u64)at.slot * n * p.channels + channel : nullptr;
    float h[16], decay[16];
#pragma unroll
    for (u32 s = 0; s < 16; s++) {
        h[s] = slot && s < n ? slot[(u64)s * p.channels] : 0.0f;
        decay[s] = s < n ? -LOG2_E * expf(p.a_log[(u64)channel * p.a_stride + s]) : 0.0f;
    }
    const float skip = p.d[channel], bias = p.dt_bias[channel];
    for (u32 t = 0; t < at.len; t++) {
        const u64 row = at.first_row + t;
        const float x = number(p.x[row * p.x_stride + channel]);
        const float delta = softplus(number(p.dt[row * p.dt_stride + channel]) + bias), u = delta * x;
        float y = skip * x;
#pragma unroll
        for (u32 s = 0; s < 16; s++) {
            if (s >= n) continue;
            h[s] = fast_exp2(delta * decay[s]) * h[s] + u * number(p.b[row * p.b_stride + s]);
            y += number(p.c[row * p.c_stride + s]) * h[s];
        }
        put(p.y[row * p.channels + channel], y);
    }
#pragma unroll
    for (u32 s = 0; s < 16; s++)
        if (slot && s < n) slot[(u64)s * p.channels] = h[s];
}
