//! Generation: a sampler that is a pure function of logits and random bits, and a loop that speaks token ids.

mod decoder;
mod recorded;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

pub use crate::ops::sample::{Choice, Draw, Sampling};
pub use decoder::{Decoder, Sequence, Session};

use crate::batch::Batch;
use crate::lm::Lm;
use crate::state::States;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Chooses a token from logits, given a number in `[0, 1)`. Ties go to the smaller id.
///
/// # Panics
/// When there are no logits.
pub fn choose(logits: &[f32], sampling: &Sampling, unit: f64) -> Choice {
    assert!(!logits.is_empty(), "no logits to choose from");
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let log_sum = logits.iter().map(|x| (*x as f64 - top).exp()).sum::<f64>().ln() + top;
    let choice = |token: usize| Choice { token: token as u32, logprob: logits[token] as f64 - log_sum };
    let likeliest = || (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("logits");
    if sampling.temperature == 0.0 {
        return choice(likeliest());
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let descending = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if sampling.top_k > 0 && sampling.top_k < order.len() {
        order.select_nth_unstable_by(sampling.top_k - 1, descending);
        order.truncate(sampling.top_k);
    }
    if sampling.top_k > 0 || sampling.top_p < 1.0 {
        order.sort_unstable_by(descending);
    }
    let mut weights: Vec<f64> = order.iter().map(|i| ((logits[*i] as f64 - top) / sampling.temperature).exp()).collect();
    let mut total: f64 = weights.iter().sum();
    if sampling.top_p < 1.0 {
        let mut sum = 0.0;
        let kept = weights.iter().position(|w| {
            sum += w;
            sum >= sampling.top_p * total
        });
        weights.truncate(kept.map_or(weights.len(), |i| i + 1));
        total = weights.iter().sum();
    }
    let mut left = unit * total;
    for (i, w) in weights.iter().enumerate() {
        left -= w;
        if left < 0.0 {
            return choice(order[i]);
        }
    }
    choice(order[weights.len() - 1])
}

/// Number `drawn` of a stream of random numbers in `[0, 1)`.
fn unit(seed: u64, stream: u64, drawn: u64) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng.set_word_pos(2 * u128::from(drawn));
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Continues one slot of some states token by token.
pub struct Generator<'m> {
    model: &'m Lm,
    draw: Draw,
    /// Logits of what follows what was read, where they were computed and here.
    last: Option<(Tensor, Vec<f32>)>,
    decoder: Decoder<'m>,
}

/// Tokens read at once while a prompt is learned: long enough for full speed, short enough to bound memory.
pub const PREFILL_CHUNK: usize = 2048;

impl<'m> Generator<'m> {
    /// A generator that has read nothing yet.
    ///
    /// # Errors
    /// Sampling settings out of range.
    pub fn new(model: &'m Lm, sampling: Sampling) -> Result<Generator<'m>> {
        sampling.validate()?;
        Ok(Generator { model, draw: Draw::new(sampling, 0), last: None, decoder: Decoder::new(model) })
    }

    /// Reads tokens into slot `slot`; afterwards [`Generator::choose`] can choose what follows.
    ///
    /// # Errors
    /// No tokens, a token outside the vocabulary, or memory.
    pub fn read(&mut self, states: &mut States, slot: usize, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::Invalid("there is no token to continue from: give a prompt of at least one token".into()));
        }
        if let Some(hidden) = prefill(self.model, states, slot, tokens)? {
            let logits = self.model.logits(&hidden, &[0])?;
            let values = logits.to_f64_vec().iter().map(|x| *x as f32).collect();
            self.last = Some((logits, values));
        }
        Ok(())
    }

    /// Logits of the token that follows what was read; none when nothing was.
    pub fn logits(&self) -> &[f32] {
        self.last.as_ref().map_or(&[], |(_, logits)| logits)
    }

    /// Chooses the next token from what was read; it is not read yet.
    ///
    /// # Panics
    /// When nothing was read.
    pub fn choose(&mut self) -> Choice {
        let Draw { sampling, stream, drawn } = self.draw;
        self.draw.drawn += 1;
        choose(self.logits(), &sampling, unit(sampling.seed, stream, drawn))
    }

    /// Reads a token and chooses the next: [`Generator::read`] and [`Generator::choose`], on a GPU in one step, which is recorded.
    ///
    /// # Errors
    /// A token outside the vocabulary, or memory.
    pub fn step(&mut self, states: &mut States, slot: usize, token: u32) -> Result<Choice> {
        let sequence = Sequence { slot, draw: self.draw, ends: [None; 2] };
        let choices = self.decoder.step(states, &[sequence], &[token])?;
        self.draw.drawn += 1;
        self.last = None;
        Ok(choices[0])
    }

    /// Chooses up to `limit` tokens from what was read on, and reads each but the last; on a GPU without waiting for the host
    /// between them ([`Decoder`]). Ends behind a token of `ends`, which is neither read nor given to `each`, and when `each` returns
    /// false, behind the tokens that are under way by then, which it is given too. Returns the token chosen last, if any: what comes
    /// next has to read it first.
    ///
    /// # Errors
    /// Memory, or what `each` returns.
    ///
    /// # Panics
    /// When nothing was read.
    pub fn write<E: From<Error>>(
        &mut self,
        states: &mut States,
        slot: usize,
        limit: usize,
        ends: [Option<u32>; 2],
        mut each: impl FnMut(Choice) -> std::result::Result<bool, E>,
    ) -> std::result::Result<Option<u32>, E> {
        if limit == 0 {
            return Ok(None);
        }
        let (logits, _) = self.last.take().expect("something was read");
        let sequence = Sequence { slot, draw: self.draw, ends };
        let mut session = self.decoder.start(states, &[sequence], &logits)?;
        // On a CPU a step that is under way is done.
        let ahead = if self.model.device().as_cuda().is_some() { 2 } else { 0 };
        let (mut begun, mut open, mut last) = (1, true, None);
        loop {
            while open && begun < limit && session.waiting() <= ahead {
                session.step()?;
                begun += 1;
            }
            let Some(choices) = session.take() else { break };
            let Some(choice) = choices[0] else { continue };
            self.draw.drawn += 1;
            last = Some(choice.token);
            if session.ended() {
                open = false;
            } else {
                open &= each(choice)?;
            }
        }
        Ok(last)
    }
}

/// Reads any number of tokens into slot `slot`, in constant memory, where no prediction is wanted.
///
/// # Errors
/// A token outside the vocabulary, or memory.
pub fn learn(model: &Lm, states: &mut States, slot: usize, tokens: &[u32]) -> Result<()> {
    prefill(model, states, slot, tokens).map(|_| ())
}

/// Reads tokens in chunks; returns the final hidden row `[1, D]` of the last.
fn prefill(model: &Lm, states: &mut States, slot: usize, tokens: &[u32]) -> Result<Option<Tensor>> {
    let mut last = None;
    for chunk in tokens.chunks(PREFILL_CHUNK) {
        let mut batch = Batch::default();
        batch.push(chunk, slot);
        // Only the last token's prediction is wanted, so most of the last block's work is not.
        last = Some(model.forward_rows(&batch, states, &[chunk.len() - 1])?);
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 2.0, 1.0, 2.0, -1.0];

    fn frequencies(sampling: Sampling) -> [f64; 5] {
        let mut counts = [0.0; 5];
        for i in 0..10_000 {
            counts[choose(&LOGITS, &sampling, (i as f64 + 0.5) / 10_000.0).token as usize] += 1e-4;
        }
        counts
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_likeliest() {
        let greedy = choose(&LOGITS, &Sampling { temperature: 0.0, ..Sampling::default() }, 0.9);
        assert_eq!(greedy.token, 1);
        let z: f64 = LOGITS.iter().map(|x| (*x as f64).exp()).sum();
        assert!((greedy.logprob - (2.0 - z.ln())).abs() < 1e-12);
    }

    #[test]
    fn frequencies_are_the_softmax() {
        let z: f64 = LOGITS.iter().map(|x| (*x as f64 / 0.7).exp()).sum();
        let got = frequencies(Sampling { temperature: 0.7, ..Sampling::default() });
        for (f, x) in got.iter().zip(LOGITS) {
            assert!((f - (x as f64 / 0.7).exp() / z).abs() < 2e-4, "{got:?}");
        }
    }

    #[test]
    fn cuts_keep_the_likeliest() {
        let top_k = frequencies(Sampling { top_k: 3, ..Sampling::default() });
        assert_eq!([top_k[0], top_k[4]], [0.0, 0.0]);
        let top_p = frequencies(Sampling { top_p: 0.5, ..Sampling::default() });
        assert!((top_p[1] - 0.5).abs() < 1e-3 && (top_p[3] - 0.5).abs() < 1e-3, "{top_p:?}");
    }
}
