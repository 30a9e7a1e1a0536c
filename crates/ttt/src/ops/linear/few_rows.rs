//! `y = x wᵀ` for few rows of x: bound by the memory that `w` is read from, so `w` is read once, in order, without packing
//! (with more than four rows, each 256 KiB of it again from the second-level cache).
//!
//! Each element of y is one vector of partial sums along i, summed up at the end, whatever the number of rows: a sequence gets
//! the same logits bit for bit alone and in a batch of up to [`MAX_ROWS`].

use pulp::{Simd, WithSimd};

use super::cpu::prefetch;
use crate::device::par::{self, ColsPerUnit};
use crate::device::view::{Mat, MatMut};

/// At most this many rows of x. On one Zen 3 core and weights [768..4096, 256..2048] this kernel makes 27-36 GFLOP/s with 1 row,
/// 60-90 with 4 and more; `gemm`, which packs the weights first, 10 with 2 rows, 30 with 8, 60 with 32, 75 with 64, and is
/// ahead from about 128.
pub(super) const MAX_ROWS: usize = 64;

/// Elements of `w` that one unit of work reads (256 KiB): forking costs a few microseconds, reading them about twenty.
const ELEMENTS_PER_UNIT: usize = 65_536;

/// Writes `y = x wᵀ`.
pub(super) fn forward(x: Mat<f32>, w: Mat<f32>, y: MatMut<f32>) {
    let block = (ELEMENTS_PER_UNIT / w.cols().max(1)).max(1).next_multiple_of(24);
    let units = w.rows().div_ceil(block);
    par::for_each(units, ColsPerUnit { mat: y, cols: block }, &|unit, y: ColsPerUnit<MatMut<f32>>| {
        let first = unit * block;
        let w = w.row_range(first..first + y.mat.cols());
        pulp::Arch::new().dispatch(Block { x, w, y: y.mat });
    });
}

struct Block<'a> {
    x: Mat<'a, f32>,
    w: Mat<'a, f32>,
    y: MatMut<'a, f32>,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // 8 to 12 sums at once hide the latency of the multiply-adds and fit 16 registers.
        for first in (0..self.x.rows()).step_by(4) {
            match self.x.rows() - first {
                1 => self.tiles::<S, 1, 8>(simd, first),
                2 => self.tiles::<S, 2, 4>(simd, first),
                3 => self.tiles::<S, 3, 3>(simd, first),
                _ => self.tiles::<S, 4, 3>(simd, first),
            }
        }
    }
}

impl Block<'_> {
    /// All of the block's columns of rows `first..first + X` of y, W at a time.
    #[inline(always)]
    fn tiles<S: Simd, const X: usize, const W: usize>(&mut self, simd: S, first: usize) {
        let whole = self.w.rows() / W * W;
        for o in (0..whole).step_by(W) {
            self.tile::<S, X, W>(simd, first, o);
        }
        for o in whole..self.w.rows() {
            self.tile::<S, X, 1>(simd, first, o);
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const X: usize, const W: usize>(&mut self, simd: S, first: usize, o: usize) {
        let vectors = self.x.cols() / S::F32_LANES;
        let (mut x, mut w) = ([(&[][..], &[][..]); X], [(&[][..], &[][..]); W]);
        for i in 0..X {
            let (whole, rest) = S::as_simd_f32s(self.x.row(first + i));
            x[i] = (&whole[..vectors], rest);
        }
        for j in 0..W {
            let (whole, rest) = S::as_simd_f32s(self.w.row(o + j));
            w[j] = (&whole[..vectors], rest);
        }
        let mut sums = [[simd.splat_f32s(0.0); W]; X];
        // While three or more rows keep the arithmetic busy, the next tile is on its way; it must leave room in the first-level
        // cache. With one or two the processor's own prefetching is faster.
        let ahead = X >= 3 && first == 0 && W * self.w.cols() <= 3072;
        let next = self.w.as_ptr().wrapping_add((o + W) * self.w.stride());
        for k in 0..vectors {
            if ahead {
                prefetch(next.wrapping_add(k * W * S::F32_LANES), W * S::F32_LANES);
            }
            for i in 0..X {
                for j in 0..W {
                    sums[i][j] = simd.mul_add_e_f32s(x[i].0[k], w[j].0[k], sums[i][j]);
                }
            }
        }
        if !x[0].1.is_empty() {
            for i in 0..X {
                let x = simd.partial_load_f32s(x[i].1);
                for j in 0..W {
                    sums[i][j] = simd.mul_add_e_f32s(x, simd.partial_load_f32s(w[j].1), sums[i][j]);
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            let y = &mut self.y.row_mut(first + i)[o..o + W];
            for (y, sum) in y.iter_mut().zip(sums) {
                *y = simd.reduce_sum_f32s(sum);
            }
        }
    }
}
