//! The definition, in plain loops.

use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// Logits of a row minus their largest, and the logarithm of the sum of their exponentials.
fn shifted_logits<E: Element>(hidden: &[E], w: Mat<E>) -> (Vec<E>, E) {
    let mut logits: Vec<E> = (0..w.rows()).map(|v| hidden.iter().zip(w.row(v)).map(|(&h, &w)| h * w).sum()).collect();
    let largest = logits.iter().copied().fold(logits[0], E::max);
    for logit in &mut logits {
        *logit -= largest;
    }
    let log_sum = logits.iter().map(|x| x.exp()).sum::<E>().ln();
    (logits, log_sum)
}

/// Negative log likelihood of each row.
pub(crate) fn forward<E: Element>(hidden: Mat<E>, w: Mat<E>, targets: &[u32]) -> Vec<f64> {
    let nll = |(i, &target): (usize, &u32)| {
        let (logits, log_sum) = shifted_logits(hidden.row(i), w);
        (log_sum - logits[target as usize]).to_f64()
    };
    targets.iter().enumerate().map(nll).collect()
}

/// Writes `dhidden`, adds to `dw`: `dlogits = weight (softmax(logits) − onehot(target))`.
pub(crate) fn forward_backward<E: Element>(
    hidden: Mat<E>,
    w: Mat<E>,
    targets: &[u32],
    weights: &[f64],
    mut dw: MatMut<E>,
    mut dhidden: MatMut<E>,
) -> Vec<f64> {
    let mut nll = vec![0.0; targets.len()];
    for (i, (&target, &weight)) in targets.iter().zip(weights).enumerate() {
        let dhidden = dhidden.row_mut(i);
        dhidden.fill(E::ZERO);
        if weight == 0.0 {
            continue;
        }
        let (logits, log_sum) = shifted_logits(hidden.row(i), w);
        nll[i] = (log_sum - logits[target as usize]).to_f64();
        for (v, &logit) in logits.iter().enumerate() {
            let hit = if v == target as usize { E::ONE } else { E::ZERO };
            let dlogit = E::from_f64(weight) * ((logit - log_sum).exp() - hit);
            for (c, dhidden) in dhidden.iter_mut().enumerate() {
                *dhidden += dlogit * w.row(v)[c];
                if dw.rows() > 0 {
                    dw.row_mut(v)[c] += dlogit * hidden.row(i)[c];
                }
            }
        }
    }
    nll
}
