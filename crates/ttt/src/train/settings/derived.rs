//! What follows from settings: segments, batches, steps, schedules.

use super::{Optimizer, Settings};
use crate::config::{Config, Inner};
use crate::data::Segmenting;
use crate::train::schedule::{InnerLearningRate, LearningRate};

impl Settings {
    /// Tokens of a segment: a sequence, when it is not cut.
    pub fn segment_length(&self) -> usize {
        self.train.segment_length.unwrap_or(self.train.sequence_length)
    }

    /// How sequences are cut and dealt out, for mini-batches of `mini_batch` tokens.
    pub fn segmenting(&self, mini_batch: usize) -> Segmenting {
        Segmenting {
            segment: self.segment_length(),
            per_step: self.train.segments_per_step,
            mini_batch,
            reset_at_documents: self.train.reset_at_documents,
        }
    }

    /// Whether segments continue states: sequences are cut.
    pub fn carries(&self) -> bool {
        self.segment_length() < self.train.sequence_length
    }

    /// Sequences of a step, of each of which it reads [`super::Train::segments_per_step`] segments.
    pub fn sequences_per_step(&self) -> usize {
        self.train.batch_tokens as usize / (self.segment_length() * self.train.segments_per_step).max(1)
    }

    /// Sequences computed at once: the largest number up to `train.micro_batch` that divides those of a step, so that all micro-batches
    /// are equal.
    pub fn micro_batch(&self) -> usize {
        let sequences = self.sequences_per_step();
        (1..=self.train.micro_batch.min(sequences)).rev().find(|n| sequences.is_multiple_of(*n)).unwrap_or(1)
    }

    /// Steps of the run: enough for all its tokens.
    pub fn steps(&self) -> u64 {
        self.train.tokens.div_ceil(self.train.batch_tokens)
    }

    /// Steps of the optimizer's warm-up.
    pub fn warmup_steps(&self) -> u64 {
        let fraction = || (self.optimizer.warmup_fraction * self.steps() as f64).round() as u64;
        self.optimizer.warmup_steps.unwrap_or_else(fraction)
    }

    /// The learning rate over the run.
    pub fn learning_rate(&self) -> LearningRate {
        let Optimizer { learning_rate: peak, end_learning_rate: end, .. } = self.optimizer;
        LearningRate { peak, end, warmup: self.warmup_steps(), total: self.steps() }
    }

    /// The inner learning rate of `config`, the run's model, over the run.
    pub fn inner_learning_rate(&self, config: &Config) -> InnerLearningRate {
        let warmup = self.train.inner_lr_warmup.unwrap_or(match config.inner() {
            None | Some(Inner::Linear) => 0,
            Some(Inner::Mlp) => self.warmup_steps(),
        });
        InnerLearningRate { init: self.train.inner_lr_init, base: config.ttt_base_lr, warmup }
    }
}
