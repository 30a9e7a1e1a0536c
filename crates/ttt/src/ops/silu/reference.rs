//! The definition, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::ops::swiglu::reference::sigmoid;
use crate::tensor::Element;

/// The derivative of silu.
fn slope<E: Element>(a: E) -> E {
    let s = sigmoid(a);
    s * (E::ONE + a * (E::ONE - s))
}

/// `y = silu(x)`.
pub(crate) fn forward<E: Element>(x: Mat<E>, mut y: MatMut<E>) {
    for i in 0..y.rows() {
        for (y, &x) in y.row_mut(i).iter_mut().zip(x.row(i)) {
            *y = x * sigmoid(x);
        }
    }
}

/// Writes `dx`.
pub(crate) fn backward<E: Element>(dy: Mat<E>, x: Mat<E>, mut dx: MatMut<E>) {
    for i in 0..dx.rows() {
        for ((dx, &dy), &x) in dx.row_mut(i).iter_mut().zip(dy.row(i)).zip(x.row(i)) {
            *dx = dy * slope(x);
        }
    }
}

/// `y = silu(gate) ⊙ x`.
pub(crate) fn gate<E: Element>(gate: Mat<E>, x: Mat<E>, mut y: MatMut<E>) {
    for i in 0..y.rows() {
        for ((y, &a), &x) in y.row_mut(i).iter_mut().zip(gate.row(i)).zip(x.row(i)) {
            *y = a * sigmoid(a) * x;
        }
    }
}

/// Writes `dgate` and `dx`.
pub(crate) fn backward_gate<E: Element>(dy: Mat<E>, gate: Mat<E>, x: Mat<E>, mut dgate: MatMut<E>, mut dx: MatMut<E>) {
    for i in 0..dx.rows() {
        for (c, &dy) in dy.row(i).iter().enumerate() {
            let a = gate.row(i)[c];
            dgate.row_mut(i)[c] = dy * x.row(i)[c] * slope(a);
            dx.row_mut(i)[c] = dy * a * sigmoid(a);
        }
    }
}
