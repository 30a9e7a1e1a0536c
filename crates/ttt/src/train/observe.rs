//! What a run tells whoever shows it, and how it is stopped.

use std::path::Path;

use crate::config::Config;
use crate::data::Progress;
use crate::layer::Keep;
use crate::plan::Memory;
use crate::train::metrics::Record;

/// What happens during a run, for whoever shows it.
#[derive(Debug)]
pub enum Event<'a> {
    /// Where the text comes from.
    Corpus(&'a str),
    /// Something is odd, but the run goes on.
    Warning(&'a str),
    /// The text is being turned into tokens.
    Tokenizing(Progress),
    /// The loop begins.
    Start {
        /// The model.
        config: &'a Config,
        /// What a step needs of memory.
        memory: Memory,
        /// What its forward pass keeps.
        keep: Keep,
        /// Number of its parameters.
        parameters: usize,
        /// Number of those that are learned.
        learned: usize,
        /// Training tokens of the corpus.
        train_tokens: u64,
        /// Validation tokens of the corpus.
        validation_tokens: u64,
        /// Updates made before, by the part of the run that is resumed.
        from_step: u64,
        /// Updates of the whole run.
        steps: u64,
    },
    /// A step was made and is not in `metrics.jsonl`.
    Step(&'a Record),
    /// A record was written.
    Logged(&'a Record),
    /// The model's continuation of the sample prompt.
    Sample(&'a str),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// Shows a run, and may stop it.
pub trait Observer: Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);

    /// Whether the run should save a checkpoint and stop.
    fn interrupted(&self) -> bool {
        false
    }
}
