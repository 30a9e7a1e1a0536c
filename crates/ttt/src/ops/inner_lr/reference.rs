//! What follows the matrix product, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::ops::swiglu::reference::sigmoid;
use crate::tensor::Element;

/// `a ← scale · sigmoid(a + bias)`.
pub(crate) fn gate<E: Element>(mut a: MatMut<E>, bias: Mat<E>, scale: f64) {
    for i in 0..a.rows() {
        for (a, &bias) in a.row_mut(i).iter_mut().zip(bias.row(0)) {
            *a = E::from_f64(scale) * sigmoid(*a + bias);
        }
    }
}

/// `da = dlr ⊙ lr ⊙ (1 − lr/scale)`, `dbias += Σ_rows da`.
pub(crate) fn gate_backward<E: Element>(dlr: Mat<E>, lr: Mat<E>, scale: f64, mut dbias: MatMut<E>, mut da: MatMut<E>) {
    // With scale = 0 the rate is 0 whatever the gate says.
    let inverse = E::from_f64(if scale == 0.0 { 0.0 } else { 1.0 / scale });
    for i in 0..lr.rows() {
        for (h, (&dlr, &lr)) in dlr.row(i).iter().zip(lr.row(i)).enumerate() {
            let d = dlr * lr * (E::ONE - lr * inverse);
            da.row_mut(i)[h] = d;
            dbias.row_mut(0)[h] += d;
        }
    }
}
