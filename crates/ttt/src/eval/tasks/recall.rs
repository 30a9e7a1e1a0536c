//! Multi-query associative recall (MQAR; Arora et al., Zoology, arXiv 2312.04927): `Ax Kb ...`, then keys of these in any order,
//! each followed by its value.

use super::{Alphabet, Example, Random, invalid};
use crate::Result;

/// P pairs of different keys and different values, then P queries: one of the keys, each time any of them, and its value, which is
/// judged. (Were every key asked for once, a model could rule out the values that it has seen again, and be right 34 % of the time
/// with 8 pairs without knowing what belongs together.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recall {
    /// Number of pairs, P.
    pub pairs: usize,
    /// Tokens of a sequence, at least 4 P; what is beyond is filler, spread at random before the queries.
    pub length: usize,
    /// To learn from: each sequence has some number of pairs from 1 to P, and as many queries as fit. Few pairs are learned
    /// first, and show what to do with many; sequences of 8 pairs alone are learned by some seeds and not by others.
    pub mixed: bool,
}

impl Recall {
    pub(super) fn example(&self, alphabet: &Alphabet, random: &mut Random) -> Example {
        let pairs = if self.mixed { 1 + random.below(self.pairs) } else { self.pairs };
        let queries = if self.mixed { (self.length - 2 * pairs) / 2 } else { pairs };
        let keys = random.sample(&alphabet.keys, pairs);
        let values = random.sample(&alphabet.values, pairs);
        let mut example = Example::default();
        for (key, value) in keys.iter().zip(&values) {
            example.push(*key);
            example.push(*value);
        }
        let mut gaps = vec![0; queries];
        (2 * pairs + 2 * queries..self.length).for_each(|_| gaps[random.below(queries)] += 1);
        for gap in gaps {
            (0..gap).for_each(|_| example.push(alphabet.filler));
            let asked = random.below(pairs);
            example.push(keys[asked]);
            example.push_judged(values[asked]);
        }
        example
    }

    /// 1 / P: any value of the sequence. (A guess among all values of the alphabet is right less often.)
    pub(super) fn chance(&self) -> f64 {
        1.0 / self.pairs as f64
    }

    pub(super) fn validate(&self, alphabet: &Alphabet) -> Result<()> {
        let most = alphabet.keys.len().min(alphabet.values.len());
        if !(1..=most).contains(&self.pairs) {
            return invalid(format!("recall of {} pairs: there may be 1 to {most} with this vocabulary", self.pairs));
        }
        if self.length < 4 * self.pairs {
            return invalid(format!(
                "recall of {} pairs in {} tokens: it takes at least {}",
                self.pairs,
                self.length,
                4 * self.pairs
            ));
        }
        Ok(())
    }
}
