//! The definition, in plain loops.

use std::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use super::{Choice, Draw};

/// `⌊2^40 · 2^((x − top) · scale)⌋` in f32 operations that a GPU does bit for bit.
fn weight(x: f32, top: f32, scale: f32) -> u64 {
    let t = (x - top) * scale;
    // Not at all for NaN.
    if t.partial_cmp(&-41.0) != Some(Ordering::Greater) {
        return 0;
    }
    let n = t.round_ties_even();
    let f = t - n;
    let coefficients = [1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, std::f32::consts::LN_2, 1.0];
    let p: f32 = coefficients.iter().fold(1.540_353e-4, |p: f32, c| p.mul_add(f, *c));
    let m = (p * 16_777_216.0) as u64;
    let shift = 16 + n as i32;
    if shift >= 0 { m << shift } else { m >> -shift }
}

/// Number `index` of a stream of 64-bit random numbers.
fn random(key: [u8; 32], stream: u64, index: u64) -> u64 {
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(stream);
    rng.set_word_pos(2 * u128::from(index));
    rng.next_u64()
}

/// Chooses a token of a row of logits.
pub(crate) fn choose(logits: &[f32], draw: &Draw) -> Choice {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let descending = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    let likeliest = order.iter().copied().min_by(descending).expect("logits");
    let top = logits[likeliest];
    let log_sum = logits.iter().map(|x| f64::from(x - top).exp()).sum::<f64>().ln();
    let choice = |token: usize| Choice { token: token as u32, logprob: f64::from(logits[token] - top) - log_sum };
    let (sampling, scale) = (&draw.sampling, draw.sampling.scale());
    let weight = |i: usize| weight(logits[i], top, scale);
    let mut total: u64 = order.iter().map(|i| weight(*i)).sum();
    if scale == 0.0 || total == 0 {
        return choice(likeliest);
    }
    if sampling.top_k > 0 && sampling.top_k < logits.len() || sampling.top_p < 1.0 {
        order.sort_unstable_by(descending);
    }
    if sampling.top_k > 0 && sampling.top_k < logits.len() {
        order.truncate(sampling.top_k);
        total = order.iter().map(|i| weight(*i)).sum();
    }
    if sampling.top_p < 1.0 {
        let bound = ((total as f64 * sampling.top_p).ceil() as u64).clamp(1, total);
        total = 0;
        let kept = order.iter().position(|i| {
            total += weight(*i);
            total >= bound
        });
        order.truncate(kept.map_or(order.len(), |i| i + 1));
    }
    let bits = random(sampling.key(), draw.stream, draw.drawn) & !2047;
    let target = ((u128::from(bits) * u128::from(total)) >> 64) as u64;
    let mut sum = 0;
    let chosen = order.iter().find(|i| {
        sum += weight(**i);
        sum > target
    });
    choice(*chosen.expect("the sum of all weights exceeds the target"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate;
    use crate::ops::sample::Sampling;

    #[test]
    fn weights_are_exponentials() {
        for i in 0..2000 {
            let x = -0.014 * i as f32;
            let want = f64::from(x).exp() * (1u64 << 40) as f64;
            let got = weight(x + 3.0, 3.0, std::f32::consts::LOG2_E) as f64;
            assert!((got - want).abs() < 1.0 + 4e-6 * want, "{x}: {got} and not {want}");
        }
        assert_eq!(weight(2.5, 2.5, 1.0), 1 << 40);
        assert_eq!([weight(f32::NEG_INFINITY, 0.0, 1.0), weight(f32::NAN, 0.0, 1.0)], [0; 2]);
    }

    /// The same random numbers as a generator draws, and the same tokens unless a boundary lies within 1e-5 of the number.
    #[test]
    fn choices_are_the_generators() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut noise = || (rng.next_u64() >> 40) as f32 / (1 << 24) as f32;
        let settings = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.9, 40, 0.95), (1.0, 1, 0.5)];
        let (mut same, mut near) = (0, 0);
        for (temperature, top_k, top_p) in settings {
            let sampling = Sampling { temperature, top_k, top_p, seed: 11 };
            let mut units = ChaCha8Rng::seed_from_u64(11);
            for drawn in 0..200 {
                // Few levels, so that equal logits occur.
                let logits: Vec<f32> = (0..300).map(|_| (noise() * 40.0).floor() * 0.2).collect();
                let unit = (units.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
                let ours = choose(&logits, &Draw { sampling, stream: 0, drawn });
                let want = generate::choose(&logits, &sampling, unit);
                if ours.token == want.token {
                    same += 1;
                    assert!((ours.logprob - want.logprob).abs() < 1e-5);
                } else {
                    near += 1;
                    let around = [-1e-5, 1e-5].map(|by| generate::choose(&logits, &sampling, (unit + by).clamp(0.0, 1.0)).token);
                    assert!(around.contains(&ours.token), "{sampling:?}: {ours:?} and not {want:?}");
                }
            }
        }
        assert!(near * 100 < same, "{near} of {same} differ");
    }

    #[test]
    fn streams_differ_and_go_on() {
        let key = Sampling::default().key();
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        rng.set_stream(5);
        let want: Vec<u64> = (0..40).map(|_| rng.next_u64()).collect();
        assert_eq!((0..40).map(|i| random(key, 5, i)).collect::<Vec<_>>(), want);
        assert_ne!(random(key, 4, 0), want[0]);
    }
}
