//! One token of each of some sequences on a GPU in mixed precision, from the projections on, in one launch: the convolutions and
//! RoPE of q and k, the gate of the learning rate, and the token itself. What [`super::super::forward`] does after those operations, rounded
//! where they round.

use super::{decode, decode_shared};
use crate::Result;
use crate::batch::Segment;
use crate::config::Inner;
use crate::device::cuda::{Cuda, width};
use crate::device::view::View;
use crate::ops::inner::FastWeights;
use crate::ops::{conv, expect_segments, expect_shape, rope};
use crate::tensor::{DType, Tensor};

/// What a step reads. Letters: n rows, h heads of d columns, K tokens of a mini-batch.
pub(crate) struct Inputs<'a> {
    /// The projections, `[n, ·]` in blocks of `h d` columns: with convolutions their input, then v; otherwise q, k, v.
    pub(crate) projected: View<'a>,
    /// What was projected, `[n, h d]`.
    pub(crate) normed: View<'a>,
    /// Gate of the learning rate: weight `[h, h d]`, bias `[1, h]` and what its sigmoid is multiplied by.
    pub(crate) rate: (View<'a>, View<'a>, f64),
    /// Learned scale of a mini-batch's tokens before the clamp, `[1, K]`.
    pub(crate) token_idx: View<'a>,
    /// Weight and bias of the inner LayerNorm, `[h, d]`.
    pub(crate) norm: [View<'a>; 2],
    /// Angles.
    pub(crate) rope: &'a rope::Table,
    /// Weight `[h d, taps]` and bias `[1, h d]` of the convolutions of q and k.
    pub(crate) convs: Option<[(View<'a>, View<'a>); 2]>,
    /// The sequences, one row each.
    pub(crate) segments: &'a [Segment],
}

/// `StepParams` of params.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Params {
    projected: u64,
    normed: u64,
    rate_weight: u64,
    rate_bias: u64,
    token_idx: u64,
    gamma: u64,
    beta: u64,
    cosine: u64,
    sine: u64,
    taps_of: [u64; 2],
    bias_of: [u64; 2],
    window: u64,
    segments: u64,
    z: u64,
    weights: u64,
    rows: u64,
    pre_window: u64,
    pre_now: u64,
    stride: u32,
    heads: u32,
    mini_batch: u32,
    taps: u32,
    pre_taps: u32,
    pub(super) rate_scale: f32,
}

/// Whether the kernel is for such a layer: type of the activations, head size, mini-batch and taps.
pub(crate) fn covers(cuda: &Cuda, dtype: DType, head_dim: usize, mini_batch: usize, taps: usize) -> bool {
    let fits = || decode_shared(head_dim, mini_batch) <= cuda.info().shared_bytes;
    dtype == DType::Bf16 && decode(head_dim).is_some() && mini_batch <= 64 && taps <= conv::cuda::MAX_TAPS && fits()
}

/// Reads a token of each sequence and moves its slot on; returns z `[n, h d]`. `before` are the windows of the convolution before the
/// layer and what comes next into them, `[n, h d]`: they are moved on too.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When shapes disagree, a segment has not one token, or [`covers`] says no.
pub(crate) fn step(
    cuda: &Cuda,
    inputs: &Inputs<'_>,
    state: &mut FastWeights,
    window: Option<&mut Tensor>,
    before: Option<(&mut Tensor, &Tensor)>,
) -> Result<Tensor> {
    let (projected, normed) = (inputs.projected, inputs.normed);
    let (n, heads, d, k) = (normed.rows(), state.heads(), state.head_dim(), state.mini_batch());
    let width_of_all = heads * d;
    let (rate_weight, rate_bias, rate_scale) = inputs.rate;
    let taps = inputs.convs.map_or(1, |convs| convs[0].0.cols());
    assert!(state.inner() == Inner::Linear && covers(cuda, projected.dtype(), d, k, taps), "no kernel for heads of {d}");
    let blocks = if inputs.convs.is_some() { 2 } else { 3 };
    assert!(projected.rows() == n && projected.cols() >= blocks * width_of_all, "projections {:?}", projected.shape());
    expect_shape("normed", normed.shape(), [n, width_of_all]);
    expect_shape("the gate's weight", rate_weight.shape(), [heads, width_of_all]);
    expect_shape("the gate's bias", rate_bias.shape(), [1, heads]);
    expect_shape("token_idx", inputs.token_idx.shape(), [1, k]);
    inputs.norm.iter().for_each(|part| expect_shape("norm", part.shape(), [heads, d]));
    assert!(inputs.rope.positions() == k && inputs.rope.head_dim() == d, "angles of another layer");
    assert!(width(&[normed, rate_weight]) == 8, "rows that are not aligned");
    expect_segments(inputs.segments, n);
    let mut seen = vec![false; state.slots()];
    for s in inputs.segments {
        assert!(s.len == 1 && s.phase < k && s.slot < state.slots(), "{s:?} in a step of {} slots", state.slots());
        assert!(!std::mem::replace(&mut seen[s.slot], true), "two segments of a batch name the same slot");
    }
    let (mut taps_of, mut bias_of, mut window_at) = ([0; 2], [0; 2], 0);
    if let Some(convs) = inputs.convs {
        let window = window.expect("convolutions have a window");
        conv::expect_window(window, inputs.segments, taps - 1, width_of_all);
        window_at = window.view_mut().as_view().address();
        // k first: the first half of a block's threads makes it.
        for (i, (weight, bias)) in convs.into_iter().rev().enumerate() {
            expect_shape("w", weight.shape(), [width_of_all, taps]);
            expect_shape("bias", bias.shape(), [1, width_of_all]);
            assert!(weight.stride() == taps, "weights of a convolution lie one behind the other");
            (taps_of[i], bias_of[i]) = (weight.address(), bias.address());
        }
    }
    let (mut pre_window, mut pre_now, mut pre_taps) = (0, 0, 1);
    if let Some((window, now)) = before {
        pre_taps = window.shape()[1] + 1;
        conv::expect_window(window, inputs.segments, pre_taps - 1, width_of_all);
        expect_shape("what comes into the windows", now.view().shape(), [n, width_of_all]);
        assert!(pre_taps <= conv::cuda::MAX_TAPS, "{pre_taps} taps");
        (pre_window, pre_now) = (window.view_mut().as_view().address(), now.address());
    }
    let z = Tensor::empty(projected.device(), &[n, width_of_all], DType::Bf16)?;
    let uploaded = cuda.segments(inputs.segments)?;
    let [cosine, sine] = inputs.rope.parts().map(|part| part.address());
    let (weights, rows) = state.tensors_mut();
    let params = Params {
        projected: projected.address(),
        normed: normed.address(),
        rate_weight: rate_weight.address(),
        rate_bias: rate_bias.address(),
        token_idx: inputs.token_idx.address(),
        gamma: inputs.norm[0].address(),
        beta: inputs.norm[1].address(),
        cosine,
        sine,
        taps_of,
        bias_of,
        window: window_at,
        segments: uploaded.segments(),
        z: z.address(),
        weights: weights.view_mut().as_view().address(),
        rows: rows.view_mut().as_view().address(),
        pre_window,
        pre_now,
        stride: projected.stride() as u32,
        heads: heads as u32,
        mini_batch: k as u32,
        taps: taps as u32,
        pre_taps: pre_taps as u32,
        rate_scale: rate_scale as f32,
    };
    let kernel = (DType::Bf16, "ttt_linear_step");
    let source = decode(d).expect("checked above");
    // SAFETY: shapes and segments were checked above; what is written is owned or mutably borrowed.
    unsafe { cuda.launch_overlapped(source, kernel, [n * heads, 1, 1], 2 * d, decode_shared(d, k), &params) };
    Ok(z)
}
