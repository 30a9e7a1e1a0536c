//! Choosing tokens from logits, for many sequences at once, such that the choice can be made where the logits are.
//!
//! For a row of logits x with largest number `top`, temperature T, and the number r of 53 random bits that the sequence draws next
//! from its stream of ChaCha8:
//! ```text
//! w_i = ⌊2^40 · e^((x_i − top) / T)⌋                    integers, so that sums do not depend on their order
//! order: descending x, equal ones by ascending id         (by id alone when nothing is cut)
//! top-k keeps the first k; then top-p the fewest of the first with Σ w ≥ p · Σ kept
//! the first token in the order whose Σ w up to and with it exceeds r / 2^53 · Σ kept
//! ```
//! Temperature 0 takes the first token of the order. The random numbers are those of [`crate::generate::Generator`] for stream 0, and
//! so is the meaning of all settings; weights are rounded to 2^-40 of the likeliest token's and computed in f32, so the tokens of
//! [`crate::generate::choose`] differ only where r lies within some 1e-6 of a boundary between two tokens.

pub(crate) mod cuda;
mod reference;

use rand_chacha::ChaCha8Rng;
use rand_core::SeedableRng;

use crate::device::view::View;
use crate::{Error, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only the k likeliest tokens are eligible; 0 means all.
    pub top_k: usize,
    /// Only the smallest set of likeliest tokens whose probabilities reach this sum is eligible; 1 means all.
    pub top_p: f64,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks the ranges.
    ///
    /// # Errors
    /// The field that is wrong and what it may be.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::Invalid(format!("the temperature is {}; it must be a number from 0 up", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::Invalid(format!("top-p is {}; it must be above 0 and at most 1", self.top_p)));
        }
        Ok(())
    }

    /// Log2(e) over the temperature, as the weights use it; 0 for temperature 0. A temperature too small for f32 is 0.
    fn scale(&self) -> f32 {
        let scale = (std::f64::consts::LOG2_E / self.temperature) as f32;
        if scale.is_finite() { scale } else { 0.0 }
    }

    /// Key of the random numbers.
    fn key(&self) -> [u8; 32] {
        ChaCha8Rng::seed_from_u64(self.seed).get_seed()
    }
}

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the model, before temperature and cuts.
    pub logprob: f64,
}

/// What a sequence chooses its tokens by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Settings.
    pub sampling: Sampling,
    /// Which of the seed's streams of random numbers: 0 is that of [`crate::generate::Generator`].
    pub stream: u64,
    /// Numbers taken from the stream so far, one for each token chosen.
    pub drawn: u64,
}

impl Draw {
    /// The beginning of a stream.
    pub fn new(sampling: Sampling, stream: u64) -> Draw {
        Draw { sampling, stream, drawn: 0 }
    }
}

/// Chooses a token for each row of `logits [n, v]` (f32) and moves the rows' draws on.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When there are no logits, not as many draws as rows, or logits of another type than f32.
pub fn forward(logits: View, draws: &mut [Draw]) -> Result<Vec<Choice>> {
    assert!(logits.rows() == draws.len() && logits.cols() > 0, "{} draws for logits {:?}", draws.len(), logits.shape());
    let choices = match logits.device().as_cuda() {
        Some(gpu) => cuda::forward(gpu, logits, draws)?,
        None => {
            let logits = logits.as_mat::<f32>();
            draws.iter().enumerate().map(|(i, draw)| reference::choose(logits.row(i), draw)).collect()
        }
    };
    draws.iter_mut().for_each(|draw| draw.drawn += 1);
    Ok(choices)
}
