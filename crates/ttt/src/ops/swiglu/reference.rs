//! The definition, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// `1 / (1 + e^−a)`.
pub(crate) fn sigmoid<E: Element>(a: E) -> E {
    E::ONE / (E::ONE + (-a).exp())
}

/// `y = silu(gate) ⊙ up`.
pub(crate) fn forward<E: Element>(gate_up: Mat<E>, mut y: MatMut<E>) {
    for i in 0..y.rows() {
        let (gate, up) = gate_up.row(i).split_at(y.cols());
        for ((y, &a), &up) in y.row_mut(i).iter_mut().zip(gate).zip(up) {
            *y = a * sigmoid(a) * up;
        }
    }
}

/// Writes `[dgate | dup]`.
pub(crate) fn backward<E: Element>(dy: Mat<E>, gate_up: Mat<E>, mut dgate_up: MatMut<E>) {
    let width = dy.cols();
    for i in 0..dy.rows() {
        let (gate, up) = gate_up.row(i).split_at(width);
        let (dgate, dup) = dgate_up.row_mut(i).split_at_mut(width);
        for (c, &dy) in dy.row(i).iter().enumerate() {
            let s = sigmoid(gate[c]);
            dgate[c] = dy * up[c] * s * (E::ONE + gate[c] * (E::ONE - s));
            dup[c] = dy * gate[c] * s;
        }
    }
}
