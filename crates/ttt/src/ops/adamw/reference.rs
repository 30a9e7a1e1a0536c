//! The definition, in plain loops.

use super::Factors;
use crate::tensor::Element;

/// One update of every element.
#[inline(always)]
pub(super) fn step<E: Element>(params: &mut [E], grads: &[E], m: &mut [E], v: &mut [E], factors: Factors) {
    let e = E::from_f64;
    let (beta1, rest1, unbias1) = (e(factors.beta1), e(1.0 - factors.beta1), e(factors.unbias1));
    let (beta2, rest2, unbias2) = (e(factors.beta2), e(1.0 - factors.beta2), e(factors.unbias2));
    let (eps, decay, lr, scale) = (e(factors.eps), e(factors.weight_decay), e(factors.lr), e(factors.grad_scale));
    for (((p, &g), m), v) in params.iter_mut().zip(grads).zip(m).zip(v) {
        let g = g * scale;
        *m = beta1 * *m + rest1 * g;
        *v = beta2 * *v + rest2 * g * g;
        *p -= lr * (*m * unbias1 / ((*v * unbias2).sqrt() + eps) + decay * *p);
    }
}
