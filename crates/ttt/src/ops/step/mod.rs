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

/// The most rows for which norms are fused with products on a GPU: every block computes them again, and each row has fewer warps.
pub const FUSED_ROWS: usize = 4;

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

/// A causal convolution in a step of one row a segment, on what was normed: `x + conv(norm(x))`.
#[derive(Clone, Copy, Debug)]
pub struct Conv<'a> {
    /// Weight of the norm, `[1, c]`.
    pub scale: View<'a>,
    /// Weight `[c, taps]`.
    pub weight: View<'a>,
    /// Bias `[1, c]`.
    pub bias: View<'a>,
    /// The sequences.
    pub segments: &'a [Segment],
    /// Their windows, `[slots, taps - 1, c]`.
    pub window: &'a Tensor,
}

/// What [`conv_norm_linear`] makes of `x`.
#[derive(Debug)]
pub struct ConvNormLinear {
    /// `x + conv(norm(x)) [n, i]`.
    pub residual: Tensor,
    /// [`norm_linear`] of that: the product and what was multiplied.
    pub product: (Tensor, Tensor),
    /// `norm(x) [n, i]`, which comes next into the windows; they are not moved on ([`conv::advance`]).
    pub now: Tensor,
}

/// [`norm_linear`] of `x + conv(norm(x))`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When a shape is not as in [`norm_linear`] or [`conv::forward`].
pub fn conv_norm_linear<'w>(x: View, conv: Conv, scale: View, eps: f64, w: impl Into<WeightView<'w>>) -> Result<ConvNormLinear> {
    let w = w.into();
    if let Some(gpu) = cuda::gpu(x, &w).filter(|gpu| cuda::fuses_conv(gpu, x, &conv)) {
        return cuda::conv_norm_linear(gpu, x, conv, scale, eps, w.float());
    }
    let now = rms_norm::forward(x, conv.scale, eps)?;
    let mut residual = conv::forward(now.view(), conv.weight, conv.bias, conv.segments, Some(conv.window))?;
    add::add_to(residual.view_mut(), x);
    let product = norm_linear(residual.view(), scale, eps, w)?;
    Ok(ConvNormLinear { residual, product, now })
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
