//! f32 on the processor's cores: what follows the matrix product, in vector code.

use crate::device::par;
use crate::device::view::{Mat, MatMut};
use crate::ops::simd::{map, sigmoid, vectorise};

/// `a ← scale · sigmoid(a + bias)`.
pub(crate) fn gate(a: MatMut<f32>, bias: Mat<f32>, scale: f64) {
    let block = par::block_rows(a.cols());
    par::for_row_blocks(a, block, |_, a| gate_rows(a, bias.row(0), scale as f32));
}

vectorise! {
    fn gate_rows<'a>(a: MatMut<'a, f32>, bias: &'a [f32], scale: f32) {
        let mut a = a;
        for i in 0..a.rows() {
            map(a.row_mut(i), [bias], |[bias], a| scale * sigmoid(a + bias));
        }
    }
}
