//! Borrowed matrices: what operations read and write.
//!
//! Everything an operation touches is a matrix of rows (tokens, mostly) with a row stride, so that a block of columns of a
//! fused matrix (`[q|v|g]`, say) is read and written in place. [`View`] and [`ViewMut`] have their type at run time and cross the
//! public doors of operations; [`Mat`] and [`MatMut`] have it at compile time and reach the kernels.

use std::marker::PhantomData;
use std::ops::Range;

use crate::device::Device;
use crate::tensor::{DType, Element};

/// A borrowed matrix `[rows, cols]` of `E`, rows `stride` elements apart.
#[derive(Debug)]
pub struct Mat<'a, E> {
    ptr: *const E,
    rows: usize,
    cols: usize,
    stride: usize,
    marker: PhantomData<&'a [E]>,
}

/// A mutably borrowed matrix `[rows, cols]` of `E`, rows `stride` elements apart.
///
/// Two of them may interleave in memory (column blocks of one matrix), but they never share an element.
#[derive(Debug)]
pub struct MatMut<'a, E> {
    ptr: *mut E,
    rows: usize,
    cols: usize,
    stride: usize,
    marker: PhantomData<&'a mut [E]>,
}

// SAFETY: a Mat is a shared borrow of its elements.
unsafe impl<E: Sync> Send for Mat<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Sync> Sync for Mat<'_, E> {}
// SAFETY: a MatMut is the only borrow of its elements.
unsafe impl<E: Send> Send for MatMut<'_, E> {}
// SAFETY: through a shared reference a MatMut only reads.
unsafe impl<E: Sync> Sync for MatMut<'_, E> {}

impl<E> Clone for Mat<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for Mat<'_, E> {}

impl<'a, E> Mat<'a, E> {
    /// A slice as a matrix of `rows` x `cols`.
    ///
    /// # Panics
    /// When the slice has another length.
    pub fn new(data: &'a [E], rows: usize, cols: usize) -> Self {
        assert!(rows.checked_mul(cols) == Some(data.len()), "a slice of {} elements is no matrix of {rows} x {cols}", data.len());
        Mat { ptr: data.as_ptr(), rows, cols, stride: cols, marker: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Address of the first element.
    pub fn as_ptr(&self) -> *const E {
        self.ptr
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [E] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: row `i` lies inside the borrowed matrix.
        unsafe { std::slice::from_raw_parts(self.ptr.add(i * self.stride), self.cols) }
    }

    /// All elements, when the rows lie one behind the other.
    ///
    /// # Panics
    /// When they do not.
    pub fn slice(&self) -> &'a [E] {
        assert!(self.stride == self.cols || self.rows <= 1, "rows of {} columns lie {} apart", self.cols, self.stride);
        // SAFETY: the rows are contiguous.
        unsafe { std::slice::from_raw_parts(self.ptr, self.rows * self.cols) }
    }

    /// The rows of `range`.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn row_range(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        // wrapping_add: for an empty range at the end of a column block the address may lie outside the allocation.
        Mat { ptr: self.ptr.wrapping_add(range.start * self.stride), rows: range.len(), ..*self }
    }

    /// The columns of `range`.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn col_range(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.cols, "columns {range:?} of {}", self.cols);
        Mat { ptr: self.ptr.wrapping_add(range.start), cols: range.len(), ..*self }
    }

    /// The same elements as `rows` x `cols`, when the rows lie one behind the other.
    ///
    /// # Panics
    /// When they do not, or their number differs.
    pub fn reshape(&self, rows: usize, cols: usize) -> Self {
        Mat::new(self.slice(), rows, cols)
    }
}

impl<'a, E> MatMut<'a, E> {
    /// A slice as a matrix of `rows` x `cols`.
    ///
    /// # Panics
    /// When the slice has another length.
    pub fn new(data: &'a mut [E], rows: usize, cols: usize) -> Self {
        assert!(rows.checked_mul(cols) == Some(data.len()), "a slice of {} elements is no matrix of {rows} x {cols}", data.len());
        MatMut { ptr: data.as_mut_ptr(), rows, cols, stride: cols, marker: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Address of the first element.
    pub fn as_mut_ptr(&mut self) -> *mut E {
        self.ptr
    }

    /// The same matrix, to read.
    pub fn as_ref(&self) -> Mat<'_, E> {
        Mat { ptr: self.ptr, rows: self.rows, cols: self.cols, stride: self.stride, marker: PhantomData }
    }

    /// The same matrix, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> MatMut<'_, E> {
        MatMut { ptr: self.ptr, rows: self.rows, cols: self.cols, stride: self.stride, marker: PhantomData }
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &[E] {
        self.as_ref().row(i)
    }

    /// Row `i`, to write.
    #[inline(always)]
    pub fn row_mut(&mut self, i: usize) -> &mut [E] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: row `i` lies inside the matrix, which is mutably borrowed for as long as the row.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.stride), self.cols) }
    }

    /// All elements, when the rows lie one behind the other.
    ///
    /// # Panics
    /// When they do not.
    pub fn slice_mut(&mut self) -> &mut [E] {
        assert!(self.stride == self.cols || self.rows <= 1, "rows of {} columns lie {} apart", self.cols, self.stride);
        // SAFETY: the rows are contiguous.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.rows * self.cols) }
    }

    /// Splits into the rows before `mid` and the rest.
    ///
    /// # Panics
    /// When there are fewer than `mid` rows.
    pub fn split_rows(self, mid: usize) -> (MatMut<'a, E>, MatMut<'a, E>) {
        assert!(mid <= self.rows, "row {mid} of {}", self.rows);
        let rest = MatMut { ptr: self.ptr.wrapping_add(mid * self.stride), rows: self.rows - mid, ..self };
        (MatMut { rows: mid, ..self }, rest)
    }

    /// Splits into the columns before `mid` and the rest.
    ///
    /// # Panics
    /// When there are fewer than `mid` columns.
    pub fn split_cols(self, mid: usize) -> (MatMut<'a, E>, MatMut<'a, E>) {
        assert!(mid <= self.cols, "column {mid} of {}", self.cols);
        let rest = MatMut { ptr: self.ptr.wrapping_add(mid), cols: self.cols - mid, ..self };
        (MatMut { cols: mid, ..self }, rest)
    }

    /// The rows of `range`.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn row_range(self, range: Range<usize>) -> MatMut<'a, E> {
        self.split_rows(range.end).0.split_rows(range.start).1
    }

    /// The columns of `range`.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn col_range(self, range: Range<usize>) -> MatMut<'a, E> {
        self.split_cols(range.end).0.split_cols(range.start).1
    }

    /// The same elements as `rows` x `cols`, when the rows lie one behind the other.
    ///
    /// # Panics
    /// When they do not, or their number differs.
    pub fn reshape(self, rows: usize, cols: usize) -> MatMut<'a, E> {
        assert!(self.stride == self.cols || self.rows <= 1, "rows of {} columns lie {} apart", self.cols, self.stride);
        assert!(
            rows.checked_mul(cols) == Some(self.rows * self.cols),
            "{} x {} elements are no matrix of {rows} x {cols}",
            self.rows,
            self.cols
        );
        MatMut { rows, cols, stride: cols, ..self }
    }
}

/// A borrowed matrix whose element type is known at run time.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    mat: Mat<'a, u8>,
    dtype: DType,
    device: &'a Device,
}

/// A mutably borrowed matrix whose element type is known at run time.
#[derive(Debug)]
pub struct ViewMut<'a> {
    mat: MatMut<'a, u8>,
    dtype: DType,
    device: &'a Device,
}

// Inside a View the matrix of bytes counts columns and stride in *elements*; `as_mat` gives them their type back.

impl<'a> View<'a> {
    /// A matrix on `device` whose type is known at run time.
    pub fn new<E: Element>(mat: Mat<'a, E>, device: &'a Device) -> Self {
        let Mat { ptr, rows, cols, stride, marker: _ } = mat;
        View { mat: Mat { ptr: ptr.cast(), rows, cols, stride, marker: PhantomData }, dtype: E::DTYPE, device }
    }

    /// A contiguous matrix in a GPU's memory.
    pub(crate) fn on_gpu(address: u64, [rows, cols]: [usize; 2], dtype: DType, device: &'a Device) -> Self {
        View { mat: Mat { ptr: address as *const u8, rows, cols, stride: cols, marker: PhantomData }, dtype, device }
    }

    /// Address in the GPU's memory.
    ///
    /// # Panics
    /// When the matrix lies in main memory.
    pub(crate) fn address(&self) -> u64 {
        assert!(self.device.as_cuda().is_some(), "a matrix of the CPU where a GPU's was expected");
        self.mat.ptr as u64
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.mat.stride
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.mat.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.mat.cols
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.mat.rows, self.mat.cols]
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the matrix lives.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// The matrix with its element type.
    ///
    /// # Panics
    /// When the elements are not `E`, or lie in a GPU's memory.
    pub fn as_mat<E: Element>(&self) -> Mat<'a, E> {
        assert!(self.device.as_cuda().is_none(), "a matrix of a GPU where the CPU's was expected");
        assert_eq!(self.dtype, E::DTYPE, "the elements are {:?}, not {:?}", self.dtype, E::DTYPE);
        Mat { ptr: self.mat.ptr.cast(), rows: self.mat.rows, cols: self.mat.cols, stride: self.mat.stride, marker: PhantomData }
    }

    /// The rows of `range`.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn row_range(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.mat.rows, "rows {range:?} of {}", self.mat.rows);
        let ptr = self.mat.ptr.wrapping_add(range.start * self.mat.stride * self.dtype.size());
        View { mat: Mat { ptr, rows: range.len(), ..self.mat }, ..*self }
    }

    /// The columns of `range`.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn col_range(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.mat.cols, "columns {range:?} of {}", self.mat.cols);
        let ptr = self.mat.ptr.wrapping_add(range.start * self.dtype.size());
        View { mat: Mat { ptr, cols: range.len(), ..self.mat }, ..*self }
    }

    /// The same elements as `rows` x `cols`, when the rows lie one behind the other.
    ///
    /// # Panics
    /// When they do not, or their number differs.
    pub fn reshape(&self, rows: usize, cols: usize) -> Self {
        let mat = self.mat;
        assert!(mat.stride == mat.cols || mat.rows <= 1, "rows of {} columns lie {} apart", mat.cols, mat.stride);
        assert!(
            rows.checked_mul(cols) == Some(mat.rows * mat.cols),
            "{} x {} elements are no matrix of {rows} x {cols}",
            mat.rows,
            mat.cols
        );
        View { mat: Mat { rows, cols, stride: cols, ..mat }, ..*self }
    }
}

impl<'a> ViewMut<'a> {
    /// A matrix on `device` whose type is known at run time.
    pub fn new<E: Element>(mat: MatMut<'a, E>, device: &'a Device) -> Self {
        let MatMut { ptr, rows, cols, stride, marker: _ } = mat;
        ViewMut { mat: MatMut { ptr: ptr.cast(), rows, cols, stride, marker: PhantomData }, dtype: E::DTYPE, device }
    }

    /// A contiguous matrix in a GPU's memory.
    pub(crate) fn on_gpu(address: u64, [rows, cols]: [usize; 2], dtype: DType, device: &'a Device) -> Self {
        ViewMut { mat: MatMut { ptr: address as *mut u8, rows, cols, stride: cols, marker: PhantomData }, dtype, device }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.mat.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.mat.cols
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.mat.rows, self.mat.cols]
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the matrix lives.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// The matrix with its element type.
    ///
    /// # Panics
    /// When the elements are not `E`.
    pub fn as_mat<E: Element>(&mut self) -> MatMut<'_, E> {
        self.reborrow().into_mat()
    }

    /// The matrix with its element type.
    ///
    /// # Panics
    /// When the elements are not `E`, or lie in a GPU's memory.
    pub fn into_mat<E: Element>(self) -> MatMut<'a, E> {
        assert!(self.device.as_cuda().is_none(), "a matrix of a GPU where the CPU's was expected");
        assert_eq!(self.dtype, E::DTYPE, "the elements are {:?}, not {:?}", self.dtype, E::DTYPE);
        MatMut { ptr: self.mat.ptr.cast(), rows: self.mat.rows, cols: self.mat.cols, stride: self.mat.stride, marker: PhantomData }
    }

    /// The same matrix, to read.
    pub fn as_view(&self) -> View<'_> {
        View { mat: self.mat.as_ref(), dtype: self.dtype, device: self.device }
    }

    /// The same matrix, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { mat: self.mat.reborrow(), dtype: self.dtype, device: self.device }
    }

    /// Splits into the columns before `mid` and the rest.
    ///
    /// # Panics
    /// When there are fewer than `mid` columns.
    pub fn split_cols(self, mid: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        assert!(mid <= self.mat.cols, "column {mid} of {}", self.mat.cols);
        let ViewMut { mat, dtype, device } = self;
        let rest = MatMut { ptr: mat.ptr.wrapping_add(mid * dtype.size()), cols: mat.cols - mid, ..mat };
        (ViewMut { mat: MatMut { cols: mid, ..mat }, dtype, device }, ViewMut { mat: rest, dtype, device })
    }

    /// Splits into the rows before `mid` and the rest.
    ///
    /// # Panics
    /// When there are fewer than `mid` rows.
    pub fn split_rows(self, mid: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        assert!(mid <= self.mat.rows, "row {mid} of {}", self.mat.rows);
        let ViewMut { mat, dtype, device } = self;
        let rest = MatMut { ptr: mat.ptr.wrapping_add(mid * mat.stride * dtype.size()), rows: mat.rows - mid, ..mat };
        (ViewMut { mat: MatMut { rows: mid, ..mat }, dtype, device }, ViewMut { mat: rest, dtype, device })
    }

    /// The columns of `range`.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn col_range(self, range: Range<usize>) -> ViewMut<'a> {
        self.split_cols(range.end).0.split_cols(range.start).1
    }

    /// The rows of `range`.
    ///
    /// # Panics
    /// When they do not exist.
    pub fn row_range(self, range: Range<usize>) -> ViewMut<'a> {
        self.split_rows(range.end).0.split_rows(range.start).1
    }

    /// The elements of `range` of a contiguous matrix as `rows` x `cols`.
    ///
    /// # Panics
    /// When the rows do not lie one behind the other, or the number of elements differs.
    pub fn reshape_range(self, range: Range<usize>, rows: usize, cols: usize) -> ViewMut<'a> {
        let elements = self.mat.rows * self.mat.cols;
        self.reshape(elements, 1).row_range(range).reshape(rows, cols)
    }

    /// The same elements as `rows` x `cols`, when the rows lie one behind the other.
    ///
    /// # Panics
    /// When they do not, or their number differs.
    pub fn reshape(self, rows: usize, cols: usize) -> ViewMut<'a> {
        let ViewMut { mat, dtype, device } = self;
        ViewMut { mat: mat.reshape(rows, cols), dtype, device }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn column_blocks_are_disjoint() {
        let mut data: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let (mut left, mut right) = MatMut::new(&mut data, 3, 4).split_cols(1);
        left.row_mut(1)[0] = -1.0;
        right.row_mut(2)[2] = -2.0;
        assert_eq!(right.row(0), [1.0, 2.0, 3.0]);
        assert_eq!(data, [0.0, 1.0, 2.0, 3.0, -1.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, -2.0]);
    }

    #[test]
    #[should_panic(expected = "rows of 1 columns lie 4 apart")]
    fn a_column_block_is_no_slice() {
        let mut data = vec![0f32; 12];
        MatMut::new(&mut data, 3, 4).split_cols(1).0.slice_mut();
    }
}
