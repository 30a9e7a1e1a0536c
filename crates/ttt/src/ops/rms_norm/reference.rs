//! The definition, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

fn inverse_rms<E: Element>(x: &[E], eps: f64) -> E {
    let sum: E = x.iter().map(|&x| x * x).sum();
    E::ONE / (sum / E::from_f64(x.len() as f64) + E::from_f64(eps)).sqrt()
}

/// `y = x r ⊙ w`.
pub(crate) fn forward<E: Element>(x: Mat<E>, w: Mat<E>, eps: f64, mut y: MatMut<E>) {
    for i in 0..x.rows() {
        let r = inverse_rms(x.row(i), eps);
        for ((y, &x), &w) in y.row_mut(i).iter_mut().zip(x.row(i)).zip(w.row(0)) {
            *y = x * r * w;
        }
    }
}

/// Writes `dx`, adds to `dw`.
pub(crate) fn backward<E: Element>(dy: Mat<E>, x: Mat<E>, w: Mat<E>, eps: f64, mut dw: MatMut<E>, mut dx: MatMut<E>) {
    let width = E::from_f64(x.cols() as f64);
    let w = w.row(0);
    for i in 0..x.rows() {
        let (dy, x) = (dy.row(i), x.row(i));
        let r = inverse_rms(x, eps);
        let mean = (0..w.len()).map(|c| dy[c] * w[c] * x[c] * r).sum::<E>() / width;
        for c in 0..w.len() {
            dx.row_mut(i)[c] = r * (dy[c] * w[c] - x[c] * r * mean);
            dw.row_mut(0)[c] += dy[c] * x[c] * r;
        }
    }
}
