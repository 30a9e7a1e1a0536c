//! What TTT-Linear and TTT-MLP share: the fast weights that slots carry, the inputs and gradients of one layer, and the loops
//! over sequences, heads, mini-batches and checkpoints (`drive`).
//!
//! Notation, here and in both learners (for one sequence and head, one mini-batch of n <= K tokens, head width d, f = 4d):
//!
//! | symbol | shape | meaning |
//! |---|---|---|
//! | q, k, v | `[n, d]` | views of the tokens; q and k rotated |
//! | r | `[n]` | `lr`: base rate * sigmoid(gate) / d |
//! | τ | `[n]` | `tok` >= 0; the inner learning rate of token j as token i sees it is τ_i r_j |
//! | G, Ĝ = r ⊙ G | `[n, d]` or `[n, f]` | inner gradients at the weights of the mini-batch's start |
//! | γ, β | `[d]` | LayerNorm of the head, inside the inner model (see [`Variant`]) |

pub(crate) mod cpu;
pub(crate) mod cuda;
pub(crate) mod drive;
pub(crate) mod layer;
pub(crate) mod math;
pub(crate) mod rounding;
pub(crate) mod rows;
#[cfg(test)]
pub(crate) mod test_lanes;
pub(crate) mod wrap;

use crate::Result;
use crate::batch::Segment;
use crate::config::Inner;
use crate::device::Device;
use crate::device::view::{View, ViewMut};
use crate::ops::add;
use crate::tensor::{DType, Tensor};

/// What one layer carries from token to token for each slot.
///
/// The weights only move when a mini-batch is complete, so a slot inside a mini-batch also keeps that mini-batch's rows: enough
/// to run the ordinary mini-batch code for the rest of it.
#[derive(Clone, Debug)]
pub struct FastWeights {
    inner: Inner,
    slots: usize,
    heads: usize,
    head_dim: usize,
    mini_batch: usize,
    weights: Tensor,
    rows: Tensor,
}

impl FastWeights {
    /// Zeros for `slots` sequences.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn zeros(
        device: &Device,
        dtype: DType,
        inner: Inner,
        slots: usize,
        heads: usize,
        head_dim: usize,
        mini_batch: usize,
    ) -> Result<FastWeights> {
        assert!(mini_batch > 0, "a mini-batch of no tokens");
        let weights = Tensor::zeros(device, &[slots, heads, Self::state_len(inner, head_dim)], dtype)?;
        let rows = Tensor::zeros(device, &[slots, heads, mini_batch - 1, Self::row_len(inner, head_dim)], dtype)?;
        Ok(FastWeights { inner, slots, heads, head_dim, mini_batch, weights, rows })
    }

    /// Zeros of a learner that carries `len` sums a head from token to token and has no mini-batches, for `slots` sequences.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn of_sums(device: &Device, dtype: DType, slots: usize, heads: usize, head_dim: usize, len: usize) -> Result<FastWeights> {
        let weights = Tensor::zeros(device, &[slots, heads, len], dtype)?;
        let rows = Tensor::zeros(device, &[slots, heads, 0, Self::row_len(Inner::Linear, head_dim)], dtype)?;
        Ok(FastWeights { inner: Inner::Linear, slots, heads, head_dim, mini_batch: 1, weights, rows })
    }

    /// Number of fast weights of a head, S: `d² + d` (`[W1 | b1]`) or `8d² + 5d` (`[W1 | b1 | W2 | b2]`).
    pub fn state_len(inner: Inner, head_dim: usize) -> usize {
        weight_lens(inner, head_dim).iter().sum()
    }

    /// Numbers kept for a token of an open mini-batch and head, R: `2d` (`[k | Ĝ]`) or `10d` (`[k | Ĝ1 | X2 | Ĝ2]`).
    pub fn row_len(inner: Inner, head_dim: usize) -> usize {
        row_widths(inner, head_dim).iter().sum()
    }

    /// `[slots, heads, S]`: the weights at the start of the open mini-batch.
    pub fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// `[slots, heads, S]`, to write.
    pub fn weights_mut(&mut self) -> &mut Tensor {
        &mut self.weights
    }

    /// `[slots, heads, K - 1, R]`: the rows of the open mini-batch already seen; those at and after the phase are arbitrary.
    pub fn rows(&self) -> &Tensor {
        &self.rows
    }

    /// `[slots, heads, K - 1, R]`, to write.
    pub fn rows_mut(&mut self) -> &mut Tensor {
        &mut self.rows
    }

    /// Weights and rows, both to write.
    pub fn tensors_mut(&mut self) -> (&mut Tensor, &mut Tensor) {
        (&mut self.weights, &mut self.rows)
    }

    /// The inner model.
    pub fn inner(&self) -> Inner {
        self.inner
    }

    /// Number of sequences.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Number of heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Width of a head, d.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Tokens of a mini-batch, K.
    pub fn mini_batch(&self) -> usize {
        self.mini_batch
    }

    /// A copy on another device.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn to(&self, device: &Device) -> Result<FastWeights> {
        Ok(FastWeights { weights: self.weights.to(device)?, rows: self.rows.to(device)?, ..*self })
    }

    /// Slot `slot` alone, on another device.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn slot_to(&self, slot: usize, device: &Device) -> Result<FastWeights> {
        let alone = |tensor: &Tensor| tensor.slot(slot, tensor.shape()[1])?.to(device);
        Ok(FastWeights { slots: 1, weights: alone(&self.weights)?, rows: alone(&self.rows)?, ..*self })
    }

    /// Puts the learned initial weights into `slot`: `[W1 [h*d, ·], b1 [h, ·]]`, for the MLP also `[W2 [h*4d, d], b2 [h, d]]`.
    /// The slot is then at phase 0.
    ///
    /// # Panics
    /// When a shape is another, or the slot does not exist.
    pub fn start(&mut self, slot: usize, initial: &[View<'_>]) {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        let (heads, lens) = (self.heads, weight_lens(self.inner, self.head_dim));
        let count = lens.iter().filter(|&&len| len > 0).count();
        assert_eq!(initial.len(), count, "{} initial weights for {:?}", initial.len(), self.inner);
        for (view, len) in initial.iter().zip(lens) {
            let [rows, cols] = view.shape();
            assert!(rows * cols == heads * len && rows % heads == 0, "initial weights {rows} x {cols} for {heads} heads of {len}");
        }
        let mut at = 0;
        for (view, len) in initial.iter().zip(lens) {
            let own = self.weights.view_mut().row_range(slot * heads..(slot + 1) * heads).col_range(at..at + len);
            add::copy_to(own, view.reshape(heads, len));
            at += len;
        }
    }

    /// [`FastWeights::start`] of every slot.
    ///
    /// # Panics
    /// When a shape is another.
    pub fn start_all(&mut self, initial: &[View<'_>]) {
        let device = self.weights.device().clone();
        if self.slots == 0 {
            return;
        }
        self.start(0, initial);
        match device.as_cuda() {
            // One launch for all other slots.
            Some(gpu) => {
                let (first, rest) = self.weights.view_mut().split_rows(self.heads);
                add::cuda::repeat(gpu, &rest, first.as_view());
            }
            None => (1..self.slots).for_each(|slot| self.start(slot, initial)),
        }
    }
}

/// Elements of `[W1, b1, W2, b2]` of a head; the last two are 0 for the linear model.
pub(crate) fn weight_lens(inner: Inner, d: usize) -> [usize; 4] {
    match inner {
        Inner::Linear => [d * d, d, 0, 0],
        Inner::Mlp => [4 * d * d, 4 * d, 4 * d * d, d],
    }
}

/// Widths of the rows kept for a token of an open mini-batch: `[k, Ĝ]` or `[k, Ĝ1, X2, Ĝ2]`.
pub(crate) fn row_widths(inner: Inner, d: usize) -> [usize; 4] {
    match inner {
        Inner::Linear => [d, d, 0, 0],
        Inner::Mlp => [d, 4 * d, 4 * d, d],
    }
}

/// What is around g in the inner model `f(x) = x + LN(g(x))`, where g has the weights: both by default. The paper's ladder from
/// linear attention to TTT-Linear (its Table 1) begins with neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// LayerNorm of g's output. Without it γ and β change nothing and their gradients are 0.
    pub layer_norm: bool,
    /// `x +`. Without it the inner model learns v itself, not `v - k`.
    pub residual: bool,
}

impl Default for Variant {
    fn default() -> Variant {
        Variant { layer_norm: true, residual: true }
    }
}

/// What the inner models of a layer read.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Test views, rotated: `[n, h*d]`.
    pub q: View<'a>,
    /// Training views, rotated: `[n, h*d]`.
    pub k: View<'a>,
    /// Label views: `[n, h*d]`.
    pub v: View<'a>,
    /// Inner learning rate of each token: `[n, h]`, base rate * sigmoid(gate) / d.
    pub lr: View<'a>,
    /// Scale of each position of a mini-batch: `[1, K]`, not negative.
    pub tok: View<'a>,
    /// Weight of the inner LayerNorm: `[h, d]`.
    pub gamma: View<'a>,
    /// Bias of the inner LayerNorm: `[h, d]`.
    pub beta: View<'a>,
    /// LayerNorm and residual of the inner model. The fast code covers the default alone.
    pub variant: Variant,
    /// The sequences. Their rows lie one behind the other from row 0 to n, and no two name the same slot.
    pub segments: &'a [Segment],
}

impl Inputs<'_> {
    /// Checks all shapes and returns (tokens, heads, head width, mini-batch size).
    pub(crate) fn sizes(&self) -> (usize, usize, usize, usize) {
        let [heads, d] = self.gamma.shape();
        let [n, mini_batch] = [self.q.rows(), self.tok.cols()];
        let wide = [n, heads * d];
        assert!(
            self.q.shape() == wide && self.k.shape() == wide && self.v.shape() == wide,
            "q {:?}, k {:?}, v {:?} for {heads} heads of {d}",
            self.q.shape(),
            self.k.shape(),
            self.v.shape()
        );
        assert_eq!(self.lr.shape(), [n, heads], "lr {:?} for {n} tokens and {heads} heads", self.lr.shape());
        assert!(self.tok.rows() == 1 && mini_batch > 0, "tok {:?} is not [1, K]", self.tok.shape());
        assert_eq!(self.beta.shape(), [heads, d], "beta {:?} beside gamma [{heads}, {d}]", self.beta.shape());
        let mut row = 0;
        for s in self.segments {
            assert_eq!(s.first_row, row, "a segment starts at row {} instead of {row}", s.first_row);
            assert!(s.phase < mini_batch, "phase {} in mini-batches of {mini_batch}", s.phase);
            row += s.len;
        }
        assert_eq!(row, n, "segments of {row} rows in a batch of {n}");
        (n, heads, d, mini_batch)
    }
}

/// Where the gradients of a layer's inputs go; overwritten.
#[derive(Debug)]
pub struct InputGrads<'a> {
    /// `[n, h*d]`.
    pub dq: ViewMut<'a>,
    /// `[n, h*d]`.
    pub dk: ViewMut<'a>,
    /// `[n, h*d]`.
    pub dv: ViewMut<'a>,
    /// `[n, h]`.
    pub dlr: ViewMut<'a>,
}

/// Where the gradients of a layer's parameters go; added to.
#[derive(Debug)]
pub struct ParamGrads<'a> {
    /// `[1, K]`, of the clamped scales.
    pub dtok: ViewMut<'a>,
    /// `[h, d]`.
    pub dgamma: ViewMut<'a>,
    /// `[h, d]`.
    pub dbeta: ViewMut<'a>,
}

/// What a forward pass keeps for its backward: the fast weights at the start of every g-th mini-batch. The others are computed
/// again (time-axis gradient checkpointing, paper Appendix C).
#[derive(Debug)]
pub struct Saved {
    pub(crate) inner: Inner,
    pub(crate) group: usize,
    /// `[checkpoints, S]`: for each segment, for each head, ceil(ceil(len/K) / g). On a CPU the weights at the start of every g-th
    /// mini-batch; on a GPU those after the last complete mini-batch of each group of g.
    pub(crate) states: Tensor,
    /// On a GPU the scaled inner gradients, with which updates are undone: `[n, h*d]`, for the MLP `[n, h*5d]` with `[Ĝ1 | Ĝ2]` a
    /// head.
    pub(crate) ghat: Option<Tensor>,
    /// On a GPU, for the MLP, what LayerNorm read: `[n, h*2d]` with `[Z2 | Z̄2]` a head.
    pub(crate) sums: Option<Tensor>,
    /// On a GPU with g = 1 the weights of all slots before the pass, which statistics need.
    pub(crate) start: Option<Tensor>,
}

impl Saved {
    /// Bytes kept: for f32 `4 h S` times the sum of ceil(ceil(len/K) / g) over the segments; on a GPU also the inner gradients.
    pub fn bytes(&self) -> usize {
        self.states.bytes() + [&self.ghat, &self.sums, &self.start].into_iter().flatten().map(Tensor::bytes).sum::<usize>()
    }

    /// Mini-batches from one checkpoint to the next, g.
    pub fn group(&self) -> usize {
        self.group
    }
}
