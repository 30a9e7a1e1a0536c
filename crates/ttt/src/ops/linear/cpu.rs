//! f32 on the processor's cores: the `gemm` crate, and for few rows the kernel of [`super::few_rows`].
//!
//! Measured on two Zen 3 cores (90-95 GFLOP/s each): `gemm` splits over two threads at 99 % in all three products at training
//! shapes. Splitting rows or columns by hand is no faster anywhere and 5-35 % slower in more than two parts, because every
//! part packs the other operand again.

use gemm::Parallelism;

use super::few_rows;
use crate::device::view::{Mat, MatMut};

/// `y = x wᵀ`.
pub(crate) fn forward(x: Mat<f32>, w: Mat<f32>, y: MatMut<f32>) {
    if x.rows() <= few_rows::MAX_ROWS {
        few_rows::forward(x, w, y);
    } else {
        product(Operand::new(x), Operand::new(w).transposed(), y, false);
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
