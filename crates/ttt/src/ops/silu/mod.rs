//! SiLU, `silu(a) = a / (1 + e^−a)`, alone and as a gate: the two places where a Mamba block has it.

mod cpu;
pub(crate) mod cuda;
mod reference;

use crate::Result;
use crate::device::view::{View, ViewMut};
use crate::ops::{expect_shape, fast};
use crate::tensor::{Tensor, with_dtype};

/// `y [n, c] = silu(x)`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub fn forward(x: View) -> Result<Tensor> {
    let mut y = Tensor::empty(x.device(), &x.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::forward(gpu, x, &y.view_mut());
    } else if fast(x.device(), x.dtype()) {
        cpu::forward(x.as_mat(), y.view_mut().into_mat());
    } else {
        with_dtype!(x.dtype(), E => reference::forward::<E>(x.as_mat(), y.view_mut().into_mat()));
    }
    Ok(y)
}

/// `dx [n, c]` of `dy [n, c]`: with s = 1/(1 + e^−x), `dx = dy ⊙ s (1 + x (1 − s))`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When the shapes differ.
pub fn backward(dy: View, x: View) -> Result<Tensor> {
    expect_shape("dy", dy.shape(), x.shape());
    let mut dx = Tensor::empty(x.device(), &x.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::backward(gpu, dy, x, &dx.view_mut());
    } else if fast(x.device(), x.dtype()) {
        cpu::backward(dy.as_mat(), x.as_mat(), dx.view_mut().into_mat());
    } else {
        with_dtype!(x.dtype(), E => reference::backward::<E>(dy.as_mat(), x.as_mat(), dx.view_mut().into_mat()));
    }
    Ok(dx)
}

/// `y [n, c] = silu(gate) ⊙ x`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When the shapes differ.
pub fn gate(gate: View, x: View) -> Result<Tensor> {
    expect_shape("gate", gate.shape(), x.shape());
    let mut y = Tensor::empty(x.device(), &x.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::gate(gpu, gate, x, &y.view_mut());
    } else if fast(x.device(), x.dtype()) {
        cpu::gate(gate.as_mat(), x.as_mat(), y.view_mut().into_mat());
    } else {
        with_dtype!(x.dtype(), E => reference::gate::<E>(gate.as_mat(), x.as_mat(), y.view_mut().into_mat()));
    }
    Ok(y)
}

/// Returns `dx = silu(gate) ⊙ dy`, writes `dgate = dy ⊙ x ⊙ silu′(gate)`; all `[n, c]`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When the shapes differ.
pub fn backward_gate(dy: View, gate: View, x: View, dgate: ViewMut) -> Result<Tensor> {
    expect_shape("dy", dy.shape(), x.shape());
    expect_shape("gate", gate.shape(), x.shape());
    expect_shape("dgate", dgate.shape(), x.shape());
    let mut dx = Tensor::empty(x.device(), &x.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::backward_gate(gpu, dy, gate, x, &dgate, &dx.view_mut());
    } else if fast(x.device(), x.dtype()) {
        cpu::backward_gate(dy.as_mat(), gate.as_mat(), x.as_mat(), dgate.into_mat(), dx.view_mut().into_mat());
    } else {
        with_dtype!(x.dtype(), E => {
            let (dgate, dx) = (dgate.into_mat(), dx.view_mut().into_mat());
            reference::backward_gate::<E>(dy.as_mat(), gate.as_mat(), x.as_mat(), dgate, dx)
        });
    }
    Ok(dx)
}
