//! f32 on the processor's cores: the `gemm` crate, and for few rows the kernel of [`super::few_rows`].
//!
//! Measured on two Zen 3 cores (90-95 GFLOP/s each): `gemm` splits over two threads at 99 % in all three products at training
//! shapes. Splitting rows or columns by hand is no faster anywhere and 5-35 % slower in more than two parts, because every
//! part packs the other operand again.

use gemm::Parallelism;

use super::few_rows;
use crate::Result;
use crate::device::view::{Mat, MatMut};
use crate::device::{WeightView, par};
use crate::ops::simd::vectorise;
use crate::tensor::{DType, Tensor};

/// `y = x wᵀ`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub(crate) fn forward(x: Mat<f32>, w: WeightView, y: MatMut<f32>) -> Result<()> {
    match w {
        _ if x.rows() <= few_rows::MAX_ROWS => few_rows::forward(x, w, y),
        WeightView::Float(w) => product(Operand::new(x), Operand::new(w.as_mat()).transposed(), y, false),
        WeightView::Bf16 { .. } | WeightView::Int8 { .. } => widened_product(x, w, y)?,
    }
    Ok(())
}

/// Numbers of a narrow matrix that are widened at once: 4 MiB, which stay in the caches until they are multiplied.
const WIDENED: usize = 1 << 20;

/// `y = x wᵀ`, some rows of `w` at a time.
fn widened_product(x: Mat<f32>, w: WeightView, mut y: MatMut<f32>) -> Result<()> {
    let block = (WIDENED / w.cols().max(1)).clamp(1, w.rows().max(1));
    let mut scratch = Tensor::empty(w.device(), &[block, w.cols()], DType::F32)?;
    for first in (0..w.rows()).step_by(block) {
        let rows = first..(first + block).min(w.rows());
        let w = w.row_range(rows.clone());
        let mut wide = scratch.view_mut().into_mat().row_range(0..rows.len());
        par::for_row_blocks(wide.reborrow(), par::block_rows(w.cols()), |first, part| widen(w, first, part));
        product(Operand::new(x), Operand::new(wide.as_ref()).transposed(), y.reborrow().col_range(rows), false);
    }
    Ok(())
}

vectorise! {
    /// Writes the values of the rows from `first` on.
    pub(super) fn widen<'a>(w: WeightView<'a>, first: usize, out: MatMut<'a, f32>) {
        let mut out = out;
        for i in 0..out.rows() {
            w.widen_row(first + i, out.row_mut(i));
        }
    }
}

/// `dx = dy w`.
pub(crate) fn backward_input(dy: Mat<f32>, w: Mat<f32>, dx: MatMut<f32>) {
    product(Operand::new(dy), Operand::new(w), dx, false);
}

/// `dw += dyᵀ x`.
pub(crate) fn backward_weight(dy: Mat<f32>, x: Mat<f32>, dw: MatMut<f32>) {
    product(Operand::new(dy).transposed(), Operand::new(x), dw, true);
}

/// A matrix, perhaps transposed: element (i, j) lies at `i · row_stride + j · col_stride`.
struct Operand<'a> {
    mat: Mat<'a, f32>,
    shape: [usize; 2],
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Operand<'a> {
    fn new(mat: Mat<'a, f32>) -> Self {
        Operand { mat, shape: [mat.rows(), mat.cols()], row_stride: mat.stride(), col_stride: 1 }
    }

    fn transposed(self) -> Self {
        let Operand { mat, shape: [rows, cols], row_stride, col_stride } = self;
        Operand { mat, shape: [cols, rows], row_stride: col_stride, col_stride: row_stride }
    }
}

/// `y = a b`, or `y += a b`.
fn product(a: Operand, b: Operand, mut y: MatMut<f32>, add: bool) {
    let ([m, k], [_, n]) = (a.shape, b.shape);
    assert!(b.shape[0] == k && [y.rows(), y.cols()] == [m, n], "{:?} x {:?} into {} x {}", a.shape, b.shape, y.rows(), y.cols());
    let stride = y.stride() as isize;
    // The number of threads only says how blocks of `y` are dealt out; each element's sum is the same for any. Products below
    // about 0.6 million multiply-adds stay on this thread (a threshold of `gemm`).
    let parallelism = match rayon::current_num_threads() {
        1 => Parallelism::None,
        threads => Parallelism::Rayon(threads),
    };
    // SAFETY: shapes and strides are those of the borrowed matrices, whose shapes fit (asserted); `y` is mutably borrowed, so it
    // overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            stride,
            add,
            a.mat.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.mat.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Asks for the cache lines of the `len` elements at `at`, which need not exist.
#[inline(always)]
pub(super) fn prefetch<T>(at: *const T, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..len * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing; any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, len);
}
