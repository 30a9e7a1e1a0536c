//! The learned scale of a mini-batch's tokens: `tok_i = max(0, 1/(i + 1) + idx_i)`. K numbers, so there is only the reference.

mod reference;

use crate::Result;
use crate::device::view::{View, ViewMut};
use crate::ops::expect_shape;
use crate::ops::inner_lr::cuda;
use crate::tensor::{Tensor, with_dtype};

/// `tok [1, k]` of `idx [1, k]`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When `idx` has not one row.
pub fn forward(idx: View) -> Result<Tensor> {
    expect_shape("idx", idx.shape(), [1, idx.cols()]);
    let mut tok = Tensor::empty(idx.device(), &idx.shape(), idx.dtype())?;
    if let Some(gpu) = idx.device().as_cuda() {
        cuda::token_scale(gpu, idx, &tok.view_mut());
        return Ok(tok);
    }
    with_dtype!(idx.dtype(), E => reference::forward::<E>(idx.as_mat(), tok.view_mut().into_mat()));
    Ok(tok)
}

/// `didx_i += dtok_i` where the clamp does not hold, all `[1, k]`.
///
/// # Panics
/// When the shapes differ.
pub fn backward(dtok: View, idx: View, didx: ViewMut) {
    expect_shape("idx", idx.shape(), [1, idx.cols()]);
    expect_shape("dtok", dtok.shape(), idx.shape());
    expect_shape("didx", didx.shape(), idx.shape());
    if let Some(gpu) = idx.device().as_cuda() {
        return cuda::token_scale_backward(gpu, dtok, idx, &didx);
    }
    with_dtype!(idx.dtype(), E => reference::backward::<E>(dtok.as_mat(), idx.as_mat(), didx.into_mat()));
}
