//! What learns inside a TTT layer: an inner model in mini-batches, the same in one mini-batch as long as the sequence, or linear
//! attention, which has nothing to learn and remembers. One of a closed set, with one way in.

use crate::Result;
use crate::config::{Config, Inner, LinearAttention, TokenScale};
use crate::device::Device;
use crate::device::view::View;
use crate::layer::Keep;
use crate::ops::inner::{self, FastWeights, InputGrads, Inputs, ParamGrads};
use crate::ops::linear_attention::{self, Kind};
use crate::ops::{ttt_batch, ttt_linear, ttt_mlp};
use crate::tensor::{DType, Tensor};

/// The learner of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Learner {
    /// Gradient steps every `mini_batch` tokens.
    MiniBatch {
        /// The inner model.
        inner: Inner,
        /// K.
        mini_batch: usize,
    },
    /// TTT-Linear with all gradients taken at the initial weights.
    Batch {
        /// Whether the inner model has a bias.
        bias: bool,
        /// τ.
        scale: TokenScale,
    },
    /// Linear attention.
    Attention(Kind),
}

/// What a pass has kept of the states.
#[derive(Debug)]
pub(crate) enum Kept {
    /// Weights every few mini-batches.
    Weights(inner::Saved),
    /// Nothing of the inner loop but the weights that the sequences began with, or not even those where all began with the
    /// learned ones: it runs again.
    Again(Option<Tensor>),
    /// The states that the sequences began with.
    Start(Tensor),
}

impl Kept {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Kept::Weights(saved) => saved.bytes(),
            Kept::Again(start) => start.as_ref().map_or(0, Tensor::bytes),
            Kept::Start(start) => start.bytes(),
        }
    }

    /// Kept weights.
    ///
    /// # Panics
    /// When none were kept.
    pub(super) fn weights(&self) -> &inner::Saved {
        match self {
            Kept::Weights(saved) => saved,
            Kept::Again(_) | Kept::Start(_) => panic!("weights of mini-batches where none were kept"),
        }
    }
}

impl Learner {
    /// That of a model with TTT layers.
    pub(crate) fn of(config: &Config) -> Learner {
        match config.linear_attention {
            Some(LinearAttention::Plain) => Learner::Attention(Kind::Plain),
            Some(LinearAttention::Normalised) => Learner::Attention(Kind::Normalised),
            None if config.sums() => Learner::Batch { bias: config.ttt_bias, scale: config.ttt_token_scale },
            None => Learner::MiniBatch { inner: config.ttt_layer_type, mini_batch: config.mini_batch_size },
        }
    }

    /// Numbers that a head carries from mini-batch to mini-batch, or from token to token.
    pub(crate) fn state_len(self, d: usize) -> usize {
        match self {
            Learner::MiniBatch { inner, .. } => FastWeights::state_len(inner, d),
            Learner::Batch { .. } => ttt_batch::state_len(d),
            Learner::Attention(_) => linear_attention::state_len(d),
        }
    }

    /// Floating-point operations of the forward pass for a token and head of width d.
    pub(crate) fn flops(self, d: f64) -> f64 {
        let chunk = linear_attention::CHUNK as f64;
        match self {
            // Per mini-batch and head: 6 n d² + 4 n² d (TTT-Linear), 56 n d² + 20 n² d (TTT-MLP).
            Learner::MiniBatch { inner: Inner::Linear, mini_batch } => 6.0 * d * d + 4.0 * mini_batch as f64 * d,
            Learner::MiniBatch { inner: Inner::Mlp, mini_batch } => 56.0 * d * d + 20.0 * mini_batch as f64 * d,
            // k W0 and q W0; then as linear attention.
            Learner::Batch { .. } => 8.0 * d * d + 4.0 * chunk * d,
            // Reading and moving the state; the products within a chunk.
            Learner::Attention(_) => 4.0 * d * d + 4.0 * chunk * d,
        }
    }

    /// States of `slots` sequences that begin with zeros.
    pub(super) fn zeros(self, device: &Device, dtype: DType, slots: usize, heads: usize, d: usize) -> Result<FastWeights> {
        match self {
            Learner::MiniBatch { inner, mini_batch } => FastWeights::zeros(device, dtype, inner, slots, heads, d, mini_batch),
            Learner::Batch { .. } | Learner::Attention(_) => {
                FastWeights::of_sums(device, dtype, slots, heads, d, self.state_len(d))
            }
        }
    }

    /// A slot of zeros begins with the learned initial weights, if there are any.
    pub(super) fn start(self, fast: &mut FastWeights, slot: usize, initial: &[View<'_>]) {
        match self {
            _ if initial.is_empty() => {}
            Learner::MiniBatch { .. } => fast.start(slot, initial),
            Learner::Batch { .. } => ttt_batch::start(fast.weights_mut(), slot, initial),
            Learner::Attention(_) => panic!("{} initial weights for linear attention", initial.len()),
        }
    }

    /// [`Learner::start`] of every slot.
    pub(super) fn start_all(self, fast: &mut FastWeights, initial: &[View<'_>]) {
        match self {
            Learner::MiniBatch { .. } if !initial.is_empty() => fast.start_all(initial),
            _ => (0..fast.slots()).for_each(|slot| self.start(fast, slot, initial)),
        }
    }

    /// Reads all segments and moves their slots on; returns z and, where `keep` asks for it, what [`Learner::backward`] needs.
    /// `fresh`: all slots hold the learned initial weights.
    pub(super) fn forward(
        self,
        inputs: &Inputs<'_>,
        fast: &mut FastWeights,
        keep: Keep,
        fresh: bool,
    ) -> Result<(Tensor, Option<Kept>)> {
        let group = match keep {
            Keep::Saved { group } => Some(group),
            Keep::Start { .. } | Keep::Input { .. } | Keep::Nothing => None,
        };
        let weights = |(z, saved): (Tensor, Option<inner::Saved>)| (z, saved.map(Kept::Weights));
        let start = |(z, start): (Tensor, Option<Tensor>)| (z, start.map(Kept::Start));
        match self {
            Learner::MiniBatch { inner, .. } => {
                let again = match (keep, fresh) {
                    (Keep::Start { .. }, true) => Some(Kept::Again(None)),
                    (Keep::Start { .. }, false) => Some(Kept::Again(Some(fast.weights().copy()?))),
                    _ => None,
                };
                let (z, kept) = match inner {
                    Inner::Linear => ttt_linear::forward(inputs, fast, group).map(weights)?,
                    Inner::Mlp => ttt_mlp::forward(inputs, fast, group).map(weights)?,
                };
                Ok((z, kept.or(again)))
            }
            Learner::Batch { bias, scale } => {
                ttt_batch::forward(&batch(inputs, bias, scale), fast.weights_mut(), keep.activations()).map(start)
            }
            Learner::Attention(kind) => {
                linear_attention::forward(&attention(inputs, kind), fast.weights_mut(), keep.activations()).map(start)
            }
        }
    }

    /// Gradients of everything [`Learner::forward`] read. Linear attention reads no rates and no LayerNorm; their gradients stay.
    pub(super) fn backward(
        self,
        inputs: &Inputs<'_>,
        kept: &Kept,
        dz: View<'_>,
        dstate: &mut Tensor,
        d: InputGrads<'_>,
        p: ParamGrads<'_>,
    ) -> Result<()> {
        match (self, kept) {
            (Learner::MiniBatch { inner: Inner::Linear, .. }, Kept::Weights(saved)) => {
                ttt_linear::backward(inputs, saved, dz, dstate, d, p)
            }
            (Learner::MiniBatch { inner: Inner::Mlp, .. }, Kept::Weights(saved)) => {
                ttt_mlp::backward(inputs, saved, dz, dstate, d, p)
            }
            (Learner::Batch { bias, scale }, Kept::Start(start)) => {
                let InputGrads { dq, dk, dv, dlr } = d;
                let grads = ttt_batch::Grads { dq, dk, dv, dlr, dgamma: p.dgamma, dbeta: p.dbeta };
                ttt_batch::backward(&batch(inputs, bias, scale), start, dz, dstate, grads)
            }
            (Learner::Attention(kind), Kept::Start(start)) => {
                let grads = linear_attention::Grads { dq: d.dq, dk: d.dk, dv: d.dv };
                linear_attention::backward(&attention(inputs, kind), start, dz, dstate, grads)
            }
            (learner, kept) => panic!("{kept:?} of another learner than {learner:?}"),
        }
    }
}

fn batch<'a>(inputs: &Inputs<'a>, bias: bool, token_scale: TokenScale) -> ttt_batch::Inputs<'a> {
    let &Inputs { q, k, v, lr, gamma, beta, variant, segments, .. } = inputs;
    ttt_batch::Inputs { q, k, v, lr, gamma, beta, variant, bias, token_scale, segments }
}

fn attention<'a>(inputs: &Inputs<'a>, kind: Kind) -> linear_attention::Inputs<'a> {
    let &Inputs { q, k, v, gamma, segments, .. } = inputs;
    linear_attention::Inputs { q, k, v, heads: gamma.rows(), kind, segments }
}
