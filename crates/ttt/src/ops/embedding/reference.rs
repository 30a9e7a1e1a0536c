//! The definition, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// `y[i] = table[ids[i]]`.
pub(crate) fn forward<E: Element>(ids: &[u32], table: Mat<E>, mut y: MatMut<E>) {
    for (i, &id) in ids.iter().enumerate() {
        y.row_mut(i).copy_from_slice(table.row(id as usize));
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
