//! The activation of the feed-forward block: `y = silu(gate) ⊙ up`, `silu(a) = a / (1 + e^−a)`.

mod cpu;
pub(crate) mod cuda;
pub(crate) mod reference;

use crate::Result;
use crate::device::view::View;
use crate::ops::{expect_shape, fast};
use crate::tensor::{Tensor, with_dtype};

/// `y [n, i]` of `gate_up [n, 2i] = [gate | up]`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `gate_up` has an odd number of columns.
pub fn forward(gate_up: View) -> Result<Tensor> {
    let width = half_width(gate_up);
    let mut y = Tensor::empty(gate_up.device(), &[gate_up.rows(), width], gate_up.dtype())?;
    if let Some(gpu) = gate_up.device().as_cuda() {
        cuda::forward(gpu, gate_up, &y.view_mut());
    } else if fast(gate_up.device(), gate_up.dtype()) {
        cpu::forward(gate_up.as_mat(), y.view_mut().into_mat());
    } else {
        with_dtype!(y.dtype(), E => reference::forward::<E>(gate_up.as_mat(), y.view_mut().into_mat()));
    }
    Ok(y)
}

/// `[dgate | dup] [n, 2i]` of `dy [n, i]`: with s = 1/(1 + e^−gate), `dgate = dy ⊙ up ⊙ s (1 + gate (1 − s))`,
/// `dup = dy ⊙ silu(gate)`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `gate_up` has an odd number of columns, or `dy` is not half as wide.
pub fn backward(dy: View, gate_up: View) -> Result<Tensor> {
    expect_shape("dy", dy.shape(), [gate_up.rows(), half_width(gate_up)]);
    let mut dx = Tensor::empty(gate_up.device(), &gate_up.shape(), gate_up.dtype())?;
    if let Some(gpu) = gate_up.device().as_cuda() {
        cuda::backward(gpu, dy, gate_up, &dx.view_mut());
    } else if fast(gate_up.device(), gate_up.dtype()) {
        cpu::backward(dy.as_mat(), gate_up.as_mat(), dx.view_mut().into_mat());
    } else {
        with_dtype!(dx.dtype(), E => reference::backward::<E>(dy.as_mat(), gate_up.as_mat(), dx.view_mut().into_mat()));
    }
    Ok(dx)
}

fn half_width(gate_up: View) -> usize {
    assert!(gate_up.cols().is_multiple_of(2), "[gate | up] has an odd number of columns: {:?}", gate_up.shape());
    gate_up.cols() / 2
}
