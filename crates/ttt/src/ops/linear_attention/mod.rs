//! Causal linear attention, without softmax: the first rungs of the paper's ladder, and what batch descent is made of (Theorem 1).
//!
//! With φ the feature map (none, or elu + 1) and ones where the kind has them, for one sequence and head:
//! ```text
//! o_t = Σ_{s≤t} (φ(q_t)·φ(k_s) + one) v_s                       one = 1 for Biased, otherwise 0
//! o_t = Σ_{s≤t} φ(q_t)·φ(k_s) v_s / (ε + Σ_{s≤t} φ(q_t)·φ(k_s))  for Normalised
//! S   = Σ φ(k_s)ᵀ v_s,   s = Σ v_s (Biased) or Σ φ(k_s) (Normalised)
//! ```
//! S and s are all that is carried from token to token, so sequences may be cut anywhere. Fast code works in chunks: within a chunk
//! the products of queries and keys, between chunks S.

pub(crate) mod cpu;
pub(crate) mod cuda;
pub(crate) mod reference;

use rayon::prelude::*;

use crate::Result;
use crate::batch::Segment;
use crate::device::view::{Mat, MatMut, View, ViewMut};
use crate::ops::{expect_segments, expect_shape, fast};
use crate::tensor::{Element, Tensor, with_dtype};

/// Added to the normaliser, as in the code of Katharopoulos et al. (arXiv 2006.16236).
pub(crate) const EPS: f64 = 1e-6;

/// Tokens of a chunk of the fast code.
pub(crate) use cpu::CHUNK;

/// Which linear attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Products of queries and keys as they are.
    Plain,
    /// The same with one more feature in both that is always 1: what a bias of the inner model adds.
    Biased,
    /// Feature map φ(x) = elu(x) + 1 and division by the sum of weights (Katharopoulos et al.).
    Normalised,
}

/// Elements of a head's state: `[S d×d | s d]`.
pub fn state_len(d: usize) -> usize {
    d * d + d
}

/// What linear attention reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[n, h*d]`.
    pub q: View<'a>,
    /// `[n, h*d]`.
    pub k: View<'a>,
    /// `[n, h*d]`.
    pub v: View<'a>,
    /// Number of heads, h.
    pub heads: usize,
    /// Which one.
    pub kind: Kind,
    /// The sequences, their rows one behind the other, no two in a slot.
    pub segments: &'a [Segment],
}

/// Where gradients go; overwritten.
#[derive(Debug)]
pub struct Grads<'a> {
    /// `[n, h*d]`.
    pub dq: ViewMut<'a>,
    /// `[n, h*d]`.
    pub dk: ViewMut<'a>,
    /// `[n, h*d]`.
    pub dv: ViewMut<'a>,
}

impl Inputs<'_> {
    /// Tokens and head width.
    fn sizes(&self) -> (usize, usize) {
        let [n, wide] = self.q.shape();
        expect_shape("k", self.k.shape(), [n, wide]);
        expect_shape("v", self.v.shape(), [n, wide]);
        assert!(self.heads > 0 && wide % self.heads == 0, "{wide} columns for {} heads", self.heads);
        expect_segments(self.segments, n);
        (n, wide / self.heads)
    }

    fn fast(&self) -> bool {
        fast(self.q.device(), self.q.dtype())
    }
}

/// Reads all segments and moves their slots of `state` `[slots, h, d² + d]` on; returns o `[n, h*d]`. With `keep` also the states
/// that the segments began with, `[segments, h, d² + d]`, for [`backward`].
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When shapes disagree or two segments share a slot.
pub fn forward(inputs: &Inputs<'_>, state: &mut Tensor, keep: bool) -> Result<(Tensor, Option<Tensor>)> {
    let (n, d) = inputs.sizes();
    let start = if keep { Some(starts(inputs.segments, state)?) } else { None };
    let mut o = Tensor::empty(inputs.q.device(), &[n, inputs.heads * d], inputs.q.dtype())?;
    if let Some(gpu) = inputs.q.device().as_cuda() {
        cuda::forward(gpu, inputs, state, &mut o)?;
    } else if inputs.fast() {
        run(inputs, state, o.view_mut(), cpu::scratch(d), cpu::forward)?;
    } else {
        with_dtype!(inputs.q.dtype(), E => run::<E>(inputs, state, o.view_mut(), 0, reference::forward)?);
    }
    Ok((o, start))
}

/// Gradients of everything that [`forward`] read. `dstate` `[segments, h, d² + d]` holds the gradient of each segment's final state
/// and becomes that of its first, `start`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When shapes disagree.
pub fn backward(inputs: &Inputs<'_>, start: &Tensor, dout: View<'_>, dstate: &mut Tensor, grads: Grads<'_>) -> Result<()> {
    let (n, d) = inputs.sizes();
    let wide = [n, inputs.heads * d];
    for (name, shape) in [("dout", dout.shape()), ("dq", grads.dq.shape()), ("dk", grads.dk.shape()), ("dv", grads.dv.shape())] {
        expect_shape(name, shape, wide);
    }
    let expected = [inputs.segments.len(), inputs.heads, state_len(d)];
    assert!(start.shape() == expected && dstate.shape() == expected, "states {:?} and {:?}", start.shape(), dstate.shape());
    if let Some(gpu) = inputs.q.device().as_cuda() {
        cuda::backward(gpu, inputs, start, dout, dstate, grads)
    } else if inputs.fast() {
        run_backward(inputs, start, dout, dstate, grads, cpu::backward_scratch, cpu::backward)
    } else {
        with_dtype!(inputs.q.dtype(), E => {
            run_backward::<E>(inputs, start, dout, dstate, grads, |_, _, _| 0, reference::backward)
        })
    }
}

/// The states that segments begin with.
pub(crate) fn starts(segments: &[Segment], state: &Tensor) -> Result<Tensor> {
    let [_, heads, len] = *state.shape() else { panic!("states of shape {:?}", state.shape()) };
    let mut start = Tensor::empty(state.device(), &[segments.len(), heads, len], state.dtype())?;
    if state.device().as_cuda().is_some() {
        let each = heads * len;
        for (i, segment) in segments.iter().enumerate() {
            start.copy_from(i * each, state, segment.slot * each..(segment.slot + 1) * each);
        }
        return Ok(start);
    }
    with_dtype!(state.dtype(), E => {
        let (from, to) = (state.as_slice::<E>(), start.as_mut_slice::<E>());
        for (segment, to) in segments.iter().zip(to.chunks_exact_mut(heads * len)) {
            to.copy_from_slice(&from[segment.slot * heads * len..][..heads * len]);
        }
    });
    Ok(start)
}

/// The slots' states that segments move, one for each segment and head, in their order.
pub(crate) fn slots_of<'s, E: Element>(segments: &[Segment], state: &'s mut Tensor, heads: usize, len: usize) -> Vec<&'s mut [E]> {
    let [slots, has, own] = *state.shape() else { panic!("states of shape {:?}", state.shape()) };
    assert!(has == heads && own == len && state.dtype() == E::DTYPE, "states {:?} for {heads} heads of {len}", state.shape());
    let mut all: Vec<Option<&mut [E]>> = state.as_mut_slice::<E>().chunks_exact_mut(len).map(Some).collect();
    let mut own = Vec::with_capacity(segments.len() * heads);
    for segment in segments {
        assert!(segment.slot < slots, "slot {} of {slots}", segment.slot);
        for head in 0..heads {
            own.push(all[segment.slot * heads + head].take().expect("two segments of a batch name the same slot"));
        }
    }
    own
}

/// The rows and columns of each segment and head, in their order.
pub(crate) fn blocks<'m, E>(segments: &[Segment], mut rest: MatMut<'m, E>, heads: usize) -> Vec<MatMut<'m, E>> {
    let width = rest.cols() / heads;
    let mut all = Vec::with_capacity(segments.len() * heads);
    for segment in segments {
        let (mut rows, later) = rest.split_rows(segment.len);
        rest = later;
        for _ in 0..heads {
            let (own, others) = rows.split_cols(width);
            (rows, _) = (others, all.push(own));
        }
    }
    all
}

/// One segment's rows of one head.
pub(crate) fn block<'m, E>(mat: Mat<'m, E>, segment: &Segment, head: usize, width: usize) -> Mat<'m, E> {
    mat.row_range(segment.rows()).col_range(head * width..(head + 1) * width)
}

/// Tasks that a thread takes at once, so that a fork and its scratch pay. Depends on shapes alone.
pub(crate) fn tasks_at_once(tokens: usize, tasks: usize, d: usize) -> usize {
    const MULTIPLY_ADDS: usize = 1 << 18;
    (MULTIPLY_ADDS * tasks.max(1) / (2 * tokens * d * d).max(1)).clamp(1, 64)
}

type Forward<E> = fn(Kind, [Mat<'_, E>; 3], &mut [E], MatMut<'_, E>, &mut [E]);

fn run<E: Element>(inputs: &Inputs<'_>, state: &mut Tensor, o: ViewMut<'_>, scratch: usize, forward: Forward<E>) -> Result<()> {
    let (n, d) = inputs.sizes();
    let (segments, heads, device) = (inputs.segments, inputs.heads, inputs.q.device());
    let qkv = [inputs.q, inputs.k, inputs.v].map(|m| m.as_mat::<E>());
    let states = slots_of::<E>(segments, state, heads, state_len(d));
    let mut tasks: Vec<_> = blocks(segments, o.into_mat::<E>(), heads).into_iter().zip(states).enumerate().collect();
    let job = tasks_at_once(n * heads, tasks.len(), d);
    tasks.par_chunks_mut(job).try_for_each(|tasks| {
        let mut scratch = Tensor::empty(device, &[scratch], E::DTYPE)?;
        for (i, (o, state)) in tasks {
            let (segment, head) = (&segments[*i / heads], *i % heads);
            forward(inputs.kind, qkv.map(|m| block(m, segment, head, d)), state, o.reborrow(), scratch.as_mut_slice::<E>());
        }
        Ok(())
    })
}

type Backward<E> = fn(Kind, [Mat<'_, E>; 3], &[E], Mat<'_, E>, &mut [E], [MatMut<'_, E>; 3], &mut [E]);

fn run_backward<E: Element>(
    inputs: &Inputs<'_>,
    start: &Tensor,
    dout: View<'_>,
    dstate: &mut Tensor,
    grads: Grads<'_>,
    scratch: fn(Kind, usize, usize) -> usize,
    backward: Backward<E>,
) -> Result<()> {
    let (n, d) = inputs.sizes();
    let (segments, heads, device) = (inputs.segments, inputs.heads, inputs.q.device());
    let qkv = [inputs.q, inputs.k, inputs.v].map(|m| m.as_mat::<E>());
    let (start, dout) = (start.as_slice::<E>(), dout.as_mat::<E>());
    let [dq, dk, dv] = [grads.dq, grads.dk, grads.dv].map(|m| blocks(segments, m.into_mat::<E>(), heads));
    let dstates = dstate.as_mut_slice::<E>().chunks_exact_mut(state_len(d));
    let mut tasks: Vec<_> = dq.into_iter().zip(dk).zip(dv).zip(dstates).enumerate().collect();
    let longest = segments.iter().map(|s| s.len).max().unwrap_or(0);
    let job = tasks_at_once(3 * n * heads, tasks.len(), d);
    tasks.par_chunks_mut(job).try_for_each(|tasks| {
        let mut scratch = Tensor::empty(device, &[scratch(inputs.kind, longest, d)], E::DTYPE)?;
        for (i, (((dq, dk), dv), dstate)) in tasks {
            let (segment, head) = (&segments[*i / heads], *i % heads);
            let own = |m| block(m, segment, head, d);
            let grads = [dq.reborrow(), dk.reborrow(), dv.reborrow()];
            let start = &start[*i * state_len(d)..][..state_len(d)];
            backward(inputs.kind, qkv.map(own), start, own(dout), dstate, grads, scratch.as_mut_slice::<E>());
        }
        Ok(())
    })
}
