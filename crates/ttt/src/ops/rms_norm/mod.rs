//! Root-mean-square norm over a row of D: `y = x / √(mean(x²) + eps) ⊙ w`.

mod cpu;
pub(crate) mod cuda;
mod reference;

use crate::Result;
use crate::device::view::{View, ViewMut};
use crate::ops::{add, expect_shape, fast};
use crate::tensor::{Tensor, with_dtype};

/// `y [n, d]` of `x [n, d]`, w `[1, d]`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `w` is not `[1, d]`.
pub fn forward(x: View, w: View, eps: f64) -> Result<Tensor> {
    expect_shape("w", w.shape(), [1, x.cols()]);
    let mut y = Tensor::empty(x.device(), &x.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::forward(gpu, x, w, eps, &y.view_mut());
    } else if fast(x.device(), x.dtype()) {
        cpu::forward(x.as_mat(), w.as_mat(), eps, y.view_mut().into_mat());
    } else {
        with_dtype!(x.dtype(), E => reference::forward::<E>(x.as_mat(), w.as_mat(), eps, y.view_mut().into_mat()));
    }
    Ok(y)
}

/// Returns `dx [n, d]`, adds to `dw [1, d]`: with r = 1/√(mean(x²) + eps) and x̂ = r x,
/// `dx = r (dy⊙w − x̂ mean(dy⊙w⊙x̂))`, `dw += Σ_rows dy⊙x̂`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `dy` has not the shape of `x`, or `w` or `dw` is not `[1, d]`.
pub fn backward(dy: View, x: View, w: View, eps: f64, dw: ViewMut) -> Result<Tensor> {
    backward_onto(dy, x, w, eps, dw, None)
}

/// [`backward`], to which the gradient of a residual path around the norm `[n, d]` is added.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// As there, and when `residual` has not the shape of `x`.
pub fn backward_onto(dy: View, x: View, w: View, eps: f64, dw: ViewMut, residual: Option<View>) -> Result<Tensor> {
    if let Some(residual) = residual {
        expect_shape("residual", residual.shape(), x.shape());
    }
    expect_shape("dy", dy.shape(), x.shape());
    expect_shape("w", w.shape(), [1, x.cols()]);
    expect_shape("dw", dw.shape(), [1, x.cols()]);
    let mut dx = Tensor::empty(x.device(), &x.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::backward(gpu, dy, x, w, eps, &dw, &dx.view_mut(), residual)?;
        return Ok(dx);
    }
    if fast(x.device(), x.dtype()) {
        let (dw, dx) = (dw.into_mat(), dx.view_mut().into_mat());
        cpu::backward(x.device(), dy.as_mat(), x.as_mat(), w.as_mat(), eps, dw, dx)?;
    } else {
        with_dtype!(x.dtype(), E => {
            reference::backward::<E>(dy.as_mat(), x.as_mat(), w.as_mat(), eps, dw.into_mat(), dx.view_mut().into_mat())
        });
    }
    if let Some(residual) = residual {
        add::add_to(dx.view_mut(), residual);
    }
    Ok(dx)
}
