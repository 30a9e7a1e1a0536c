// What the TTT-MLP kernels are launched with; `repr(C)` twins are in `cuda.rs`. Conventions, `Segment` and the sum of partials are those
// of TTT-Linear (params.cuh).
#pragma once
#include "params.cuh"

// f = 4 d; S = 2 d f + f + d fast weights of a head: [W1 row-major [d, f] | b1 | W2 row-major [f, d] | b2].
// R = 2 d + 2 f numbers of a token of an open mini-batch: [k | Ĝ1 | X2 | Ĝ2].
struct MlpForwardParams {
    const void* q;           // [tokens, H d] element, rotated
    const void* k;           // [tokens, H d] element, rotated
    const void* v;           // [tokens, H d] element
    const float* lr;         // [tokens, H]: base rate * sigmoid(gate) / d
    const float* tok;        // [K] >= 0
    const float* gamma;      // [H, d]
    const float* beta;       // [H, d]
    const Segment* segments; // [segments]
    void* z;                 // [tokens, H d] element, written
    float* weights;          // [slots, H, S]: weights at the start of the open mini-batch, moved on
    float* rows;             // [slots, H, K - 1, R]: the open mini-batch's tokens, read below the phase and written behind it. Null: every
                             // phase is 0 and an open tail is dropped (training)
    void* ghat;              // [tokens, H, f + d] element, written: [Ĝ1 | Ĝ2] for the backward. Null: nothing is kept
    float* sums;             // [tokens, H, 2 d], written with ghat: [Z2 | Z̄2]
    float* checkpoints;      // for each segment, for each head, [ceil(ceil(len / K) / group), S], written with ghat: the weights after
                             // the last complete mini-batch of each group of `group`
    float* scratch;          // plain kernels: mlp_forward_scratch(d, K) f32 for each block, which is (segment, head); fast: unused
    u32 q_stride, k_stride, v_stride, z_stride, lr_stride;
    u32 heads;      // H
    u32 head_dim;   // d; in the fast kernels that of the compilation
    u32 mini_batch; // K <= 64; <= 16 in the fast kernels
    u32 group;      // mini-batches of a checkpoint group, >= 1
};

// All phases are 0; an update by a tail shorter than K was dropped.
struct MlpBackwardParams {
    const void* q; // as in the forward
    const void* k;
    const void* v;
    const float* lr;
    const float* tok;
    const float* gamma;
    const float* beta;
    const Segment* segments;
    const void* ghat; // what the forward wrote
    const float* sums;
    const float* checkpoints;
    const void* dz; // [tokens, H d] element
    void* dq;       // [tokens, H d] element, written
    void* dk;
    void* dv;
    float* dlr;      // [tokens, H], written
    float* dstate;   // [segments, H, S]: gradient of the final weights, becomes that of the initial ones
    float* partials; // [segments, H, K + 2 d], written: [dtok | dgamma | dbeta] of each block; `ttt_linear_reduce` adds them
    float* scratch;  // plain kernels: mlp_backward_scratch(d, K) f32 for each block; fast: unused
    u32 q_stride, k_stride, v_stride, lr_stride, dz_stride, dq_stride, dk_stride, dv_stride, dlr_stride;
    u32 heads;
    u32 head_dim;
    u32 mini_batch;
    u32 group;
};

// f32 numbers of scratch for a block of the plain kernels.
DEVICE u32 mlp_forward_scratch(u32 d, u32 k) { return 3 * k * d + 4 * k * 4 * d + 2 * k * k; }
DEVICE u32 mlp_backward_scratch(u32 d, u32 k) { return 8 * d * d + 5 * d + 8 * k * d + 10 * k * 4 * d + 4 * k * k + 3 * k; }
