//! f32 on the processor's cores: blocks of rows in parallel, vector code along a row.

use crate::device::par::{self, RowsPerUnit};
use crate::device::view::{Mat, MatMut};
use crate::ops::simd::{map, map_two, sigmoid, vectorise};

/// `y = silu(x)`.
pub(crate) fn forward(x: Mat<f32>, y: MatMut<f32>) {
    par::for_row_blocks(y, par::block_rows(x.cols()), |first, y| forward_rows(x.row_range(first..first + y.rows()), y));
}

/// Writes `dx`.
pub(crate) fn backward(dy: Mat<f32>, x: Mat<f32>, dx: MatMut<f32>) {
    par::for_row_blocks(dx, par::block_rows(x.cols()), |first, dx| {
        let rows = first..first + dx.rows();
        backward_rows(dy.row_range(rows.clone()), x.row_range(rows), dx);
    });
}

/// `y = silu(gate) ⊙ x`.
pub(crate) fn gate(gate: Mat<f32>, x: Mat<f32>, y: MatMut<f32>) {
    par::for_row_blocks(y, par::block_rows(x.cols()), |first, y| {
        let rows = first..first + y.rows();
        gate_rows(gate.row_range(rows.clone()), x.row_range(rows), y);
    });
}

/// Writes `dgate` and `dx`.
pub(crate) fn backward_gate(dy: Mat<f32>, gate: Mat<f32>, x: Mat<f32>, dgate: MatMut<f32>, dx: MatMut<f32>) {
    let block = par::block_rows(x.cols());
    let parts = (RowsPerUnit { mat: dgate, rows: block }, RowsPerUnit { mat: dx, rows: block });
    type Rows<'a> = RowsPerUnit<MatMut<'a, f32>>;
    par::for_each(x.rows().div_ceil(block), parts, &|unit, (dgate, dx): (Rows, Rows)| {
        let rows = unit * block..unit * block + dx.mat.rows();
        let (dy, gate, x) = (dy.row_range(rows.clone()), gate.row_range(rows.clone()), x.row_range(rows));
        backward_gate_rows(dy, gate, x, dgate.mat, dx.mat);
    });
}

vectorise! {
    fn forward_rows<'a>(x: Mat<'a, f32>, y: MatMut<'a, f32>) {
        let mut y = y;
        for i in 0..y.rows() {
            map(y.row_mut(i), [x.row(i)], |[x], _| x * sigmoid(x));
        }
    }
}

vectorise! {
    fn backward_rows<'a>(dy: Mat<'a, f32>, x: Mat<'a, f32>, dx: MatMut<'a, f32>) {
        let mut dx = dx;
        for i in 0..dx.rows() {
            map(dx.row_mut(i), [dy.row(i), x.row(i)], |[dy, x], _| {
                let s = sigmoid(x);
                dy * (s * (1.0 + x * (1.0 - s)))
            });
        }
    }
}

vectorise! {
    fn gate_rows<'a>(gate: Mat<'a, f32>, x: Mat<'a, f32>, y: MatMut<'a, f32>) {
        let mut y = y;
        for i in 0..y.rows() {
            map(y.row_mut(i), [gate.row(i), x.row(i)], |[a, x], _| a * sigmoid(a) * x);
        }
    }
}

vectorise! {
    fn backward_gate_rows<'a>(
        dy: Mat<'a, f32>,
        gate: Mat<'a, f32>,
        x: Mat<'a, f32>,
        dgate: MatMut<'a, f32>,
        dx: MatMut<'a, f32>,
    ) {
        let (mut dgate, mut dx) = (dgate, dx);
        for i in 0..dx.rows() {
            map_two(dgate.row_mut(i), dx.row_mut(i), [dy.row(i), gate.row(i), x.row(i)], |[dy, a, x]| {
                let s = sigmoid(a);
                (dy * x * (s * (1.0 + a * (1.0 - s))), dy * (a * s))
            });
        }
    }
}
