//! The definition, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// `y += x`.
pub(crate) fn add_to<E: Element>(mut y: MatMut<E>, x: Mat<E>) {
    for i in 0..x.rows() {
        for (y, &x) in y.row_mut(i).iter_mut().zip(x.row(i)) {
            *y += x;
        }
    }
}

/// `y = x`.
pub(crate) fn copy_to<E: Element>(mut y: MatMut<E>, x: Mat<E>) {
    for i in 0..x.rows() {
        y.row_mut(i).copy_from_slice(x.row(i));
    }
}

/// `y[i] = x[rows[i]]`.
pub(crate) fn gather<E: Element>(mut y: MatMut<E>, x: Mat<E>, rows: &[usize]) {
    for (i, row) in rows.iter().enumerate() {
        y.row_mut(i).copy_from_slice(x.row(*row));
    }
}
