//! The definition, in plain loops.

use crate::device::WeightView;
use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// `y[i] = table[ids[i]]`.
pub(crate) fn forward<E: Element>(ids: &[u32], table: WeightView, mut y: MatMut<E>) {
    for (i, &id) in ids.iter().enumerate() {
        table.widen_row(id as usize, y.row_mut(i));
    }
}

/// `dtable[ids[i]] += dy[i]`.
pub(crate) fn backward<E: Element>(ids: &[u32], dy: Mat<E>, mut dtable: MatMut<E>) {
    for (i, &id) in ids.iter().enumerate() {
        for (d, &dy) in dtable.row_mut(id as usize).iter_mut().zip(dy.row(i)) {
            *d += dy;
        }
    }
}
