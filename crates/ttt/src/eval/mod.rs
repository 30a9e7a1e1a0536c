//! Evaluation: how well a model predicts texts that it reads for the first time.
//!
//! Every prediction is made before its token is learned from: position t's logits depend on tokens 0..=t of its text and are
//! compared with token t + 1.

mod judge;
mod mean;
mod plot;
mod report;
pub mod tasks;

pub use judge::{Judge, Judged};
pub use mean::ClusteredMean;
pub use plot::{grid_svg, report_svg};
pub(crate) use plot::{inner_grid, loss_line};
pub use report::{Clusters, InnerRow, LossRow, Report};

use crate::batch::Batch;
use crate::layer::Keep;
use crate::lm::Lm;
use crate::{Error, Result};

/// Sums over everything that was read.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Sum of the negative log likelihoods of all predicted tokens, in nats.
    pub nll: f64,
    /// Number of predicted tokens.
    pub tokens: u64,
    /// Bytes of the text that the predicted tokens stand for.
    pub bytes: f64,
}

impl Evaluation {
    /// Mean negative log likelihood of a token, in nats.
    pub fn loss(&self) -> f64 {
        self.nll / self.tokens as f64
    }

    /// e to the power of the loss.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }

    /// Bits that the model needs for a byte of the text.
    pub fn bits_per_byte(&self) -> f64 {
        self.nll / std::f64::consts::LN_2 / self.bytes
    }

    /// Adds another evaluation's sums.
    pub fn add(&mut self, other: &Evaluation) {
        self.nll += other.nll;
        self.tokens += other.tokens;
        self.bytes += other.bytes;
    }
}

/// Reads one text from the beginning, in constant memory, and predicts every token from index `from` on (the first cannot be
/// predicted; a prompt is read but not judged). With `context`, the state starts afresh every so many tokens. `bytes` is what the
/// predicted tokens stand for.
///
/// # Errors
/// Nothing to predict, a token outside the vocabulary, or memory.
pub fn evaluate_text(model: &Lm, tokens: &[u32], from: usize, context: Option<usize>, bytes: f64) -> Result<Evaluation> {
    let from = from.max(1);
    if tokens.len() <= from {
        return Err(Error::Data(format!("a text of {} tokens has nothing to predict from token {from} on", tokens.len())));
    }
    let mut judge = Judge::new(model, context.map(|n| n.max(1) as u64), false)?;
    judge.start(from);
    let mut nll = 0.0;
    let mut sink = |judged: &Judged<'_>| nll += judged.nll.iter().sum::<f64>();
    judge.push(tokens, &mut sink)?;
    judge.finish(&mut sink)?;
    Ok(Evaluation { nll, tokens: (tokens.len() - from) as u64, bytes })
}

/// Evaluates a batch of sequences that start from the initial weights; only targets with a mask of 1 count, which stand for `bytes`
/// bytes of text.
///
/// # Errors
/// A token outside the vocabulary, or memory.
///
/// # Panics
/// When inputs, targets and mask differ in number.
pub fn evaluate_batch(model: &Lm, batch: &Batch, targets: &[u32], mask: &[f64], bytes: f64) -> Result<Evaluation> {
    assert!(batch.tokens.len() == targets.len() && targets.len() == mask.len(), "inputs, targets and mask differ in number");
    let (hidden, _) = model.forward(batch, None, Keep::Nothing, 1.0)?;
    let nll = model.nll(hidden.view(), targets)?;
    let tokens = mask.iter().filter(|m| **m > 0.0).count();
    let nll = nll.iter().zip(mask).map(|(n, m)| n * m).sum();
    Ok(Evaluation { nll, tokens: tokens as u64, bytes })
}
