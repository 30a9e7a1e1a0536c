//! The gate of the inner learning rate: `lr = scale · sigmoid(x wᵀ + bias)`, one for each token and head (paper 2.7; `scale` is
//! the base rate times its warm-up factor, over the head size).

mod cpu;
pub(crate) mod cuda;
mod reference;

use crate::Result;
use crate::device::view::{View, ViewMut};
use crate::ops::{expect_shape, fast, linear};
use crate::tensor::{DType, Tensor, with_dtype};

/// `lr [n, h]` of `x [n, d]`, w `[h, d]`, bias `[1, h]`; in f32 when `x` and `w` are bf16.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `w` is not `d` wide, or `bias` is not `[1, h]`.
pub fn forward(x: View, w: View, bias: View, scale: f64) -> Result<Tensor> {
    expect_shape("bias", bias.shape(), [1, w.rows()]);
    let dtype = if x.dtype() == DType::Bf16 { DType::F32 } else { x.dtype() };
    let mut lr = linear::forward_as(x, w, dtype)?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::gate(gpu, &lr.view_mut(), bias, scale);
    } else if fast(x.device(), x.dtype()) {
        cpu::gate(lr.view_mut().into_mat(), bias.as_mat(), scale);
    } else {
        with_dtype!(x.dtype(), E => reference::gate::<E>(lr.view_mut().into_mat(), bias.as_mat(), scale));
    }
    Ok(lr)
}

/// Adds to `dx [n, d]`, `dw [h, d]` and `dbias [1, h]`: with da = dlr ⊙ lr ⊙ (1 − lr/scale) (0 when `scale` is),
/// `dx += da w`, `dw += daᵀ x`, `dbias += Σ_rows da`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `dlr` or `lr` is not `[n, h]`, `dw` has not the shape of `w`, `dbias` is not `[1, h]`, or `dx` not `[n, d]`.
pub fn backward(dlr: View, lr: View, x: View, w: View, scale: f64, dw: ViewMut, dbias: ViewMut, dx: ViewMut) -> Result<()> {
    expect_shape("dlr", dlr.shape(), [x.rows(), w.rows()]);
    expect_shape("lr", lr.shape(), [x.rows(), w.rows()]);
    expect_shape("dbias", dbias.shape(), [1, w.rows()]);
    let mut da = Tensor::empty(x.device(), &lr.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::gate_backward(gpu, dlr, lr, scale, &dbias, &da.view_mut())?;
    } else {
        with_dtype!(x.dtype(), E => {
            reference::gate_backward::<E>(dlr.as_mat(), lr.as_mat(), scale, dbias.into_mat(), da.view_mut().into_mat())
        });
    }
    linear::backward_weight(da.view(), x, dw);
    linear::add_backward_input(da.view(), w, dx)
}
