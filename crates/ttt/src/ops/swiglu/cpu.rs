//! f32 on the processor's cores: blocks of rows in parallel, vector code along a row.

use crate::device::par;
use crate::device::view::{Mat, MatMut};
use crate::ops::simd::{map, map_two, sigmoid, vectorise};

/// `y = silu(gate) ⊙ up`.
pub(crate) fn forward(gate_up: Mat<f32>, y: MatMut<f32>) {
    par::for_row_blocks(y, par::block_rows(gate_up.cols()), |first, y| {
        forward_rows(gate_up.row_range(first..first + y.rows()), y);
    });
}

/// Writes `[dgate | dup]`.
pub(crate) fn backward(dy: Mat<f32>, gate_up: Mat<f32>, dgate_up: MatMut<f32>) {
    par::for_row_blocks(dgate_up, par::block_rows(gate_up.cols()), |first, dgate_up| {
        let rows = first..first + dgate_up.rows();
        backward_rows(dy.row_range(rows.clone()), gate_up.row_range(rows), dgate_up);
    });
}

vectorise! {
    fn forward_rows<'a>(gate_up: Mat<'a, f32>, y: MatMut<'a, f32>) {
        let mut y = y;
        for i in 0..y.rows() {
            let (gate, up) = gate_up.row(i).split_at(y.cols());
            map(y.row_mut(i), [gate, up], |[a, up], _| a * sigmoid(a) * up);
        }
    }
}

vectorise! {
    fn backward_rows<'a>(dy: Mat<'a, f32>, gate_up: Mat<'a, f32>, dgate_up: MatMut<'a, f32>) {
        let mut dgate_up = dgate_up;
        for i in 0..dy.rows() {
            let (gate, up) = gate_up.row(i).split_at(dy.cols());
            let (dgate, dup) = dgate_up.row_mut(i).split_at_mut(dy.cols());
            map_two(dgate, dup, [dy.row(i), gate, up], |[dy, a, up]| {
                let s = sigmoid(a);
                (dy * up * (s * (1.0 + a * (1.0 - s))), dy * (a * s))
            });
        }
    }
}
