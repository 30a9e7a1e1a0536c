//! What surrounds the inner loop in a step of one token for each of a few sequences: compositions of other operations, each as few
//! launches as pay on a GPU. Everywhere else they are the operations that they are made of, one after the other.
//!
//! On a GPU in mixed precision every result is rounded to bf16 where the single operations round, except that a residual is added
//! before the rounding and not behind it.

pub(crate) mod cuda;

use crate::Result;
use crate::batch::Segment;
use crate::device::WeightView;
use crate::device::view::View;
use crate::ops::{add, conv, gelu_gate, layer_norm, linear, rms_norm, swiglu};
use crate::tensor::Tensor;

/// `norm(x) wᵀ [n, o]` and `norm(x) [n, i]` of `x [n, i]`, w `[o, i]`, `scale [1, i]`: root-mean-square norm and product.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When a shape is not as above.
pub fn norm_linear<'w>(x: View, scale: View, eps: f64, w: impl Into<WeightView<'w>>) -> Result<(Tensor, Tensor)> {
    let w = w.into();
    if let Some(gpu) = cuda::gpu(x, &w) {
        return cuda::norm_linear(gpu, x, scale, eps, w.float());
    }
    let normed = rms_norm::forward(x, scale, eps)?;
    Ok((linear::forward(normed.view(), w)?, normed))
}

/// `silu(g) ⊙ u [n, o]` of `[g | u] = norm(x) wᵀ`, w `[2 o, i]`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When a shape is not as above, or as in [`norm_linear`].
pub fn norm_swiglu<'w>(x: View, scale: View, eps: f64, w: impl Into<WeightView<'w>>) -> Result<Tensor> {
    let w = w.into();
    if let Some(gpu) = cuda::gpu(x, &w) {
        return cuda::norm_swiglu(gpu, x, scale, eps, w.float());
    }
    let normed = rms_norm::forward(x, scale, eps)?;
    swiglu::forward(linear::forward(normed.view(), w)?.view())
}

/// `y [n, o] += x wᵀ`, x `[n, i]`, w `[o, i]`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When a shape is not as above, or another handle to `y` exists.
pub fn add_linear<'w>(y: &mut Tensor, x: View, w: impl Into<WeightView<'w>>) -> Result<()> {
    let w = w.into();
    if let Some(gpu) = cuda::gpu(x, &w) {
        cuda::add_linear(gpu, &y.view_mut(), x, w.float());
        return Ok(());
    }
    let product = linear::forward(x, w)?;
    add::add_to(y.view_mut(), product.view());
    Ok(())
}

/// `y [n, o] += (gelu(gate) ⊙ LayerNorm(x)) wᵀ`, x and gate `[n, i]`; without a gate the norm alone. `norm`: weight and bias.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When a shape is not as above, or another handle to `y` exists.
pub fn add_gated_linear<'w>(
    y: &mut Tensor,
    x: View,
    norm: [View; 2],
    eps: f64,
    gate: Option<View>,
    w: impl Into<WeightView<'w>>,
) -> Result<()> {
    let w = w.into();
    if let Some(gpu) = cuda::gpu(x, &w) {
        return cuda::add_gated_linear(gpu, &y.view_mut(), x, norm, eps, gate, w.float());
    }
    let normed = layer_norm::forward(x, norm[0], norm[1], eps)?;
    let gated = match gate {
        Some(gate) => gelu_gate::forward(gate, normed.view())?,
        None => normed,
    };
    add_linear(y, gated.view(), w)
}

/// `x [n, c] += conv(norm(x))`, one row a segment; the windows are moved on. `conv`: weight `[c, taps]` and bias `[1, c]`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When a shape is not as above or as in [`conv::forward`], or another handle to `x` or the windows exists.
pub fn add_conv(
    x: &mut Tensor,
    scale: View,
    eps: f64,
    [w, bias]: [View; 2],
    segments: &[Segment],
    window: &mut Tensor,
) -> Result<()> {
    let device = x.device().clone();
    if let Some(gpu) = device.as_cuda().filter(|_| cuda::aligned_rows(x.view())) {
        return cuda::add_conv(gpu, x, scale, eps, [w, bias], segments, window);
    }
    let normed = rms_norm::forward(x.view(), scale, eps)?;
    let y = conv::forward(normed.view(), w, bias, segments, Some(window))?;
    conv::advance(normed.view(), segments, window);
    add::add_to(x.view_mut(), y.view());
    Ok(())
}
