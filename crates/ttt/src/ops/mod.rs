//! Operations: a small set of functions on tensors, each with an explicit forward and backward.
//!
//! Every operation has a folder: `mod.rs` is the public door (one function per direction; it checks shapes and picks the
//! implementation once), `reference.rs` the definition (plain loops, generic over f32 and f64), `cpu.rs` the fast f32 version,
//! `cuda.rs` and `kernel.cu` that of GPUs (f32 and bf16).
//! f64 always runs the reference; f32 runs it when the device says so ([`crate::device::Kernels`]).
//!
//! Rules that hold for all of them:
//! - activations are matrices `[tokens, ...]`; operations that look along time take the [`crate::batch::Segment`]s of the batch;
//! - gradients are `d<name>`; *parameter* gradients are added to, *activation* gradients are overwritten;
//! - a wrong shape panics with both shapes; what a user can cause (memory) is an [`crate::Error`];
//! - work is split over the threads of the current pool by shape alone, so results do not depend on timing.

pub mod adamw;
pub mod add;
pub mod attention;
pub mod conv;
pub mod cross_entropy;
pub mod embedding;
pub mod gelu_gate;
pub mod grad_norm;
pub mod inner;
pub mod inner_lr;
pub mod layer_norm;
pub mod linear;
pub mod linear_attention;
pub mod rms_norm;
pub mod rope;
pub mod sample;
pub mod selective_scan;
pub mod silu;
pub mod step;
pub mod swiglu;
pub mod token_scale;
pub mod ttt_batch;
pub mod ttt_linear;
pub mod ttt_mlp;
pub mod verdict;

pub(crate) mod partials;
pub(crate) mod segments;
pub(crate) mod simd;

use crate::device::{Device, Kernels};
use crate::tensor::DType;

/// The kernels of all operations.
pub(crate) static KERNELS: &[&crate::device::cuda::kernels::Source] = &[
    &adamw::cuda::SOURCE,
    &add::cuda::SOURCE,
    &conv::cuda::SOURCE,
    &cross_entropy::cuda::SOURCE,
    &embedding::cuda::SOURCE,
    &gelu_gate::cuda::SOURCE,
    &inner_lr::cuda::SOURCE,
    &layer_norm::cuda::SOURCE,
    &rms_norm::cuda::SOURCE,
    &rope::cuda::SOURCE,
    &sample::cuda::SOURCE,
    &step::cuda::PRODUCTS,
    &step::cuda::ROWS,
    &swiglu::cuda::SOURCE,
    &verdict::cuda::SOURCE,
    &inner::cuda::SOURCE,
    &ttt_linear::cuda::PLAIN,
    &ttt_linear::cuda::FORWARD_48,
    &ttt_linear::cuda::BACKWARD_48,
    &ttt_linear::cuda::CHAIN_48,
    &ttt_linear::cuda::DECODE_48,
    &ttt_linear::cuda::FORWARD_64,
    &ttt_linear::cuda::BACKWARD_64,
    &ttt_linear::cuda::CHAIN_64,
    &ttt_linear::cuda::DECODE_64,
    &ttt_linear::cuda::FORWARD_96,
    &ttt_linear::cuda::BACKWARD_96,
    &ttt_linear::cuda::CHAIN_96,
    &ttt_linear::cuda::DECODE_96,
    &ttt_mlp::cuda::PLAIN,
    &ttt_mlp::cuda::FORWARD,
    &ttt_mlp::cuda::DECODE,
];

/// Kernels that use what only Hopper has.
pub(crate) static HOPPER_KERNELS: &[&crate::device::cuda::kernels::Source] = &[&ttt_mlp::cuda::BACKWARD];

/// Whether the fast f32 version of an operation runs, not the reference.
pub(crate) fn fast(device: &Device, dtype: DType) -> bool {
    dtype == DType::F32 && device.kernels() == Kernels::Fast
}

/// Panics with both shapes when they differ.
#[track_caller]
pub(crate) fn expect_shape(name: &str, is: [usize; 2], should: [usize; 2]) {
    assert!(is == should, "`{name}` is {is:?} and should be {should:?}");
}

/// Panics when the segments do not cover `rows` rows one behind the other.
#[track_caller]
pub(crate) fn expect_segments(segments: &[crate::batch::Segment], rows: usize) {
    let mut row = 0;
    for segment in segments {
        assert!(segment.first_row == row, "a segment starts at row {} and should start at row {row}", segment.first_row);
        row += segment.len;
    }
    assert!(row == rows, "the segments have {row} rows and should have {rows}");
}
