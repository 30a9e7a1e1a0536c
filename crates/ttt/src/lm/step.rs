//! A step of decoding whose tokens are on the GPU already.

use super::Lm;
use crate::batch::Segment;
use crate::layer::{Keep, Pass};
use crate::ops::sample::cuda::Tokens;
use crate::ops::{embedding, rms_norm};
use crate::state::States;
use crate::tensor::Tensor;
use crate::{Error, Result};

impl Lm {
    /// Reads a token of each segment, which lies on the GPU, and returns the logits `[n, V]` of what follows: what [`Lm::forward`]
    /// and [`Lm::logits`] do, but that the slots' positions are the caller's to move on.
    ///
    /// # Errors
    /// A model that is not on a GPU, or memory.
    pub(crate) fn step(&self, tokens: &Tokens, segments: &[Segment], states: &mut States) -> Result<Tensor> {
        let Some(gpu) = self.device.as_cuda() else { return Err(Error::Device("the model is not on a GPU".into())) };
        let (weights, rope) = (&self.weights, self.rope(segments)?);
        let pass = Pass { weights, segments, routes: None, rope: rope.as_ref(), inner_lr: 1.0, keep: Keep::Nothing };
        let mut x = embedding::cuda::forward_of(gpu, tokens, self.weights.matrix(self.ids.embed).float())?;
        for (block, state) in self.blocks.iter().zip(&mut states.layers) {
            x = block.forward(&pass, x, Some(state))?.0;
        }
        let hidden = rms_norm::forward(x.view(), self.weights.view(self.ids.norm), self.config.rms_norm_eps)?;
        self.logits(&hidden, &(0..segments.len()).collect::<Vec<_>>())
    }
}
