//! f32 on the processor's cores: the reference as vector code, blocks of elements in parallel.

use super::{Factors, reference};
use crate::device::par::{self, RowsPerUnit};
use crate::device::view::{Mat, MatMut};
use crate::ops::simd::vectorise;

/// Elements of a unit of work: 64 KiB of each of the four tensors.
const BLOCK: usize = 16_384;

/// One update of every element.
pub(super) fn step(params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32], factors: Factors) {
    type Blocks<'a> = RowsPerUnit<MatMut<'a, f32>>;
    let len = params.len();
    let mutable = |mat| RowsPerUnit { mat: MatMut::new(mat, len, 1), rows: BLOCK };
    let grads = RowsPerUnit { mat: Mat::new(grads, len, 1), rows: BLOCK };
    let parts = (mutable(params), grads, mutable(m), mutable(v));
    par::for_each(len.div_ceil(BLOCK), parts, &|_, (mut p, g, mut m, mut v): (Blocks, RowsPerUnit<Mat<f32>>, Blocks, Blocks)| {
        step_block(p.mat.slice_mut(), g.mat.slice(), m.mat.slice_mut(), v.mat.slice_mut(), factors)
    });
}

vectorise! {
    fn step_block<'a>(params: &'a mut [f32], grads: &'a [f32], m: &'a mut [f32], v: &'a mut [f32], factors: Factors) {
        reference::step(params, grads, m, v, factors);
    }
}
