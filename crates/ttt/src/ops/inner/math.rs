//! Plain loops that the references of both learners share. Matrices are row-major slices, products add to `c`.

use crate::tensor::Element;

/// ε of every LayerNorm around the inner models, fixed in all official code.
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
