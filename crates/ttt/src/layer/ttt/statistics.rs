//! How well the inner models of a layer fit, a mini-batch at a time.

use super::{Learner, TttLayer, TttSaved};
use crate::Result;
use crate::config::Inner;
use crate::device::view::View;
use crate::layer::Pass;
use crate::ops::inner::FastWeights;
use crate::ops::rope::Direction;
use crate::ops::{add, rope, token_scale, ttt_linear, ttt_mlp};
use crate::tensor::{Tensor, with_dtype};
use crate::weights::Weights;

/// Squared errors of the inner loop, one value a full mini-batch, each a mean over sequences, heads and channels (the statistics
/// of the official JAX code).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InnerStatistics {
    /// Spread of the target `v - k` (k before RoPE) of the first token of each mini-batch around its mean over the sequence.
    pub target_variance: Vec<f64>,
    /// Error of the last token under the initial weights.
    pub initial: Vec<f64>,
    /// Error of the last token under the weights at the start of its mini-batch.
    pub before: Vec<f64>,
    /// Error of the last token under the weights after its mini-batch.
    pub after: Vec<f64>,
}

impl TttLayer {
    /// Inner-loop statistics of a pass that kept every mini-batch's weights and ended with `end`.
    pub fn statistics(&self, pass: &Pass<'_>, saved: &TttSaved, end: &FastWeights) -> Result<InnerStatistics> {
        let rows = self.inner_errors(pass, saved, end)?;
        let inputs = self.inputs(pass, &saved.projected, &saved.qk, &saved.rates);
        let column = |i: usize| rows.iter().map(|r| r[i]).collect();
        let target_variance = self.target_variance(pass, inputs.k, inputs.v, rows.len())?;
        Ok(InnerStatistics { target_variance, initial: column(0), before: column(1), after: column(2) })
    }

    /// The last three of [`InnerStatistics`], a row for each full mini-batch of the pass. The initial weights are the learned
    /// ones, wherever in its text the pass began.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn inner_errors(&self, pass: &Pass<'_>, saved: &TttSaved, end: &FastWeights) -> Result<Vec<[f64; 3]>> {
        let inputs = self.inputs(pass, &saved.projected, &saved.qk, &saved.rates);
        let mut initial = self.fast_weights(pass.weights, end.slots())?;
        pass.segments.iter().for_each(|s| self.start(pass.weights, &mut initial, s.slot));
        match self.mini_batches() {
            (Inner::Linear, _) => ttt_linear::statistics(&inputs, saved.inner.weights(), &initial, end),
            (Inner::Mlp, _) => ttt_mlp::statistics(&inputs, saved.inner.weights(), &initial, end),
        }
    }

    /// τ of a mini-batch's last position: what a mini-batch's gradients are scaled by in the update that the next ones see. At 0
    /// (the scale is learned, and clamped, where its gradient is 0 too) the layer keeps nothing beyond a mini-batch.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn last_token_scale(&self, weights: &Weights) -> Result<Option<f64>> {
        let Some(token_idx) = self.ids.lr.and_then(|lr| lr.token_idx) else { return Ok(None) };
        Ok(token_scale::forward(weights.view(token_idx))?.to_f64_vec().last().copied())
    }

    fn target_variance(&self, pass: &Pass<'_>, k: View<'_>, v: View<'_>, mini_batches: usize) -> Result<Vec<f64>> {
        let mut plain = Tensor::empty(k.device(), &[k.rows(), k.cols()], k.dtype())?;
        add::copy_to(plain.view_mut(), k);
        rope::rotate(plain.view_mut(), pass.rope(), pass.segments, self.heads, Direction::Backward);
        let mut values = Tensor::empty(k.device(), &[k.rows(), k.cols()], k.dtype())?;
        add::copy_to(values.view_mut(), v);
        let host = k.device().cpu_beside();
        let (plain, values) = (plain.to(&host)?, values.to(&host)?);
        let (mut sums, mut counts, size) = (vec![0.0; mini_batches], vec![0usize; mini_batches], self.mini_batches().1);
        with_dtype!(plain.dtype(), E => {
            use crate::tensor::Element;
            let (k, v) = (plain.view().as_mat::<E>(), values.view().as_mat::<E>());
            for s in pass.segments {
                for c in 0..self.hidden {
                    let target = |t: usize| v.row(s.first_row + t)[c].to_f64() - k.row(s.first_row + t)[c].to_f64();
                    let mean = (0..s.len).map(target).sum::<f64>() / s.len as f64;
                    for m in 0..s.len / size {
                        sums[m] += (target(m * size) - mean).powi(2);
                        counts[m] += 1;
                    }
                }
            }
        });
        Ok(sums.iter().zip(counts).map(|(s, n)| s / n as f64).collect())
    }

    /// The inner model and the size of its mini-batches.
    ///
    /// # Panics
    /// When the learner has no mini-batches.
    fn mini_batches(&self) -> (Inner, usize) {
        match self.learner {
            Learner::MiniBatch { inner, mini_batch } => (inner, mini_batch),
            other => panic!("statistics of mini-batches, of which {other:?} has none"),
        }
    }
}
