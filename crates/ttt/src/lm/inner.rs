//! Passes that also measure how well the inner models fit.

use super::Lm;
use crate::Result;
use crate::batch::Batch;
use crate::layer::{BlockSaved, InnerStatistics, Keep, MixerSaved, Pass, TttLayer, TttSaved, TttState};
use crate::ops::{embedding, rms_norm};
use crate::state::States;
use crate::tensor::Tensor;

/// Squared errors of one layer's inner models on the last token of each full mini-batch, means over sequences, heads and channels:
/// under the learned initial weights, those before the mini-batch's update, those after it (paper, Figure 4).
pub type InnerErrors = Vec<[f64; 3]>;

impl Lm {
    /// Inner-loop statistics of every layer over a batch of sequences that start from the initial weights; of a mixer without an
    /// inner loop there are none.
    ///
    /// # Errors
    /// A token outside the vocabulary, or memory.
    pub fn inner_statistics(&self, batch: &Batch) -> Result<Vec<InnerStatistics>> {
        self.check_tokens(&batch.tokens)?;
        self.device.install(|| {
            let mut states = States::new(self, batch.slots())?;
            Ok(self.measure(batch, &mut states, |layer, pass, saved, end| layer.statistics(pass, saved, &end.fast))?.1)
        })
    }

    /// [`Lm::forward`] that continues states and also returns each layer's errors, none of a mixer without an inner loop. It holds
    /// every mini-batch's fast weights of one layer at a time.
    ///
    /// # Errors
    /// A token outside the vocabulary, or memory.
    ///
    /// # Panics
    /// When the batch names a slot twice, starts one afresh, or names one that is inside a mini-batch.
    pub fn forward_measured(&self, batch: &Batch, states: &mut States) -> Result<(Tensor, Vec<InnerErrors>)> {
        self.check_tokens(&batch.tokens)?;
        assert!(batch.seqs.iter().all(|s| !s.fresh), "a measured pass starts a sequence afresh");
        self.device.install(|| {
            let of =
                |layer: &TttLayer, pass: &Pass<'_>, saved: &TttSaved, end: &TttState| layer.inner_errors(pass, saved, &end.fast);
            let (x, errors) = self.measure(batch, states, of)?;
            let hidden = rms_norm::forward(x.view(), self.weights.view(self.ids.norm), self.config.rms_norm_eps)?;
            Ok((hidden, errors))
        })
    }

    /// Reads a batch and measures each TTT layer behind it; returns the input of the final norm too.
    fn measure<T>(
        &self,
        batch: &Batch,
        states: &mut States,
        of: impl Fn(&TttLayer, &Pass<'_>, &TttSaved, &TttState) -> Result<T>,
    ) -> Result<(Tensor, Vec<T>)> {
        let segments = states.segments(batch);
        let keep = if self.config.inner().is_some() { Keep::Saved { group: 1 } } else { Keep::Nothing };
        let rope = self.rope(&segments)?;
        let pass = Pass { weights: &self.weights, segments: &segments, routes: None, rope: rope.as_ref(), inner_lr: 1.0, keep };
        let mut x = embedding::forward(&batch.tokens, self.weights.matrix(self.ids.embed))?;
        let mut all = Vec::with_capacity(self.blocks.len());
        for (block, state) in self.blocks.iter().zip(&mut states.layers) {
            let (y, saved) = block.forward(&pass, x, Some(&mut *state))?;
            if let (Some(layer), Some(MixerSaved::Ttt(saved))) = (block.mixer().ttt(), saved.as_ref().map(BlockSaved::mixer)) {
                all.push(of(layer, &pass, saved, state.ttt())?);
            }
            x = y;
        }
        states.advance(batch);
        Ok((x, all))
    }
}
