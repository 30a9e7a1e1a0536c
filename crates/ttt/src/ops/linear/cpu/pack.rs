//! What a product's right operand is packed from: panels of neighbouring columns, term by term.

use std::ops::Range;

use pulp::Simd;

use crate::device::view::Mat;
#[cfg(target_arch = "x86_64")]
use crate::ops::inner::cpu::transpose_8x8;
use crate::ops::linear::few_rows::Stored;

/// A right operand B `[k, n]`.
pub(super) trait Columns: Sync {
    /// At most so many terms of a sum are packed at a time. The more, the less often C is read again; 1024 terms of 6 rows of A
    /// (24 KiB) still lie in the first-level cache.
    const MAX_TERMS: usize;

    /// `[k, n]`.
    fn shape(&self) -> [usize; 2];

    /// Writes panels of `width` columns one behind the other, each `out[l, j] = B[terms.start + l, its first column + j]`, with
    /// zeros behind the last column.
    ///
    /// # Panics
    /// When the block does not exist or `out` is too small for it.
    fn pack<S: Simd>(&self, simd: S, out: &mut [f32], width: usize, terms: Range<usize>, columns: Range<usize>);

    /// Where that block is read from: address, bytes of a row, bytes from one row to the next, rows.
    fn source(&self, terms: Range<usize>, columns: Range<usize>) -> Source;
}

/// Rows of bytes, to be fetched ahead.
#[derive(Clone, Copy)]
pub(super) struct Source {
    at: *const u8,
    row: usize,
    stride: usize,
    rows: usize,
    /// How much of the row was asked for.
    done: usize,
}

impl Source {
    fn new<T>(mat: Mat<T>) -> Source {
        let size = size_of::<T>();
        Source { at: mat.as_ptr().cast(), row: size * mat.cols(), stride: size * mat.stride(), rows: mat.rows(), done: 0 }
    }

    /// Nothing to fetch.
    pub(super) fn none() -> Source {
        Source { at: std::ptr::null(), row: 0, stride: 0, rows: 0, done: 0 }
    }

    /// Number of cache lines.
    pub(super) fn lines(&self) -> usize {
        self.rows * self.row.div_ceil(64)
    }

    /// Asks for the next `lines` cache lines to be brought into the second-level cache.
    #[inline(always)]
    pub(super) fn fetch(&mut self, lines: usize) {
        for _ in 0..lines {
            if self.rows == 0 {
                return;
            }
            #[cfg(target_arch = "x86_64")]
            {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                // SAFETY: a prefetch reads nothing; any address is allowed.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(self.at.wrapping_add(self.done).cast()) };
            }
            self.done += 64;
            if self.done >= self.row {
                (self.done, self.at, self.rows) = (0, self.at.wrapping_add(self.stride), self.rows - 1);
            }
        }
    }
}

/// B is a matrix.
pub(super) struct Plain<'a>(pub(super) Mat<'a, f32>);

impl Columns for Plain<'_> {
    // Half of what a transpose has, so that twice the columns, longer runs of each row, are read at a time.
    const MAX_TERMS: usize = 512;

    fn shape(&self) -> [usize; 2] {
        [self.0.rows(), self.0.cols()]
    }

    #[inline(always)]
    fn pack<S: Simd>(&self, _: S, out: &mut [f32], width: usize, terms: Range<usize>, columns: Range<usize>) {
        let block = self.0.row_range(terms).col_range(columns);
        let size = block.rows() * width;
        // Along the rows, as they lie in memory.
        for l in 0..block.rows() {
            for (p, x) in block.row(l).chunks(width).enumerate() {
                let out = &mut out[p * size + l * width..][..width];
                if let (Ok(x), [out, ..]) = (<&[f32; 16]>::try_from(x), out.as_chunks_mut::<16>().0)
                    && width == 16
                {
                    *out = *x;
                } else {
                    out[..x.len()].copy_from_slice(x);
                    out[x.len()..].fill(0.0);
                }
            }
        }
    }

    fn source(&self, terms: Range<usize>, columns: Range<usize>) -> Source {
        Source::new(self.0.row_range(terms).col_range(columns))
    }
}

/// B is the transpose of a matrix of weights, whose rows may have scales.
pub(super) struct Transposed<'a, T> {
    pub(super) rows: Mat<'a, T>,
    pub(super) scales: Option<&'a [f32]>,
}

impl<T: Stored> Columns for Transposed<'_, T> {
    const MAX_TERMS: usize = 1024;

    fn shape(&self) -> [usize; 2] {
        [self.rows.cols(), self.rows.rows()]
    }

    #[inline(always)]
    fn pack<S: Simd>(&self, _: S, out: &mut [f32], width: usize, terms: Range<usize>, columns: Range<usize>) {
        let size = terms.len() * width;
        for (p, first) in columns.clone().step_by(width).enumerate() {
            let rows = first..(first + width).min(columns.end);
            let scales = self.scales.map(|scales| &scales[rows.clone()]);
            let panel = Transposed { rows: self.rows.row_range(rows).col_range(terms.clone()), scales };
            panel.pack_panel::<S>(&mut out[p * size..][..size], width);
        }
    }

    fn source(&self, terms: Range<usize>, columns: Range<usize>) -> Source {
        Source::new(self.rows.row_range(columns).col_range(terms))
    }
}

/// Terms of eight rows that are widened at a time, on the stack.
const WIDENED: usize = 128;

impl<T: Stored> Transposed<'_, T> {
    /// `out[l, j] = rows[j, l] scales[j]` in rows of `width`, zeros behind.
    #[inline(always)]
    fn pack_panel<S: Simd>(&self, out: &mut [f32], width: usize) {
        let (rows, k) = (self.rows.rows(), self.rows.cols());
        assert!(k * width <= out.len() && rows <= width, "{rows} x {k} into {} as a panel of {width}", out.len());
        // Eight rows at a time from end to end: rows that lie a power of two apart share the lines of the first-level cache.
        let whole = if cfg!(target_arch = "x86_64") && S::F32_LANES >= 8 { [rows / 8 * 8, k / 8 * 8] } else { [0, 0] };
        #[cfg(target_arch = "x86_64")]
        for j in (0..whole[0]).step_by(8) {
            let mut wide = [0.0f32; 8 * WIDENED];
            for first in (0..whole[1]).step_by(WIDENED) {
                let terms = first..(first + WIDENED).min(whole[1]);
                let block = self.rows.row_range(j..j + 8).col_range(terms.clone());
                let (from, stride) = match T::floats(block) {
                    Some(block) if self.scales.is_none() => (block.as_ptr(), block.stride()),
                    _ => {
                        for (r, wide) in wide.as_chunks_mut::<WIDENED>().0.iter_mut().enumerate() {
                            self.widen(j + r, terms.clone(), wide);
                        }
                        (wide.as_ptr(), WIDENED)
                    }
                };
                for l in (0..terms.len()).step_by(8) {
                    let out = &mut out[(first + l) * width + j..];
                    // SAFETY: eight rows of at least l + 8 numbers lie at `from`, `stride` apart; rows l..l + 8 and columns
                    // j..j + 8 of `out` exist (asserted above); a `Simd` of 8 or more lanes on x86-64 exists only where AVX does.
                    unsafe { transpose_8x8(out.as_mut_ptr(), width, from.wrapping_add(l), stride, None) };
                }
            }
        }
        for j in 0..rows {
            let row = self.rows.row(j);
            let scale = self.scales.map_or(1.0, |scales| scales[j]);
            for l in if j < whole[0] { whole[1]..k } else { 0..k } {
                out[l * width + j] = row[l].widen() * scale;
            }
        }
        if rows < width {
            for out in out.chunks_exact_mut(width).take(k) {
                out[rows..].fill(0.0);
            }
        }
    }

    /// Some terms of row `j`.
    #[inline(always)]
    fn widen(&self, j: usize, terms: Range<usize>, out: &mut [f32]) {
        let scale = self.scales.map_or(1.0, |scales| scales[j]);
        for (out, x) in out.iter_mut().zip(&self.rows.row(j)[terms]) {
            *out = x.widen() * scale;
        }
    }
}
