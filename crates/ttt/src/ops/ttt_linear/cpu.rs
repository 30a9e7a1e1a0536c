//! TTT-Linear in f32 with vectors: the dual form of `reference.rs` on tiles that stay in the first-level cache (backward.md 3).

use pulp::{Arch, Simd, WithSimd};

use crate::device::view::{Mat, MatMut};
use crate::ops::inner::drive::{Chunk, ChunkGrads, Dims, Learner, carve};
use crate::ops::inner::layer::{Layer, times_transposed};
use crate::ops::inner::rows::{
    InnerRow, axpy, copy_rows, dot, inner_row, inner_row_backward, output_row, output_row_backward, scale, token_columns,
};

/// The vectors of this machine.
#[derive(Clone, Copy)]
pub(crate) struct Fast(Arch);

impl Fast {
    /// The fast code, when it covers heads of width `d` in mini-batches of `k`.
    pub(crate) fn new(d: usize, k: usize) -> Option<Fast> {
        (d.is_multiple_of(16) && (16..=128).contains(&d) && k <= 64).then(|| Fast(Arch::new()))
    }
}

/// Tiles of a mini-batch that [`Learn`] fills.
struct Learned<'a> {
    k: &'a mut [f32],
    ghat: &'a mut [f32],
    xhat: &'a mut [f32],
    e: &'a mut [f32],
    grad: &'a mut [f32],
    z: &'a mut [f32],
    stats: &'a mut [f32],
}

impl Learned<'_> {
    const fn len(Dims { d, k }: Dims) -> usize {
        6 * k * d + 2 * k
    }

    fn carve(Dims { d, k }: Dims, tape: &mut [f32]) -> (Learned<'_>, &mut [f32]) {
        let (own, rest) = tape.split_at_mut(Self::len(Dims { d, k }));
        let [kk, ghat, xhat, e, grad, z, stats] = carve(own, [k * d, k * d, k * d, k * d, k * d, k * d, 2 * k]);
        (Learned { k: kk, ghat, xhat, e, grad, z, stats }, rest)
    }
}

struct Learn<'a> {
    dims: Dims,
    x: Chunk<'a, f32>,
    w: &'a [f32],
    tape: &'a mut [f32],
}

impl WithSimd for Learn<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Learn { dims, x, w, tape } = self;
        let Dims { d, k } = dims;
        let (weight, bias) = w.split_at(d * d);
        let (t, _) = Learned::carve(dims, tape);
        copy_rows(&mut t.k[x.first * d..], x.k);
        let layer = Layer { a: d, b: d, first: x.first, n: x.len(), columns: token_columns(k) };
        layer.apply(simd, t.z, &t.k[x.first * d..], [weight, bias]);
        for i in 0..x.len() {
            let (new, r) = ((x.first + i) * d, i * d..(i + 1) * d);
            let stats = inner_row(
                simd,
                InnerRow {
                    z: &t.z[r.clone()],
                    k: &t.k[new..][..d],
                    v: x.v.row(i),
                    norm: [x.gamma, x.beta],
                    lr: x.lr.row(i)[0],
                    xhat: &mut t.xhat[r.clone()],
                    e: &mut t.e[r.clone()],
                    grad: &mut t.grad[r],
                    ghat: &mut t.ghat[new..][..d],
                },
            );
            t.stats[2 * i..][..2].copy_from_slice(&stats);
        }
    }
}

struct Output<'a> {
    dims: Dims,
    x: Chunk<'a, f32>,
    w: &'a [f32],
    tape: &'a mut [f32],
    z: MatMut<'a, f32>,
}

impl WithSimd for Output<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Output { dims, x, w, tape, mut z } = self;
        let Dims { d, k } = dims;
        let (weight, bias) = w.split_at(d * d);
        let (t, tape) = Learned::carve(dims, tape);
        let columns = token_columns(k);
        let [q, m, neg, k_t, _] = carve(tape, [k * d, k * columns, k * columns, d * columns, 0]);
        copy_rows(q, x.q);
        let layer = Layer { a: d, b: d, first: x.first, n: x.len(), columns };
        layer.output(simd, t.z, q, [weight, bias], [t.k, t.ghat], x.tok, [m, neg, k_t]);
        for i in 0..x.len() {
            let r = i * d..(i + 1) * d;
            output_row(simd, &t.z[r.clone()], &mut t.xhat[..d], &q[r], [x.gamma, x.beta], z.row_mut(i));
        }
    }
}

struct Commit<'a> {
    dims: Dims,
    tau: f32,
    w: &'a mut [f32],
    tape: &'a mut [f32],
}

impl WithSimd for Commit<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Dims { d, k } = self.dims;
        let (weight, bias) = self.w.split_at_mut(d * d);
        let (t, _) = Learned::carve(self.dims, self.tape);
        let layer = Layer { a: d, b: d, first: 0, n: k, columns: token_columns(k) };
        layer.descend(simd, -self.tau, [weight, bias], t.k, t.ghat);
    }
}

struct Backward<'a> {
    dims: Dims,
    x: Chunk<'a, f32>,
    w: &'a [f32],
    dw: &'a mut [f32],
    commits: bool,
    dz: Mat<'a, f32>,
    tape: &'a mut [f32],
    grads: ChunkGrads<'a, f32>,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { dims, x, w, dw, commits, dz, tape, mut grads } = self;
        simd.vectorize(Learn { dims, x, w, tape });

        let (Dims { d, k }, n) = (dims, x.len());
        let columns = token_columns(k);
        let layer = Layer { a: d, b: d, first: 0, n, columns };
        let (weight, bias) = w.split_at(d * d);
        let (dweight, dbias) = dw.split_at_mut(d * d);
        let (t, tape) = Learned::carve(dims, tape);
        let (kd, kc, dc) = (k * d, k * columns, d * columns);
        let [q, dzbar, dghat, dq, dk, dt, p, xo, m, neg, dm, k_t, ghat_t, x_t, y_t] =
            carve(&mut tape[..8 * kd + 3 * kc + 4 * dc], [kd, kd, kd, kd, kd, kd, kd, kd, kc, kc, kc, dc, dc, dc, dc]);
        copy_rows(q, x.q);
        layer.output(simd, dzbar, q, [weight, bias], [t.k, t.ghat], x.tok, [m, neg, k_t]);

        // (1) output LayerNorm
        for i in 0..n {
            let sums = [&mut *grads.dgamma, &mut *grads.dbeta];
            output_row_backward(simd, &mut dzbar[i * d..][..d], &mut xo[..d], dz.row(i), x.gamma, sums);
        }
        // (2) Z̄
        layer.output_backward(
            simd,
            dzbar,
            [q, weight, t.k, t.ghat],
            x.tok,
            [m, neg],
            [dghat, dq, dk, grads.dtok],
            [dm, ghat_t, x_t, y_t],
        );
        // (3) W'
        if commits {
            let tau = x.tok[n - 1];
            let dtau = layer.commit_backward(simd, tau, [dweight, dbias], [t.k, t.ghat, ghat_t], [dghat, dk], [p, y_t]);
            grads.dtok[n - 1] += dtau;
        }
        // (4) Ĝ, (5) G
        for i in 0..n {
            let r = i * d..(i + 1) * d;
            let dg = &mut dghat[r.clone()];
            grads.dlr.row_mut(i)[0] = dot(simd, dg, &t.grad[r.clone()]);
            scale(simd, dg, x.lr.row(i)[0]);
            let stats = [t.stats[2 * i], t.stats[2 * i + 1]];
            let sums = [&mut dt[r.clone()], &mut *grads.dgamma, &mut *grads.dbeta];
            inner_row_backward(simd, dg, [&t.grad[r.clone()], &t.xhat[r.clone()], &t.e[r], x.gamma], stats, sums);
        }
        let dz_inner = dghat;
        // (6) Z = kW + b, t = v - k
        times_transposed(simd, dk, dz_inner, weight, [n, d, d, columns], [x_t, y_t], (1.0, true));
        layer.gradient(simd, 1.0, dweight, &[[&*q, &*dzbar], [&*t.k, &*dz_inner]]);
        layer.bias_gradient(simd, 1.0, dbias, dzbar);
        layer.bias_gradient(simd, 1.0, dbias, dz_inner);
        for i in 0..n {
            let r = i * d..(i + 1) * d;
            let (dq_out, dk_out) = (grads.dq.row_mut(i), grads.dk.row_mut(i));
            dq_out.copy_from_slice(dz.row(i));
            axpy(simd, dq_out, 1.0, &dq[r.clone()]);
            dk_out.copy_from_slice(&dk[r.clone()]);
            axpy(simd, dk_out, -1.0, &dt[r.clone()]);
            grads.dv.row_mut(i).copy_from_slice(&dt[r]);
        }
    }
}

impl Learner<f32> for Fast {
    fn tape_lens(&self, dims: Dims) -> [usize; 2] {
        let Dims { d, k } = dims;
        let c = token_columns(k);
        let learned = Learned::len(dims);
        [learned + k * d + 2 * k * c + d * c, learned + 8 * k * d + 3 * k * c + 4 * d * c]
    }

    fn learn(&self, dims: Dims, x: &Chunk<'_, f32>, w: &[f32], tape: &mut [f32]) {
        self.0.dispatch(Learn { dims, x: *x, w, tape });
    }

    fn output(&self, dims: Dims, x: &Chunk<'_, f32>, w: &[f32], tape: &mut [f32], z: MatMut<'_, f32>) {
        self.0.dispatch(Output { dims, x: *x, w, tape, z });
    }

    fn commit(&self, dims: Dims, tok: &[f32], w: &mut [f32], tape: &mut [f32]) {
        self.0.dispatch(Commit { dims, tau: tok[dims.k - 1], w, tape });
    }

    fn backward(
        &self,
        dims: Dims,
        x: &Chunk<'_, f32>,
        w: &[f32],
        dw: &mut [f32],
        commits: bool,
        dz: Mat<'_, f32>,
        tape: &mut [f32],
        grads: ChunkGrads<'_, f32>,
    ) {
        self.0.dispatch(Backward { dims, x: *x, w, dw, commits, dz, tape, grads });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Inner;
    use crate::ops::inner::rounding::Rounding;
    use crate::ops::inner::test_lanes::agree;

    #[test]
    fn without_vectors_it_is_still_the_reference() {
        agree(Inner::Linear, Fast(Arch::Scalar), super::super::reference::Reference(Rounding::Exact));
        agree(Inner::Linear, Fast(Arch::new()), super::super::reference::Reference(Rounding::Exact));
    }
}
