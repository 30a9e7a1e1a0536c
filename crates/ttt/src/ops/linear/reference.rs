//! The definition, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// `y = x wᵀ`.
pub(crate) fn forward<E: Element>(x: Mat<E>, w: Mat<E>, mut y: MatMut<E>) {
    for i in 0..x.rows() {
        for (o, y) in y.row_mut(i).iter_mut().enumerate() {
            *y = x.row(i).iter().zip(w.row(o)).map(|(&x, &w)| x * w).sum();
        }
    }
}

/// `dx = dy w`.
pub(crate) fn backward_input<E: Element>(dy: Mat<E>, w: Mat<E>, mut dx: MatMut<E>) {
    for i in 0..dy.rows() {
        let dx = dx.row_mut(i);
        dx.fill(E::ZERO);
        for (o, &dy) in dy.row(i).iter().enumerate() {
            for (dx, &w) in dx.iter_mut().zip(w.row(o)) {
                *dx += dy * w;
            }
        }
    }
}

/// `dw += dyᵀ x`.
pub(crate) fn backward_weight<E: Element>(dy: Mat<E>, x: Mat<E>, mut dw: MatMut<E>) {
    for i in 0..dy.rows() {
        for (o, &dy) in dy.row(i).iter().enumerate() {
            for (dw, &x) in dw.row_mut(o).iter_mut().zip(x.row(i)) {
                *dw += dy * x;
            }
        }
    }
}
