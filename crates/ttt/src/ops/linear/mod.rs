//! Matrix products with a weight matrix: `y = x wᵀ`.
//!
//! Letters: n rows (tokens), i inputs, o outputs. Weights are `[o, i]`, as in the model files.

pub(crate) mod cpu;
pub(crate) mod cuda;
pub(crate) mod few_rows;
pub(crate) mod reference;

use crate::Result;
use crate::device::WeightView;
use crate::device::view::{Mat, View, ViewMut};
use crate::ops::{add, expect_shape, fast};
use crate::tensor::{DType, Tensor, with_dtype};

/// `y [n, o] = x [n, i] wᵀ`, w `[o, i]`; with narrow weights, of the numbers that they stand for.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `w` has not as many columns as `x`.
pub fn forward<'w>(x: View, w: impl Into<WeightView<'w>>) -> Result<Tensor> {
    forward_as(x, w, x.dtype())
}

/// [`forward`] with `y` in another type: f32 of bf16 operands, on a GPU.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `w` has not as many columns as `x`; on a CPU, for another type than that of `x`.
pub fn forward_as<'w>(x: View, w: impl Into<WeightView<'w>>, dtype: DType) -> Result<Tensor> {
    let w = w.into();
    expect_shape("w", w.shape(), [w.rows(), x.cols()]);
    let mut y = Tensor::empty(x.device(), &[x.rows(), w.rows()], dtype)?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::forward(gpu, x, w.float(), &y.view_mut());
    } else if fast(x.device(), x.dtype()) {
        cpu::forward(x.as_mat(), w, y.view_mut().into_mat());
    } else {
        with_dtype!(x.dtype(), E => {
            let widened = w.widened::<E>();
            reference::forward::<E>(x.as_mat(), Mat::new(&widened, w.rows(), w.cols()), y.view_mut().into_mat());
        });
    }
    Ok(y)
}

/// `y [n, o] = c + x wᵀ`: [`forward`] with a residual, which a GPU adds in the product.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `w` has not as many columns as `x`, or `c` is not `[n, o]`.
pub fn forward_onto<'w>(x: View, w: impl Into<WeightView<'w>>, c: View) -> Result<Tensor> {
    let w = w.into();
    expect_shape("c", c.shape(), [x.rows(), w.rows()]);
    let Some(gpu) = x.device().as_cuda() else {
        let mut y = forward(x, w)?;
        add::add_to(y.view_mut(), c);
        return Ok(y);
    };
    expect_shape("w", w.shape(), [w.rows(), x.cols()]);
    let mut y = Tensor::empty(x.device(), &[x.rows(), w.rows()], x.dtype())?;
    cuda::forward_onto(gpu, x, w.float(), &y.view_mut(), c);
    Ok(y)
}

/// `dx [n, i] += dy [n, o] w`, w `[o, i]`: [`backward_input`] where another gradient of x is already.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// As there, and when `dx` is not `[n, i]`.
pub fn add_backward_input(dy: View, w: View, dx: ViewMut) -> Result<()> {
    expect_shape("dx", dx.shape(), [dy.rows(), w.cols()]);
    match dy.device().as_cuda() {
        Some(gpu) => {
            expect_shape("w", w.shape(), [dy.cols(), w.cols()]);
            cuda::add_backward_input(gpu, dy, w, &dx);
        }
        None => add::add_to(dx, backward_input(dy, w)?.view()),
    }
    Ok(())
}

/// `dx [n, i] = dy [n, o] w`, w `[o, i]`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `w` has not as many rows as `dy` has columns.
pub fn backward_input(dy: View, w: View) -> Result<Tensor> {
    expect_shape("w", w.shape(), [dy.cols(), w.cols()]);
    let mut dx = Tensor::empty(dy.device(), &[dy.rows(), w.cols()], dy.dtype())?;
    if let Some(gpu) = dy.device().as_cuda() {
        cuda::backward_input(gpu, dy, w, &dx.view_mut());
    } else if fast(dy.device(), dy.dtype()) {
        cpu::backward_input(dy.as_mat(), w.as_mat(), dx.view_mut().into_mat());
    } else {
        with_dtype!(dy.dtype(), E => reference::backward_input::<E>(dy.as_mat(), w.as_mat(), dx.view_mut().into_mat()));
    }
    Ok(dx)
}

/// `dw [o, i] += dyᵀ x`, dy `[n, o]`, x `[n, i]`.
///
/// # Panics
/// When the numbers of rows differ, or `dw` is not `[o, i]`.
pub fn backward_weight(dy: View, x: View, dw: ViewMut) {
    expect_shape("x", x.shape(), [dy.rows(), x.cols()]);
    expect_shape("dw", dw.shape(), [dy.cols(), x.cols()]);
    if let Some(gpu) = dy.device().as_cuda() {
        cuda::backward_weight(gpu, dy, x, &dw);
    } else if fast(dy.device(), dy.dtype()) {
        cpu::backward_weight(dy.as_mat(), x.as_mat(), dw.into_mat());
    } else {
        with_dtype!(dy.dtype(), E => reference::backward_weight::<E>(dy.as_mat(), x.as_mat(), dw.into_mat()));
    }
}
