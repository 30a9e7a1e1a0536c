//! Random numbers of one choice: those that `ttt generate` draws for the same seed.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use ttt::generate::{Choice, Draw, Sampling, choose};

/// Chooses tokens of one sequence.
pub struct Sampler {
    draw: Draw,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Choice number `index` of a request.
    pub fn new(sampling: Sampling, index: usize) -> Sampler {
        let sampling = Sampling { seed: sampling.seed.wrapping_add(index as u64), ..sampling };
        Sampler { draw: Draw::new(sampling, 0), rng: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    /// The next token.
    pub fn choose(&mut self, logits: &[f32]) -> Choice {
        let unit = self.next();
        choose(logits, &self.draw.sampling, unit)
    }

    /// What the next token is chosen by, when others do it; they say so with [`Sampler::next`].
    pub fn draw(&self) -> Draw {
        self.draw
    }

    /// Takes the next number, in `[0, 1)`.
    pub fn next(&mut self) -> f64 {
        self.draw.drawn += 1;
        (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}
