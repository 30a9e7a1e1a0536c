//! The definition, in plain loops.

use crate::device::view::Mat;
use crate::tensor::Element;

/// Sum of the squares of all elements.
pub(crate) fn sum_of_squares<E: Element>(x: &[E]) -> f64 {
    x.iter().map(|x| x.to_f64() * x.to_f64()).sum()
}

/// Index of the first element that is infinite or not a number.
pub(crate) fn first_non_finite<E: Element>(x: Mat<E>) -> Option<usize> {
    (0..x.rows()).find_map(|i| x.row(i).iter().position(|x| !x.to_f64().is_finite()).map(|c| i * x.cols() + c))
}
