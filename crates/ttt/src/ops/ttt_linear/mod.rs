//! TTT-Linear: `f(x) = x + LN(x W1 + b1)`, trained by mini-batch gradient descent on `½‖f(k) - v‖²` while it reads
//! (paper 2.3-2.7).
//!
//! Dual form of one mini-batch (symbols in [`crate::ops::inner`]):
//! ```text
//! Z = k W + b;  G = ∂/∂Z ½‖LN(Z) - (v - k)‖²;  Ĝ = r ⊙ G
//! Z̄ = q W + b - τ ⊙ (tril(q kᵀ + 1) Ĝ);        z = q + LN(Z̄)
//! W' = W - τ_last kᵀ Ĝ;                         b' = b - τ_last Σ Ĝ        (only when the mini-batch is complete)
//! ```

mod cpu;
pub(crate) mod cuda;
pub mod reference;

use super::inner::rounding::Rounding;
use super::inner::{self, FastWeights, InputGrads, Inputs, ParamGrads, Saved, Variant, drive};
use crate::Result;
use crate::config::Inner;
use crate::device::view::View;
use crate::tensor::{Tensor, with_dtype};

/// The fast code, where the device wants it and it covers the shape and the variant.
fn fast(inputs: &Inputs<'_>) -> Option<cpu::Fast> {
    let wanted = super::fast(inputs.q.device(), inputs.q.dtype()) && inputs.variant == Variant::default();
    wanted.then(|| cpu::Fast::new(inputs.gamma.cols(), inputs.tok.cols())).flatten()
}

/// Reads all segments and moves their slots on; returns z `[n, h*d]`. With `keep: Some(g)` it also keeps the weights at every
/// g-th mini-batch for [`backward`].
///
/// # Errors
/// [`crate::Error::OutOfMemory`]; some slots have then moved on and some have not.
///
/// # Panics
/// When shapes disagree, segments do not lie one behind the other or share a slot, or a pass to be kept starts inside a
/// mini-batch.
pub fn forward(inputs: &Inputs<'_>, state: &mut FastWeights, keep: Option<usize>) -> Result<(Tensor, Option<Saved>)> {
    if let Some(gpu) = inputs.q.device().as_cuda() {
        return cuda::forward(gpu, inputs, state, keep);
    }
    match fast(inputs) {
        Some(fast) => drive::forward(fast, Inner::Linear, inputs, state, keep),
        None => with_dtype!(inputs.q.dtype(), E => {
            drive::forward::<E, _>(reference::Reference(Rounding::of(inputs.q.device())), Inner::Linear, inputs, state, keep)
        }),
    }
}

/// Gradients of everything [`forward`] read. `dstate` `[segments, h, S]` holds the gradient of each segment's final weights and
/// becomes that of its initial weights. The update of a tail shorter than a mini-batch does not reach the final weights.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When shapes disagree, or a segment starts inside a mini-batch.
pub fn backward(
    inputs: &Inputs<'_>,
    saved: &Saved,
    dz: View<'_>,
    dstate: &mut Tensor,
    d: InputGrads<'_>,
    p: ParamGrads<'_>,
) -> Result<()> {
    if let Some(gpu) = inputs.q.device().as_cuda() {
        return cuda::backward(gpu, inputs, saved, dz, dstate, d, p);
    }
    match fast(inputs) {
        Some(fast) => drive::backward(fast, Inner::Linear, inputs, saved, dz, dstate, d, p),
        None => with_dtype!(inputs.q.dtype(), E => {
            drive::backward::<E, _>(reference::Reference(Rounding::of(inputs.q.device())), Inner::Linear, inputs, saved, dz, dstate, d, p)
        }),
    }
}

/// How well the inner model fits: for each full mini-batch index, the mean over the segments that have it, heads and columns of
/// the squared error of its last token under the initial weights, those of the mini-batch's start and those of its end (the official JAX code's statistics,
/// entries 1 to 3). `initial` and `end` are the states before the first token and after the pass.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When shapes disagree, or `saved` is not of g = 1.
pub fn statistics(inputs: &Inputs<'_>, saved: &Saved, initial: &FastWeights, end: &FastWeights) -> Result<Vec<[f64; 3]>> {
    if let Some(gpu) = inputs.q.device().as_cuda() {
        return inner::cuda::statistics(gpu, Inner::Linear, inputs, saved, initial);
    }
    Ok(
        with_dtype!(inputs.q.dtype(), E => drive::statistics::<E>(reference::squared_error, Inner::Linear, inputs, saved, initial, end)),
    )
}
