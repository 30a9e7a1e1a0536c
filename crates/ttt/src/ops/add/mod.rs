//! Addition and copying: residual streams, gradients that meet or go to a block of columns, chosen rows.

mod cpu;
pub(crate) mod cuda;
mod reference;

use crate::Result;
use crate::device::view::{View, ViewMut};
use crate::ops::{expect_shape, fast};
use crate::tensor::{Tensor, with_dtype};

/// `y += x`.
///
/// # Panics
/// When the shapes differ.
pub fn add_to(y: ViewMut, x: View) {
    expect_shape("x", x.shape(), y.shape());
    if let Some(gpu) = x.device().as_cuda() {
        return cuda::add_to(gpu, &y, x);
    }
    if fast(x.device(), x.dtype()) {
        cpu::add_to(y.into_mat(), x.as_mat());
    } else {
        with_dtype!(x.dtype(), E => reference::add_to::<E>(y.into_mat(), x.as_mat()));
    }
}

/// `y = x`: into a block of columns, say.
///
/// # Panics
/// When the shapes differ.
pub fn copy_to(y: ViewMut, x: View) {
    expect_shape("x", x.shape(), y.shape());
    if let Some(gpu) = x.device().as_cuda() {
        return cuda::copy_to(gpu, &y, x);
    }
    with_dtype!(x.dtype(), E => reference::copy_to::<E>(y.into_mat(), x.as_mat()));
}

/// `y = x` in the type of `y`, on a GPU.
pub(crate) fn convert(y: ViewMut, x: View) {
    expect_shape("x", x.shape(), y.shape());
    cuda::convert(x.device().as_cuda().expect("a GPU"), &y, x);
}

/// Some rows of `x`, in the order given.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When a row does not exist.
pub fn gather(x: View, rows: &[usize]) -> Result<Tensor> {
    let mut y = Tensor::empty(x.device(), &[rows.len(), x.cols()], x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        if let Some(row) = rows.iter().find(|row| **row >= x.rows()) {
            panic!("row {row} of {}", x.rows());
        }
        let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        cuda::rows(gpu, &y.view_mut(), x, &rows, false)?;
        return Ok(y);
    }
    with_dtype!(x.dtype(), E => reference::gather::<E>(y.view_mut().into_mat(), x.as_mat(), rows));
    Ok(y)
}
