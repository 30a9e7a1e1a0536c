//! `y = x wᵀ` for few rows of x: bound by the memory that `w` is read from, so `w` is read once, in order, without packing
//! (with more than four rows, each 65,536 numbers of it again from the second-level cache). Narrow weights are widened in
//! registers; a row's scale multiplies the finished sum.
//!
//! Each element of y is one vector of partial sums along i, summed up at the end, whatever the number of rows: a sequence gets
//! the same logits bit for bit alone and in a batch of up to [`MAX_ROWS`].

use half::bf16;
use pulp::{Simd, WithSimd};

use super::cpu::prefetch;
use crate::device::WeightView;
use crate::device::par::{self, ColsPerUnit};
use crate::device::view::{Mat, MatMut};

/// At most this many rows of x. On one Zen 3 core and weights [768..4096, 256..2048] this kernel makes 27-36 GFLOP/s with 1 row,
/// 60-90 with 4 and more; `gemm`, which packs the weights first, 10 with 2 rows, 30 with 8, 60 with 32, 75 with 64, and is
/// ahead from about 128.
pub(super) const MAX_ROWS: usize = 64;

/// Numbers of `w` that one unit of work reads (256 KiB of f32): forking costs a few microseconds, reading them about twenty.
const ELEMENTS_PER_UNIT: usize = 65_536;

/// Writes `y = x wᵀ`.
pub(super) fn forward(x: Mat<f32>, w: WeightView, y: MatMut<f32>) {
    match w {
        WeightView::Float(w) => of_type::<f32>(x, w.as_mat(), None, y),
        WeightView::Bf16 { rows, .. } => of_type(x, rows, None, y),
        WeightView::Int8 { rows, scales, .. } => of_type(x, rows, Some(scales), y),
    }
}

/// Writes `y = x wᵀ` on this thread alone.
pub(crate) fn product(x: Mat<f32>, w: Mat<f32>, y: MatMut<f32>) {
    pulp::Arch::new().dispatch(Block { x, w, scales: None, y });
}

fn of_type<T: Stored>(x: Mat<f32>, w: Mat<T>, scales: Option<&[f32]>, y: MatMut<f32>) {
    let block = (ELEMENTS_PER_UNIT / w.cols().max(1)).max(1).next_multiple_of(24);
    let units = w.rows().div_ceil(block);
    par::for_each(units, ColsPerUnit { mat: y, cols: block }, &|unit, y: ColsPerUnit<MatMut<f32>>| {
        let rows = unit * block..unit * block + y.mat.cols();
        let block = Block { x, w: w.row_range(rows.clone()), scales: scales.map(|s| &s[rows]), y: y.mat };
        pulp::Arch::new().dispatch(block);
    });
}

/// A type that weights are stored in.
pub(super) trait Stored: Copy + Sync {
    /// The number as f32, exactly.
    fn widen(self) -> f32;

    /// The matrix itself, when nothing needs widening.
    fn floats(_: Mat<Self>) -> Option<Mat<f32>> {
        None
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    fn floats(mat: Mat<f32>) -> Option<Mat<f32>> {
        Some(mat)
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
}

impl Stored for i8 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self as f32
    }
}

struct Block<'a, T> {
    x: Mat<'a, f32>,
    w: Mat<'a, T>,
    scales: Option<&'a [f32]>,
    y: MatMut<'a, f32>,
}

impl<T: Stored> WithSimd for Block<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match S::F32_LANES {
            16 => self.rows::<S, 16>(simd),
            8 => self.rows::<S, 8>(simd),
            4 => self.rows::<S, 4>(simd),
            _ => self.rows::<S, 1>(simd),
        }
    }
}

impl<T: Stored> Block<'_, T> {
    /// L is the number of lanes of S.
    #[inline(always)]
    fn rows<S: Simd, const L: usize>(&mut self, simd: S) {
        let mut first = 0;
        // With 32 registers 24 sums at once: 11 loads for 24 multiply-adds, and the weights come half as often from further away.
        while L == 16 && self.x.rows() - first >= 8 {
            self.tiles::<S, L, 8, 3>(simd, first);
            first += 8;
        }
        // 8 to 12 sums at once hide the latency of the multiply-adds and fit 16 registers.
        for first in (first..self.x.rows()).step_by(4) {
            match self.x.rows() - first {
                1 => self.tiles::<S, L, 1, 8>(simd, first),
                2 => self.tiles::<S, L, 2, 4>(simd, first),
                3 => self.tiles::<S, L, 3, 3>(simd, first),
                _ => self.tiles::<S, L, 4, 3>(simd, first),
            }
        }
    }

    /// All of the block's columns of rows `first..first + X` of y, W at a time.
    #[inline(always)]
    fn tiles<S: Simd, const L: usize, const X: usize, const W: usize>(&mut self, simd: S, first: usize) {
        let whole = self.w.rows() / W * W;
        for o in (0..whole).step_by(W) {
            self.tile::<S, L, X, W>(simd, first, o);
        }
        for o in whole..self.w.rows() {
            self.tile::<S, L, X, 1>(simd, first, o);
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const L: usize, const X: usize, const W: usize>(&mut self, simd: S, first: usize, o: usize) {
        let vectors = self.x.cols() / L;
        let (mut x, mut w) = ([(&[][..], &[][..]); X], [(&[][..], &[][..]); W]);
        for (i, x) in x.iter_mut().enumerate() {
            let (whole, rest) = S::as_simd_f32s(self.x.row(first + i));
            *x = (&whole[..vectors], rest);
        }
        for (j, w) in w.iter_mut().enumerate() {
            let (whole, rest) = self.w.row(o + j).as_chunks::<L>();
            *w = (&whole[..vectors], rest);
        }
        let mut sums = [[simd.splat_f32s(0.0); W]; X];
        // While three or more rows keep the arithmetic busy, the next tile is on its way; it must leave room in the first-level
        // cache. With one or two rows of f32 the processor's own prefetching is faster; narrow rows are too short for it.
        let (narrow, bytes) = (size_of::<T>() < 4, W * self.w.cols() * size_of::<T>());
        let ahead = first == 0 && if X >= 3 { bytes <= 12_288 } else { narrow && bytes <= 16_384 };
        let next = self.w.as_ptr().wrapping_add((o + W) * self.w.stride());
        for k in 0..vectors {
            if ahead {
                prefetch(next.wrapping_add(k * W * L), W * L);
            }
            let mut wv = [simd.splat_f32s(0.0); W];
            for j in 0..W {
                wv[j] = vector::<S, T, L>(&w[j].0[k]);
            }
            for i in 0..X {
                for j in 0..W {
                    sums[i][j] = simd.mul_add_e_f32s(x[i].0[k], wv[j], sums[i][j]);
                }
            }
        }
        if !x[0].1.is_empty() {
            for i in 0..X {
                let x = simd.partial_load_f32s(x[i].1);
                for j in 0..W {
                    sums[i][j] = simd.mul_add_e_f32s(x, part::<S, T, L>(simd, w[j].1), sums[i][j]);
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            let y = &mut self.y.row_mut(first + i)[o..o + W];
            for (j, (y, sum)) in y.iter_mut().zip(sums).enumerate() {
                let sum = simd.reduce_sum_f32s(sum);
                *y = self.scales.map_or(sum, |scales| sum * scales[o + j]);
            }
        }
    }
}

// Loops over indices: what is not always inlined (`map`, `zip`) stays a call, compiled without the instructions of S.

/// L numbers, widened; L is the number of lanes of S.
#[inline(always)]
fn vector<S: Simd, T: Stored, const L: usize>(w: &[T; L]) -> S::f32s {
    let mut wide = [0.0; L];
    for i in 0..L {
        wide[i] = w[i].widen();
    }
    S::as_simd_f32s(&wide).0[0]
}

/// Fewer than L numbers, widened; the other lanes are 0.
#[inline(always)]
fn part<S: Simd, T: Stored, const L: usize>(simd: S, w: &[T]) -> S::f32s {
    let mut wide = [0.0; L];
    for i in 0..w.len() {
        wide[i] = w[i].widen();
    }
    simd.partial_load_f32s(&wide[..w.len()])
}
