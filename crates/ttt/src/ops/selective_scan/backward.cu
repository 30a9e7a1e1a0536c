// The selective scan, backward: span by span from the last to the first. States are those of the forward pass at the span's start,
// scanned again; gradients of states are scanned the other way. Blocks: segments x blocks of `groups` groups of channels. What is
// summed over channels, dB and dC, is summed over a warp's two in registers, over warps and groups in shared memory in their order,
// and over blocks by `scan_reduce`.
#ifndef WARPS
#ifdef FEW_WARPS
#define WARPS 4 // fits the shared memory of smaller GPUs
#else
#define WARPS 12 // 168 registers a thread: one block fills an SM
#endif
#endif
#include "scan.cuh"

// Shared memory: tiles of B and C [N], of x, step sizes and dy [GROUP], parts of dB and dC of each warp [2][WARPS][2], their sums
// [2 N] where a block has several groups, A and kept states [N, GROUP], and for each group gradients of states and of A [N, GROUP],
// of D and the bias [GROUP].
KERNEL __launch_bounds__(THREADS, 1) scan_backward(const __grid_constant__ ScanGradParams q) {
    DYNAMIC_SHARED(raw);
    const ScanParams& p = q.in;
    const u32 n = p.states, lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = 2 * warp;
    float *b_tile = (float*)raw, *c_tile = b_tile + n * PITCH, *x_tile = c_tile + n * PITCH, *d_tile = x_tile + GROUP * PITCH;
    float *dy_tile = d_tile + GROUP * PITCH, *parts = dy_tile + GROUP * PITCH, *sums = parts + 4 * WARPS * PITCH;
    float *decays = sums + (q.groups > 1 ? 2 * n * PITCH : 0), *starts = decays + n * GROUP, *dstates = starts + n * GROUP;
    float *dskips = dstates + 2 * q.groups * n * GROUP;
    const u32 per_block = q.groups * GROUP, blocks = (p.channels + per_block - 1) / per_block;
    const Place at = place_of(p.segments, blocks);
    const u32 groups = min(q.groups, (p.channels - at.block * per_block + GROUP - 1) / GROUP);
    float* const slot = p.state ? p.state + (u64)at.slot * n * p.channels : nullptr;
    for (u32 g = 0; g < groups; g++) {
        load_group(dstates + 2 * g * n * GROUP, slot, n, at.block * per_block + g * GROUP, p.channels);
        for (u32 e = threadIdx.x; e < n * GROUP; e += THREADS) dstates[(2 * g + 1) * n * GROUP + e] = 0.0f;
        for (u32 e = threadIdx.x; e < 2 * GROUP; e += THREADS) dskips[2 * g * GROUP + e] = 0.0f;
    }
    const u32 spans = (at.len + SPAN - 1) / SPAN;
    for (u32 span = spans; span-- > 0;) {
        const u32 row = at.first_row + span * SPAN, count = min(at.len - span * SPAN, SPAN);
        for (u32 g = 0; g < groups; g++) {
            const u32 first = at.block * per_block + g * GROUP;
            float *dh = dstates + 2 * g * n * GROUP, *da = dh + n * GROUP, *dskip = dskips + 2 * g * GROUP, *dbias = dskip + GROUP;
            __syncthreads(); // tiles and sums are read
            if (g == 0) {
                stage<MAX_STATES, 11>(b_tile, n, p.b, p.b_stride, row, count, 0, n);
                stage<MAX_STATES, 11>(c_tile, n, p.c, p.c_stride, row, count, 0, n);
            }
            stage_decays(decays, p, first);
            load_group(starts, p.kept + (u64)(at.first_row / SPAN + at.segment + span) * n * p.channels, n, first, p.channels);
            stage<GROUP, 8>(x_tile, GROUP, p.x, p.x_stride, row, count, first, p.channels);
            stage<GROUP, 8>(dy_tile, GROUP, q.dy, q.dy_stride, row, count, first, p.channels);
            stage_steps<8>(d_tile, p, row, count, first);
            __syncthreads();
            float delta[2][PER], u[2][PER], dy[2][PER], dinput[2][PER], ddelta[2][PER];
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                load_lane(delta[j], d_tile + (own + j) * PITCH, lane);
                load_lane(u[j], x_tile + (own + j) * PITCH, lane);
                load_lane(dy[j], dy_tile + (own + j) * PITCH, lane);
#pragma unroll
                for (u32 i = 0; i < PER; i++) u[j][i] *= delta[j][i], dinput[j][i] = 0.0f, ddelta[j][i] = 0.0f;
            }
            for (u32 s = 0; s < n; s++) {
                float b[PER], c[PER], db[PER], dc[PER];
                load_lane(b, b_tile + s * PITCH, lane);
                load_lane(c, c_tile + s * PITCH, lane);
#pragma unroll
                for (u32 i = 0; i < PER; i++) db[i] = 0.0f, dc[i] = 0.0f;
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    const u32 k = s * GROUP + own + j;
                    const float decay = decays[k];
                    float a[PER], h[PER], product, end, start, sum = 0.0f;
#pragma unroll
                    for (u32 i = 0; i < PER; i++) a[i] = fast_exp2(delta[j][i] * decay), h[i] = u[j][i] * b[i];
                    const float before = scan_forward_lanes(a, h, starts[k], lane, product, end);
                    h[0] = a[0] * before + h[0];
#pragma unroll
                    for (u32 i = 1; i < PER; i++) h[i] = a[i] * h[i - 1] + h[i];
                    float ae[PER];
#pragma unroll
                    for (u32 i = 0; i < PER; i++) dc[i] += dy[j][i] * h[i], ae[i] = a[i] * (c[i] * dy[j][i]);
                    // gamma: the gradient that a token hands to the state before it.
                    float gamma = scan_backward_lanes(a, ae, dh[k], lane, product, start);
                    if (lane == 0) dh[k] = start;
#pragma unroll
                    for (u32 i = PER; i-- > 0;) {
                        const float g_h = c[i] * dy[j][i] + gamma;
                        gamma = a[i] * g_h;
                        db[i] += g_h * u[j][i];
                        dinput[j][i] += g_h * b[i];
                        const float w = gamma * (i > 0 ? h[i - 1] : before);
                        ddelta[j][i] += w * decay;
                        sum += w * delta[j][i];
                    }
                    sum = sum_lanes(sum);
                    if (lane == 0) da[k] += sum * (decay * LN_2); // A = -exp(A_log) is its own derivative
                }
                float* part = parts + ((s % 2 * WARPS + warp) * 2) * PITCH;
                store_lane(part, lane, db);
                store_lane(part + PITCH, lane, dc);
                __syncthreads();
                for (u32 e = threadIdx.x; e < 2 * SPAN; e += THREADS) {
                    const u32 side = e / SPAN, k = e % SPAN;
                    float sum = q.groups > 1 && g > 0 ? sums[(side * n + s) * PITCH + k] : 0.0f;
#pragma unroll
                    for (u32 w = 0; w < WARPS; w++) sum += parts[((s % 2 * WARPS + w) * 2 + side) * PITCH + k];
                    if (g + 1 < groups) {
                        sums[(side * n + s) * PITCH + k] = sum;
                    } else {
                        const u32 t = k / 4 % 32 * PER + k / 128 * 4 + k % 4; // the inverse of `place`
                        if (t < count) q.selected[((u64)at.block * 2 * n + side * n + s) * q.rows + row + t] = sum;
                    }
                }
            }
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                float x[PER], dx[PER], ddt[PER], of_skip = 0.0f, of_bias = 0.0f;
                load_lane(x, x_tile + (own + j) * PITCH, lane);
                const float skip = first + own + j < p.channels ? p.d[first + own + j] : 0.0f;
#pragma unroll
                for (u32 i = 0; i < PER; i++) {
                    dx[i] = delta[j][i] * dinput[j][i] + skip * dy[j][i];
                    // The slope of softplus is 1 - e^-delta.
                    ddt[i] = (ddelta[j][i] * LN_2 + x[i] * dinput[j][i]) * -expm1f(-delta[j][i]);
                    of_skip += dy[j][i] * x[i], of_bias += ddt[i];
                }
                store_lane(x_tile + (own + j) * PITCH, lane, dx);
                store_lane(d_tile + (own + j) * PITCH, lane, ddt);
                of_skip = sum_lanes(of_skip), of_bias = sum_lanes(of_bias);
                if (lane == 0) dskip[own + j] += of_skip, dbias[own + j] += of_bias;
            }
            __syncthreads();
            unstage<8>(q.dx, q.dx_stride, x_tile, row, count, first, p.channels);
            unstage<8>(q.ddt, q.ddt_stride, d_tile, row, count, first, p.channels);
        }
    }
    __syncthreads();
    float* const to = q.parameters + (u64)at.segment * p.channels * (n + 2);
    for (u32 g = 0; g < groups; g++) {
        const u32 first = at.block * per_block + g * GROUP;
        const float *dh = dstates + 2 * g * n * GROUP, *da = dh + n * GROUP, *dskip = dskips + 2 * g * GROUP;
        if (slot) store_group(slot, dh, n, first, p.channels);
        for (u32 e = threadIdx.x; e < n * GROUP; e += THREADS)
            if (first + e / n < p.channels) to[(u64)(first + e / n) * n + e % n] = da[e % n * GROUP + e / n];
        for (u32 e = threadIdx.x; e < 2 * GROUP; e += THREADS)
            if (first + e % GROUP < p.channels) to[(u64)(n + e / GROUP) * p.channels + first + e % GROUP] = dskip[e];
    }
}

struct ScanReduceParams {
    const float* selected; // [blocks, 2 N, rows]
    T *db, *dc;            // [rows, N]
    u32 db_stride, dc_stride, blocks, states, rows;
};

// dB and dC from the parts of blocks of channels, in their order. A thread a row and state; rows run fastest.
KERNEL __launch_bounds__(256) scan_reduce(const __grid_constant__ ScanReduceParams p) {
    const u64 e = (u64)blockIdx.x * 256 + threadIdx.x, all = (u64)2 * p.states * p.rows;
    if (e >= all) return;
    float sum = 0.0f;
#pragma unroll 8
    for (u32 i = 0; i < p.blocks; i++) sum += p.selected[i * all + e];
    const u32 state = e / p.rows, row = e % p.rows;
    if (state < p.states) put(p.db[(u64)row * p.db_stride + state], sum);
    else put(p.dc[(u64)row * p.dc_stride + state - p.states], sum);
}
