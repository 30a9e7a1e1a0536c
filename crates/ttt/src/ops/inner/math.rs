//! Plain loops that the references of both learners share. Matrices are row-major slices, products add to `c`.

use crate::tensor::Element;

/// ε of every LayerNorm around the inner models (spec 2).
pub(crate) const EPS: f64 = 1e-6;

/// c[m,n] += a[m,k] b[k,n].
pub(crate) fn mm<E: Element>(c: &mut [E], a: &[E], b: &[E], [m, k, n]: [usize; 3]) {
    for i in 0..m {
        for l in 0..k {
            axpy(&mut c[i * n..][..n], a[i * k + l], &b[l * n..][..n]);
        }
    }
}

/// c[m,n] += a[m,k] b[n,k]ᵀ.
pub(crate) fn mm_nt<E: Element>(c: &mut [E], a: &[E], b: &[E], [m, k, n]: [usize; 3]) {
    for i in 0..m {
        for j in 0..n {
            c[i * n + j] += dot(&a[i * k..][..k], &b[j * k..][..k]);
        }
    }
}

/// c[m,n] += a[k,m]ᵀ b[k,n].
pub(crate) fn mm_tn<E: Element>(c: &mut [E], a: &[E], b: &[E], [m, k, n]: [usize; 3]) {
    for l in 0..k {
        for i in 0..m {
            axpy(&mut c[i * n..][..n], a[l * m + i], &b[l * n..][..n]);
        }
    }
}

/// y += a x.
pub(crate) fn axpy<E: Element>(y: &mut [E], a: E, x: &[E]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * *x;
    }
}

/// Σ x y.
pub(crate) fn dot<E: Element>(x: &[E], y: &[E]) -> E {
    x.iter().zip(y).map(|(x, y)| *x * *y).sum()
}

/// Every row of `out` becomes `row`.
pub(crate) fn fill_rows<E: Element>(out: &mut [E], row: &[E]) {
    for y in out.chunks_exact_mut(row.len()) {
        y.copy_from_slice(row);
    }
}

fn mean<E: Element>(x: &[E]) -> E {
    x.iter().copied().sum::<E>() / E::from_f64(x.len() as f64)
}

fn mean_product<E: Element>(x: &[E], y: &[E]) -> E {
    dot(x, y) / E::from_f64(x.len() as f64)
}

/// x̂ = (z - mean z) / s for one row, with s = sqrt(var + ε); returns 1 / s.
pub(crate) fn normalize<E: Element>(z: &[E], xhat: &mut [E]) -> E {
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
pub(crate) fn normalize_backward<E: Element>(p: &mut [E], xhat: &[E], rs: E) {
    let (p0, p1) = (mean(p), mean_product(p, xhat));
    for (p, x) in p.iter_mut().zip(xhat) {
        *p = rs * (*p - p0 - *x * p1);
    }
}

/// What the inner gradient leaves for its own backward, one row.
#[derive(Clone, Copy)]
pub(crate) struct InnerRow<E> {
    /// 1 / s.
    pub(crate) rs: E,
    /// mean(γ ⊙ e ⊙ x̂).
    pub(crate) m: E,
}

/// G = ∂/∂z ½‖γ x̂ + β - t‖² for one row (spec 3.1), with x̂ and e = γ x̂ + β - t.
pub(crate) fn inner_gradient<E: Element>(
    z: &[E],
    t: impl Fn(usize) -> E,
    [gamma, beta]: [&[E]; 2],
    [xhat, e, grad]: [&mut [E]; 3],
) -> InnerRow<E> {
    let rs = normalize(z, xhat);
    for c in 0..z.len() {
        e[c] = gamma[c] * xhat[c] + beta[c] - t(c);
        grad[c] = gamma[c] * e[c];
    }
    let (g0, m) = (mean(grad), mean_product(grad, xhat));
    for (g, x) in grad.iter_mut().zip(xhat.iter()) {
        *g = rs * (*g - g0 - m * *x);
    }
    InnerRow { rs, m }
}

/// Backward of [`inner_gradient`] for one row (backward.md 1.1): from dG, in its place, dz; `dt` becomes the gradient of t; dγ
/// and dβ are added to.
pub(crate) fn inner_gradient_backward<E: Element>(
    dg: &mut [E],
    [grad, xhat, e, gamma]: [&[E]; 4],
    row: InnerRow<E>,
    [dt, dgamma, dbeta]: [&mut [E]; 3],
) {
    let InnerRow { rs, m } = row;
    let (a1, a2, a3) = (mean(dg), mean_product(dg, xhat), mean_product(dg, grad));
    for c in 0..dg.len() {
        let u = rs * (dg[c] - a1 - a2 * xhat[c]);
        let de = gamma[c] * u;
        dg[c] = gamma[c] * de - rs * (m * dg[c] + a2 * gamma[c] * e[c]);
        dt[c] = -de;
        dgamma[c] += u * e[c] + de * xhat[c];
        dbeta[c] += de;
    }
    let (a4, a5) = (mean(dg), mean_product(dg, xhat) + a3);
    for (h, x) in dg.iter_mut().zip(xhat) {
        *h = rs * (*h - a4 - *x * a5);
    }
}

/// gelu (tanh form), its first and its second derivative.
pub(crate) fn gelu<E: Element>(x: E) -> [E; 3] {
    let [c, a, half] = [(2.0 / std::f64::consts::PI).sqrt(), 0.044715, 0.5].map(E::from_f64);
    let [three_a, six_a] = [3.0 * 0.044715, 6.0 * 0.044715].map(E::from_f64);
    let x2 = x * x;
    let th = (c * x * (E::ONE + a * x2)).tanh();
    let (sech2, kappa) = (E::ONE - th * th, c * (E::ONE + three_a * x2));
    let d1 = half * (E::ONE + th) + half * x * sech2 * kappa;
    let d2 = sech2 * (c * (E::ONE + six_a * x2) - x * th * kappa * kappa);
    [half * x * (E::ONE + th), d1, d2]
}
