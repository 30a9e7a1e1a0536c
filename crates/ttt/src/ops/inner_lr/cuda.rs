//! On a GPU; here also [`crate::ops::token_scale`].

use crate::Result;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, blocks};
use crate::device::view::{View, ViewMut};
use crate::ops::add;
use crate::ops::partials::gpu_rows;
use crate::tensor::{DType, Tensor};

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "inner_lr",
    file: "ops/inner_lr/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "gate", registers: 40 },
        Entry { name: "gate_backward", registers: 48 },
        Entry { name: "token_scale", registers: 40 },
        Entry { name: "token_scale_backward", registers: 40 },
    ],
};

/// Threads of a block of the backward, and the most heads.
pub(crate) const MAX_HEADS: usize = 256;

/// `lr ← scale · sigmoid(lr + bias)`.
pub(crate) fn gate(cuda: &Cuda, lr: &ViewMut, bias: View, scale: f64) {
    let lr = lr.as_view();
    let [rows, heads] = lr.shape();
    let list = args![lr.address(), bias.address(), rows, heads, scale as f32];
    // SAFETY: `lr` is contiguous and mutably borrowed, `bias` has `heads` numbers (checked by the caller).
    unsafe { cuda.launch(&SOURCE, (DType::F32, "gate"), blocks(rows * heads), 256, 0, list) };
}

/// Writes `da`, adds to `dbias`.
pub(crate) fn gate_backward(cuda: &Cuda, dlr: View, lr: View, scale: f64, dbias: &ViewMut, da: &ViewMut) -> Result<()> {
    let (da, [rows, heads]) = (da.as_view(), lr.shape());
    assert!(heads <= MAX_HEADS, "{heads} heads; the kernel takes {MAX_HEADS}");
    let [rows_per_block, count] = gpu_rows(rows);
    let partials = Tensor::empty(lr.device(), &[count, heads], DType::F32)?;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let list = args![
        da.address(),
        partials.address(),
        dlr.address(),
        dlr.stride(),
        lr.address(),
        lr.stride(),
        rows,
        heads,
        rows_per_block,
        inverse as f32
    ];
    // SAFETY: the shapes were checked by the caller; `da` is contiguous and mutably borrowed, `partials` has a row for each block.
    unsafe { cuda.launch(&SOURCE, (da.dtype(), "gate_backward"), [count, 1, 1], MAX_HEADS, 4 * MAX_HEADS, list) };
    add::cuda::add_up(cuda, dbias, partials.address(), [count, heads], 0);
    Ok(())
}

/// Writes `tok`.
pub(crate) fn token_scale(cuda: &Cuda, idx: View, tok: &ViewMut) {
    let list = args![tok.as_view().address(), idx.address(), idx.cols()];
    // SAFETY: both are [1, k] (checked by the caller).
    unsafe { cuda.launch(&SOURCE, (DType::F32, "token_scale"), blocks(idx.cols()), 256, 0, list) };
}

/// Adds to `didx`.
pub(crate) fn token_scale_backward(cuda: &Cuda, dtok: View, idx: View, didx: &ViewMut) {
    let list = args![didx.as_view().address(), dtok.address(), idx.address(), idx.cols()];
    // SAFETY: all are [1, k] (checked by the caller).
    unsafe { cuda.launch(&SOURCE, (DType::F32, "token_scale_backward"), blocks(idx.cols()), 256, 0, list) };
}
