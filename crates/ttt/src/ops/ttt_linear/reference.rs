//! The definition of TTT-Linear: plain loops, dual form (backward.md 3) and, as a second reference, primal form (paper 2.5).
#![allow(clippy::needless_range_loop)] // indices are the notation of the formulas

use crate::device::view::{Mat, MatMut};
use crate::ops::inner::Variant;
use crate::ops::inner::drive::{Chunk, ChunkGrads, Dims, Learner, carve};
use crate::ops::inner::math::{axpy, dot, fill_rows, mm, mm_nt, mm_tn};
use crate::ops::inner::rounding::Rounding;
use crate::ops::inner::wrap::{InnerRow, Wrap};
use crate::tensor::Element;

/// The dual form.
#[derive(Clone, Copy)]
pub(crate) struct Reference(pub(crate) Rounding);

impl<E: Element> Learner<E> for Reference {
    fn tape_lens(&self, Dims { d, k }: Dims) -> [usize; 2] {
        [6 * k * d, 13 * k * d + 2 * k * k + 3 * k]
    }

    fn learn(&self, Dims { d, k }: Dims, x: &Chunk<'_, E>, w: &[E], tape: &mut [E]) {
        let [kk, ghat, z, xhat, e, _] = carve(tape, [k * d; 6]);
        let (weight, bias) = w.split_at(d * d);
        let weight = self.0.all(weight);
        for i in 0..x.len() {
            let rows = (x.first + i) * d..(x.first + i + 1) * d;
            let (k_row, v_row) = (x.k.row(i), x.v.row(i));
            kk[rows.clone()].copy_from_slice(k_row);
            let z = &mut z[..d];
            z.copy_from_slice(bias);
            mm(z, k_row, &weight, [1, d, d]);
            let g = &mut ghat[rows];
            x.wrap().inner_gradient(z, [k_row, v_row], [&mut xhat[..d], &mut e[..d], &mut *g]);
            for g in g {
                *g = self.0.one(*g * x.lr.row(i)[0]);
            }
        }
    }

    fn output(&self, Dims { d, k }: Dims, x: &Chunk<'_, E>, w: &[E], tape: &mut [E], mut z: MatMut<'_, E>) {
        let [kk, ghat, zbar, xhat, sum, _] = carve(tape, [k * d; 6]);
        let (weight, bias) = w.split_at(d * d);
        let weight = self.0.all(weight);
        let (zbar, xhat, sum) = (&mut zbar[..d], &mut xhat[..d], &mut sum[..d]);
        for i in 0..x.len() {
            let q_row = x.q.row(i);
            zbar.copy_from_slice(bias);
            mm(zbar, q_row, &weight, [1, d, d]);
            sum.fill(E::ZERO);
            for j in 0..=x.first + i {
                let m = self.0.one(dot(q_row, &kk[j * d..][..d]) + E::ONE);
                axpy(sum, m, &ghat[j * d..][..d]);
            }
            axpy(zbar, -x.tok[x.first + i], sum);
            x.wrap().output(zbar, q_row, xhat, z.row_mut(i));
        }
    }

    fn commit(&self, Dims { d, k }: Dims, tok: &[E], w: &mut [E], tape: &mut [E]) {
        let [kk, ghat, sum, _] = carve(tape, [k * d, k * d, d, 0]);
        let (weight, bias) = w.split_at_mut(d * d);
        let (tau, ghat) = self.0.scaled(tok[k - 1], ghat);
        for i in 0..d {
            sum.fill(E::ZERO);
            for j in 0..k {
                axpy(sum, kk[j * d + i], &ghat[j * d..][..d]);
            }
            axpy(&mut weight[i * d..][..d], -tau, sum);
        }
        sum.fill(E::ZERO);
        for j in 0..k {
            axpy(sum, E::ONE, &ghat[j * d..][..d]);
        }
        axpy(bias, -tau, sum);
    }

    fn backward(
        &self,
        Dims { d, k }: Dims,
        x: &Chunk<'_, E>,
        w: &[E],
        dw: &mut [E],
        commits: bool,
        dz: Mat<'_, E>,
        tape: &mut [E],
        mut grads: ChunkGrads<'_, E>,
    ) {
        let n = x.len();
        let (nd, nn) = (n * d, n * n);
        let (weight, bias) = w.split_at(d * d);
        let weight = self.0.all(weight);
        let (dweight, dbias) = dw.split_at_mut(d * d);
        let (tiles, tape) = tape.split_at_mut(13 * k * d);
        let [kk, q, g, ghat, xhat, e, z, xo, dzbar, dghat, dq, dk, p] = carve(tiles, [nd; 13]);
        let [m, dm, rs, mean, dtok] = carve(tape, [nn, nn, n, n, n]);

        // Forward (3.1).
        fill_rows(z, bias);
        for i in 0..n {
            kk[i * d..][..d].copy_from_slice(x.k.row(i));
            q[i * d..][..d].copy_from_slice(x.q.row(i));
        }
        mm(z, kk, &weight, [n, d, d]);
        for i in 0..n {
            let r = i * d..(i + 1) * d;
            let (k_row, v_row) = (&kk[r.clone()], x.v.row(i));
            let parts = [&mut xhat[r.clone()], &mut e[r.clone()], &mut g[r.clone()]];
            let row = x.wrap().inner_gradient(&z[r.clone()], [k_row, v_row], parts);
            (rs[i], mean[i]) = (row.rs, row.m);
            for c in r {
                ghat[c] = self.0.one(x.lr.row(i)[0] * g[c]);
            }
        }
        m.fill(E::ZERO);
        for i in 0..n {
            for j in 0..=i {
                m[i * n + j] = self.0.one(dot(&q[i * d..][..d], &kk[j * d..][..d]) + E::ONE);
            }
        }
        z.fill(E::ZERO);
        mm(z, m, ghat, [n, n, d]);
        for i in 0..n {
            for c in 0..d {
                z[i * d + c] = bias[c] - x.tok[i] * z[i * d + c];
            }
        }
        mm(z, q, &weight, [n, d, d]);

        // (1) output LayerNorm and residual
        for i in 0..n {
            let r = i * d..(i + 1) * d;
            let outputs = [&mut dzbar[r.clone()], &mut dq[r.clone()], &mut *grads.dgamma, &mut *grads.dbeta];
            x.wrap().output_backward(&z[r.clone()], dz.row(i), &mut xo[r], outputs);
        }
        self.0.put(dzbar);

        // (2) Z̄ = qW + b - τ ⊙ (M Ĝ)
        for i in 0..n {
            dtok[i] = E::ZERO;
            for j in 0..n {
                dm[i * n + j] = E::ZERO;
                if j <= i {
                    let nij = dot(&dzbar[i * d..][..d], &ghat[j * d..][..d]);
                    dtok[i] += -(m[i * n + j] * nij);
                    dm[i * n + j] = self.0.one(-x.tok[i] * nij);
                }
            }
        }
        for i in 0..n {
            for c in 0..d {
                p[i * d + c] = -x.tok[i] * dzbar[i * d + c];
            }
        }
        dghat.fill(E::ZERO);
        dk.fill(E::ZERO);
        mm_tn(dghat, m, p, [n, n, d]);
        mm_nt(dq, dzbar, &weight, [n, d, d]);
        mm(dq, dm, kk, [n, n, d]);
        mm_tn(dk, dm, q, [n, n, d]);

        // (3) W' = W - τ_l kᵀĜ
        if commits {
            let (tau, dweight) = (x.tok[n - 1], self.0.all(dweight));
            fill_rows(p, dbias);
            mm(p, kk, &dweight, [n, d, d]);
            axpy(dghat, -tau, p);
            dtok[n - 1] += -dot(p, ghat);
            p.fill(E::ZERO);
            mm_nt(p, ghat, &dweight, [n, d, d]);
            axpy(dk, -tau, p);
        }

        // (4) Ĝ = r ⊙ G, (5) G
        for i in 0..n {
            let r = i * d..(i + 1) * d;
            let lr = x.lr.row(i)[0];
            let dg = &mut dghat[r.clone()];
            grads.dlr.row_mut(i)[0] = dot(dg, &g[r.clone()]);
            for g in dg.iter_mut() {
                *g *= lr;
            }
            let row = InnerRow { rs: rs[i], m: mean[i] };
            let outputs = [grads.dv.row_mut(i), &mut dk[r.clone()], &mut *grads.dgamma, &mut *grads.dbeta];
            x.wrap().inner_gradient_backward(dg, [&g[r.clone()], &xhat[r.clone()], &e[r]], row, outputs);
        }
        self.0.put(dghat);
        let dz_inner = dghat;

        // (6) Z = kW + b
        mm_nt(dk, dz_inner, &weight, [n, d, d]);
        mm_tn(dweight, q, dzbar, [d, n, d]);
        mm_tn(dweight, kk, dz_inner, [d, n, d]);
        for i in 0..n {
            axpy(dbias, E::ONE, &dzbar[i * d..][..d]);
            axpy(dbias, E::ONE, &dz_inner[i * d..][..d]);
            grads.dq.row_mut(i).copy_from_slice(&dq[i * d..][..d]);
            grads.dk.row_mut(i).copy_from_slice(&dk[i * d..][..d]);
            grads.dtok[i] += dtok[i];
        }
    }
}

/// Squared error of `f(k) - v` over the columns.
pub(crate) fn squared_error<E: Element>(k: &[E], v: &[E], wrap: Wrap<'_, E>, w: &[E]) -> f64 {
    let d = k.len();
    let (mut z, mut buffers) = (w[d * d..].to_vec(), vec![E::ZERO; 3 * d]);
    mm(&mut z, k, &w[..d * d], [1, d, d]);
    let [xhat, e, g] = carve(&mut buffers, [d; 3]);
    wrap.inner_gradient(&z, [k, v], [xhat, &mut *e, g]);
    dot(e, e).to_f64()
}

/// One head of one sequence from phase 0, token by token with the sums SW, Sb (paper 2.5). `w` `[W1 | b1]` moves to the last
/// mini-batch boundary; `z` is `[t, d]`.
pub fn primal<E: Element>(
    [q, k, v]: [&[E]; 3],
    [lr, tok]: [&[E]; 2],
    [gamma, beta]: [&[E]; 2],
    variant: Variant,
    w: &mut [E],
    z: &mut [E],
) {
    let (d, wrap) = (gamma.len(), Wrap { gamma, beta, variant });
    let mut sum = vec![E::ZERO; d * d + d];
    let (mut zrow, mut xhat, mut e, mut g) = (vec![E::ZERO; d], vec![E::ZERO; d], vec![E::ZERO; d], vec![E::ZERO; d]);
    for (t, z) in z.chunks_exact_mut(d).enumerate() {
        let [q, k, v] = [q, k, v].map(|m| &m[t * d..][..d]);
        let position = t % tok.len();
        zrow.copy_from_slice(&w[d * d..]);
        mm(&mut zrow, k, &w[..d * d], [1, d, d]);
        wrap.inner_gradient(&zrow, [k, v], [&mut xhat, &mut e, &mut g]);
        for c in &mut g {
            *c *= lr[t];
        }
        mm_tn(&mut sum[..d * d], k, &g, [d, 1, d]);
        axpy(&mut sum[d * d..], E::ONE, &g);
        let mut moved = w.to_vec();
        axpy(&mut moved, -tok[position], &sum);
        zrow.copy_from_slice(&moved[d * d..]);
        mm(&mut zrow, q, &moved[..d * d], [1, d, d]);
        wrap.output(&zrow, q, &mut xhat, z);
        if position + 1 == tok.len() {
            w.copy_from_slice(&moved);
            sum.fill(E::ZERO);
        }
    }
}
