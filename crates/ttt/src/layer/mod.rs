//! The parts of the model: forward and backward over [`crate::ops`], holding parameter ids and never tensors.
//!
//! Everything here follows one pattern: `forward` returns its output and, when asked to keep something, a plain struct of what
//! `backward` needs; `backward` adds parameter gradients to a flat [`Params`](crate::params::Params) and returns the gradient of its input. Sums over
//! the several uses of one value (the residual stream, the input of q, k, v and the gates) are written out here, never in `ops/`.

mod attention;
mod block;
mod carry;
mod ffn;
mod mamba;
mod mixer;
mod pre_conv;
pub mod state;
mod ttt;

pub use attention::{AttentionLayer, AttentionSaved};
pub use block::{Block, BlockSaved};
pub(crate) use carry::routes;
pub use carry::{Carried, Route};
pub use mamba::{MambaLayer, MambaSaved, MambaState};
pub use mixer::{MixerLayer, MixerSaved};
pub use state::{LayerState, TttState};
pub(crate) use ttt::Learner;
pub use ttt::{InnerStatistics, TttLayer, TttSaved};

use crate::batch::Segment;
use crate::ops::rope;
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
    /// The activations of every block but the outputs of its inner loop, and of its fast weights only those that the sequences
    /// began with; the backward pass runs the inner loop of a block again. The same as [`Keep::Saved`] where nothing learns in
    /// mini-batches.
    Start {
        /// Mini-batches between two kept states of the fast weights while an inner loop runs again.
        group: usize,
    },
    /// Only the input of every block; the backward pass computes the block again with [`Keep::Saved`].
    Input {
        /// Mini-batches between two kept states of the fast weights while a block is computed again.
        group: usize,
    },
}

impl Keep {
    /// Whether a block keeps activations.
    pub(crate) fn activations(self) -> bool {
        matches!(self, Keep::Saved { .. } | Keep::Start { .. })
    }
}

/// What all layers of one pass through the model share.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// The model's parameters.
    pub weights: &'a Weights,
    /// The sequences of the batch. In a pass without states, or with routes, sequence i is in a slot i of its own.
    pub segments: &'a [Segment],
    /// Of each sequence, the slots of the states that it comes from and goes to. Without routes it works in its slot itself.
    pub routes: Option<&'a [Route]>,
    /// Rotary angles, where the mixer has heads.
    pub rope: Option<&'a rope::Table>,
    /// Factor of the inner learning rate: below 1 while it warms up, otherwise 1.
    pub inner_lr: f64,
    /// What to keep for the backward pass.
    pub keep: Keep,
}

impl<'a> Pass<'a> {
    /// The rotary angles.
    ///
    /// # Panics
    /// When the mixer has no heads.
    pub(crate) fn rope(&self) -> &'a rope::Table {
        self.rope.expect("rotary angles of a mixer with heads")
    }

    /// Row `row` of the batch as a sequence of one token in row `to`, which has read all that came before it.
    pub(crate) fn alone(&self, row: usize, to: usize) -> Segment {
        let of = self.segments.iter().find(|s| s.rows().contains(&row));
        let segment = of.unwrap_or_else(|| panic!("row {row} of no segment"));
        Segment { first_row: to, len: 1, slot: segment.slot, phase: segment.phase + row - segment.first_row }
    }
}
