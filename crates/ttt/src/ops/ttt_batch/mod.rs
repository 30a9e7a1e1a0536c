//! TTT-Linear with one mini-batch as long as the sequence: batch gradient descent, all gradients taken at the initial weights
//! (paper 2.4 with b the whole sequence; 2.6, Theorem 1). The rungs of the paper's ladder before "mini-batch".
//!
//! One sequence and head (symbols in [`crate::ops::inner`]; position t counts from the beginning of the sequence):
//! ```text
//! Z_t = k_t W0 + b0;  G_t = ∂/∂Z ½‖f(k_t) - v_t‖²;  Ĝ_t = r_t G_t          needs W0 alone, so all tokens at once
//! Z̄_t = q_t W0 + b0 - τ_t Σ_{s≤t} (q_t·k_s + 1) Ĝ_s;  z_t = f(q_t) from Z̄_t
//! ```
//! The sum is causal linear attention ([`super::linear_attention`]) with Ĝ as its values, so it is computed in chunks and what is
//! carried is `[W0 | b0 | SW | Sb]`, the initial weights and the running sums SW = Σ kᵀĜ, Sb = Σ Ĝ: sequences may be cut anywhere.
//! For sequences of up to 64 tokens it is [`super::ttt_linear`] with a mini-batch no shorter than the sequence.

mod cpu;
pub(crate) mod cuda;
pub(crate) mod reference;

use rayon::prelude::*;

use super::inner::Variant;
use super::inner::wrap::Wrap;
use super::linear_attention::{self, block, blocks, slots_of, tasks_at_once};
use crate::Result;
use crate::batch::Segment;
use crate::config::TokenScale;
use crate::device::view::{Mat, MatMut, View, ViewMut};
use crate::ops::{add, expect_segments, expect_shape, fast};
use crate::tensor::{Element, Tensor, with_dtype};

/// Elements of a head's state, `[W0 | b0 | SW | Sb]`.
pub fn state_len(d: usize) -> usize {
    2 * (d * d + d)
}

/// What the inner models of a layer read.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Test views: `[n, h*d]`.
    pub q: View<'a>,
    /// Training views: `[n, h*d]`.
    pub k: View<'a>,
    /// Label views: `[n, h*d]`.
    pub v: View<'a>,
    /// Inner learning rate r of each token: `[n, h]`.
    pub lr: View<'a>,
    /// Weight of the inner LayerNorm: `[h, d]`.
    pub gamma: View<'a>,
    /// Bias of the inner LayerNorm: `[h, d]`.
    pub beta: View<'a>,
    /// LayerNorm and residual of the inner model.
    pub variant: Variant,
    /// Whether f has a bias. Without one b0 has to be 0, and the 1 beside q·k is not there.
    pub bias: bool,
    /// τ.
    pub token_scale: TokenScale,
    /// The sequences, their rows one behind the other, no two in a slot; the phase is the number of all tokens before.
    pub segments: &'a [Segment],
}

/// Where gradients go: those of activations are overwritten, those of parameters added to.
#[derive(Debug)]
pub struct Grads<'a> {
    /// `[n, h*d]`.
    pub dq: ViewMut<'a>,
    /// `[n, h*d]`.
    pub dk: ViewMut<'a>,
    /// `[n, h*d]`.
    pub dv: ViewMut<'a>,
    /// `[n, h]`.
    pub dlr: ViewMut<'a>,
    /// `[h, d]`.
    pub dgamma: ViewMut<'a>,
    /// `[h, d]`.
    pub dbeta: ViewMut<'a>,
}

/// One segment of one head, typed.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a, E> {
    pub(crate) q: Mat<'a, E>,
    pub(crate) k: Mat<'a, E>,
    pub(crate) v: Mat<'a, E>,
    pub(crate) lr: Mat<'a, E>,
    pub(crate) wrap: Wrap<'a, E>,
    pub(crate) bias: bool,
    pub(crate) scale: TokenScale,
    /// Tokens before the first.
    pub(crate) position: usize,
}

impl<E: Element> Head<'_, E> {
    /// τ of row i.
    pub(crate) fn tau(&self, i: usize) -> E {
        E::from_f64(self.scale.at(self.position + i))
    }

    /// What is added to q·k.
    pub(crate) fn one(&self) -> E {
        if self.bias { E::ONE } else { E::ZERO }
    }
}

/// Where the gradients of a [`Head`] go; `params` `[dγ | dβ]` is added to.
pub(crate) struct HeadGrads<'a, E> {
    pub(crate) dq: MatMut<'a, E>,
    pub(crate) dk: MatMut<'a, E>,
    pub(crate) dv: MatMut<'a, E>,
    pub(crate) dlr: MatMut<'a, E>,
    pub(crate) params: &'a mut [E],
}

impl<'a> Inputs<'a> {
    /// Tokens, heads and head width.
    fn sizes(&self) -> (usize, usize, usize) {
        let [heads, d] = self.gamma.shape();
        let n = self.q.rows();
        for (name, shape) in [("q", self.q.shape()), ("k", self.k.shape()), ("v", self.v.shape())] {
            expect_shape(name, shape, [n, heads * d]);
        }
        expect_shape("lr", self.lr.shape(), [n, heads]);
        expect_shape("beta", self.beta.shape(), [heads, d]);
        expect_segments(self.segments, n);
        (n, heads, d)
    }

    fn fast(&self) -> bool {
        fast(self.q.device(), self.q.dtype())
    }

    fn head<E: Element>(&self, segment: &Segment, head: usize) -> Head<'a, E> {
        let d = self.gamma.cols();
        let own = |m: View<'a>| block(m.as_mat::<E>(), segment, head, d);
        let wrap = Wrap { gamma: self.gamma.as_mat().row(head), beta: self.beta.as_mat().row(head), variant: self.variant };
        Head {
            q: own(self.q),
            k: own(self.k),
            v: own(self.v),
            lr: block(self.lr.as_mat::<E>(), segment, head, 1),
            wrap,
            bias: self.bias,
            scale: self.token_scale,
            position: segment.phase,
        }
    }
}

/// Puts a slot back to the beginning: the initial weights `[W1 [h*d, d], b1 [h, d]]`, or those that are given of them, the others 0,
/// and no tokens seen.
///
/// # Panics
/// When a shape is another, or the slot does not exist.
pub fn start(state: &mut Tensor, slot: usize, initial: &[View<'_>]) {
    let [slots, heads, len] = *state.shape() else { panic!("states of shape {:?}", state.shape()) };
    assert!(slot < slots, "slot {slot} of {slots}");
    state.fill_zero_range(slot * heads * len..(slot + 1) * heads * len);
    let mut at = 0;
    for view in initial {
        let per_head = view.rows() * view.cols() / heads;
        assert!(view.rows() % heads == 0 && at + per_head <= len / 2, "initial weights {:?} for {heads} heads", view.shape());
        let own = state.view_mut().row_range(slot * heads..(slot + 1) * heads).col_range(at..at + per_head);
        add::copy_to(own, view.reshape(heads, per_head));
        at += per_head;
    }
}

/// Reads all segments and moves their slots of `state` `[slots, h, S]` on; returns z `[n, h*d]`. With `keep` also the states that the
/// segments began with, `[segments, h, S]`, for [`backward`].
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When shapes disagree or two segments share a slot.
pub fn forward(inputs: &Inputs<'_>, state: &mut Tensor, keep: bool) -> Result<(Tensor, Option<Tensor>)> {
    let (n, heads, d) = inputs.sizes();
    let start = if keep { Some(linear_attention::starts(inputs.segments, state)?) } else { None };
    let mut z = Tensor::empty(inputs.q.device(), &[n, heads * d], inputs.q.dtype())?;
    if let Some(gpu) = inputs.q.device().as_cuda() {
        cuda::forward(gpu, inputs, state, &mut z)?;
    } else if inputs.fast() {
        run(inputs, state, z.view_mut(), cpu::scratch(d), cpu::forward)?;
    } else {
        with_dtype!(inputs.q.dtype(), E => run::<E>(inputs, state, z.view_mut(), 0, reference::forward)?);
    }
    Ok((z, start))
}

/// Gradients of everything that [`forward`] read. `dstate` `[segments, h, S]` holds the gradient of each segment's final state and
/// becomes that of its first, `start`: its first half is the gradient of the initial weights.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When shapes disagree.
pub fn backward(inputs: &Inputs<'_>, start: &Tensor, dz: View<'_>, dstate: &mut Tensor, grads: Grads<'_>) -> Result<()> {
    let (n, heads, d) = inputs.sizes();
    let wide = [n, heads * d];
    for (name, shape) in [("dz", dz.shape()), ("dq", grads.dq.shape()), ("dk", grads.dk.shape()), ("dv", grads.dv.shape())] {
        expect_shape(name, shape, wide);
    }
    expect_shape("dlr", grads.dlr.shape(), [n, heads]);
    expect_shape("dgamma", grads.dgamma.shape(), [heads, d]);
    expect_shape("dbeta", grads.dbeta.shape(), [heads, d]);
    let expected = [inputs.segments.len(), heads, state_len(d)];
    assert!(start.shape() == expected && dstate.shape() == expected, "states {:?} and {:?}", start.shape(), dstate.shape());
    if let Some(gpu) = inputs.q.device().as_cuda() {
        cuda::backward(gpu, inputs, start, dz, dstate, grads)
    } else if inputs.fast() {
        run_backward(inputs, start, dz, dstate, grads, cpu::backward_scratch, cpu::backward)
    } else {
        with_dtype!(inputs.q.dtype(), E => run_backward::<E>(inputs, start, dz, dstate, grads, |_, _| 0, reference::backward))
    }
}

type Forward<E> = fn(Head<'_, E>, &mut [E], MatMut<'_, E>, &mut [E]);

fn run<E: Element>(inputs: &Inputs<'_>, state: &mut Tensor, z: ViewMut<'_>, scratch: usize, forward: Forward<E>) -> Result<()> {
    let (n, heads, d) = inputs.sizes();
    let (segments, device) = (inputs.segments, inputs.q.device());
    let states = slots_of::<E>(segments, state, heads, state_len(d));
    let mut tasks: Vec<_> = blocks(segments, z.into_mat::<E>(), heads).into_iter().zip(states).enumerate().collect();
    let job = tasks_at_once(2 * n * heads, tasks.len(), d);
    tasks.par_chunks_mut(job).try_for_each(|tasks| {
        let mut scratch = Tensor::empty(device, &[scratch], E::DTYPE)?;
        for (i, (z, state)) in tasks {
            let head = inputs.head(&segments[*i / heads], *i % heads);
            forward(head, state, z.reborrow(), scratch.as_mut_slice::<E>());
        }
        Ok(())
    })
}

type Backward<E> = fn(Head<'_, E>, &[E], Mat<'_, E>, &mut [E], HeadGrads<'_, E>, &mut [E]);

fn run_backward<E: Element>(
    inputs: &Inputs<'_>,
    start: &Tensor,
    dz: View<'_>,
    dstate: &mut Tensor,
    grads: Grads<'_>,
    scratch: fn(usize, usize) -> usize,
    backward: Backward<E>,
) -> Result<()> {
    let (n, heads, d) = inputs.sizes();
    let (segments, device, len) = (inputs.segments, inputs.q.device(), state_len(d));
    let (start, dz) = (start.as_slice::<E>(), dz.as_mat::<E>());
    let mut params = Tensor::zeros(device, &[segments.len() * heads, 2 * d], E::DTYPE)?;
    let [dq, dk, dv, dlr] = [grads.dq, grads.dk, grads.dv, grads.dlr].map(|m| blocks(segments, m.into_mat::<E>(), heads));
    let dstates = dstate.as_mut_slice::<E>().chunks_exact_mut(len);
    let parts = params.as_mut_slice::<E>().chunks_exact_mut(2 * d);
    let mut tasks: Vec<_> = dq.into_iter().zip(dk).zip(dv).zip(dlr).zip(dstates.zip(parts)).enumerate().collect();
    let longest = segments.iter().map(|s| s.len).max().unwrap_or(0);
    let job = tasks_at_once(6 * n * heads, tasks.len(), d);
    tasks.par_chunks_mut(job).try_for_each(|tasks| -> Result<()> {
        let mut scratch = Tensor::empty(device, &[scratch(longest, d)], E::DTYPE)?;
        for (i, ((((dq, dk), dv), dlr), (dstate, params))) in tasks {
            let (segment, head) = (&segments[*i / heads], *i % heads);
            let [dq, dk, dv, dlr] = [dq, dk, dv, dlr].map(|m| m.reborrow());
            let grads = HeadGrads { dq, dk, dv, dlr, params };
            let dz = block(dz, segment, head, d);
            backward(inputs.head(segment, head), &start[*i * len..][..len], dz, dstate, grads, scratch.as_mut_slice::<E>());
        }
        Ok(())
    })?;
    drop(tasks);
    let (mut dgamma, mut dbeta) = (grads.dgamma.into_mat::<E>(), grads.dbeta.into_mat::<E>());
    for (i, part) in params.as_slice::<E>().chunks_exact(2 * d).enumerate() {
        let head = i % heads;
        for (sum, part) in dgamma.row_mut(head).iter_mut().chain(dbeta.row_mut(head)).zip(part) {
            *sum += *part;
        }
    }
    Ok(())
}
