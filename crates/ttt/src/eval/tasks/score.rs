//! How well a model does a task.

use super::{Alphabet, Example, Task};
use crate::Result;
use crate::batch::Batch;
use crate::eval::mean::ClusteredMean;
use crate::layer::Keep;
use crate::lm::Lm;
use crate::state::States;

/// Tokens read at once.
const CHUNK: usize = 2048;

/// What a model did, means over judged tokens with the sequences as clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Part of the judged tokens that were the model's likeliest.
    pub accuracy: ClusteredMean,
    /// Negative log likelihood of the judged tokens, in nats.
    pub loss: ClusteredMean,
    /// Part of the sequences of which all judged tokens were the likeliest.
    pub exact: ClusteredMean,
}

/// Judges a model on the sequences `0..sequences` of a seed, each from the initial weights, in memory that does not grow with
/// their number nor, but for its ids, with their length.
///
/// # Errors
/// Settings that make no sequence of the alphabet, or memory.
pub fn score(model: &Lm, task: &Task, alphabet: &Alphabet, seed: u64, sequences: u64) -> Result<Score> {
    task.validate(alphabet)?;
    let mut score = Score::default();
    let mut waiting: Vec<Example> = Vec::new();
    for index in 0..sequences {
        let example = task.example(alphabet, seed, index);
        if example.tokens.len() > CHUNK {
            score.add(&long(model, &example)?);
            continue;
        }
        if waiting.iter().map(|e| e.tokens.len()).sum::<usize>() + example.tokens.len() > CHUNK {
            together(model, &std::mem::take(&mut waiting), &mut score)?;
        }
        waiting.push(example);
    }
    together(model, &waiting, &mut score)?;
    Ok(score)
}

/// One judged token: its negative log likelihood, and whether it was the likeliest.
type Answer = (f64, bool);

impl Score {
    fn add(&mut self, answers: &[Answer]) {
        let (n, right) = (answers.len() as f64, answers.iter().filter(|a| a.1).count() as f64);
        self.accuracy.add(right, n);
        self.loss.add(answers.iter().map(|a| a.0).sum(), n);
        self.exact.add(f64::from(u8::from(right == n)), 1.0);
    }
}

/// Short sequences in one batch.
fn together(model: &Lm, examples: &[Example], score: &mut Score) -> Result<()> {
    if examples.is_empty() {
        return Ok(());
    }
    let inputs: Vec<&[u32]> = examples.iter().map(|e| &e.tokens[..e.tokens.len() - 1]).collect();
    let batch = Batch::packed(&inputs);
    let (hidden, _) = model.forward(&batch, None, Keep::Nothing, 1.0)?;
    let rows = examples.iter().zip(&batch.seqs).flat_map(|(e, s)| e.judged.iter().map(|at| s.first_row + at - 1));
    let targets: Vec<u32> = examples.iter().flat_map(|e| e.judged.iter().map(|at| e.tokens[*at])).collect();
    let answers = answers(model, &hidden, &rows.collect::<Vec<_>>(), &targets)?;
    let mut rest = &answers[..];
    for example in examples {
        let (own, others) = rest.split_at(example.judged.len());
        score.add(own);
        rest = others;
    }
    Ok(())
}

/// A long sequence in chunks, with a state.
fn long(model: &Lm, example: &Example) -> Result<Vec<Answer>> {
    let mut states = States::new(model, 1)?;
    let inputs = &example.tokens[..example.tokens.len() - 1];
    let mut all = Vec::new();
    for (i, chunk) in inputs.chunks(CHUNK).enumerate() {
        let from = i * CHUNK;
        let judged: Vec<usize> =
            example.judged.iter().filter(|at| (from..from + chunk.len()).contains(&(*at - 1))).copied().collect();
        let mut rows: Vec<usize> = judged.iter().map(|at| at - 1 - from).collect();
        if rows.is_empty() {
            // Something must be asked for; it is not looked at.
            rows.push(chunk.len() - 1);
        }
        let hidden = model.forward_rows(&Batch::one(chunk), &mut states, &rows)?;
        let targets: Vec<u32> = judged.iter().map(|at| example.tokens[*at]).collect();
        all.extend(answers(model, &hidden, &(0..judged.len()).collect::<Vec<_>>(), &targets)?);
    }
    Ok(all)
}

fn answers(model: &Lm, hidden: &crate::tensor::Tensor, rows: &[usize], targets: &[u32]) -> Result<Vec<Answer>> {
    // Logits of so many rows at once that a large vocabulary takes little memory.
    let (vocab, mut all) = (model.config().vocab_size, Vec::with_capacity(rows.len()));
    let part = ((1 << 22) / vocab).max(1);
    for (rows, targets) in rows.chunks(part).zip(targets.chunks(part)) {
        let logits = model.logits(hidden, rows)?.to_f64_vec();
        for (logits, target) in logits.chunks_exact(vocab).zip(targets) {
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = logits.iter().map(|x| (x - top).exp()).sum::<f64>().ln() + top;
            let own = logits[*target as usize];
            let first = logits.iter().position(|x| *x == top);
            all.push((log_sum - own, first == Some(*target as usize)));
        }
    }
    Ok(all)
}
