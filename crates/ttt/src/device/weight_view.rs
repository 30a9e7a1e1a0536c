//! Borrowed weight matrices in the type that they are stored in.

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;

use crate::device::Device;
use crate::device::view::{Mat, View};
use crate::tensor::{DType, Element};

/// A weight matrix `[rows, cols]` as it is stored; a row makes one output of a product.
///
/// What a stored number means: itself, but in [`WeightView::Int8`] itself times its row's scale.
#[derive(Clone, Copy, Debug)]
pub enum WeightView<'a> {
    /// In the type of the activations.
    Float(View<'a>),
    /// Upper halves of f32 numbers.
    Bf16 {
        /// The numbers.
        rows: Mat<'a, bf16>,
        /// Where the matrix lives.
        device: &'a Device,
    },
    /// Integers from -127 to 127.
    Int8 {
        /// The integers.
        rows: Mat<'a, i8>,
        /// Value of 1 in each row.
        scales: &'a [f32],
        /// Where the matrix lives.
        device: &'a Device,
    },
}

impl<'a> From<View<'a>> for WeightView<'a> {
    fn from(view: View<'a>) -> Self {
        WeightView::Float(view)
    }
}

impl<'a> WeightView<'a> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.shape()[0]
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.shape()[1]
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            WeightView::Float(view) => view.shape(),
            WeightView::Bf16 { rows, .. } => [rows.rows(), rows.cols()],
            WeightView::Int8 { rows, .. } => [rows.rows(), rows.cols()],
        }
    }

    /// Where the matrix lives.
    pub fn device(&self) -> &'a Device {
        match self {
            WeightView::Float(view) => view.device(),
            WeightView::Bf16 { device, .. } | WeightView::Int8 { device, .. } => device,
        }
    }

    /// Type of the activations that it is multiplied with.
    pub fn dtype(&self) -> DType {
        match self {
            WeightView::Float(view) => view.dtype(),
            WeightView::Bf16 { .. } | WeightView::Int8 { .. } => DType::F32,
        }
    }

    /// The rows of `range`.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn row_range(&self, range: Range<usize>) -> Self {
        match *self {
            WeightView::Float(view) => WeightView::Float(view.row_range(range)),
            WeightView::Bf16 { rows, device } => WeightView::Bf16 { rows: rows.row_range(range), device },
            WeightView::Int8 { rows, scales, device } => {
                WeightView::Int8 { rows: rows.row_range(range.clone()), scales: &scales[range], device }
            }
        }
    }

    /// Writes the values of row `i` to `out`.
    ///
    /// # Panics
    /// When there is no such row, `out` has not its length, or a matrix of floats holds no `E`.
    #[inline(always)]
    pub fn widen_row<E: Element>(&self, i: usize, out: &mut [E]) {
        assert!(out.len() == self.cols(), "a row of {} numbers into {}", self.cols(), out.len());
        match self {
            WeightView::Float(view) => out.copy_from_slice(view.as_mat::<E>().row(i)),
            WeightView::Bf16 { rows, .. } => {
                for (out, w) in out.iter_mut().zip(rows.row(i)) {
                    *out = E::from_f64(f32::from_bits((w.to_bits() as u32) << 16) as f64);
                }
            }
            WeightView::Int8 { rows, scales, .. } => {
                for (out, w) in out.iter_mut().zip(rows.row(i)) {
                    *out = E::from_f64((*w as f32 * scales[i]) as f64);
                }
            }
        }
    }

    /// All values, row by row; copied unless the matrix holds them as they are.
    ///
    /// # Panics
    /// When a matrix of floats holds no `E`.
    pub fn widened<E: Element>(&self) -> Cow<'a, [E]> {
        if let WeightView::Float(view) = self {
            let mat = view.as_mat::<E>();
            if mat.stride() == mat.cols() {
                return Cow::Borrowed(mat.slice());
            }
        }
        let mut all = vec![E::ZERO; self.rows() * self.cols()];
        for (i, row) in all.chunks_exact_mut(self.cols().max(1)).enumerate() {
            self.widen_row(i, row);
        }
        Cow::Owned(all)
    }
}
