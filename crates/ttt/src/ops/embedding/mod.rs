//! Token embeddings: rows of a table.

mod cpu;
mod reference;

use crate::Result;
use crate::device::WeightView;
use crate::device::view::{View, ViewMut};
use crate::ops::{expect_shape, fast};
use crate::tensor::{Tensor, with_dtype};

/// Row `ids[i]` of `table [v, d]` for each i: `[ids.len(), d]`; of a narrow table, the numbers that it stands for.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When an id is not below `v`; callers check what users give them.
pub fn forward<'w>(ids: &[u32], table: impl Into<WeightView<'w>>) -> Result<Tensor> {
    let table = table.into();
    expect_ids(ids, table.rows());
    let mut y = Tensor::empty(table.device(), &[ids.len(), table.cols()], table.dtype())?;
    if fast(table.device(), table.dtype()) {
        cpu::forward(ids, table, y.view_mut().into_mat());
    } else {
        with_dtype!(table.dtype(), E => reference::forward::<E>(ids, table, y.view_mut().into_mat()));
    }
    Ok(y)
}

/// `dtable[ids[i]] += dy[i]`, in the order of i.
///
/// # Panics
/// When `dy` is not `[ids.len(), d]`, or an id is not below `v`.
pub fn backward(ids: &[u32], dy: View, dtable: ViewMut) {
    expect_ids(ids, dtable.rows());
    expect_shape("dy", dy.shape(), [ids.len(), dtable.cols()]);
    if fast(dy.device(), dy.dtype()) {
        cpu::backward(ids, dy.as_mat(), dtable.into_mat());
    } else {
        with_dtype!(dy.dtype(), E => reference::backward::<E>(ids, dy.as_mat(), dtable.into_mat()));
    }
}

fn expect_ids(ids: &[u32], rows: usize) {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
        panic!("id {id} in a table of {rows} rows");
    }
}
