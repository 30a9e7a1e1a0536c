// What the TTT-Linear kernels are launched with; `repr(C)` twins are in `cuda.rs`. Strides are in elements, < 2^30, and are the
// distance from one token to the next: q, k, v, z and their gradients may be column blocks of wider matrices. Column `head * d + i` of a
// row is component i of that head. "element" is bf16 or, in the `_f32` kernels, f32; the fast kernels need the rows of every element
// matrix 16-byte aligned (pointer, and stride a multiple of 8).
#pragma once
#include "prelude.cuh"

// A sequence of the batch. Rows of all segments lie one behind the other; no two name the same slot.
struct Segment {
    u32 first_row;        // row of its first token
    u32 len;              // tokens; may be 0
    u32 slot;             // in `weights` and `rows`
    u32 phase;            // tokens of its open mini-batch already consumed, < K; 0 when something is kept for a backward
    u32 first_checkpoint; // checkpoints (of one head) of all earlier segments: the sum of ceil(ceil(len / K) / group)
};

// Few heads and long sequences run decoupled: `ttt_linear_forward_chain` (a block a segment and head) walks the weights alone and
// leaves them at the start of every part of `split` mini-batches, then `ttt_linear_forward` does the parts side by side (a block a
// segment, head and part, in this order, the part running fastest). Backward: `ttt_linear_backward_prepare` (the same blocks) computes
// what does not depend on dW, `ttt_linear_backward_chain` (a block a segment and head) walks dW alone and leaves it at the end of every
// part, then `ttt_linear_backward` does the parts. Without: no chain, split = 0, parts = 1.

// Dynamic shared memory in bytes, d the head size; a device that has less for a block runs the plain kernels:
//   forward, forward_chain      4 (3 * 16 (2 d + 16) + 64) + 192 d + 8 d
//   backward, backward_prepare  2 (5 * 16 (2 d + 16) + 64) + (2 d + 48) (2 d + 16) + 304 d + 64
//   backward_chain              4 (2 * 16 (2 d + 16) + 128 d + 512) + 192 d
//   decode, step                4 (20 d + (2 d + 1) K + d / 16)
//   plain, reduce               0

// S = d * d + d fast weights of a head: [W row-major [in, out] | b].
struct ForwardParams {
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
    float* rows;             // [slots, H, K - 1, 2 d]: [k | scaled inner gradient] of the open mini-batch's tokens, read below the
                             // phase and written behind it. Null: every phase is 0 and an open tail is dropped (training)
    void* ghat;              // [tokens, H d] element, written: scaled inner gradients for the backward. Null: not kept
    float* checkpoints;      // for each segment, for each head, [ceil(ceil(len / K) / group), S], written: the weights after the last
                             // complete mini-batch of each group of `group`. Null: not kept
    float* boundaries;       // decoupled: [segments, H, parts, S], weights at the start of each part; else unused
    float* opened;           // decoupled with rows: [segments, H, K - 1, 2 d], the rows below the phase; else unused
    float* scratch;          // plain kernels: forward_scratch(d, K) f32 for each block, which is (segment, head); fast: unused
    u32 q_stride, k_stride, v_stride, z_stride, lr_stride, ghat_stride;
    u32 heads;      // H
    u32 head_dim;   // d; in the fast kernels that of the compilation
    u32 mini_batch; // K <= 64; <= 16 in the fast kernels
    u32 group;      // mini-batches of a checkpoint group, >= 1
    u32 split;      // mini-batches of a part, a multiple of group; 0: not decoupled
    u32 parts;      // parts of the longest segment, ceil(mini-batches / split); 1 when not decoupled
};

// One token of each of some sequences from the projections on: convolutions or none, RoPE, gate of the learning rate. bf16.
struct StepParams {
    const void* projected;    // [rows, stride]: column blocks of H d: with convolutions [their input | v ..], else [q | k | v ..]
    const void* normed;       // [rows, H d]: what the projections and the gate read
    const void* rate_weight;  // [H, H d]
    const float* rate_bias;   // [H]
    const float* token_idx;   // [K]: tok_i = max(0, 1 / (i + 1) + token_idx_i)
    const float* gamma;       // [H, d]
    const float* beta;        // [H, d]
    const float* cosine;      // [K, d]
    const float* sine;        // [K, d], negative in even columns
    const float* taps_of[2];  // k, q: [H d, taps]. Null: no convolutions
    const float* bias_of[2];  // k, q: [H d]
    void* window;             // [slots, taps - 1, H d], moved on
    const u32* segments;      // [rows][first row, length, slot, phase]; length 0: nothing is done
    void* z;                  // [rows, H d], written
    float* weights;           // as in the forward
    float* rows;
    void* pre_window;         // [slots, pre_taps - 1, H d]: of the convolution before the layer, moved on by
    const void* pre_now;      // [rows, H d]. Null: somebody else does it
    u32 stride;
    u32 heads;
    u32 mini_batch;
    u32 taps;         // <= 8
    u32 pre_taps;     // <= 8
    float rate_scale; // base rate / d
};

// All phases are 0; an update by a tail shorter than K was dropped.
struct BackwardParams {
    const void* q; // as in the forward
    const void* k;
    const void* v;
    const float* lr;
    const float* tok;
    const float* gamma;
    const float* beta;
    const Segment* segments;
    const void* ghat;         // what the forward wrote
    const float* checkpoints; // what the forward wrote
    const void* dz;           // [tokens, H d] element
    void* dq;                 // [tokens, H d] element, written
    void* dk;
    void* dv;
    float* dlr;      // [tokens, H], written
    float* dstate;   // [segments, H, S]: gradient of the final weights, becomes that of the initial ones
    float* partials; // [segments, H, parts, K + 2 d], written: [dtok | dgamma | dbeta] of each block; `ttt_linear_reduce` adds them
    float* boundaries; // decoupled: [segments, H, parts, S], gradient of the weights at the end of each part; else unused
    void* prepared;    // decoupled: [segments, H, parts * split] records of 128 d + 512 bytes; else unused
    float* scratch;  // plain kernels: backward_scratch(d, K) f32 for each block; fast: unused
    u32 q_stride, k_stride, v_stride, lr_stride, ghat_stride, dz_stride, dq_stride, dk_stride, dv_stride, dlr_stride;
    u32 heads;
    u32 head_dim;
    u32 mini_batch;
    u32 group;
    u32 split;
    u32 parts;
};

struct ReduceParams {
    const float* partials; // [segments, H, parts, K + 2 d]
    float* dtok;           // [K], added to
    float* dgamma;         // [H, d], added to
    float* dbeta;          // [H, d], added to
    u32 segments;
    u32 heads;
    u32 head_dim;
    u32 mini_batch;
    u32 parts;
};

// f32 numbers of scratch for a block of the plain kernels.
DEVICE u32 forward_scratch(u32 d, u32 k) { return 3 * k * d + k * k; }
DEVICE u32 backward_scratch(u32 d, u32 k) { return d * d + d + 9 * k * d + 2 * k * k + 4 * k; }

constexpr float EPS = 1e-6f;
