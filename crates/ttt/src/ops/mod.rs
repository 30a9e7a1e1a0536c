//! Operations: a small set of functions on tensors, each with an explicit forward and backward.
//!
//! Every operation has a folder: `mod.rs` is the public door (one function per direction; it checks shapes and picks the
//! implementation once), `reference.rs` the definition (plain loops, generic over f32 and f64), `cpu.rs` the fast f32 version.
//! f64 always runs the reference; f32 runs it when the device says so ([`crate::device::Kernels`]).
//!
//! Rules that hold for all of them:
//! - activations are matrices `[tokens, ...]`; operations that look along time take the [`crate::batch::Segment`]s of the batch;
//! - gradients are `d<name>`; *parameter* gradients are added to, *activation* gradients are overwritten;
//! - a wrong shape panics with both shapes; what a user can cause (memory) is an [`crate::Error`];
//! - work is split over the threads of the current pool by shape alone, so results do not depend on timing.

pub mod inner;
pub mod ttt_linear;
pub mod ttt_mlp;
