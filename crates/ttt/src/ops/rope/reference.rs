//! The definition, in plain loops.

use rayon::prelude::*;

use super::{Direction, Pairs};
use crate::batch::Segment;
use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// Fills the tables of a [`super::Table`], a row for each position.
pub(crate) fn fill<E: Element>(cos: MatMut<E>, sin: MatMut<E>, positions: &[usize], pairs: Pairs, theta: f64) {
    let width = cos.cols();
    let speeds: Vec<f64> = (0..width / 2).map(|i| theta.powf(-((2 * i) as f64) / width as f64)).collect();
    let (mut cos, mut sin) = (cos, sin);
    let rows = cos.slice_mut().par_chunks_mut(width).zip(sin.slice_mut().par_chunks_mut(width));
    rows.zip(positions).with_min_len(64).for_each(|((cos, sin), p)| {
        for (i, speed) in speeds.iter().enumerate() {
            let (first, angle) = (i * pairs.step, *p as f64 * speed);
            let (s, c) = angle.sin_cos();
            (cos[first], cos[first + pairs.apart]) = (E::from_f64(c), E::from_f64(c));
            (sin[first], sin[first + pairs.apart]) = (E::from_f64(-s), E::from_f64(s));
        }
    });
}

/// Turns every row of `x` in place.
pub(crate) fn rotate<E: Element>(
    mut x: MatMut<E>,
    cos: Mat<E>,
    sin: Mat<E>,
    segments: &[Segment],
    pairs: Pairs,
    direction: Direction,
) {
    let (positions, head_dim) = (cos.rows(), cos.cols());
    let sign = match direction {
        Direction::Forward => E::ONE,
        Direction::Backward => -E::ONE,
    };
    for segment in segments {
        for i in 0..segment.len {
            let p = (segment.phase + i) % positions;
            for head in x.row_mut(segment.first_row + i).chunks_exact_mut(head_dim) {
                for pair in 0..head_dim / 2 {
                    let first = pair * pairs.step;
                    let second = first + pairs.apart;
                    let (a, b) = (head[first], head[second]);
                    head[first] = a * cos.row(p)[first] + b * sign * sin.row(p)[first];
                    head[second] = b * cos.row(p)[second] + a * sign * sin.row(p)[second];
                }
            }
        }
    }
}
