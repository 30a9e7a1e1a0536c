//! Copying: random symbols, then the same again. What is learned from it is the induction head (Olsson et al., arXiv 2209.11895).

use super::{Alphabet, Example, Random, invalid};
use crate::Result;

/// `length / 2` random keys and their repetition. Its first token cannot be foreseen; the others are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Tokens of a sequence; even.
    pub length: usize,
}

impl Copy {
    pub(super) fn example(&self, alphabet: &Alphabet, random: &mut Random) -> Example {
        let half: Vec<u32> = (0..self.length / 2).map(|_| random.choose(&alphabet.keys)).collect();
        let tokens = [&half[..], &half].concat();
        Example { tokens, judged: (half.len() + 1..self.length).collect() }
    }

    pub(super) fn chance(&self, alphabet: &Alphabet) -> f64 {
        1.0 / alphabet.keys.len() as f64
    }

    pub(super) fn validate(&self, alphabet: &Alphabet) -> Result<()> {
        if self.length < 4 || !self.length.is_multiple_of(2) {
            return invalid(format!("copying {} tokens: the length must be even and at least 4", self.length));
        }
        if alphabet.keys.is_empty() {
            return invalid("copying needs a vocabulary of at least 3 ids".into());
        }
        Ok(())
    }
}
