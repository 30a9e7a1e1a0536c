//! LayerNorm and residual around an inner model, which a [`Variant`] may leave out: plain loops over one row, for the references of
//! both learners. Z is what the model's last product gives, for the training view in its gradient, for the test view in its output.

use super::Variant;
use super::math::{EPS, axpy, dot};
use crate::tensor::Element;

/// `f(x) = x + LN(Z; γ, β)`.
#[derive(Clone, Copy)]
pub(crate) struct Wrap<'a, E> {
    pub(crate) gamma: &'a [E],
    pub(crate) beta: &'a [E],
    pub(crate) variant: Variant,
}

/// What the inner gradient leaves for its own backward, one row. Not read without LayerNorm.
#[derive(Clone, Copy)]
pub(crate) struct InnerRow<E> {
    /// 1 / s.
    pub(crate) rs: E,
    /// mean(γ ⊙ e ⊙ x̂).
    pub(crate) m: E,
}

impl<E: Element> Wrap<'_, E> {
    /// y = γ ⊙ x̂ + β; returns 1 / s. Without LayerNorm y = z, and x̂ stays as it is.
    fn norm(&self, z: &[E], xhat: &mut [E], y: &mut [E]) -> E {
        if !self.variant.layer_norm {
            y.copy_from_slice(z);
            return E::ONE;
        }
        let rs = normalize(z, xhat);
        for c in 0..z.len() {
            y[c] = self.gamma[c] * xhat[c] + self.beta[c];
        }
        rs
    }

    /// z = f(q) from Z̄.
    pub(crate) fn output(&self, zbar: &[E], q: &[E], xhat: &mut [E], z: &mut [E]) {
        self.norm(zbar, xhat, z);
        if self.variant.residual {
            axpy(z, E::ONE, q);
        }
    }

    /// Backward of [`Wrap::output`]: dZ̄ and the part of dq that does not go through Z̄; dγ and dβ are added to.
    pub(crate) fn output_backward(&self, zbar: &[E], dz: &[E], xhat: &mut [E], [dzbar, dq, dgamma, dbeta]: [&mut [E]; 4]) {
        if self.variant.residual {
            dq.copy_from_slice(dz);
        } else {
            dq.fill(E::ZERO);
        }
        if !self.variant.layer_norm {
            dzbar.copy_from_slice(dz);
            return;
        }
        let rs = normalize(zbar, xhat);
        for c in 0..dz.len() {
            dzbar[c] = dz[c] * self.gamma[c];
            dgamma[c] += dz[c] * xhat[c];
            dbeta[c] += dz[c];
        }
        normalize_backward(dzbar, xhat, rs);
    }

    /// G = ∂/∂Z ½‖e‖² with the error e = LN(Z) - t, t = v - k; without residual t = v, without LayerNorm G = e = Z - t.
    pub(crate) fn inner_gradient(&self, z: &[E], [k, v]: [&[E]; 2], [xhat, e, grad]: [&mut [E]; 3]) -> InnerRow<E> {
        let rs = self.norm(z, xhat, e);
        for c in 0..z.len() {
            e[c] -= if self.variant.residual { v[c] - k[c] } else { v[c] };
        }
        if !self.variant.layer_norm {
            grad.copy_from_slice(e);
            return InnerRow { rs, m: E::ZERO };
        }
        for c in 0..z.len() {
            grad[c] = self.gamma[c] * e[c];
        }
        let (g0, m) = (mean(grad), mean_product(grad, xhat));
        for (g, x) in grad.iter_mut().zip(xhat.iter()) {
            *g = rs * (*g - g0 - m * *x);
        }
        InnerRow { rs, m }
    }

    /// Backward of [`Wrap::inner_gradient`] (backward.md 1.1): from dG, in its place, dZ; dv is overwritten, dk, dγ and dβ are added
    /// to.
    pub(crate) fn inner_gradient_backward(
        &self,
        dg: &mut [E],
        [grad, xhat, e]: [&[E]; 3],
        InnerRow { rs, m }: InnerRow<E>,
        [dv, dk, dgamma, dbeta]: [&mut [E]; 4],
    ) {
        if self.variant.layer_norm {
            let gamma = self.gamma;
            let (a1, a2, a3) = (mean(dg), mean_product(dg, xhat), mean_product(dg, grad));
            for c in 0..dg.len() {
                let u = rs * (dg[c] - a1 - a2 * xhat[c]);
                let de = gamma[c] * u;
                dg[c] = gamma[c] * de - rs * (m * dg[c] + a2 * gamma[c] * e[c]);
                dv[c] = -de;
                dgamma[c] += u * e[c] + de * xhat[c];
                dbeta[c] += de;
            }
            let (a4, a5) = (mean(dg), mean_product(dg, xhat) + a3);
            for (h, x) in dg.iter_mut().zip(xhat) {
                *h = rs * (*h - a4 - *x * a5);
            }
        } else {
            for (dv, dg) in dv.iter_mut().zip(dg.iter()) {
                *dv = -*dg;
            }
        }
        if self.variant.residual {
            axpy(dk, -E::ONE, dv);
        }
    }
}

fn mean<E: Element>(x: &[E]) -> E {
    x.iter().copied().sum::<E>() / E::from_f64(x.len() as f64)
}

fn mean_product<E: Element>(x: &[E], y: &[E]) -> E {
    dot(x, y) / E::from_f64(x.len() as f64)
}

/// x̂ = (z - mean z) / s, with s = sqrt(var + ε); returns 1 / s.
fn normalize<E: Element>(z: &[E], xhat: &mut [E]) -> E {
    let mu = mean(z);
    for (x, z) in xhat.iter_mut().zip(z) {
        *x = *z - mu;
    }
    let rs = E::ONE / (mean_product(xhat, xhat) + E::from_f64(EPS)).sqrt();
    for x in xhat {
        *x *= rs;
    }
    rs
}

/// Gradient of z in x̂ = (z - mean z) / s from p = ∂L/∂x̂ (backward.md 1.1, LNb), in place of p.
fn normalize_backward<E: Element>(p: &mut [E], xhat: &[E], rs: E) {
    let (p0, p1) = (mean(p), mean_product(p, xhat));
    for (p, x) in p.iter_mut().zip(xhat) {
        *p = rs * (*p - p0 - *x * p1);
    }
}
