//! f32 on the processor's cores: blocks of rows in parallel, vector code along a row.

use crate::device::par::{self, RowsPerUnit};
use crate::device::view::{Mat, MatMut};
use crate::ops::simd::{gelu, map, map_two, vectorise};

/// `y = gelu(gate) ⊙ x`.
pub(crate) fn forward(gate: Mat<f32>, x: Mat<f32>, y: MatMut<f32>) {
    par::for_row_blocks(y, par::block_rows(x.cols()), |first, y| {
        let rows = first..first + y.rows();
        forward_rows(gate.row_range(rows.clone()), x.row_range(rows), y);
    });
}

/// Writes `dgate` and `dx`.
pub(crate) fn backward(dy: Mat<f32>, gate: Mat<f32>, x: Mat<f32>, dgate: MatMut<f32>, dx: MatMut<f32>) {
    let block = par::block_rows(x.cols());
    let parts = (RowsPerUnit { mat: dgate, rows: block }, RowsPerUnit { mat: dx, rows: block });
    let units = x.rows().div_ceil(block);
    par::for_each(units, parts, &|unit, (dgate, dx): (RowsPerUnit<MatMut<f32>>, RowsPerUnit<MatMut<f32>>)| {
        let rows = unit * block..unit * block + dx.mat.rows();
        let (dy, gate, x) = (dy.row_range(rows.clone()), gate.row_range(rows.clone()), x.row_range(rows));
        backward_rows(dy, gate, x, dgate.mat, dx.mat);
    });
}

vectorise! {
    fn forward_rows<'a>(gate: Mat<'a, f32>, x: Mat<'a, f32>, y: MatMut<'a, f32>) {
        let mut y = y;
        for i in 0..x.rows() {
            map(y.row_mut(i), [gate.row(i), x.row(i)], |[a, x], _| gelu(a).0 * x);
        }
    }
}

vectorise! {
    fn backward_rows<'a>(dy: Mat<'a, f32>, gate: Mat<'a, f32>, x: Mat<'a, f32>, dgate: MatMut<'a, f32>, dx: MatMut<'a, f32>) {
        let (mut dgate, mut dx) = (dgate, dx);
        for i in 0..x.rows() {
            map_two(dgate.row_mut(i), dx.row_mut(i), [dy.row(i), gate.row(i), x.row(i)], |[dy, a, x]| {
                let (value, slope) = gelu(a);
                (dy * x * slope, value * dy)
            });
        }
    }
}
