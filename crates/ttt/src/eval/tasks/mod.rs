//! Synthetic tasks that show what a state can hold: associative recall, a needle in a haystack, copying.
//!
//! A generator is a pure function of settings, seed and number of the sequence, and says which tokens are judged: those that a
//! model can know only from what it has read. [`write_lines`] makes training files of them, with a loss on judged tokens alone, and
//! [`score`] judges a model on sequences that it has not seen.

mod copy;
mod lines;
mod needle;
mod recall;
mod score;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

pub use copy::Copy;
pub use lines::write_lines;
pub use needle::{Haystack, Needle};
pub use recall::Recall;
pub use score::{Score, score};

use crate::data::Tokenizer;
use crate::{Error, Result};

/// A sequence, and which of its tokens are judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Ids.
    pub tokens: Vec<u32>,
    /// Indices of the judged tokens, ascending, none of them 0.
    pub judged: Vec<usize>,
}

impl Example {
    fn push(&mut self, token: u32) {
        self.tokens.push(token);
    }

    fn push_judged(&mut self, token: u32) {
        self.judged.push(self.tokens.len());
        self.tokens.push(token);
    }
}

/// Disjoint sets of tokens to build sequences from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alphabet {
    /// Keys, and the symbols that are copied.
    pub keys: Vec<u32>,
    /// Values.
    pub values: Vec<u32>,
    /// What stands between.
    pub filler: u32,
}

impl Alphabet {
    /// Bytes: 26 capital letters as keys, 26 small ones as values, the space between.
    pub fn bytes() -> Alphabet {
        let ids = |range: std::ops::RangeInclusive<u8>| range.map(u32::from).collect();
        Alphabet { keys: ids(b'A'..=b'Z'), values: ids(b'a'..=b'z'), filler: b' '.into() }
    }

    /// Ids of any vocabulary: 0 is the filler, the lower half of the others are keys, the upper half values.
    pub fn ids(vocab_size: usize) -> Alphabet {
        let (half, end) = (vocab_size.saturating_sub(1) / 2, vocab_size as u32);
        let middle = 1 + half as u32;
        Alphabet { keys: (1..middle).collect(), values: (middle..end).collect(), filler: 0 }
    }

    /// Bytes where ids are bytes, otherwise ids.
    pub fn of(tokenizer: Option<&Tokenizer>, vocab_size: usize) -> Alphabet {
        match tokenizer {
            Some(tokenizer) if tokenizer.is_bytes() && vocab_size >= 128 => Alphabet::bytes(),
            _ => Alphabet::ids(vocab_size),
        }
    }
}

/// A task with its settings.
#[derive(Clone, Debug)]
pub enum Task {
    /// Multi-query associative recall.
    Recall(Recall),
    /// A needle in a haystack.
    Needle(Needle),
    /// Copying.
    Copy(Copy),
}

impl Task {
    /// Sequence number `index` of the seed.
    ///
    /// # Panics
    /// When the settings do not pass [`Task::validate`].
    pub fn example(&self, alphabet: &Alphabet, seed: u64, index: u64) -> Example {
        let mut random = Random::new(seed, index);
        match self {
            Task::Recall(task) => task.example(alphabet, &mut random),
            Task::Needle(task) => task.example(alphabet, &mut random),
            Task::Copy(task) => task.example(alphabet, &mut random),
        }
    }

    /// How often a model is right that knows what may be asked but not what this sequence says.
    pub fn chance(&self, alphabet: &Alphabet) -> f64 {
        match self {
            Task::Recall(task) => task.chance(),
            Task::Needle(task) => task.chance(alphabet),
            Task::Copy(task) => task.chance(alphabet),
        }
    }

    /// Checks that the alphabet is large enough and the length long enough.
    ///
    /// # Errors
    /// The setting that is wrong, and what it may be.
    pub fn validate(&self, alphabet: &Alphabet) -> Result<()> {
        match self {
            Task::Recall(task) => task.validate(alphabet),
            Task::Needle(task) => task.validate(alphabet),
            Task::Copy(task) => task.validate(alphabet),
        }
    }
}

/// The random numbers of one sequence.
struct Random(ChaCha8Rng);

impl Random {
    fn new(seed: u64, index: u64) -> Random {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index);
        Random(rng)
    }

    /// A number below `n`; the bias of the remainder is below n / 2⁶⁴.
    fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n as u64) as usize
    }

    fn choose(&mut self, from: &[u32]) -> u32 {
        from[self.below(from.len())]
    }

    /// `n` different elements, in random order (Fisher-Yates).
    fn sample(&mut self, from: &[u32], n: usize) -> Vec<u32> {
        let mut all = from.to_vec();
        for i in 0..n {
            let other = i + self.below(all.len() - i);
            all.swap(i, other);
        }
        all.truncate(n);
        all
    }
}

fn invalid(message: String) -> Result<()> {
    Err(Error::Config(message))
}
