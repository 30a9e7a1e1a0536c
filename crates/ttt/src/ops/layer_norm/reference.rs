//! The definition, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// Mean and 1/√(var + eps) of a row.
fn statistics<E: Element>(x: &[E], eps: f64) -> (E, E) {
    let width = E::from_f64(x.len() as f64);
    let mean = x.iter().copied().sum::<E>() / width;
    let var = x.iter().map(|&x| (x - mean) * (x - mean)).sum::<E>() / width;
    (mean, E::ONE / (var + E::from_f64(eps)).sqrt())
}

/// `y = (x − mean) r ⊙ w + b`.
pub(crate) fn forward<E: Element>(x: Mat<E>, w: Mat<E>, b: Mat<E>, eps: f64, mut y: MatMut<E>) {
    let (w, b) = (w.row(0), b.row(0));
    for i in 0..x.rows() {
        let (mean, r) = statistics(x.row(i), eps);
        for (c, (y, &x)) in y.row_mut(i).iter_mut().zip(x.row(i)).enumerate() {
            *y = (x - mean) * r * w[c] + b[c];
        }
    }
}

/// Writes `dx`, adds to `dw` and `db`.
pub(crate) fn backward<E: Element>(
    dy: Mat<E>,
    x: Mat<E>,
    w: Mat<E>,
    eps: f64,
    mut dw: MatMut<E>,
    mut db: MatMut<E>,
    mut dx: MatMut<E>,
) {
    let width = E::from_f64(x.cols() as f64);
    let w = w.row(0);
    for i in 0..x.rows() {
        let (dy, x) = (dy.row(i), x.row(i));
        let (mean, r) = statistics(x, eps);
        let normal = |c: usize| (x[c] - mean) * r;
        let mean_p = (0..w.len()).map(|c| dy[c] * w[c]).sum::<E>() / width;
        let mean_px = (0..w.len()).map(|c| dy[c] * w[c] * normal(c)).sum::<E>() / width;
        for c in 0..w.len() {
            dx.row_mut(i)[c] = r * (dy[c] * w[c] - mean_p - normal(c) * mean_px);
            dw.row_mut(0)[c] += dy[c] * normal(c);
            db.row_mut(0)[c] += dy[c];
        }
    }
}
