//! The training loss: the mean over sequences of each sequence's mean over counted targets.

/// Weight of each token's negative log likelihood in the loss: `mask / (sum of the sequence's mask) / sequences`.
///
/// This is the official JAX loss, not a mean over all tokens: the two differ when sequences count different numbers of targets. A
/// sequence without any counted target weighs nothing but still counts as a sequence.
///
/// # Panics
/// When the lengths do not add up to the mask's.
pub fn sequence_mean_weights(mask: &[f64], lens: &[usize]) -> Vec<f64> {
    assert_eq!(lens.iter().sum::<usize>(), mask.len(), "sequences of lengths {lens:?} and a mask of {}", mask.len());
    let mut weights = Vec::with_capacity(mask.len());
    let mut rest = mask;
    for len in lens {
        let (own, tail) = rest.split_at(*len);
        let counted = own.iter().sum::<f64>().max(1e-10);
        weights.extend(own.iter().map(|m| m / counted / lens.len() as f64));
        rest = tail;
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sequence_weighs_the_same() {
        let weights = sequence_mean_weights(&[1.0, 0.0, 1.0, 1.0, 0.0, 0.0], &[3, 1, 2]);
        assert_eq!(weights, [1.0 / 6.0, 0.0, 1.0 / 6.0, 1.0 / 3.0, 0.0, 0.0]);
    }
}
