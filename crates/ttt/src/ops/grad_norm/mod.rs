//! The size of a gradient, and whether it is one.

mod cpu;
mod reference;

use crate::device::view::View;
use crate::ops::adamw::cuda;
use crate::ops::fast;
use crate::tensor::{Tensor, with_dtype};

/// Sum of the squares of all elements, in f64, in an order that depends on their number alone.
pub fn sum_of_squares(x: &Tensor) -> f64 {
    if let Some(gpu) = x.device().as_cuda() {
        cuda::sum_of_squares(gpu, x)
    } else if fast(x.device(), x.dtype()) {
        cpu::sum_of_squares(x.as_slice())
    } else {
        with_dtype!(x.dtype(), E => reference::sum_of_squares::<E>(x.as_slice()))
    }
}

/// Index (row by row) of the first element that is infinite or not a number.
pub fn first_non_finite(x: View) -> Option<usize> {
    if let Some(gpu) = x.device().as_cuda() {
        cuda::first_non_finite(gpu, x)
    } else if fast(x.device(), x.dtype()) {
        cpu::first_non_finite(x.as_mat())
    } else {
        with_dtype!(x.dtype(), E => reference::first_non_finite::<E>(x.as_mat()))
    }
}
