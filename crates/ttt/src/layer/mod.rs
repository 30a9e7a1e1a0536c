//! The parts of the model: forward and backward over [`crate::ops`], holding parameter ids and never tensors.
//!
//! Everything here follows one pattern: `forward` returns its output and, when asked to keep something, a plain struct of what
//! `backward` needs; `backward` adds parameter gradients to a flat [`Params`](crate::params::Params) and returns the gradient of its input. Sums over
//! the several uses of one value (the residual stream, the input of q, k, v and the gates) are written out here, never in `ops/`.

mod block;
mod ffn;
mod pre_conv;
mod ttt;

pub use block::{Block, BlockSaved};
pub use ttt::{InnerStatistics, TttLayer, TttSaved};

use crate::Result;
use crate::batch::Segment;
use crate::ops::inner::FastWeights;
use crate::ops::rope;
use crate::tensor::Tensor;
use crate::weights::Weights;

/// What a forward pass keeps for the backward pass: the one switch between inference, training and recomputation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: inference.
    Nothing,
    /// The activations of every block, and its fast weights every `group` mini-batches.
    Saved {
        /// Mini-batches between two kept states of the fast weights.
        group: usize,
    },
    /// Only the input of every block; the backward pass computes the block again with [`Keep::Saved`].
    Input {
        /// Mini-batches between two kept states of the fast weights while a block is computed again.
        group: usize,
    },
}

/// What all layers of one pass through the model share.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// The model's parameters.
    pub weights: &'a Weights,
    /// The sequences of the batch. In a pass without states sequence i is in slot i at the start of a mini-batch.
    pub segments: &'a [Segment],
    /// Rotary angles.
    pub rope: &'a rope::Table,
    /// Factor of the inner learning rate: below 1 while it warms up, otherwise 1.
    pub inner_lr: f64,
    /// What to keep for the backward pass.
    pub keep: Keep,
}

/// What one layer carries from token to token for every slot.
#[derive(Clone, Debug)]
pub struct LayerState {
    /// Fast weights and the rows of the open mini-batch.
    pub fast: FastWeights,
    /// Last inputs of the convolution before the TTT layer, `[slots, taps - 1, D]`.
    pub pre_conv: Option<Tensor>,
    /// Last inputs of the convolutions for q and k, `[slots, taps - 1, D]`; both read the same.
    pub qk_conv: Option<Tensor>,
}

impl LayerState {
    /// Bytes of the state of all slots.
    pub fn bytes(&self) -> usize {
        let windows = [&self.pre_conv, &self.qk_conv].into_iter().flatten().map(Tensor::bytes).sum::<usize>();
        self.fast.weights().bytes() + self.fast.rows().bytes() + windows
    }

    /// The tensors of the state, each `[slots, ...]`, with their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        [
            ("fast_weights", Some(self.fast.weights())),
            ("open_rows", Some(self.fast.rows())),
            ("pre_conv", self.pre_conv.as_ref()),
            ("qk_conv", self.qk_conv.as_ref()),
        ]
        .into_iter()
        .filter_map(|(name, tensor)| Some((name, tensor?)))
    }

    /// The tensors of the state, to write, in the order of [`LayerState::tensors`].
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let (weights, rows) = self.fast.tensors_mut();
        [Some(weights), Some(rows), self.pre_conv.as_mut(), self.qk_conv.as_mut()].into_iter().flatten()
    }

    /// Makes this the only handle to its tensors.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn unshare(&mut self) -> Result<()> {
        self.tensors_mut().try_for_each(|tensor| {
            *tensor = tensor.copy()?;
            Ok(())
        })
    }
}
