//! The definition of TTT-MLP: plain loops, dual form (backward.md 4) and, as a second reference, primal form (paper 2.5).
#![allow(clippy::needless_range_loop)] // indices are the notation of the formulas

use crate::device::view::{Mat, MatMut};
use crate::ops::inner::Variant;
use crate::ops::inner::drive::{Chunk, ChunkGrads, Dims, Learner, carve};
use crate::ops::inner::math::{axpy, dot, fill_rows, gelu, mm, mm_nt, mm_tn};
use crate::ops::inner::rounding::Rounding;
use crate::ops::inner::wrap::{InnerRow, Wrap};
use crate::tensor::Element;

/// The dual form.
#[derive(Clone, Copy)]
pub(crate) struct Reference(pub(crate) Rounding);

/// The parts of `[W1 | b1 | W2 | b2]`.
fn parts<E>(w: &[E], d: usize) -> [&[E]; 4] {
    let f = 4 * d;
    [&w[..d * f], &w[d * f..][..f], &w[d * f + f..][..f * d], &w[2 * d * f + f..][..d]]
}

/// w -= τ leftᵀ right for the K rows of a mini-batch, and b -= τ Σ right.
fn commit_layer<E: Element>(r: Rounding, tau: E, [left, right]: [&[E]; 2], w: &mut [E], b: &mut [E], sum: &mut [E]) {
    let (tau, right) = r.scaled(tau, right);
    let (outputs, inputs) = (b.len(), w.len() / b.len());
    let sum = &mut sum[..outputs];
    for i in 0..inputs {
        sum.fill(E::ZERO);
        for (left, right) in left.chunks_exact(inputs).zip(right.chunks_exact(outputs)) {
            axpy(sum, left[i], right);
        }
        axpy(&mut w[i * outputs..][..outputs], -tau, sum);
    }
    sum.fill(E::ZERO);
    for right in right.chunks_exact(outputs) {
        axpy(sum, E::ONE, right);
    }
    axpy(b, -tau, sum);
}

/// One layer of the outputs, token i: `out = x W + b - τ_i Σ_{j<=i} (x · left_j + 1) right_j`.
fn layer_output<E: Element>(
    r: Rounding,
    i: usize,
    tau: E,
    x: &[E],
    [w, b]: [&[E]; 2],
    [left, right]: [&[E]; 2],
    out: &mut [E],
    sum: &mut [E],
) {
    let (inputs, outputs) = (x.len(), b.len());
    let sum = &mut sum[..outputs];
    sum.fill(E::ZERO);
    for j in 0..=i {
        let m = r.one(dot(x, &left[j * inputs..][..inputs]) + E::ONE);
        axpy(sum, m, &right[j * outputs..][..outputs]);
    }
    out.copy_from_slice(b);
    mm(out, x, w, [1, inputs, outputs]);
    axpy(out, -tau, sum);
}

/// M = tril(a bᵀ + 1).
fn attention<E: Element>(r: Rounding, m: &mut [E], a: &[E], b: &[E], [n, width]: [usize; 2]) {
    m.fill(E::ZERO);
    for i in 0..n {
        for j in 0..=i {
            m[i * n + j] = r.one(dot(&a[i * width..][..width], &b[j * width..][..width]) + E::ONE);
        }
    }
}

/// The backward of `Y = -τ ⊙ (M Ĝ)` in M: dτ -= Σ_j M ⊙ N, dM = -τ ⊙ N with N = tril(dY Ĝᵀ).
fn attention_backward<E: Element>(dm: &mut [E], m: &[E], dy: &[E], ghat: &[E], tok: &[E], dtok: &mut [E], [n, width]: [usize; 2]) {
    dm.fill(E::ZERO);
    for i in 0..n {
        for j in 0..=i {
            let nij = dot(&dy[i * width..][..width], &ghat[j * width..][..width]);
            dtok[i] += -(m[i * n + j] * nij);
            dm[i * n + j] = -tok[i] * nij;
        }
    }
}

/// dĜ = -Mᵀ (τ ⊙ dY), with `p` as scratch.
fn through_attention<E: Element>(dghat: &mut [E], m: &[E], dy: &[E], tok: &[E], p: &mut [E], [n, width]: [usize; 2]) {
    for i in 0..n {
        for c in i * width..(i + 1) * width {
            p[c] = -tok[i] * dy[c];
        }
    }
    dghat.fill(E::ZERO);
    mm_tn(dghat, m, p, [n, n, width]);
}

impl<E: Element> Learner<E> for Reference {
    fn tape_lens(&self, Dims { d, k }: Dims) -> [usize; 2] {
        [10 * k * d + 16 * d, 13 * k * d + 16 * k * 4 * d + 4 * k * k + 4 * k]
    }

    fn learn(&self, Dims { d, k }: Dims, x: &Chunk<'_, E>, w: &[E], tape: &mut [E]) {
        let f = 4 * d;
        let [kk, ghat1, x2, ghat2, z1, u, z2, xhat, e, _] = carve(tape, [k * d, k * f, k * f, k * d, f, f, d, d, d, 0]);
        let [w1, b1, w2, b2] = parts(w, d);
        let [w1, w2] = [w1, w2].map(|w| self.0.all(w));
        for i in 0..x.len() {
            let (j, lr) = (x.first + i, x.lr.row(i)[0]);
            let (k_row, v_row) = (x.k.row(i), x.v.row(i));
            kk[j * d..][..d].copy_from_slice(k_row);
            z1.copy_from_slice(b1);
            mm(z1, k_row, &w1, [1, d, f]);
            let x2 = &mut x2[j * f..][..f];
            for (x, z) in x2.iter_mut().zip(z1.iter()) {
                *x = self.0.one(gelu(*z)[0]);
            }
            z2.copy_from_slice(b2);
            mm(z2, x2, &w2, [1, f, d]);
            let g2 = &mut ghat2[j * d..][..d];
            x.wrap().inner_gradient(z2, [k_row, v_row], [&mut *xhat, &mut *e, &mut *g2]);
            u.fill(E::ZERO);
            mm_nt(u, &self.0.all(g2), &w2, [1, d, f]);
            for (c, g1) in ghat1[j * f..][..f].iter_mut().enumerate() {
                *g1 = self.0.one(lr * (u[c] * gelu(z1[c])[1]));
            }
            for g in g2 {
                *g = self.0.one(*g * lr);
            }
        }
    }

    fn output(&self, Dims { d, k }: Dims, x: &Chunk<'_, E>, w: &[E], tape: &mut [E], mut z: MatMut<'_, E>) {
        let f = 4 * d;
        let [kk, ghat1, x2, ghat2, xbar2, sum, zbar2, xhat] = carve(tape, [k * d, k * f, k * f, k * d, f, f, d, d]);
        let [w1, b1, w2, b2] = parts(w, d);
        let [w1, w2] = [w1, w2].map(|w| self.0.all(w));
        for i in 0..x.len() {
            let (j, q_row) = (x.first + i, x.q.row(i));
            layer_output(self.0, j, x.tok[j], q_row, [&w1, b1], [kk, ghat1], xbar2, sum);
            for x in xbar2.iter_mut() {
                *x = self.0.one(gelu(*x)[0]);
            }
            layer_output(self.0, j, x.tok[j], xbar2, [&w2, b2], [x2, ghat2], zbar2, sum);
            x.wrap().output(zbar2, q_row, xhat, z.row_mut(i));
        }
    }

    fn commit(&self, Dims { d, k }: Dims, tok: &[E], w: &mut [E], tape: &mut [E]) {
        let f = 4 * d;
        let [kk, ghat1, x2, ghat2, sum, _] = carve(tape, [k * d, k * f, k * f, k * d, f, 0]);
        let [w1, b1, w2, b2] = carve(w, [d * f, f, f * d, d]);
        commit_layer(self.0, tok[k - 1], [kk, ghat1], w1, b1, sum);
        commit_layer(self.0, tok[k - 1], [x2, ghat2], w2, b2, sum);
    }

    fn backward(
        &self,
        Dims { d, .. }: Dims,
        x: &Chunk<'_, E>,
        w: &[E],
        dw: &mut [E],
        commits: bool,
        dz: Mat<'_, E>,
        tape: &mut [E],
        mut grads: ChunkGrads<'_, E>,
    ) {
        let (n, f) = (x.len(), 4 * d);
        let (nd, nf, nn) = (n * d, n * f, n * n);
        let [w1, b1, w2, b2] = parts(w, d);
        let [w1, w2] = [w1, w2].map(|w| self.0.all(w));
        let [dw1, db1, dw2, db2] = carve(dw, [d * f, f, f * d, d]);
        let (narrow, tape) = tape.split_at_mut(13 * nd);
        let (wide, tape) = tape.split_at_mut(16 * nf);
        let [kk, q, g2, ghat2, xhat, e, z2, xo, dzbar2, dghat2, dq, dk, p2] = carve(narrow, [nd; 13]);
        let [z1, x2, d1, d2, u, g1, ghat1, xbar2, dbar1, dxbar2, dx2, dghat1, dzbar1, p1, du, dz1] = carve(wide, [nf; 16]);
        let [m1, m2, dm1, dm2, rs, mean, dtok, _] = carve(tape, [nn, nn, nn, nn, n, n, n, 0]);

        // Forward (4.1).
        for i in 0..n {
            kk[i * d..][..d].copy_from_slice(x.k.row(i));
            q[i * d..][..d].copy_from_slice(x.q.row(i));
        }
        fill_rows(z1, b1);
        mm(z1, kk, &w1, [n, d, f]);
        for c in 0..nf {
            [x2[c], d1[c], d2[c]] = gelu(z1[c]);
        }
        self.0.put(x2);
        fill_rows(z2, b2);
        mm(z2, x2, &w2, [n, f, d]);
        for i in 0..n {
            let r = i * d..(i + 1) * d;
            let (k_row, v_row) = (&kk[r.clone()], x.v.row(i));
            let outputs = [&mut xhat[r.clone()], &mut e[r.clone()], &mut g2[r.clone()]];
            let row = x.wrap().inner_gradient(&z2[r.clone()], [k_row, v_row], outputs);
            (rs[i], mean[i]) = (row.rs, row.m);
            for c in r {
                ghat2[c] = self.0.one(x.lr.row(i)[0] * g2[c]);
            }
        }
        u.fill(E::ZERO);
        let g2_operand = self.0.all(g2);
        mm_nt(u, &g2_operand, &w2, [n, d, f]);
        for c in 0..nf {
            g1[c] = u[c] * d1[c];
            ghat1[c] = self.0.one(x.lr.row(c / f)[0] * g1[c]);
        }
        attention(self.0, m1, q, kk, [n, d]);
        for i in 0..n {
            let r = i * f..(i + 1) * f;
            layer_output(self.0, i, x.tok[i], &q[i * d..][..d], [&w1, b1], [kk, ghat1], &mut dzbar1[r], p1);
        }
        for c in 0..nf {
            [xbar2[c], dbar1[c], _] = gelu(dzbar1[c]);
        }
        self.0.put(xbar2);
        attention(self.0, m2, xbar2, x2, [n, f]);

        // (a) output LayerNorm and residual
        for i in 0..n {
            let r = i * d..(i + 1) * d;
            layer_output(self.0, i, x.tok[i], &xbar2[i * f..][..f], [&w2, b2], [x2, ghat2], &mut z2[r.clone()], p2);
            let outputs = [&mut dzbar2[r.clone()], &mut dq[r.clone()], &mut *grads.dgamma, &mut *grads.dbeta];
            x.wrap().output_backward(&z2[r.clone()], dz.row(i), &mut xo[r], outputs);
        }
        self.0.put(dzbar2);

        // (b) Z̄2 = X̄2 W2 + b2 - τ ⊙ (M2 Ĝ2)
        dtok.fill(E::ZERO);
        attention_backward(dm2, m2, dzbar2, ghat2, x.tok, dtok, [n, d]);
        self.0.put(dm2);
        through_attention(dghat2, m2, dzbar2, x.tok, p2, [n, d]);
        dxbar2.fill(E::ZERO);
        mm_nt(dxbar2, dzbar2, &w2, [n, d, f]);
        mm(dxbar2, dm2, x2, [n, n, f]);
        dx2.fill(E::ZERO);
        mm_tn(dx2, dm2, xbar2, [n, n, f]);

        // (c) X̄2 = gelu(Z̄1)
        for c in 0..nf {
            dzbar1[c] = dxbar2[c] * dbar1[c];
        }
        self.0.put(dzbar1);

        // (d) Z̄1 = q W1 + b1 - τ ⊙ (M1 Ĝ1)
        attention_backward(dm1, m1, dzbar1, ghat1, x.tok, dtok, [n, f]);
        self.0.put(dm1);
        through_attention(dghat1, m1, dzbar1, x.tok, p1, [n, f]);
        mm_nt(dq, dzbar1, &w1, [n, f, d]);
        mm(dq, dm1, kk, [n, n, d]);
        dk.fill(E::ZERO);
        mm_tn(dk, dm1, q, [n, n, d]);

        // (e) state updates
        if commits {
            let tau = x.tok[n - 1];
            let [dw1, dw2] = [&*dw1, &*dw2].map(|dw| self.0.all(dw));
            fill_rows(p1, db1);
            mm(p1, kk, &dw1, [n, d, f]);
            fill_rows(p2, db2);
            mm(p2, x2, &dw2, [n, f, d]);
            axpy(dghat1, -tau, p1);
            axpy(dghat2, -tau, p2);
            dtok[n - 1] += -(dot(p1, ghat1) + dot(p2, ghat2));
            p2.fill(E::ZERO);
            mm_nt(p2, ghat1, &dw1, [n, f, d]);
            axpy(dk, -tau, p2);
            p1.fill(E::ZERO);
            mm_nt(p1, ghat2, &dw2, [n, d, f]);
            axpy(dx2, -tau, p1);
        }

        // (f) Ĝ = r ⊙ G
        for i in 0..n {
            let (rd, rf, lr) = (i * d..(i + 1) * d, i * f..(i + 1) * f, x.lr.row(i)[0]);
            grads.dlr.row_mut(i)[0] = dot(&dghat1[rf.clone()], &g1[rf.clone()]) + dot(&dghat2[rd.clone()], &g2[rd.clone()]);
            for g in dghat1[rf].iter_mut().chain(&mut dghat2[rd]) {
                *g *= lr;
            }
        }
        let (dg1, dg2) = (dghat1, dghat2);

        // (g) G1 = U ⊙ gelu'(Z1), U = G2 W2ᵀ
        for c in 0..nf {
            du[c] = dg1[c] * d1[c];
        }
        self.0.put(du);
        mm(dg2, du, &w2, [n, f, d]);

        // (h) G2
        for i in 0..n {
            let r = i * d..(i + 1) * d;
            let row = InnerRow { rs: rs[i], m: mean[i] };
            let outputs = [grads.dv.row_mut(i), &mut dk[r.clone()], &mut *grads.dgamma, &mut *grads.dbeta];
            x.wrap().inner_gradient_backward(&mut dg2[r.clone()], [&g2[r.clone()], &xhat[r.clone()], &e[r]], row, outputs);
        }
        self.0.put(dg2);
        let dz2 = dg2;

        // (i) Z2 = X2 W2 + b2, (j) X2 = gelu(Z1)
        mm_nt(dx2, dz2, &w2, [n, d, f]);
        for c in 0..nf {
            dz1[c] = dx2[c] * d1[c] + dg1[c] * u[c] * d2[c];
        }
        self.0.put(dz1);

        // (k) Z1 = k W1 + b1
        mm_nt(dk, dz1, &w1, [n, f, d]);
        mm_tn(dw1, q, dzbar1, [d, n, f]);
        mm_tn(dw1, kk, dz1, [d, n, f]);
        mm_tn(dw2, xbar2, dzbar2, [f, n, d]);
        mm_tn(dw2, x2, dz2, [f, n, d]);
        mm_tn(dw2, du, &g2_operand, [f, n, d]);
        for i in 0..n {
            axpy(db1, E::ONE, &dzbar1[i * f..][..f]);
            axpy(db1, E::ONE, &dz1[i * f..][..f]);
            axpy(db2, E::ONE, &dzbar2[i * d..][..d]);
            axpy(db2, E::ONE, &dz2[i * d..][..d]);
            grads.dq.row_mut(i).copy_from_slice(&dq[i * d..][..d]);
            grads.dk.row_mut(i).copy_from_slice(&dk[i * d..][..d]);
            grads.dtok[i] += dtok[i];
        }
    }
}

/// Squared error of `f(k) - v` over the columns.
pub(crate) fn squared_error<E: Element>(k: &[E], v: &[E], wrap: Wrap<'_, E>, w: &[E]) -> f64 {
    let d = k.len();
    let [w1, b1, w2, b2] = parts(w, d);
    let (mut z1, mut z2, mut buffers) = (b1.to_vec(), b2.to_vec(), vec![E::ZERO; 3 * d]);
    mm(&mut z1, k, w1, [1, d, 4 * d]);
    for x in &mut z1 {
        *x = gelu(*x)[0];
    }
    mm(&mut z2, &z1, w2, [1, 4 * d, d]);
    let [xhat, e, g] = carve(&mut buffers, [d; 3]);
    wrap.inner_gradient(&z2, [k, v], [xhat, &mut *e, g]);
    dot(e, e).to_f64()
}

/// One head of one sequence from phase 0, token by token with the sums S1, s1, S2, s2 (paper 2.5). `w` `[W1 | b1 | W2 | b2]`
/// moves to the last mini-batch boundary; `z` is `[t, d]`.
pub fn primal<E: Element>(
    [q, k, v]: [&[E]; 3],
    [lr, tok]: [&[E]; 2],
    [gamma, beta]: [&[E]; 2],
    variant: Variant,
    w: &mut [E],
    z: &mut [E],
) {
    let (d, wrap) = (gamma.len(), Wrap { gamma, beta, variant });
    let f = 4 * d;
    let mut sums = vec![E::ZERO; w.len()];
    let (mut xhat, mut e, mut g2) = (vec![E::ZERO; d], vec![E::ZERO; d], vec![E::ZERO; d]);
    for (t, z) in z.chunks_exact_mut(d).enumerate() {
        let [q, k, v] = [q, k, v].map(|m| &m[t * d..][..d]);
        let position = t % tok.len();
        let [w1, b1, w2, b2] = parts(w, d);
        let mut z1 = b1.to_vec();
        mm(&mut z1, k, w1, [1, d, f]);
        let x2: Vec<E> = z1.iter().map(|z| gelu(*z)[0]).collect();
        let mut z2 = b2.to_vec();
        mm(&mut z2, &x2, w2, [1, f, d]);
        wrap.inner_gradient(&z2, [k, v], [&mut xhat, &mut e, &mut g2]);
        let mut g1 = vec![E::ZERO; f];
        mm_nt(&mut g1, &g2, w2, [1, d, f]);
        for (g, z) in g1.iter_mut().zip(&z1) {
            *g = lr[t] * (*g * gelu(*z)[1]);
        }
        for g in &mut g2 {
            *g *= lr[t];
        }
        let [s1, sb1, s2, sb2] = carve(&mut sums, [d * f, f, f * d, d]);
        mm_tn(s1, k, &g1, [d, 1, f]);
        axpy(sb1, E::ONE, &g1);
        mm_tn(s2, &x2, &g2, [f, 1, d]);
        axpy(sb2, E::ONE, &g2);
        let mut moved = w.to_vec();
        axpy(&mut moved, -tok[position], &sums);
        let [w1, b1, w2, b2] = parts(&moved, d);
        let mut x = b1.to_vec();
        mm(&mut x, q, w1, [1, d, f]);
        for x in &mut x {
            *x = gelu(*x)[0];
        }
        let mut zbar = b2.to_vec();
        mm(&mut zbar, &x, w2, [1, f, d]);
        wrap.output(&zbar, q, &mut xhat, z);
        if position + 1 == tok.len() {
            w.copy_from_slice(&moved);
            sums.fill(E::ZERO);
        }
    }
}
