//! Whether a run can be made with its settings.

use super::{Carry, Recompute, Settings};
use crate::{Error, Result};

impl Settings {
    /// Checks that the run can be made.
    ///
    /// # Errors
    /// The first setting that is wrong, its value, and what it may be.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::Config(message));
        let Settings { data, optimizer, train, .. } = self;
        let config = self.model_config()?;
        let at_least_one = [
            ("train.tokens", train.tokens),
            ("train.sequence_length", train.sequence_length as u64),
            ("train.segment_length", self.segment_length() as u64),
            ("train.segments_per_step", train.segments_per_step as u64),
            ("train.batch_tokens", train.batch_tokens),
            ("train.micro_batch", train.micro_batch as u64),
            ("train.checkpoint_group", train.checkpoint_group as u64),
            ("checkpoint.keep", self.checkpoint.keep as u64),
            ("log.every", self.log.every),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return wrong(format!("{key} is 0; it must be at least 1"));
        }
        let (length, mini_batch, batch) =
            (train.sequence_length as u64, config.mini_batch().unwrap_or(1) as u64, train.batch_tokens);
        if !length.is_multiple_of(mini_batch) {
            return wrong(format!(
                "train.sequence_length {length} is not a multiple of the mini-batch size {mini_batch}; {} is",
                length.next_multiple_of(mini_batch)
            ));
        }
        self.validate_segments(mini_batch)?;
        let at_once = (self.segment_length() * train.segments_per_step) as u64;
        if !batch.is_multiple_of(at_once) {
            let of = match (train.segment_length, train.segments_per_step) {
                (None, _) => format!("train.sequence_length {length}"),
                (Some(segment), 1) => format!("train.segment_length {segment}"),
                (Some(segment), n) => format!("train.segments_per_step {n} times train.segment_length {segment}"),
            };
            return wrong(format!("train.batch_tokens {batch} is not a multiple of {of}; {} is", batch.next_multiple_of(at_once)));
        }
        if train.tokens < batch {
            return wrong(format!("train.tokens {} is less than one step of {batch} tokens (train.batch_tokens)", train.tokens));
        }
        if self.eval.tokens < length {
            return wrong(format!("eval.tokens {} is less than one sequence of {length} tokens", self.eval.tokens));
        }
        if self.warmup_steps() > self.steps() {
            return wrong(format!("optimizer.warmup_steps {} is more than the run's {} steps", self.warmup_steps(), self.steps()));
        }
        if train.only_initial_state && config.inner().is_none() {
            return wrong("train.only_initial_state is of a TTT model alone: this one has no initial fast weights".into());
        }
        if train.only_initial_state && self.model.folder.is_none() {
            return wrong("train.only_initial_state needs a trained model to start from: --init-from MODEL".into());
        }
        let positive = f64::MIN_POSITIVE..=f64::MAX;
        let ranges = [
            ("data.validation_fraction", data.validation_fraction, 0.0..=1.0 - f64::EPSILON, "from 0 to below 1"),
            ("optimizer.learning_rate", optimizer.learning_rate, positive.clone(), "a positive number"),
            ("optimizer.end_learning_rate", optimizer.end_learning_rate, 0.0..=optimizer.learning_rate, "from 0 to learning_rate"),
            ("optimizer.warmup_fraction", optimizer.warmup_fraction, 0.0..=1.0, "from 0 to 1"),
            ("optimizer.beta1", optimizer.beta1, 0.0..=1.0 - f64::EPSILON, "from 0 to below 1"),
            ("optimizer.beta2", optimizer.beta2, 0.0..=1.0 - f64::EPSILON, "from 0 to below 1"),
            ("optimizer.eps", optimizer.eps, positive.clone(), "a positive number"),
            ("optimizer.weight_decay", optimizer.weight_decay, 0.0..=f64::MAX, "a number from 0 up"),
            ("optimizer.clip", optimizer.clip, 0.0..=f64::MAX, "a number from 0 up"),
            ("train.inner_lr_init", train.inner_lr_init, positive, "a positive number"),
        ];
        match ranges.iter().find(|(_, value, range, _)| !range.contains(value)) {
            Some((key, value, _, allowed)) => wrong(format!("{key} is {value}; it must be {allowed}")),
            None => Ok(()),
        }
    }

    /// The cuts of sequences, for mini-batches of `mini_batch` tokens.
    fn validate_segments(&self, mini_batch: u64) -> Result<()> {
        let train = &self.train;
        let (length, segment, at_once) = (train.sequence_length, self.segment_length(), train.segments_per_step);
        let message = if !(segment as u64).is_multiple_of(mini_batch) {
            let next = (segment as u64).next_multiple_of(mini_batch);
            format!("train.segment_length {segment} is not a multiple of the mini-batch size {mini_batch}; {next} is")
        } else if !length.is_multiple_of(segment) {
            format!("train.sequence_length {length} is not a multiple of train.segment_length {segment}")
        } else if !(length / segment).is_multiple_of(at_once) {
            let n = length / segment;
            format!("train.segments_per_step {at_once} does not divide the {n} segments of a sequence (train.segment_length)")
        } else if train.carry == Carry::Gradient && at_once == 1 {
            "train.carry is gradient, but a step has no cuts; set train.segments_per_step to 2 or more".into()
        } else if train.recompute == Recompute::Segment && train.carry != Carry::Gradient {
            "train.recompute is segment, which is of use only with train.carry=gradient; use auto, none, inner or block".into()
        } else {
            return Ok(());
        };
        Err(Error::Config(message))
    }
}
