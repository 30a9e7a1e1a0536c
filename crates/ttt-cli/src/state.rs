//! `--state-in` and `--state-out`.

use std::fmt;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use ttt::data::Tokenizer;
use ttt::lm::Lm;
use ttt::state::States;

use crate::units;

/// What one sequence goes on from.
pub struct Start {
    /// One slot.
    pub states: States,
    /// Tokens to read first.
    pub pending: Vec<u32>,
}

/// The state of a file, or the beginning of a sequence.
pub fn start(lm: &Lm, file: Option<&Path>, tokenizer: Option<&Tokenizer>) -> Result<Start> {
    let mut states = lm.states(1)?;
    let Some(file) = file else { return Ok(Start { states, pending: Vec::new() }) };
    let header = states.restore(0, lm, file)?;
    if let (Some(theirs), Some(ours)) = (&header.tokenizer, tokenizer)
        && theirs != ours.id()
    {
        bail!("{}: the state was made with another tokenizer ({theirs}); name that one with --tokenizer", file.display());
    }
    Ok(Start { states, pending: header.pending })
}

/// A state that was written.
pub struct Saved {
    path: String,
    bytes: u64,
    tokens: u64,
}

/// Writes slot 0 to a file.
pub fn save(states: &States, lm: &Lm, pending: &[u32], tokenizer: Option<&Tokenizer>, path: &Path) -> Result<Saved> {
    let bytes = states.save(0, lm, pending, tokenizer.map(Tokenizer::id), path)?;
    Ok(Saved { path: path.display().to_string(), bytes, tokens: states.position(0) })
}

impl Saved {
    /// For programs.
    pub fn json(&self) -> Value {
        json!({"path": self.path, "bytes": self.bytes, "tokens": self.tokens})
    }
}

impl fmt::Display for Saved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "state after {} tokens: {}, {}", units::grouped(self.tokens), self.path, units::bytes(self.bytes))
    }
}
