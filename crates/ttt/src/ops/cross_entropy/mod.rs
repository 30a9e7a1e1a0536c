//! Output head and loss in one: `nll = log Σ_v e^(hidden·w_v) − hidden·w_target`, without ever holding the logits of all rows.
//!
//! Letters: n rows, d hidden size, v vocabulary.

mod cpu;
pub(crate) mod cuda;
mod reference;

use crate::Result;
use crate::device::WeightView;
use crate::device::cuda::Cuda;
use crate::device::view::{Mat, View, ViewMut};
use crate::ops::{expect_shape, fast};
use crate::tensor::{Tensor, with_dtype};

/// Negative log likelihood (nats) of each row's target; hidden `[n, d]`, w `[v, d]`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `w` is not `d` wide, there are not n targets, or one is not below v.
pub fn forward<'w>(hidden: View, w: impl Into<WeightView<'w>>, targets: &[u32]) -> Result<Vec<f64>> {
    let w = w.into();
    expect_inputs(hidden, w.shape(), targets);
    expect_targets(targets, w.rows());
    if let Some(gpu) = hidden.device().as_cuda() {
        return cuda::forward(gpu, hidden, w.float(), targets);
    }
    if fast(hidden.device(), hidden.dtype()) {
        return cpu::forward(hidden.device(), hidden.as_mat(), w, targets);
    }
    with_dtype!(hidden.dtype(), E => {
        Ok(reference::forward::<E>(hidden.as_mat(), Mat::new(&w.widened::<E>(), w.rows(), w.cols()), targets))
    })
}

/// The same and its gradient, where the loss is `Σ_i weights[i] nll[i]`: returns nll and `dhidden [n, d]`, adds to `dw [v, d]`, which
/// has no rows where it is not wanted.
///
/// Rows of weight 0 are skipped: their target is not looked at, their nll is 0, their row of `dhidden` is zero.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `w` is not `d` wide, `dw` has not its shape, there are not n targets and weights, or a target (of a row that is not
/// skipped) is not below v.
pub fn forward_backward(hidden: View, w: View, targets: &[u32], weights: &[f64], dw: ViewMut) -> Result<(Vec<f64>, Tensor)> {
    if let Some(gpu) = hidden.device().as_cuda() {
        let (counted, dhidden) = on_gpu(gpu, hidden, w, targets, weights, dw)?;
        return Ok((counted.read(targets.len()), dhidden));
    }
    expect(hidden, w, targets, weights, &dw);
    let mut dhidden = Tensor::empty(hidden.device(), &hidden.shape(), hidden.dtype())?;
    let nll = if fast(hidden.device(), hidden.dtype()) {
        let (dw, dhidden) = (dw.into_mat(), dhidden.view_mut().into_mat());
        cpu::forward_backward(hidden.device(), hidden.as_mat(), w, targets, weights, dw, dhidden)?
    } else {
        with_dtype!(hidden.dtype(), E => {
            let dhidden = dhidden.view_mut().into_mat();
            reference::forward_backward::<E>(hidden.as_mat(), w.as_mat(), targets, weights, dw.into_mat(), dhidden)
        })
    };
    Ok((nll, dhidden))
}

/// [`forward_backward`] on a GPU, whose likelihoods stay there.
pub(crate) fn on_gpu(
    gpu: &Cuda,
    hidden: View,
    w: View,
    targets: &[u32],
    weights: &[f64],
    dw: ViewMut,
) -> Result<(cuda::Counted, Tensor)> {
    expect(hidden, w, targets, weights, &dw);
    let mut dhidden = Tensor::empty(hidden.device(), &hidden.shape(), hidden.dtype())?;
    let counted = cuda::forward_backward(gpu, hidden, w, targets, weights, &dw, &mut dhidden)?;
    Ok((counted, dhidden))
}

fn expect(hidden: View, w: View, targets: &[u32], weights: &[f64], dw: &ViewMut) {
    expect_inputs(hidden, w.shape(), targets);
    if dw.rows() > 0 {
        expect_shape("dw", dw.shape(), w.shape());
    }
    assert!(weights.len() == targets.len(), "{} weights for {} targets", weights.len(), targets.len());
    expect_targets(targets.iter().zip(weights).filter(|(_, weight)| **weight != 0.0).map(|(target, _)| target), w.rows());
}

fn expect_inputs(hidden: View, w: [usize; 2], targets: &[u32]) {
    expect_shape("w", w, [w[0], hidden.cols()]);
    assert!(targets.len() == hidden.rows(), "{} targets for {} rows", targets.len(), hidden.rows());
}

fn expect_targets<'a>(targets: impl IntoIterator<Item = &'a u32>, vocabulary: usize) {
    for &target in targets {
        assert!((target as usize) < vocabulary, "target {target} in a vocabulary of {vocabulary}");
    }
}
