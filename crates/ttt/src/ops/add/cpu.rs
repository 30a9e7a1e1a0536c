//! f32 on the processor's cores: blocks of rows in parallel, vector code along a row.

use crate::device::par;
use crate::device::view::{Mat, MatMut};
use crate::ops::simd::{map, vectorise};

/// `y += x`.
pub(crate) fn add_to(y: MatMut<f32>, x: Mat<f32>) {
    par::for_row_blocks(y, par::block_rows(x.cols()), |first, y| {
        let rows = first..first + y.rows();
        add_rows(y, x.row_range(rows));
    });
}

vectorise! {
    fn add_rows<'a>(y: MatMut<'a, f32>, x: Mat<'a, f32>) {
        let mut y = y;
        for i in 0..x.rows() {
            map(y.row_mut(i), [x.row(i)], |[x], y| y + x);
        }
    }
}
