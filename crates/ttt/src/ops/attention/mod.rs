//! Causal softmax self-attention over packed sequences, with heads of queries that share heads of keys and values.
//!
//! For one sequence and one head of queries, which reads head `j / (heads / kv heads)` of keys and values, token t and s <= t:
//!
//! ```text
//! p_ts = exp(q_t·k_s / √d − L_t),   L_t = ln Σ_{s <= t} exp(q_t·k_s / √d),   o_t = Σ_s p_ts v_s
//! ```
//!
//! and backward, from do_t and with D_t = do_t·o_t: `ds_ts = p_ts (do_t·v_s − D_t) / √d`, `dq_t = Σ_s ds_ts k_s`,
//! `dk_s = Σ_t ds_ts q_t`, `dv_s = Σ_t p_ts do_t`. Nothing of size t x t is ever held: the forward pass keeps L, from which the
//! backward pass computes each block of p again (Dao, FlashAttention-2, arXiv 2307.08691).
//!
//! Letters: n rows of the batch, h heads of queries, g heads of keys and values, d channels of a head.

mod cpu;
pub(crate) mod cuda;
mod reference;

use crate::Result;
use crate::batch::Segment;
use crate::device::Device;
use crate::device::view::{View, ViewMut};
use crate::ops::{add, expect_segments, expect_shape, fast};
use crate::tensor::{DType, Element, Tensor, with_dtype};

/// Keys and values of the tokens that each slot has read.
#[derive(Clone, Debug)]
pub struct Cache {
    /// Rotated keys, `[slots, capacity, g·d]`; rows at and after the tokens read are arbitrary.
    pub keys: Tensor,
    /// Values, `[slots, capacity, g·d]`.
    pub values: Tensor,
}

impl Cache {
    /// Without room for any token.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn empty(device: &Device, dtype: DType, slots: usize, width: usize) -> Result<Cache> {
        let empty = || Tensor::zeros(device, &[slots, 0, width], dtype);
        Ok(Cache { keys: empty()?, values: empty()? })
    }

    /// Puts keys and values `[n, g·d]` of the batch behind those of each segment's slot.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When there is no room for them, or the shapes do not fit.
    pub fn append(&mut self, k: View, v: View, segments: &[Segment]) -> Result<()> {
        for (rows, to) in [(k, &mut self.keys), (v, &mut self.values)] {
            let &[slots, capacity, width] = to.shape() else { panic!("a cache of shape {:?}", to.shape()) };
            expect_shape("keys or values", rows.shape(), [rows.rows(), width]);
            for s in segments {
                let end = s.phase + s.len;
                assert!(s.slot < slots && end <= capacity, "{end} tokens in slot {} of a cache {:?}", s.slot, [slots, capacity]);
                if rows.device().as_cuda().is_some() {
                    continue;
                }
                let first = s.slot * capacity + s.phase;
                add::copy_to(to.view_mut().row_range(first..first + s.len), rows.row_range(s.rows()));
            }
        }
        match k.device().as_cuda() {
            Some(gpu) => cuda::append(gpu, self, [k, v], segments),
            None => Ok(()),
        }
    }

    /// Keys and values of the first `tokens` tokens of a slot.
    fn past(&self, slot: usize, tokens: usize) -> [View<'_>; 2] {
        [&self.keys, &self.values].map(|tensor| {
            let &[slots, capacity, _] = tensor.shape() else { panic!("a cache of shape {:?}", tensor.shape()) };
            assert!(slot < slots && tokens <= capacity, "{tokens} tokens of slot {slot} of a cache {:?}", [slots, capacity]);
            tensor.view().row_range(slot * capacity..slot * capacity + tokens)
        })
    }
}

/// What attention reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Rotated queries, `[n, h·d]`.
    pub q: View<'a>,
    /// Rotated keys, `[n, g·d]`.
    pub k: View<'a>,
    /// Values, `[n, g·d]`.
    pub v: View<'a>,
    /// Channels of a head, d.
    pub head_dim: usize,
    /// Keys and values of what each segment's slot has read before, as many rows as the segment's phase says; without it all
    /// segments begin a sequence.
    pub past: Option<&'a Cache>,
    /// The sequences.
    pub segments: &'a [Segment],
}

impl<'a> Inputs<'a> {
    /// Checks all shapes and returns h and g.
    fn heads(&self) -> [usize; 2] {
        let d = self.head_dim;
        let [n, width] = self.q.shape();
        let kv = self.k.cols();
        expect_segments(self.segments, n);
        expect_shape("k", self.k.shape(), [n, kv]);
        expect_shape("v", self.v.shape(), [n, kv]);
        let fits = d > 0 && width.is_multiple_of(d) && kv.is_multiple_of(d) && kv > 0 && width.is_multiple_of(kv);
        assert!(fits, "{width} columns of q and {kv} of k for heads of {d}");
        assert!(self.past.is_some() || self.segments.iter().all(|s| s.phase == 0), "a sequence goes on without its past");
        [width / d, kv / d]
    }

    /// Keys and values of a segment, part by part: those before it, and its own.
    fn parts(&self, segment: &Segment) -> [[View<'a>; 2]; 2] {
        let own = [self.k, self.v].map(|x| x.row_range(segment.rows()));
        let past = match self.past {
            Some(cache) => cache.past(segment.slot, segment.phase),
            None => own.map(|x| x.row_range(0..0)),
        };
        [past, own]
    }
}

/// Where gradients go; overwritten.
#[derive(Debug)]
pub struct Grads<'a> {
    /// `[n, h·d]`.
    pub dq: ViewMut<'a>,
    /// `[n, g·d]`.
    pub dk: ViewMut<'a>,
    /// `[n, g·d]`.
    pub dv: ViewMut<'a>,
}

/// `o [n, h·d]` and `L [n, h]`, which is f32 in mixed precision.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When the shapes do not fit.
pub fn forward(inputs: &Inputs<'_>) -> Result<[Tensor; 2]> {
    let [heads, _] = inputs.heads();
    let q = &inputs.q;
    if let Some(gpu) = q.device().as_cuda() {
        return cuda::forward(gpu, inputs);
    }
    let mut o = Tensor::empty(q.device(), &[q.rows(), q.cols()], q.dtype())?;
    let mut log_sum = Tensor::empty(q.device(), &[q.rows(), heads], q.dtype())?;
    if fast(q.device(), q.dtype()) {
        cpu::forward(inputs, o.view_mut().into_mat(), log_sum.view_mut().into_mat());
    } else {
        with_dtype!(q.dtype(), E => reference::forward::<E>(inputs, o.view_mut().into_mat(), log_sum.view_mut().into_mat()));
    }
    Ok([o, log_sum])
}

/// Gradients of what [`forward`] read, from `dout [n, h·d]` and what it returned. `dpast`, of the shapes of a
/// [`Cache`], holds the gradient of the keys and values of each segment's slot after it and becomes that of those before it; without it nothing follows, and what came before
/// is a constant.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When the shapes do not fit.
pub fn backward(
    inputs: &Inputs<'_>,
    [o, log_sum]: [&Tensor; 2],
    dout: View,
    mut dpast: Option<[&mut Tensor; 2]>,
    grads: Grads<'_>,
) -> Result<()> {
    let [heads, _] = inputs.heads();
    let (n, q) = (inputs.q.rows(), &inputs.q);
    for (name, is, should) in [
        ("o", o.view().shape(), q.shape()),
        ("log_sum", log_sum.view().shape(), [n, heads]),
        ("dout", dout.shape(), q.shape()),
        ("dq", grads.dq.shape(), q.shape()),
        ("dk", grads.dk.shape(), inputs.k.shape()),
        ("dv", grads.dv.shape(), inputs.k.shape()),
    ] {
        expect_shape(name, is, should);
    }
    if let Some(gpu) = q.device().as_cuda() {
        return cuda::backward(gpu, inputs, [o, log_sum], dout, dpast, &grads);
    }
    let Grads { dq, mut dk, mut dv } = grads;
    // The rows of the pass itself start from what later passes say of them, and are no part of what came before.
    for (i, own) in [&mut dk, &mut dv].into_iter().enumerate() {
        for s in inputs.segments {
            let own = own.reborrow().row_range(s.rows());
            match &mut dpast {
                Some(past) => {
                    let &[_, capacity, width] = past[i].shape() else { panic!("gradients of shape {:?}", past[i].shape()) };
                    let first = s.slot * capacity + s.phase;
                    add::copy_to(own, past[i].view().row_range(first..first + s.len));
                    past[i].fill_zero_range(first * width..(first + s.len) * width);
                }
                None => fill_zero(own),
            }
        }
    }
    let dpast = dpast.map(|[dk, dv]| [dk, dv].map(|x| (x.shape()[1], x.view_mut())));
    if fast(q.device(), q.dtype()) {
        cpu::backward(inputs, [o.view(), log_sum.view(), dout], dpast, dq, [dk, dv]);
    } else {
        with_dtype!(q.dtype(), E => {
            reference::backward::<E>(inputs, [o.view(), log_sum.view(), dout], dpast, dq, [dk, dv]);
        });
    }
    Ok(())
}

/// Gradients of the keys or of the values of all slots, `[slots · capacity, g·d]`, behind the capacity.
type DPast<'a> = (usize, ViewMut<'a>);

fn fill_zero(x: ViewMut) {
    with_dtype!(x.dtype(), E => {
        let mut x = x.into_mat::<E>();
        (0..x.rows()).for_each(|i| x.row_mut(i).fill(E::from_f64(0.0)));
    });
}
