//! Rows and tiles of a mini-batch, vectorised along their width (a multiple of 16): the LayerNorms, gelu, sums and products.

use pulp::Simd;

use crate::device::view::Mat;

use super::math::EPS;

/// Width of a tile whose columns are the tokens of a mini-batch: K rounded up to whole vectors.
pub(crate) fn token_columns(k: usize) -> usize {
    k.next_multiple_of(16)
}

/// Copies the rows of a matrix into a tile.
#[inline(always)]
pub(crate) fn copy_rows(tile: &mut [f32], x: Mat<'_, f32>) {
    for (i, row) in tile.chunks_exact_mut(x.cols()).enumerate().take(x.rows()) {
        row.copy_from_slice(x.row(i));
    }
}

/// The vectors of a row.
#[inline(always)]
fn vectors<S: Simd>(row: &[f32]) -> &[S::f32s] {
    S::as_simd_f32s(row).0
}

/// The vectors of a row, to write.
#[inline(always)]
fn vectors_mut<S: Simd>(row: &mut [f32]) -> &mut [S::f32s] {
    S::as_mut_simd_f32s(row).0
}

/// What one row of the inner gradient needs and leaves (backward.md 1.1).
pub(crate) struct InnerRow<'a> {
    pub(crate) z: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) norm: [&'a [f32]; 2],
    pub(crate) lr: f32,
    pub(crate) xhat: &'a mut [f32],
    pub(crate) e: &'a mut [f32],
    pub(crate) grad: &'a mut [f32],
    pub(crate) ghat: &'a mut [f32],
}

/// x̂, e, G and Ĝ of one row; returns 1/s and mean(γ ⊙ e ⊙ x̂).
#[inline(always)]
pub(crate) fn inner_row<S: Simd>(simd: S, row: InnerRow<'_>) -> [f32; 2] {
    let (z, k, v) = (vectors::<S>(row.z), vectors::<S>(row.k), vectors::<S>(row.v));
    let (gamma, beta) = (vectors::<S>(row.norm[0]), vectors::<S>(row.norm[1]));
    let n = z.len();
    let (k, v, gamma, beta) = (&k[..n], &v[..n], &gamma[..n], &beta[..n]);
    let xhat = &mut vectors_mut::<S>(row.xhat)[..n];
    let e = &mut vectors_mut::<S>(row.e)[..n];
    let grad = &mut vectors_mut::<S>(row.grad)[..n];
    let ghat = &mut vectors_mut::<S>(row.ghat)[..n];
    let inv = 1.0 / row.z.len() as f32;

    let rs = normalize_vectors(simd, z, xhat, inv);
    let (mut g0, mut m) = (simd.splat_f32s(0.0), simd.splat_f32s(0.0));
    for c in 0..n {
        let t = simd.sub_f32s(v[c], k[c]);
        e[c] = simd.sub_f32s(simd.mul_add_e_f32s(gamma[c], xhat[c], beta[c]), t);
        grad[c] = simd.mul_f32s(gamma[c], e[c]);
        g0 = simd.add_f32s(g0, grad[c]);
        m = simd.mul_add_e_f32s(grad[c], xhat[c], m);
    }
    let (g0, m) = (simd.reduce_sum_f32s(g0) * inv, simd.reduce_sum_f32s(m) * inv);
    let (g0v, mv, rsv, lr) = (simd.splat_f32s(g0), simd.splat_f32s(-m), simd.splat_f32s(rs), simd.splat_f32s(row.lr));
    for c in 0..n {
        grad[c] = simd.mul_f32s(rsv, simd.mul_add_e_f32s(mv, xhat[c], simd.sub_f32s(grad[c], g0v)));
        ghat[c] = simd.mul_f32s(lr, grad[c]);
    }
    [rs, m]
}

/// x̂ of one row; returns 1/s.
#[inline(always)]
fn normalize_vectors<S: Simd>(simd: S, z: &[S::f32s], xhat: &mut [S::f32s], inv: f32) -> f32 {
    let xhat = &mut xhat[..z.len()];
    let mut sum = simd.splat_f32s(0.0);
    for z in z {
        sum = simd.add_f32s(sum, *z);
    }
    let mu = simd.splat_f32s(simd.reduce_sum_f32s(sum) * inv);
    let mut var = simd.splat_f32s(0.0);
    for c in 0..z.len() {
        xhat[c] = simd.sub_f32s(z[c], mu);
        var = simd.mul_add_e_f32s(xhat[c], xhat[c], var);
    }
    let rs = 1.0 / (simd.reduce_sum_f32s(var) * inv + EPS as f32).sqrt();
    let rsv = simd.splat_f32s(rs);
    for x in xhat.iter_mut() {
        *x = simd.mul_f32s(*x, rsv);
    }
    rs
}

/// z = q + γ ⊙ x̂(Z̄) + β for one row.
#[inline(always)]
pub(crate) fn output_row<S: Simd>(simd: S, zbar: &[f32], xhat: &mut [f32], q: &[f32], norm: [&[f32]; 2], z: &mut [f32]) {
    let inv = 1.0 / zbar.len() as f32;
    let xhat = vectors_mut::<S>(xhat);
    normalize_vectors(simd, vectors::<S>(zbar), xhat, inv);
    let z = vectors_mut::<S>(z);
    let n = z.len();
    let (q, gamma, beta, xhat) = (&vectors::<S>(q)[..n], &vectors::<S>(norm[0])[..n], &vectors::<S>(norm[1])[..n], &xhat[..n]);
    for c in 0..n {
        z[c] = simd.add_f32s(q[c], simd.mul_add_e_f32s(gamma[c], xhat[c], beta[c]));
    }
}

/// Backward of [`output_row`]: `zbar` becomes dZ̄; dγ and dβ are added to.
#[inline(always)]
pub(crate) fn output_row_backward<S: Simd>(
    simd: S,
    zbar: &mut [f32],
    xhat: &mut [f32],
    dz: &[f32],
    gamma: &[f32],
    [dgamma, dbeta]: [&mut [f32]; 2],
) {
    let inv = 1.0 / zbar.len() as f32;
    let zbar = vectors_mut::<S>(zbar);
    let n = zbar.len();
    let xhat = &mut vectors_mut::<S>(xhat)[..n];
    let rs = normalize_vectors(simd, zbar, xhat, inv);
    let (dz, gamma) = (&vectors::<S>(dz)[..n], &vectors::<S>(gamma)[..n]);
    let (dgamma, dbeta) = (&mut vectors_mut::<S>(dgamma)[..n], &mut vectors_mut::<S>(dbeta)[..n]);
    let (mut p0, mut p1) = (simd.splat_f32s(0.0), simd.splat_f32s(0.0));
    for c in 0..n {
        zbar[c] = simd.mul_f32s(dz[c], gamma[c]);
        dgamma[c] = simd.mul_add_e_f32s(dz[c], xhat[c], dgamma[c]);
        dbeta[c] = simd.add_f32s(dbeta[c], dz[c]);
        p0 = simd.add_f32s(p0, zbar[c]);
        p1 = simd.mul_add_e_f32s(zbar[c], xhat[c], p1);
    }
    let (p0, p1) = (simd.splat_f32s(simd.reduce_sum_f32s(p0) * inv), simd.splat_f32s(-simd.reduce_sum_f32s(p1) * inv));
    let rs = simd.splat_f32s(rs);
    for c in 0..n {
        zbar[c] = simd.mul_f32s(rs, simd.mul_add_e_f32s(p1, xhat[c], simd.sub_f32s(zbar[c], p0)));
    }
}

/// Backward of [`inner_row`] in G: from dG, in its place, dZ; `dt` becomes the gradient of the target; dγ and dβ are added to.
/// `stats` is what [`inner_row`] returned.
#[inline(always)]
pub(crate) fn inner_row_backward<S: Simd>(
    simd: S,
    dg: &mut [f32],
    [grad, xhat, e, gamma]: [&[f32]; 4],
    [rs, m]: [f32; 2],
    [dt, dgamma, dbeta]: [&mut [f32]; 3],
) {
    let inv = 1.0 / dg.len() as f32;
    let dg = vectors_mut::<S>(dg);
    let n = dg.len();
    let (grad, xhat) = (&vectors::<S>(grad)[..n], &vectors::<S>(xhat)[..n]);
    let (e, gamma) = (&vectors::<S>(e)[..n], &vectors::<S>(gamma)[..n]);
    let dt = &mut vectors_mut::<S>(dt)[..n];
    let (dgamma, dbeta) = (&mut vectors_mut::<S>(dgamma)[..n], &mut vectors_mut::<S>(dbeta)[..n]);
    let zero = simd.splat_f32s(0.0);
    let (mut a1, mut a2, mut a3) = (zero, zero, zero);
    for c in 0..n {
        a1 = simd.add_f32s(a1, dg[c]);
        a2 = simd.mul_add_e_f32s(dg[c], xhat[c], a2);
        a3 = simd.mul_add_e_f32s(dg[c], grad[c], a3);
    }
    let (a1, a2) = (simd.reduce_sum_f32s(a1) * inv, simd.reduce_sum_f32s(a2) * inv);
    let a3 = simd.reduce_sum_f32s(a3) * inv;
    let (a1v, minus_a2, rsv) = (simd.splat_f32s(a1), simd.splat_f32s(-a2), simd.splat_f32s(rs));
    let (rs_m, rs_a2) = (simd.splat_f32s(-rs * m), simd.splat_f32s(-rs * a2));
    let (mut a4, mut a5) = (zero, zero);
    for c in 0..n {
        let u = simd.mul_f32s(rsv, simd.mul_add_e_f32s(minus_a2, xhat[c], simd.sub_f32s(dg[c], a1v)));
        let de = simd.mul_f32s(gamma[c], u);
        let ge = simd.mul_f32s(gamma[c], e[c]);
        let h = simd.mul_add_e_f32s(rs_a2, ge, simd.mul_add_e_f32s(rs_m, dg[c], simd.mul_f32s(gamma[c], de)));
        dt[c] = simd.sub_f32s(zero, de);
        dgamma[c] = simd.mul_add_e_f32s(u, e[c], simd.mul_add_e_f32s(de, xhat[c], dgamma[c]));
        dbeta[c] = simd.add_f32s(dbeta[c], de);
        dg[c] = h;
        a4 = simd.add_f32s(a4, h);
        a5 = simd.mul_add_e_f32s(h, xhat[c], a5);
    }
    let a4 = simd.splat_f32s(simd.reduce_sum_f32s(a4) * inv);
    let minus_a5 = simd.splat_f32s(-(simd.reduce_sum_f32s(a5) * inv + a3));
    for c in 0..n {
        dg[c] = simd.mul_f32s(rsv, simd.mul_add_e_f32s(minus_a5, xhat[c], simd.sub_f32s(dg[c], a4)));
    }
}

/// Σ x y.
#[inline(always)]
pub(crate) fn dot<S: Simd>(simd: S, x: &[f32], y: &[f32]) -> f32 {
    let x = vectors::<S>(x);
    let y = &vectors::<S>(y)[..x.len()];
    let zero = simd.splat_f32s(0.0);
    let (mut even, mut odd) = (zero, zero);
    let mut c = 0;
    while c + 2 <= x.len() {
        even = simd.mul_add_e_f32s(x[c], y[c], even);
        odd = simd.mul_add_e_f32s(x[c + 1], y[c + 1], odd);
        c += 2;
    }
    if c < x.len() {
        even = simd.mul_add_e_f32s(x[c], y[c], even);
    }
    simd.reduce_sum_f32s(simd.add_f32s(even, odd))
}

/// y += a x.
#[inline(always)]
pub(crate) fn axpy<S: Simd>(simd: S, y: &mut [f32], a: f32, x: &[f32]) {
    let y = vectors_mut::<S>(y);
    let x = &vectors::<S>(x)[..y.len()];
    let a = simd.splat_f32s(a);
    for c in 0..y.len() {
        y[c] = simd.mul_add_e_f32s(a, x[c], y[c]);
    }
}

/// Σ x y z.
#[inline(always)]
pub(crate) fn dot3<S: Simd>(simd: S, x: &[f32], y: &[f32], z: &[f32]) -> f32 {
    let x = vectors::<S>(x);
    let (y, z) = (&vectors::<S>(y)[..x.len()], &vectors::<S>(z)[..x.len()]);
    let mut sum = simd.splat_f32s(0.0);
    for c in 0..x.len() {
        sum = simd.mul_add_e_f32s(x[c], simd.mul_f32s(y[c], z[c]), sum);
    }
    simd.reduce_sum_f32s(sum)
}

/// y *= a.
#[inline(always)]
pub(crate) fn scale<S: Simd>(simd: S, y: &mut [f32], a: f32) {
    let a = simd.splat_f32s(a);
    for y in vectors_mut::<S>(y) {
        *y = simd.mul_f32s(*y, a);
    }
}

/// y = y ⊙ x.
#[inline(always)]
pub(crate) fn multiply_by<S: Simd>(simd: S, y: &mut [f32], x: &[f32]) {
    let y = vectors_mut::<S>(y);
    let x = &vectors::<S>(x)[..y.len()];
    for c in 0..y.len() {
        y[c] = simd.mul_f32s(y[c], x[c]);
    }
}

/// out = x ⊙ y.
#[inline(always)]
pub(crate) fn multiply<S: Simd>(simd: S, out: &mut [f32], x: &[f32], y: &[f32]) {
    let out = vectors_mut::<S>(out);
    let (x, y) = (&vectors::<S>(x)[..out.len()], &vectors::<S>(y)[..out.len()]);
    for c in 0..out.len() {
        out[c] = simd.mul_f32s(x[c], y[c]);
    }
}

/// y = y ⊙ s + x ⊙ u ⊙ w.
#[inline(always)]
pub(crate) fn multiply_add3<S: Simd>(simd: S, y: &mut [f32], s: &[f32], [x, u, w]: [&[f32]; 3]) {
    let y = vectors_mut::<S>(y);
    let n = y.len();
    let (s, x) = (&vectors::<S>(s)[..n], &vectors::<S>(x)[..n]);
    let (u, w) = (&vectors::<S>(u)[..n], &vectors::<S>(w)[..n]);
    for c in 0..n {
        y[c] = simd.mul_add_e_f32s(y[c], s[c], simd.mul_f32s(x[c], simd.mul_f32s(u[c], w[c])));
    }
}

/// e^x for |x| < 87, within 2 units in the last place: x = n ln 2 + r, and the Taylor polynomial of degree 7 on |r| <= ln 2 / 2
/// (its remainder is below 6e-9).
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    let magic = simd.splat_f32s(12_582_912.0);
    let shifted = simd.mul_add_e_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), magic);
    let n = simd.sub_f32s(shifted, magic);
    // ln 2 in two parts, of which the first has few enough bits for an exact product.
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-0.693_359_4), x);
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(2.121_944_4e-4), r);
    let mut p = simd.splat_f32s(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = simd.mul_add_e_f32s(p, r, simd.splat_f32s(c));
    }
    let bits = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.mul_f32s(p, simd.transmute_f32s_u32s(simd.add_u32s(bits, simd.splat_u32s(127 << 23))))
}

/// gelu of a tile in its place, its derivative and, when `d2` is not empty, its second derivative. With σ = sigmoid(2u),
/// u = c x (1 + a x²): gelu = x σ, gelu' = σ + 2 x σ(1-σ) κ, gelu'' = 4 σ(1-σ) (c (1 + 6 a x²) - x (2σ-1) κ²), κ = c (1 + 3 a x²).
#[inline(always)]
pub(crate) fn gelu<S: Simd>(simd: S, z: &mut [f32], d1: &mut [f32], d2: &mut [f32]) {
    const C: f32 = 0.797_884_6;
    const A: f32 = 0.044_715;
    let z = vectors_mut::<S>(z);
    let n = z.len();
    let (d1, d2) = (vectors_mut::<S>(d1), vectors_mut::<S>(d2));
    let one = simd.splat_f32s(1.0);
    for i in 0..n {
        // Beyond 9.9 everything is 0 or 1 in f32, and within it the exponential does not overflow.
        let x = simd.min_f32s(simd.max_f32s(z[i], simd.splat_f32s(-9.9)), simd.splat_f32s(9.9));
        let x2 = simd.mul_f32s(x, x);
        let minus_2u = simd.mul_f32s(x, simd.mul_add_e_f32s(x2, simd.splat_f32s(-2.0 * C * A), simd.splat_f32s(-2.0 * C)));
        let e = exp(simd, minus_2u);
        let sigma = simd.div_f32s(one, simd.add_f32s(one, e));
        z[i] = simd.mul_f32s(z[i], sigma);
        if d1.is_empty() {
            continue;
        }
        let s = simd.mul_f32s(sigma, simd.mul_f32s(e, sigma));
        let kappa = simd.mul_add_e_f32s(x2, simd.splat_f32s(3.0 * A * C), simd.splat_f32s(C));
        let xk = simd.mul_f32s(x, kappa);
        d1[i] = simd.mul_add_e_f32s(simd.add_f32s(s, s), xk, sigma);
        if d2.is_empty() {
            continue;
        }
        let th = simd.sub_f32s(simd.add_f32s(sigma, sigma), one);
        let curve = simd.mul_add_e_f32s(x2, simd.splat_f32s(6.0 * A * C), simd.splat_f32s(C));
        let inside = simd.sub_f32s(curve, simd.mul_f32s(th, simd.mul_f32s(xk, kappa)));
        d2[i] = simd.mul_f32s(simd.mul_f32s(simd.splat_f32s(4.0), s), inside);
    }
}

/// Every row of `out` becomes `row`.
#[inline(always)]
pub(crate) fn fill_rows(out: &mut [f32], row: &[f32]) {
    for y in out.chunks_exact_mut(row.len()) {
        y.copy_from_slice(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::inner::math;
    use crate::ops::inner::test_lanes::{LANES, with_lanes};
    use pulp::WithSimd;

    struct Gelu<'a>([&'a mut [f32]; 3]);

    impl WithSimd for Gelu<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let [z, d1, d2] = self.0;
            gelu(simd, z, d1, d2);
        }
    }

    #[test]
    fn gelu_and_its_derivatives_are_exact_to_a_few_units_in_the_last_place() {
        let x: Vec<f32> =
            (-24_000..24_008).map(|i| i as f32 / 2000.0).chain([0.0, -0.0, 1e-20, -30.0, 30.0, 1e4, -1e4, 3e18]).collect();
        for lanes in LANES {
            let (mut z, mut d1, mut d2) = (x.clone(), vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
            with_lanes(lanes, Gelu([&mut z, &mut d1, &mut d2]));
            for (i, x) in x.iter().enumerate().filter(|(_, x)| x.abs() <= 30.0) {
                let [e0, e1, e2] = math::gelu(*x as f64);
                let error = |got: f32, expected: f64| (got as f64 - expected).abs() / expected.abs().max(1.0);
                assert!(error(z[i], e0) < 4e-7, "gelu({x}) = {}, not {e0}", z[i]);
                assert!(error(d1[i], e1) < 8e-7, "gelu'({x}) = {}, not {e1}", d1[i]);
                assert!(error(d2[i], e2) < 1e-6, "gelu''({x}) = {}, not {e2}", d2[i]);
            }
            assert!(z.iter().chain(&d1).all(|x| x.is_finite()), "a large input overflows");
        }
    }
}
