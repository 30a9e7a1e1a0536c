//! Which windows a step learns: a pure function of seed and step.

use std::ops::Range;

use crate::{Error, Result, data::tokens::Tokens};

/// Cuts a token stream into windows and deals them out in random order, each once an epoch.
///
/// Window i is `tokens[i L .. i L + L + 1]` (as in the official JAX code): the input is its first L tokens, the target its last L. Windows overlap by
/// one token; what is left at the end is dropped. The order of an epoch is a permutation that is computed, not stored, so that
/// going on with a run takes nothing but the number of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampler {
    windows: u64,
    seq_len: usize,
    seed: u64,
}

/// Inputs and targets of some windows, `[windows, seq_len]` each, packed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Examples {
    /// Ids that the model reads.
    pub inputs: Vec<u32>,
    /// Ids that it should predict.
    pub targets: Vec<u32>,
    /// Whether a target counts: BOS and prompts do not.
    pub weights: Vec<bool>,
}

/// Rounds of the Feistel network. For a hundred windows four are biased (chi squared over a million keys 159, where 99 is expected)
/// and eight are not (99.8).
const ROUNDS: u64 = 8;

impl Sampler {
    /// Windows of `seq_len` inputs over `tokens` tokens.
    ///
    /// # Errors
    /// Less than `seq_len + 1` tokens; a `seq_len` of 0.
    pub fn new(tokens: usize, seq_len: usize, seed: u64) -> Result<Sampler> {
        if seq_len == 0 {
            return Err(Error::Data("the sequence length is 0; it must be at least 1".into()));
        }
        if tokens <= seq_len {
            return Err(Error::Data(format!(
                "a sequence of {seq_len} tokens and its last target need {} tokens, but the data has {tokens}; shorten the sequence or \
                 add data",
                seq_len as u128 + 1
            )));
        }
        Ok(Sampler { windows: ((tokens - 1) / seq_len) as u64, seq_len, seed })
    }

    /// Number of windows, all of which an epoch sees once.
    pub fn windows_per_epoch(&self) -> u64 {
        self.windows
    }

    /// Tokens of a window's input.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// The windows of `step` (from 0) when each step takes `batch` windows: the numbers `step * batch ..` of the endless sequence
    /// of epochs.
    pub fn windows(&self, step: u64, batch: usize) -> Vec<usize> {
        (0..batch as u64).map(|i| self.nth(step * batch as u64 + i)).collect()
    }

    /// Window number `n` of the endless sequence of epochs.
    pub fn nth(&self, n: u64) -> usize {
        let key = mix(self.seed ^ mix(n / self.windows));
        permute(n % self.windows, self.windows, key) as usize
    }

    /// Tokens of a window, the last target included.
    pub fn range(&self, window: usize) -> Range<usize> {
        window * self.seq_len..(window + 1) * self.seq_len + 1
    }

    /// Replaces what `examples` holds by the windows given.
    ///
    /// # Panics
    /// When a window does not lie within `tokens`.
    pub fn fill(&self, tokens: &Tokens, windows: &[usize], examples: &mut Examples) {
        let Examples { inputs, targets, weights } = examples;
        inputs.clear();
        targets.clear();
        weights.clear();
        for &window in windows {
            let Range { start, end } = self.range(window);
            tokens.read(start..end - 1, inputs);
            tokens.read(start + 1..end, targets);
            tokens.mask(start + 1..end, weights);
        }
    }
}

/// A bijection of 64-bit numbers that scatters bits (the finalizer of SplitMix64; Steele, Lea and Flood 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Place of `index` in the permutation `key` of `0..len`.
///
/// A Feistel network permutes the numbers of `2 half` bits, the fewest that hold `len` (at most four times as many); a result
/// beyond `len` goes through it again until it is not (cycle walking).
fn permute(index: u64, len: u64, key: u64) -> u64 {
    let bits = u64::BITS - (len - 1).leading_zeros();
    let half = bits.div_ceil(2).max(1);
    let mask = (1 << half) - 1;
    let mut x = index;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..ROUNDS {
            let f = mix(key ^ mix((right << 8) | round));
            (left, right) = (right, (left ^ f) & mask);
        }
        x = (left << half) | right;
        if x < len {
            return x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_small_length_is_permuted() {
        for len in 1..300 {
            let mut all: Vec<u64> = (0..len).map(|i| permute(i, len, 7)).collect();
            all.sort();
            assert!(all.iter().copied().eq(0..len), "{len}");
        }
    }

    #[test]
    fn places_are_uniform() {
        // Over keys, each index must land everywhere equally often. Chi squared with 99 degrees of freedom has mean 99 and
        // deviation 14, the mean of ten of them 4.4; four rounds give 159.
        let chi = |index| {
            let mut counts = [0f64; 100];
            (0..1_000_000).for_each(|key| counts[permute(index, 100, mix(key)) as usize] += 1.0);
            counts.iter().map(|c| (c - 10_000.0).powi(2) / 10_000.0).sum::<f64>()
        };
        let mean = (0..10).map(|i| chi(i * 11)).sum::<f64>() / 10.0;
        assert!((81.0..117.0).contains(&mean), "{mean}");
    }

    #[test]
    fn large_lengths_work() {
        let len = 1u64 << 40 | 1;
        assert!((0..100).all(|i| permute(len - 1 - i, len, 3) < len));
    }
}
