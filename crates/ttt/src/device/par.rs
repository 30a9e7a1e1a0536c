//! Deterministic fork-join over blocks of rows.
//!
//! The split depends on shapes alone, never on timing or on the number of threads, so that sums come out the same bit for bit.

use crate::device::view::{Mat, MatMut};

/// Something that splits into a part for the first units of work and a part for the rest.
pub trait Split: Sized + Send {
    /// The part of the first `units` units, and the rest.
    fn split(self, units: usize) -> (Self, Self);
}

/// A matrix of which each unit of work has `rows` rows (the last may have fewer).
pub struct RowsPerUnit<M> {
    /// The matrix.
    pub mat: M,
    /// Rows of a unit.
    pub rows: usize,
}

impl<E: Send> Split for RowsPerUnit<MatMut<'_, E>> {
    fn split(self, units: usize) -> (Self, Self) {
        let at = (units * self.rows).min(self.mat.rows());
        let (a, b) = self.mat.split_rows(at);
        (RowsPerUnit { mat: a, rows: self.rows }, RowsPerUnit { mat: b, rows: self.rows })
    }
}

impl<E: Sync> Split for RowsPerUnit<Mat<'_, E>> {
    fn split(self, units: usize) -> (Self, Self) {
        let at = (units * self.rows).min(self.mat.rows());
        let (a, b) = (self.mat.row_range(0..at), self.mat.row_range(at..self.mat.rows()));
        (RowsPerUnit { mat: a, rows: self.rows }, RowsPerUnit { mat: b, rows: self.rows })
    }
}

/// A matrix of which each unit of work has `cols` columns (the last may have fewer).
pub struct ColsPerUnit<M> {
    /// The matrix.
    pub mat: M,
    /// Columns of a unit.
    pub cols: usize,
}

impl<E: Send> Split for ColsPerUnit<MatMut<'_, E>> {
    fn split(self, units: usize) -> (Self, Self) {
        let at = (units * self.cols).min(self.mat.cols());
        let (a, b) = self.mat.split_cols(at);
        (ColsPerUnit { mat: a, cols: self.cols }, ColsPerUnit { mat: b, cols: self.cols })
    }
}

impl Split for () {
    fn split(self, _: usize) -> (Self, Self) {
        ((), ())
    }
}

impl<A: Split, B: Split> Split for (A, B) {
    fn split(self, units: usize) -> (Self, Self) {
        let ((a0, a1), (b0, b1)) = (self.0.split(units), self.1.split(units));
        ((a0, b0), (a1, b1))
    }
}

impl<A: Split, B: Split, C: Split> Split for (A, B, C) {
    fn split(self, units: usize) -> (Self, Self) {
        let ((a0, a1), (b0, b1), (c0, c1)) = (self.0.split(units), self.1.split(units), self.2.split(units));
        ((a0, b0, c0), (a1, b1, c1))
    }
}

impl<A: Split, B: Split, C: Split, D: Split> Split for (A, B, C, D) {
    fn split(self, units: usize) -> (Self, Self) {
        let ((a, b), (c, d)) = ((self.0, self.1).split(units), (self.2, self.3).split(units));
        ((a.0, a.1, c.0, c.1), (b.0, b.1, d.0, d.1))
    }
}

/// Calls `work(unit, part)` for each of `units` units, in parallel on the current thread pool, with the part that belongs to it.
pub fn for_each<S: Split>(units: usize, parts: S, work: &(impl Fn(usize, S) + Sync)) {
    fn go<S: Split>(first: usize, units: usize, parts: S, work: &(impl Fn(usize, S) + Sync)) {
        match units {
            0 => {}
            1 => work(first, parts),
            _ => {
                let half = units.div_ceil(2);
                let (a, b) = parts.split(half);
                let (mut a, mut b) = (Some(a), Some(b));
                let mut left = || a.take().into_iter().for_each(|a| go(first, half, a, work));
                let mut right = || b.take().into_iter().for_each(|b| go(first + half, units - half, b, work));
                join(&mut left, &mut right);
            }
        }
    }
    go(0, units, parts, work);
}

/// [`rayon::join`] of calls whose types are not known, so that its machinery is compiled once and not for every operation.
fn join(a: &mut (dyn FnMut() + Send), b: &mut (dyn FnMut() + Send)) {
    rayon::join(a, b);
}

/// Rows of a block when `rows` rows of `cols` elements are split: enough elements (about 64 KiB of f32) that forking pays.
pub fn block_rows(cols: usize) -> usize {
    (16_384 / cols.max(1)).clamp(1, 1024)
}

/// Calls `work(first_row, block)` for blocks of `block` rows of `mat`, in parallel on the current thread pool.
pub fn for_row_blocks<'a, E: Send>(mat: MatMut<'a, E>, block: usize, work: impl Fn(usize, MatMut<'a, E>) + Sync) {
    let units = mat.rows().div_ceil(block);
    for_each(units, RowsPerUnit { mat, rows: block }, &|unit, part: RowsPerUnit<MatMut<'a, E>>| work(unit * block, part.mat));
}
