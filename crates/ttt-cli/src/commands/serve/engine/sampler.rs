//! Random numbers of one choice: those that `ttt generate` draws for the same seed.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use ttt::generate::{Choice, Sampling, choose};

/// Chooses tokens of one sequence.
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Choice number `index` of a request.
    pub fn new(sampling: Sampling, index: usize) -> Sampler {
        Sampler { sampling, rng: ChaCha8Rng::seed_from_u64(sampling.seed.wrapping_add(index as u64)) }
    }

    /// The next token.
    pub fn choose(&mut self, logits: &[f32]) -> Choice {
        let unit = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        choose(logits, &self.sampling, unit)
    }
}
