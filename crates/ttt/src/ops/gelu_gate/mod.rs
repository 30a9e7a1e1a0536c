//! The gate of the Mamba backbone: `y = gelu(gate) ⊙ x`, tanh form of gelu: `½ a (1 + tanh(√(2/π) (a + 0.044715 a³)))`.

mod cpu;
pub(crate) mod cuda;
pub(crate) mod reference;

use crate::Result;
use crate::device::view::{View, ViewMut};
use crate::ops::{expect_shape, fast};
use crate::tensor::{Tensor, with_dtype};

/// `y [n, d] = gelu(gate) ⊙ x`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When the shapes differ.
pub fn forward(gate: View, x: View) -> Result<Tensor> {
    expect_shape("gate", gate.shape(), x.shape());
    let mut y = Tensor::empty(x.device(), &x.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::forward(gpu, gate, x, &y.view_mut());
    } else if fast(x.device(), x.dtype()) {
        cpu::forward(gate.as_mat(), x.as_mat(), y.view_mut().into_mat());
    } else {
        with_dtype!(x.dtype(), E => reference::forward::<E>(gate.as_mat(), x.as_mat(), y.view_mut().into_mat()));
    }
    Ok(y)
}

/// Returns `dx = gelu(gate) ⊙ dy`, writes `dgate = dy ⊙ x ⊙ gelu′(gate)`; all `[n, d]`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When the shapes differ.
pub fn backward(dy: View, gate: View, x: View, dgate: ViewMut) -> Result<Tensor> {
    expect_shape("dy", dy.shape(), x.shape());
    expect_shape("gate", gate.shape(), x.shape());
    expect_shape("dgate", dgate.shape(), x.shape());
    let mut dx = Tensor::empty(x.device(), &x.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::backward(gpu, dy, gate, x, &dgate, &dx.view_mut());
    } else if fast(x.device(), x.dtype()) {
        cpu::backward(dy.as_mat(), gate.as_mat(), x.as_mat(), dgate.into_mat(), dx.view_mut().into_mat());
    } else {
        with_dtype!(x.dtype(), E => {
            reference::backward::<E>(dy.as_mat(), gate.as_mat(), x.as_mat(), dgate.into_mat(), dx.view_mut().into_mat())
        });
    }
    Ok(dx)
}
