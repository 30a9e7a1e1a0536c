//! On a GPU.

use crate::Result;
use crate::device::Device;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, blocks, width};
use crate::device::view::{View, ViewMut};
use crate::tensor::{DType, Tensor};

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "add",
    file: "ops/add/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "copy1", registers: 40 },
        Entry { name: "copy8", registers: 40 },
        Entry { name: "add1", registers: 40 },
        Entry { name: "add8", registers: 48 },
        Entry { name: "repeat1", registers: 40 },
        Entry { name: "repeat8", registers: 40 },
        Entry { name: "gather1", registers: 40 },
        Entry { name: "gather8", registers: 40 },
        Entry { name: "scatter1", registers: 40 },
        Entry { name: "scatter8", registers: 40 },
        Entry { name: "to_bf16_1", registers: 40 },
        Entry { name: "to_bf16_8", registers: 40 },
        Entry { name: "to_f32_1", registers: 40 },
        Entry { name: "to_f32_8", registers: 40 },
        Entry { name: "fill", registers: 40 },
        Entry { name: "add_up", registers: 48 },
    ],
};

/// A kernel from matrix to matrix, one thread for `width` elements.
fn elements(cuda: &Cuda, names: [&'static str; 2], dtype: DType, y: &ViewMut, x: View) {
    let [rows, cols] = x.shape();
    let wide = width(&[y.as_view(), x]);
    let kernel = names[usize::from(wide == 8)];
    let args = args![y.as_view().address(), y.as_view().stride(), x.address(), x.stride(), rows, cols];
    // SAFETY: both matrices are rows x cols (checked by the caller) and borrowed; `y` mutably.
    unsafe { cuda.launch(&SOURCE, (dtype, kernel), blocks(rows * cols / wide), 256, 0, args) };
}

/// `y += x`.
pub(crate) fn add_to(cuda: &Cuda, y: &ViewMut, x: View) {
    elements(cuda, ["add1", "add8"], x.dtype(), y, x);
}

/// `y = x`.
pub(crate) fn copy_to(cuda: &Cuda, y: &ViewMut, x: View) {
    elements(cuda, ["copy1", "copy8"], x.dtype(), y, x);
}

/// `y = x` in another type.
pub(crate) fn convert(cuda: &Cuda, y: &ViewMut, x: View) {
    match (x.dtype(), y.as_view().dtype()) {
        (from, to) if from == to => copy_to(cuda, y, x),
        (DType::F32, DType::Bf16) => elements(cuda, ["to_bf16_1", "to_bf16_8"], DType::F32, y, x),
        (DType::Bf16, DType::F32) => elements(cuda, ["to_f32_1", "to_f32_8"], DType::F32, y, x),
        (from, to) => panic!("{from:?} to {to:?} on a GPU"),
    }
}

/// `y[i] = x[rows[i]]`, or with `scatter` `y[rows[i]] = x[i]`.
pub(crate) fn rows(cuda: &Cuda, y: &ViewMut, x: View, index: &[u32], scatter: bool) -> Result<()> {
    let buffer = cuda.upload(index)?;
    rows_at(cuda, y, x, (buffer.address(), index.len()), scatter);
    Ok(())
}

/// [`rows`] whose index lies in the GPU's memory.
pub(crate) fn rows_at(cuda: &Cuda, y: &ViewMut, x: View, (index, rows): (u64, usize), scatter: bool) {
    let wide = width(&[y.as_view(), x]);
    let kernel = match (scatter, wide) {
        (false, 1) => "gather1",
        (false, _) => "gather8",
        (true, 1) => "scatter1",
        (true, _) => "scatter8",
    };
    let cols = x.cols();
    let args = args![y.as_view().address(), y.as_view().stride(), x.address(), x.stride(), index, rows, cols];
    // SAFETY: the matrices have `cols` columns, and the rows that are named (checked by the caller).
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, args) };
}

/// `y[i] = x[i % x.rows()]`.
pub(crate) fn repeat(cuda: &Cuda, y: &ViewMut, x: View) {
    let y = y.as_view();
    let wide = width(&[y, x]);
    let kernel = if wide == 8 { "repeat8" } else { "repeat1" };
    let args = args![y.address(), y.stride(), x.address(), x.stride(), x.rows(), y.rows(), y.cols()];
    // SAFETY: both have the same number of columns (the caller splits one matrix); `y` is mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(y.rows() * y.cols() / wide), 256, 0, args) };
}

/// f32 numbers that are all `value`, or with `harmonic` value / (i + 1): made on the GPU, so that a step that is recorded can.
pub(crate) fn filled(cuda: &Cuda, device: &Device, shape: &[usize], value: f64, harmonic: bool) -> Result<Tensor> {
    let mut y = Tensor::empty(device, shape, DType::F32)?;
    let list = args![y.view_mut().as_view().address(), y.len(), value as f32, usize::from(harmonic)];
    // SAFETY: `y` was just made.
    unsafe { cuda.launch(&SOURCE, (DType::F32, "fill"), blocks(y.len()), 256, 0, list) };
    Ok(y)
}

/// `y[c] += Σ_i partials[i, first + c]`, `y` contiguous, in an order that depends on `count` alone.
pub(crate) fn add_up(cuda: &Cuda, y: &ViewMut, partials: u64, [count, width]: [usize; 2], first: usize) {
    let cols = y.as_view().rows() * y.as_view().cols();
    add_up_pieces(cuda, y, partials, [count, width], first, [cols, 0]);
}

/// [`add_up`] where each `piece` columns of `y` lie `step` columns apart in the partial sums.
pub(crate) fn add_up_pieces(
    cuda: &Cuda,
    y: &ViewMut,
    partials: u64,
    [count, width]: [usize; 2],
    first: usize,
    [piece, step]: [usize; 2],
) {
    let y = y.as_view();
    let cols = y.rows() * y.cols();
    assert!(y.stride() == y.cols() || y.rows() <= 1, "sums go into a contiguous matrix");
    let args = args![y.address(), partials, count, width, first, piece.max(1), step, cols];
    // SAFETY: `partials` is [count, width], and the columns that are read lie in it (the callers lay it out so).
    unsafe { cuda.launch(&SOURCE, (DType::F32, "add_up"), [cols.div_ceil(32), 1, 1], 1024, 0, args) };
}
