//! The definition, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

fn unclamped<E: Element>(i: usize, idx: E) -> E {
    E::ONE / E::from_f64((i + 1) as f64) + idx
}

/// `tok_i = max(0, 1/(i + 1) + idx_i)`.
pub(crate) fn forward<E: Element>(idx: Mat<E>, mut tok: MatMut<E>) {
    for (i, (tok, &idx)) in tok.row_mut(0).iter_mut().zip(idx.row(0)).enumerate() {
        *tok = unclamped(i, idx).max(E::ZERO);
    }
}

/// Adds to `didx`.
pub(crate) fn backward<E: Element>(dtok: Mat<E>, idx: Mat<E>, mut didx: MatMut<E>) {
    for (i, (didx, &idx)) in didx.row_mut(0).iter_mut().zip(idx.row(0)).enumerate() {
        if unclamped(i, idx) > E::ZERO {
            *didx += dtok.row(0)[i];
        }
    }
}
