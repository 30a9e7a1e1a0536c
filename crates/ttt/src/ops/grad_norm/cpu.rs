//! f32 on the processor's cores: a tree of joins whose shape depends on the length alone.

use crate::device::view::Mat;
use crate::ops::simd::vectorise;

/// Elements of a leaf of the tree.
const LEAF: usize = 16_384;

/// Sum of the squares of all elements.
pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
    if x.len() <= LEAF {
        return leaf(x);
    }
    let (a, b) = x.split_at(x.len().div_ceil(2).next_multiple_of(LEAF));
    let (a, b) = rayon::join(|| sum_of_squares(a), || sum_of_squares(b));
    a + b
}

vectorise! {
    fn leaf<'a>(x: &'a [f32]) -> f64 {
        let mut lanes = [0f64; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane += x as f64 * x as f64;
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += x as f64 * x as f64;
        }
        lanes.iter().sum()
    }
}

/// Index (row by row) of the first element that is infinite or not a number.
pub(crate) fn first_non_finite(x: Mat<f32>) -> Option<usize> {
    let block = crate::device::par::block_rows(x.cols());
    if x.rows() <= block {
        return if all_finite(x) { None } else { super::reference::first_non_finite(x) };
    }
    let mid = x.rows().div_ceil(2);
    let (a, b) = (x.row_range(0..mid), x.row_range(mid..x.rows()));
    let (a, b) = rayon::join(|| first_non_finite(a), || first_non_finite(b));
    a.or(b.map(|index| mid * x.cols() + index))
}

vectorise! {
    fn all_finite<'a>(x: Mat<'a, f32>) -> bool {
        // x · 0 is 0 of a finite number and not a number of any other, and no sum makes that a number again.
        (0..x.rows()).all(|i| crate::ops::simd::sum([x.row(i)], |[x]| x * 0.0) == 0.0)
    }
}
