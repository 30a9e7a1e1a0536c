//! The size of a gradient, and whether it is one.

mod reference;

use crate::device::view::View;
use crate::tensor::{Tensor, with_dtype};

/// Sum of the squares of all elements, in f64.
pub fn sum_of_squares(x: &Tensor) -> f64 {
    with_dtype!(x.dtype(), E => reference::sum_of_squares::<E>(x.as_slice()))
}

/// Index (row by row) of the first element that is infinite or not a number.
pub fn first_non_finite(x: View) -> Option<usize> {
    with_dtype!(x.dtype(), E => reference::first_non_finite::<E>(x.as_mat()))
}
