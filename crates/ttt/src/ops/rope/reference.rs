//! The definition, in plain loops.

use super::Direction;
use crate::batch::Segment;
use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// Fills the tables of a [`super::Table`].
pub(crate) fn fill<E: Element>(mut cos: MatMut<E>, mut sin: MatMut<E>, theta: f64) {
    let width = cos.cols();
    for p in 0..cos.rows() {
        for c in (0..width).step_by(2) {
            let angle = p as f64 * theta.powf(-(c as f64) / width as f64);
            cos.row_mut(p)[c..c + 2].fill(E::from_f64(angle.cos()));
            sin.row_mut(p)[c] = E::from_f64(-angle.sin());
            sin.row_mut(p)[c + 1] = E::from_f64(angle.sin());
        }
    }
}

/// Turns every row of `x` in place.
pub(crate) fn rotate<E: Element>(mut x: MatMut<E>, cos: Mat<E>, sin: Mat<E>, segments: &[Segment], direction: Direction) {
    let (positions, head_dim) = (cos.rows(), cos.cols());
    let sign = match direction {
        Direction::Forward => E::ONE,
        Direction::Backward => -E::ONE,
    };
    for segment in segments {
        for i in 0..segment.len {
            let p = (segment.phase + i) % positions;
            for head in x.row_mut(segment.first_row + i).chunks_exact_mut(head_dim) {
                for c in (0..head_dim).step_by(2) {
                    let (a, b) = (head[c], head[c + 1]);
                    head[c] = a * cos.row(p)[c] + b * sign * sin.row(p)[c];
                    head[c + 1] = b * cos.row(p)[c] + a * sign * sin.row(p)[c + 1];
                }
            }
        }
    }
}
