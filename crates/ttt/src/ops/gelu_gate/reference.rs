//! The definition, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// gelu(a) and its derivative.
pub(crate) fn gelu<E: Element>(a: E) -> (E, E) {
    let c = E::from_f64((2.0 / std::f64::consts::PI).sqrt());
    let (half, cubic) = (E::from_f64(0.5), E::from_f64(0.044715));
    let th = (c * a * (E::ONE + cubic * a * a)).tanh();
    let slope = c * (E::ONE + E::from_f64(3.0) * cubic * a * a);
    (half * a * (E::ONE + th), half * (E::ONE + th) + half * a * (E::ONE - th * th) * slope)
}

/// `y = gelu(gate) ⊙ x`.
pub(crate) fn forward<E: Element>(gate: Mat<E>, x: Mat<E>, mut y: MatMut<E>) {
    for i in 0..x.rows() {
        for ((y, &x), &a) in y.row_mut(i).iter_mut().zip(x.row(i)).zip(gate.row(i)) {
            *y = gelu(a).0 * x;
        }
    }
}

/// Writes `dgate` and `dx`.
pub(crate) fn backward<E: Element>(dy: Mat<E>, gate: Mat<E>, x: Mat<E>, mut dgate: MatMut<E>, mut dx: MatMut<E>) {
    for i in 0..x.rows() {
        for (c, (&dy, &x)) in dy.row(i).iter().zip(x.row(i)).enumerate() {
            let (value, slope) = gelu(gate.row(i)[c]);
            dx.row_mut(i)[c] = value * dy;
            dgate.row_mut(i)[c] = dy * x * slope;
        }
    }
}
