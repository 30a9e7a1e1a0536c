//! f32 on the processor's cores.

use crate::device::WeightView;
use crate::device::par::{self, ColsPerUnit};
use crate::device::view::{Mat, MatMut};

/// Columns that one unit of the backward adds up: four cache lines, so that few rows share a line with another unit's.
const COLS_PER_UNIT: usize = 64;

/// `y[i] = table[ids[i]]`, blocks of rows in parallel.
pub(crate) fn forward(ids: &[u32], table: WeightView, y: MatMut<f32>) {
    par::for_row_blocks(y, par::block_rows(table.cols()), |first, mut y| {
        for i in 0..y.rows() {
            table.widen_row(ids[first + i] as usize, y.row_mut(i));
        }
    });
}

/// `dtable[ids[i]] += dy[i]`: blocks of columns in parallel, each in the order of i.
pub(crate) fn backward(ids: &[u32], dy: Mat<f32>, dtable: MatMut<f32>) {
    let units = dy.cols().div_ceil(COLS_PER_UNIT);
    let parts = ColsPerUnit { mat: dtable, cols: COLS_PER_UNIT };
    par::for_each(units, parts, &|unit, ColsPerUnit { mut mat, .. }: ColsPerUnit<MatMut<f32>>| {
        let first = unit * COLS_PER_UNIT;
        let dy = dy.col_range(first..first + mat.cols());
        super::reference::backward(ids, dy, mat.reborrow());
    });
}
