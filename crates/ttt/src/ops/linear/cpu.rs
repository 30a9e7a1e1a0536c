//! f32 on the processor's cores: for few rows the kernel of [`super::few_rows`], for many the one of [`packed`] or the `gemm`
//! crate, chosen by shape alone.

mod kernel;
mod pack;
mod packed;

use gemm::Parallelism;

use self::pack::{Plain, Transposed};
use super::few_rows;
use crate::device::WeightView;
use crate::device::view::{Mat, MatMut};

/// From so many rows on, `dy w` is faster packed by us (3-8 % at 1024 and 2048 rows, 4 % slower at 512).
const PACKED_ROWS: usize = 1024;

/// `y = x wᵀ`.
///
/// # Panics
/// When the shapes do not fit.
pub(crate) fn forward(x: Mat<f32>, w: WeightView, y: MatMut<f32>) {
    match w {
        _ if x.rows() <= few_rows::MAX_ROWS => few_rows::forward(x, w, y),
        WeightView::Float(w) => packed::product(x, Transposed { rows: w.as_mat::<f32>(), scales: None }, y),
        WeightView::Bf16 { rows, .. } => packed::product(x, Transposed { rows, scales: None }, y),
        WeightView::Int8 { rows, scales, .. } => packed::product(x, Transposed { rows, scales: Some(scales) }, y),
    }
}

/// `dx = dy w`.
pub(crate) fn backward_input(dy: Mat<f32>, w: Mat<f32>, dx: MatMut<f32>) {
    if dy.rows() < PACKED_ROWS {
        product(Operand::new(dy), Operand::new(w), dx, false);
    } else {
        packed::product(dy, Plain(w), dx);
    }
}

/// `dw += dyᵀ x`.
pub(crate) fn backward_weight(dy: Mat<f32>, x: Mat<f32>, dw: MatMut<f32>) {
    product(Operand::new(dy).transposed(), Operand::new(x), dw, true);
}

/// A matrix, perhaps transposed: element (i, j) lies at `i · row_stride + j · col_stride`.
pub(crate) struct Operand<'a> {
    mat: Mat<'a, f32>,
    shape: [usize; 2],
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Operand<'a> {
    pub(crate) fn new(mat: Mat<'a, f32>) -> Self {
        Operand { mat, shape: [mat.rows(), mat.cols()], row_stride: mat.stride(), col_stride: 1 }
    }

    pub(crate) fn transposed(self) -> Self {
        let Operand { mat, shape: [rows, cols], row_stride, col_stride } = self;
        Operand { mat, shape: [cols, rows], row_stride: col_stride, col_stride: row_stride }
    }
}

/// `y = a b`, or `y += a b`, where the work around it is what threads share.
///
/// # Panics
/// When the shapes do not fit.
pub(crate) fn product_here(a: Operand, b: Operand, y: MatMut<f32>, add: bool) {
    product_on(a, b, y, add, Parallelism::None);
}

/// `y = a b`, or `y += a b`.
fn product(a: Operand, b: Operand, y: MatMut<f32>, add: bool) {
    // The number of threads only says how blocks of `y` are dealt out; each element's sum is the same for any. Products below
    // about 0.6 million multiply-adds stay on this thread (a threshold of `gemm`).
    let parallelism = match rayon::current_num_threads() {
        1 => Parallelism::None,
        threads => Parallelism::Rayon(threads),
    };
    product_on(a, b, y, add, parallelism);
}

fn product_on(a: Operand, b: Operand, mut y: MatMut<f32>, add: bool, parallelism: Parallelism) {
    let ([m, k], [_, n]) = (a.shape, b.shape);
    assert!(b.shape[0] == k && [y.rows(), y.cols()] == [m, n], "{:?} x {:?} into {} x {}", a.shape, b.shape, y.rows(), y.cols());
    let stride = y.stride() as isize;
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
