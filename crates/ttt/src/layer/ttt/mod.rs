//! The TTT layer (paper section 2): projections, convolutions, RoPE, the inner loop, post-norm, gate and output projection.

mod decode;
mod learner;
mod rates;
mod statistics;

use crate::Result;
use crate::config::{Config, TokenScale};
use crate::device::view::View;
use crate::layer::state::{FAST_WEIGHTS, QK_CONV};
use crate::layer::{Carried, Keep, Pass, TttState, carry};
use crate::ops::inner::{FastWeights, InputGrads, Inputs, ParamGrads, Variant};
use crate::ops::rope::Direction;
use crate::ops::{add, conv, gelu_gate, inner_lr, layer_norm, linear, rope, token_scale};
use crate::params::{ParamId, Params, TttIds};
use crate::tensor::{Tensor, with_dtype};
use crate::weights::Weights;

use learner::Kept;
pub(crate) use learner::Learner;
use rates::Rates;
pub use statistics::InnerStatistics;

/// LayerNorm's epsilon is fixed in all official code.
const LAYER_NORM_EPS: f64 = 1e-6;

/// A TTT layer's parameters and sizes.
#[derive(Clone, Debug)]
pub struct TttLayer {
    ids: Box<TttIds>,
    learner: Learner,
    /// LayerNorm and residual of the inner model.
    variant: Variant,
    /// τ where it is not learned.
    token_scale: TokenScale,
    hidden: usize,
    heads: usize,
    head_dim: usize,
    base_lr: f64,
    /// Inputs that the convolutions of the block look back at; none without such a convolution.
    pre_conv_window: Option<usize>,
    qk_conv_window: Option<usize>,
}

/// What a TTT layer's backward pass needs.
#[derive(Debug)]
pub struct TttSaved {
    /// The projections `[q|k|v|g]`; with shared q and k the first block is the input of both convolutions.
    projected: Tensor,
    /// q and k after their convolutions and RoPE, when they are shared; otherwise they are rotated in `projected`.
    qk: Option<[Tensor; 2]>,
    rates: Rates,
    /// Output of the inner loop `[n, D]`, unless the inner loop runs again.
    z: Option<Tensor>,
    /// What was kept of the states.
    inner: Kept,
    /// The convolutions' window at the beginning, when the sequences had one.
    window: Option<Tensor>,
}

/// What [`TttSaved`] has, whether or not fast weights were kept.
struct Learned {
    projected: Tensor,
    qk: Option<[Tensor; 2]>,
    rates: Rates,
    z: Tensor,
    inner: Option<Kept>,
    window: Option<Tensor>,
}

impl TttSaved {
    /// Bytes held for the backward pass.
    pub fn bytes(&self) -> usize {
        let qk = self.qk.iter().flatten().chain(&self.window).map(Tensor::bytes).sum::<usize>();
        self.projected.bytes() + qk + self.rates.bytes() + self.z.as_ref().map_or(0, Tensor::bytes) + self.inner.bytes()
    }

    /// Bytes of kept fast weights among [`TttSaved::bytes`].
    pub fn fast_weight_bytes(&self) -> usize {
        self.inner.bytes()
    }
}

impl TttLayer {
    /// The layer of a model whose parameters are `ids`.
    pub fn new(config: &Config, ids: &TttIds) -> TttLayer {
        TttLayer {
            ids: Box::new(ids.clone()),
            learner: Learner::of(config),
            variant: Variant { layer_norm: config.ttt_layer_norm, residual: config.ttt_residual },
            token_scale: config.ttt_token_scale,
            hidden: config.hidden_size,
            heads: config.num_attention_heads,
            head_dim: config.head_dim(),
            base_lr: config.ttt_base_lr,
            pre_conv_window: config.pre_conv.then_some(config.conv_kernel - 1),
            qk_conv_window: config.share_qk.then_some(config.conv_kernel - 1),
        }
    }

    /// Column block `i` of the projections.
    fn block<'a>(&self, projected: &'a Tensor, i: usize) -> View<'a> {
        projected.view().col_range(i * self.hidden..(i + 1) * self.hidden)
    }

    /// Column block of v: the last but the gate.
    fn v_block(&self) -> usize {
        if self.ids.k_proj.is_some() { 2 } else { 1 }
    }

    fn last_projection(&self) -> ParamId {
        self.ids.g_proj.unwrap_or(self.ids.v_proj)
    }

    /// Scale of the inner learning rate's sigmoid.
    fn lr_scale(&self, pass: &Pass<'_>) -> f64 {
        self.base_lr * pass.inner_lr / self.head_dim as f64
    }

    /// Slot `slot`, which holds zeros, starts from the learned initial weights, where there are any.
    pub fn start(&self, weights: &Weights, fast: &mut FastWeights, slot: usize) {
        self.learner.start(fast, slot, &self.initial(weights));
    }

    fn initial<'a>(&self, weights: &'a Weights) -> Vec<View<'a>> {
        self.ids.initial.iter().map(|id| weights.view(*id)).collect()
    }

    /// The state of `slots` sequences of this layer, not yet started.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn fast_weights(&self, weights: &Weights, slots: usize) -> Result<FastWeights> {
        let (device, dtype) = (weights.device(), weights.storage().dtype());
        self.learner.zeros(device, dtype, slots, self.heads, self.head_dim)
    }

    /// The state of `slots` sequences of a block with this layer, not yet started.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn state(&self, weights: &Weights, slots: usize) -> Result<TttState> {
        let window = |len: Option<usize>| {
            len.map(|len| Tensor::zeros(weights.device(), &[slots, len, self.hidden], weights.dtype())).transpose()
        };
        let (pre_conv, qk_conv) = (window(self.pre_conv_window)?, window(self.qk_conv_window)?);
        Ok(TttState { fast: self.fast_weights(weights, slots)?, pre_conv, qk_conv })
    }

    /// `x [n, D]` (normed) to `[n, D]`. Without a state every segment starts from the learned initial weights.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward(&self, pass: &Pass<'_>, x: View<'_>, state: Option<&mut TttState>) -> Result<(Tensor, Option<TttSaved>)> {
        let Learned { projected, qk, rates, z, inner, window } = self.learn(pass, x, self.last_projection(), state)?;
        let y = self.output(pass, self.gate(&projected), &z)?;
        let out = linear::forward(y.view(), pass.weights.matrix(self.ids.o_proj))?;
        Ok((
            out,
            inner.map(|inner| {
                let z = (!matches!(inner, Kept::Again(_))).then_some(z);
                TttSaved { projected, qk, rates, z, inner, window }
            }),
        ))
    }

    /// [`TttLayer::forward`] of which only some rows are wanted: all tokens are learned from, but gate and output are computed
    /// for `rows` alone. Keeps nothing.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward_rows(&self, pass: &Pass<'_>, x: View<'_>, rows: &[usize], state: Option<&mut TttState>) -> Result<Tensor> {
        let learned = self.learn(pass, x, self.ids.v_proj, state)?;
        let z = add::gather(learned.z.view(), rows)?;
        let gate = match self.ids.g_proj {
            Some(g_proj) => Some(linear::forward(add::gather(x, rows)?.view(), pass.weights.matrix(g_proj))?),
            None => None,
        };
        let y = self.output(pass, gate.as_ref().map(Tensor::view), &z)?;
        linear::forward(y.view(), pass.weights.matrix(self.ids.o_proj))
    }

    /// Everything up to the output of the inner loop; the projections end with `last`.
    fn learn(&self, pass: &Pass<'_>, x: View<'_>, last: ParamId, state: Option<&mut TttState>) -> Result<Learned> {
        let (w, ids, rope) = (pass.weights, &self.ids, pass.rope());
        let (fast, window) = match state {
            Some(state) => (Some(&mut state.fast), state.qk_conv.as_mut()),
            None => (None, None),
        };
        let start = match &window {
            Some(window) if pass.keep.activations() && ids.convs.is_some() => Some(window.copy()?),
            _ => None,
        };
        let mut projected = linear::forward(x, w.matrices(ids.q_proj, last))?;
        let qk = match ids.convs {
            Some(convs) => {
                let shared = self.block(&projected, 0);
                let mut made = Vec::with_capacity(2);
                for (weight, bias) in convs {
                    let mut y = conv::forward(shared, w.view(weight), w.view(bias), pass.segments, window.as_deref())?;
                    rope::rotate(y.view_mut(), rope, pass.segments, self.heads, Direction::Forward);
                    made.push(y);
                }
                if let Some(window) = window {
                    conv::advance(shared, pass.segments, window);
                }
                let [q, k]: [Tensor; 2] = made.try_into().expect("two convolutions");
                Some([q, k])
            }
            None => {
                for i in 0..2 {
                    let block = projected.view_mut().col_range(i * self.hidden..(i + 1) * self.hidden);
                    rope::rotate(block, rope, pass.segments, self.heads, Direction::Forward);
                }
                None
            }
        };
        let rates = self.rates(pass, x)?;
        let (z, inner) = {
            let inputs = self.inputs(pass, &projected, &qk, &rates);
            match fast {
                Some(fast) => self.learner.forward(&inputs, fast, pass.keep, false)?,
                None => {
                    let mut fast = self.fast_weights(w, pass.segments.len())?;
                    self.learner.start_all(&mut fast, &self.initial(w));
                    self.learner.forward(&inputs, &mut fast, pass.keep, true)?
                }
            }
        };
        Ok(Learned { projected, qk, rates, z, inner, window: start })
    }

    /// The inner loop once more, of a pass that kept only what its sequences began with.
    fn learn_again(&self, pass: &Pass<'_>, inputs: &Inputs<'_>, kept: Kept) -> Result<(Tensor, Kept)> {
        let (Kept::Again(start), Keep::Start { group }) = (kept, pass.keep) else {
            panic!("an inner loop without outputs in a pass that keeps {:?}", pass.keep)
        };
        let slots = start.as_ref().map_or(pass.segments.len(), |start| start.shape()[0]);
        let mut fast = self.fast_weights(pass.weights, slots)?;
        match start {
            Some(start) => *fast.weights_mut() = start,
            None => self.learner.start_all(&mut fast, &self.initial(pass.weights)),
        }
        let (z, kept) = self.learner.forward(inputs, &mut fast, Keep::Saved { group }, true)?;
        Ok((z, kept.expect("a pass that keeps something")))
    }

    /// Gradient of `x` from the gradient of the output. `dstate`, of one slot a sequence, holds the gradient of what the sequences
    /// ended with and becomes that of what they began with; without it nothing follows them. The initial weights get the gradient
    /// of the sequences that start from them.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        x: View<'_>,
        saved: TttSaved,
        dout: View<'_>,
        dstate: Option<&mut Carried>,
        grads: &mut Params,
    ) -> Result<Tensor> {
        let (w, ids, d) = (pass.weights, &self.ids, self.hidden);
        let TttSaved { projected, qk, rates, z, inner, window } = saved;
        let (device, dtype, n) = (&projected.device().clone(), projected.dtype(), x.rows());
        let (z, inner) = match (z, inner) {
            (Some(z), inner) => (z, inner),
            (None, inner) => self.learn_again(pass, &self.inputs(pass, &projected, &qk, &rates), inner)?,
        };
        let mut dprojected = Tensor::empty(device, projected.shape(), dtype)?;

        // Output projection, gate, post-norm.
        if grads.holds(ids.o_proj) {
            let y = self.output(pass, self.gate(&projected), &z)?;
            linear::backward_weight(dout, y.view(), grads.view_mut(ids.o_proj));
        }
        let dy = linear::backward_input(dout, w.operand(ids.o_proj, ids.o_proj))?;
        let (post_w, post_b) = ids.post_norm;
        let dnormed = match ids.g_proj {
            Some(_) => {
                let g = self.v_block() + 1;
                let normed = layer_norm::forward(z.view(), w.view(post_w), w.view(post_b), LAYER_NORM_EPS)?;
                let dgate = dprojected.view_mut().col_range(g * d..(g + 1) * d);
                gelu_gate::backward(dy.view(), self.block(&projected, g), normed.view(), dgate)?
            }
            None => dy,
        };
        let [dpost_w, dpost_b] = grads.views_mut([post_w, post_b]);
        let dz = layer_norm::backward(dnormed.view(), z.view(), w.view(post_w), LAYER_NORM_EPS, dpost_w, dpost_b)?;
        drop((dnormed, z));

        // The inner loop.
        let mut nothing = None;
        let (dfast, dwindow) = match dstate {
            Some(carried) => {
                let [fast, window] = carried.some_mut([FAST_WEIGHTS, QK_CONV]);
                (fast.expect("fast weights are carried"), window)
            }
            None => {
                let state_len = self.learner.state_len(self.head_dim);
                let zeros = Tensor::zeros(device, &[pass.segments.len(), self.heads, state_len], w.storage().dtype())?;
                (nothing.insert(zeros), None)
            }
        };
        let mut dlr = Tensor::empty(device, rates.lr.shape(), rates.lr.dtype())?;
        let mut dtok = Tensor::zeros(device, rates.tok.shape(), rates.tok.dtype())?;
        let mut no_norm = match &rates.no_norm {
            Some(none) => Some([none.copy()?, none.copy()?]),
            None => None,
        };
        let mut dqk = match &qk {
            Some(_) => Some([Tensor::empty(device, &[n, d], dtype)?, Tensor::empty(device, &[n, d], dtype)?]),
            None => None,
        };
        {
            let inputs = self.inputs(pass, &projected, &qk, &rates);
            let v = self.v_block();
            let (before_v, rest) = dprojected.view_mut().split_cols(v * d);
            let (dv, _) = rest.split_cols(d);
            let (dq, dk) = match &mut dqk {
                Some([dq, dk]) => (dq.view_mut(), dk.view_mut()),
                None => before_v.split_cols(d),
            };
            let [dgamma, dbeta] = match (&mut no_norm, ids.ttt_norm) {
                (Some([dgamma, dbeta]), _) => [dgamma.view_mut(), dbeta.view_mut()],
                (None, norm) => {
                    let (gamma, beta) = norm.expect("a LayerNorm, or something in its place");
                    grads.views_mut([gamma, beta])
                }
            };
            let activations = InputGrads { dq, dk, dv, dlr: dlr.view_mut() };
            let parameters = ParamGrads { dtok: dtok.view_mut(), dgamma, dbeta };
            self.learner.backward(&inputs, &inner, dz.view(), dfast, activations, parameters)?;
        }
        drop((inner, dz, qk));
        self.add_initial_gradient(pass, dfast, grads);
        drop(nothing);
        if let Some(token_idx) = ids.lr.and_then(|lr| lr.token_idx) {
            token_scale::backward(dtok.view(), w.view(token_idx), grads.view_mut(token_idx));
        }

        // RoPE and convolutions.
        match (ids.convs, dqk) {
            (Some(convs), Some(dqk)) => {
                let start = || dwindow.as_deref().map(|w| carry::zeros(w, pass.segments.len())).transpose();
                let (mut dshared, mut dstart): (Option<Tensor>, Option<Tensor>) = (None, None);
                for ((weight, bias), mut dy) in convs.into_iter().zip(dqk) {
                    rope::rotate(dy.view_mut(), pass.rope(), pass.segments, self.heads, Direction::Backward);
                    let [dweight, dbias] = grads.views_mut([weight, bias]);
                    let shared = self.block(&projected, 0);
                    let mut dx_window = start()?;
                    let (weight, dx_start) = (w.view(weight), dx_window.as_mut());
                    let dx = conv::backward(dy.view(), shared, weight, pass.segments, window.as_ref(), dweight, dbias, dx_start)?;
                    for (sum, part) in [(&mut dshared, Some(dx)), (&mut dstart, dx_window)] {
                        match (sum, part) {
                            (Some(sum), Some(part)) => add::add_to(sum.view_mut(), part.view()),
                            (sum, part) => *sum = part,
                        }
                    }
                }
                let mut dshared = dshared.expect("two convolutions");
                if let (Some(dwindow), Some(mut dstart)) = (dwindow, dstart) {
                    conv::backward_advance(dwindow, pass.segments, dshared.view_mut(), &mut dstart);
                    *dwindow = dstart;
                }
                add::copy_to(dprojected.view_mut().col_range(0..d), dshared.view());
            }
            _ => {
                for i in 0..2 {
                    let block = dprojected.view_mut().col_range(i * d..(i + 1) * d);
                    rope::rotate(block, pass.rope(), pass.segments, self.heads, Direction::Backward);
                }
            }
        }

        // The projections and the learning-rate gate read the same input.
        let (first, last) = (ids.q_proj, self.last_projection());
        if grads.holds(first) {
            linear::backward_weight(dprojected.view(), x, grads.fused_mut(first, last));
        }
        let mut dx = linear::backward_input(dprojected.view(), w.operand(first, last))?;
        if let Some(ids) = ids.lr {
            let [dweight, dbias] = grads.views_mut([ids.weight, ids.bias]);
            let (weight, dbias) = (w.operand(ids.weight, ids.weight), dbias.reshape(1, self.heads));
            let dlr = dlr.view();
            inner_lr::backward(dlr, rates.lr.view(), x, weight, self.lr_scale(pass), dweight, dbias, dx.view_mut())?;
        }
        Ok(dx)
    }

    fn inputs<'a>(&self, pass: &Pass<'a>, projected: &'a Tensor, qk: &'a Option<[Tensor; 2]>, rates: &'a Rates) -> Inputs<'a> {
        let (q, k) = match qk {
            Some([q, k]) => (q.view(), k.view()),
            None => (self.block(projected, 0), self.block(projected, 1)),
        };
        let [gamma, beta] = match (&rates.no_norm, self.ids.ttt_norm) {
            (Some(none), _) => [none.view(), none.view()],
            (None, norm) => {
                let (gamma, beta) = norm.expect("a LayerNorm, or something in its place");
                [pass.weights.view(gamma), pass.weights.view(beta)]
            }
        };
        Inputs {
            q,
            k,
            v: self.block(projected, self.v_block()),
            lr: rates.lr.view(),
            tok: rates.tok.view(),
            gamma,
            beta,
            variant: self.variant,
            segments: pass.segments,
        }
    }

    /// The gate's projection, when there is one.
    fn gate<'a>(&self, projected: &'a Tensor) -> Option<View<'a>> {
        self.ids.g_proj.map(|_| self.block(projected, self.v_block() + 1))
    }

    /// Post-norm and gate: input of the output projection.
    fn output(&self, pass: &Pass<'_>, gate: Option<View<'_>>, z: &Tensor) -> Result<Tensor> {
        let (weight, bias) = self.ids.post_norm;
        let normed = layer_norm::forward(z.view(), pass.weights.view(weight), pass.weights.view(bias), LAYER_NORM_EPS)?;
        match gate {
            Some(gate) => gelu_gate::forward(gate, normed.view()),
            None => Ok(normed),
        }
    }

    /// Sequences that started from the initial weights: their gradient is the sum over these sequences, in order.
    fn add_initial_gradient(&self, pass: &Pass<'_>, dstate: &Tensor, grads: &mut Params) {
        let [sequences, heads, len] = *dstate.shape() else { panic!("state gradients of shape {:?}", dstate.shape()) };
        let starts = |s: usize| pass.routes.is_none_or(|routes| routes[s].from.is_none());
        if let Some(gpu) = dstate.device().as_cuda() {
            // A launch for each run of sequences that started from W0: one, but for batches that continue states.
            let all: Vec<usize> = (0..sequences).filter(|s| starts(*s)).collect();
            for run in all.chunk_by(|a, b| a + 1 == *b) {
                let first = dstate.address() + (4 * run[0] * heads * len) as u64;
                let mut at = 0;
                for id in &self.ids.initial {
                    let per_head = grads.table().entry(*id).elements() / heads;
                    let sizes = [run.len(), heads * len];
                    add::cuda::add_up_pieces(gpu, &grads.view_mut(*id), first, sizes, at, [per_head, len]);
                    at += per_head;
                }
            }
            return;
        }
        with_dtype!(dstate.dtype(), E => {
            let dstate = dstate.as_slice::<E>();
            let mut at = 0;
            for id in &self.ids.initial {
                let per_head = grads.table().entry(*id).elements() / heads;
                let sum = grads.values_mut::<E>(*id);
                for s in (0..sequences).filter(|s| starts(*s)) {
                    for h in 0..heads {
                        let part = &dstate[(s * heads + h) * len + at..][..per_head];
                        for (a, b) in sum[h * per_head..][..per_head].iter_mut().zip(part) {
                            *a += *b;
                        }
                    }
                }
                at += per_head;
            }
        });
    }
}
