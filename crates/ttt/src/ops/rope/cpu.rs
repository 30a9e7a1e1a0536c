//! f32 on the processor's cores: blocks of rows in parallel, vector code along a head.

use super::Direction;
use crate::batch::Segment;
use crate::device::par;
use crate::device::view::{Mat, MatMut};
use crate::ops::segments::within;
use crate::ops::simd::vectorise;

fn sign(direction: Direction) -> f32 {
    match direction {
        Direction::Forward => 1.0,
        Direction::Backward => -1.0,
    }
}

/// Turns the two halves of each head of every row of `x` in place, by the row of the tables with the same number.
pub(crate) fn rotate_halves(x: MatMut<f32>, cos: Mat<f32>, sin: Mat<f32>, direction: Direction) {
    let sign = sign(direction);
    let block = par::block_rows(x.cols());
    par::for_row_blocks(x, block, |first, x| {
        let rows = first..first + x.rows();
        turn_halves(x, cos.row_range(rows.clone()), sin.row_range(rows), sign);
    });
}

vectorise! {
    fn turn_halves<'a>(x: MatMut<'a, f32>, cos: Mat<'a, f32>, sin: Mat<'a, f32>, sign: f32) {
        let mut x = x;
        for i in 0..x.rows() {
            // Behind the middle the sine is positive, and the cosine the same.
            let half = cos.cols() / 2;
            let (cos, sin) = (&cos.row(i)[half..], &sin.row(i)[half..]);
            for head in x.row_mut(i).chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                for c in 0..half {
                    let (first, second) = (a[c], b[c]);
                    a[c] = first * cos[c] - second * (sign * sin[c]);
                    b[c] = second * cos[c] + first * (sign * sin[c]);
                }
            }
        }
    }
}

/// Turns every row of `x` in place.
pub(crate) fn rotate(x: MatMut<f32>, cos: Mat<f32>, sin: Mat<f32>, segments: &[Segment], direction: Direction) {
    let sign = sign(direction);
    let block = par::block_rows(x.cols());
    par::for_row_blocks(x, block, |first, x| rotate_rows(x, first, cos, sin, segments, sign));
}

vectorise! {
    fn rotate_rows<'a>(x: MatMut<'a, f32>, first: usize, cos: Mat<'a, f32>, sin: Mat<'a, f32>, segments: &'a [Segment], sign: f32) {
        let mut x = x;
        for (segment, tokens) in within(segments, first..first + x.rows()) {
            for t in tokens {
                let p = (segment.phase + t) % cos.rows();
                let (cos, sin) = (cos.row(p).as_chunks::<2>().0, sin.row(p).as_chunks::<2>().0);
                for head in x.row_mut(segment.first_row + t - first).chunks_exact_mut(2 * cos.len()) {
                    for (pair, (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos.iter().zip(sin)) {
                        let [a, b] = *pair;
                        *pair = [a * cos[0] + b * (sign * sin[0]), b * cos[1] + a * (sign * sin[1])];
                    }
                }
            }
        }
    }
}
