//! TTT-MLP in f32 with vectors: the dual form of `reference.rs` on tiles that stay in the second-level cache (backward.md 4).
//! The inner model is two [`Layer`]s with gelu between them.

use pulp::{Arch, Simd, WithSimd};

use crate::device::view::{Mat, MatMut};
use crate::ops::inner::drive::{Chunk, ChunkGrads, Dims, Learner, carve};
use crate::ops::inner::layer::{Layer, times_transposed};
use crate::ops::inner::rows::{
    InnerRow, axpy, copy_rows, dot, dot3, gelu, inner_row, inner_row_backward, multiply, multiply_add3, multiply_by, output_row,
    output_row_backward, scale, token_columns,
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

/// Tiles of a mini-batch that [`Learn`] fills; `z2` and the transposed ones are scratch.
struct Learned<'a> {
    k: &'a mut [f32],
    ghat1: &'a mut [f32],
    x2: &'a mut [f32],
    ghat2: &'a mut [f32],
    d1: &'a mut [f32],
    d2: &'a mut [f32],
    u: &'a mut [f32],
    xhat: &'a mut [f32],
    e: &'a mut [f32],
    g2: &'a mut [f32],
    z2: &'a mut [f32],
    stats: &'a mut [f32],
    narrow_t: &'a mut [f32],
    wide_t: &'a mut [f32],
}

impl Learned<'_> {
    fn lens(Dims { d, k }: Dims) -> [usize; 14] {
        let (kd, kf, c) = (k * d, k * 4 * d, token_columns(k));
        [kd, kf, kf, kd, kf, kf, kf, kd, kd, kd, kd, 2 * k, d * c, 4 * d * c]
    }

    fn carve(dims: Dims, tape: &mut [f32]) -> (Learned<'_>, &mut [f32]) {
        let lens = Self::lens(dims);
        let (own, rest) = tape.split_at_mut(lens.iter().sum());
        let [k, ghat1, x2, ghat2, d1, d2, u, xhat, e, g2, z2, stats, narrow_t, wide_t] = carve(own, lens);
        (Learned { k, ghat1, x2, ghat2, d1, d2, u, xhat, e, g2, z2, stats, narrow_t, wide_t }, rest)
    }
}

/// The parts of `[W1 | b1 | W2 | b2]`.
fn parts(w: &[f32], d: usize) -> [[&[f32]; 2]; 2] {
    let (w1, rest) = w.split_at(4 * d * d);
    let (b1, rest) = rest.split_at(4 * d);
    let (w2, b2) = rest.split_at(4 * d * d);
    [[w1, b1], [w2, b2]]
}

/// The two layers as they see `n` tokens from `first` on.
fn layers(Dims { d, k }: Dims, first: usize, n: usize) -> [Layer; 2] {
    let columns = token_columns(k);
    [Layer { a: d, b: 4 * d, first, n, columns }, Layer { a: 4 * d, b: d, first, n, columns }]
}

struct Learn<'a> {
    dims: Dims,
    x: Chunk<'a, f32>,
    w: &'a [f32],
    tape: &'a mut [f32],
    /// Whether to leave gelu''(Z1) too.
    second: bool,
}

impl WithSimd for Learn<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Learn { dims, x, w, tape, second } = self;
        let (d, f, n) = (dims.d, 4 * dims.d, x.len());
        let [layer1, layer2] = layers(dims, x.first, n);
        let [weights1, weights2] = parts(w, d);
        let (t, _) = Learned::carve(dims, tape);
        let (new, new_wide) = (x.first * d, x.first * f);
        copy_rows(&mut t.k[new..], x.k);
        let x2 = &mut t.x2[new_wide..][..n * f];
        layer1.apply(simd, x2, &t.k[new..], weights1);
        gelu(simd, x2, &mut t.d1[..n * f], if second { &mut t.d2[..n * f] } else { &mut [] });
        layer2.apply(simd, t.z2, x2, weights2);
        for i in 0..n {
            let (row, r) = (new + i * d, i * d..(i + 1) * d);
            let stats = inner_row(
                simd,
                InnerRow {
                    z: &t.z2[r.clone()],
                    k: &t.k[row..][..d],
                    v: x.v.row(i),
                    norm: [x.gamma, x.beta],
                    lr: x.lr.row(i)[0],
                    xhat: &mut t.xhat[r.clone()],
                    e: &mut t.e[r.clone()],
                    grad: &mut t.g2[r],
                    ghat: &mut t.ghat2[row..][..d],
                },
            );
            t.stats[2 * i..][..2].copy_from_slice(&stats);
        }
        times_transposed(simd, t.u, t.g2, weights2[0], [n, f, d, layer1.columns], [t.narrow_t, t.wide_t], (1.0, false));
        for i in 0..n {
            let (ghat1, r) = (&mut t.ghat1[new_wide + i * f..][..f], i * f..(i + 1) * f);
            multiply(simd, ghat1, &t.u[r.clone()], &t.d1[r]);
            scale(simd, ghat1, x.lr.row(i)[0]);
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

impl Output<'_> {
    fn lens(Dims { d, k }: Dims) -> [usize; 4] {
        let c = token_columns(k);
        [k * d, k * 4 * d, k * c, k * c]
    }
}

impl WithSimd for Output<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Output { dims, x, w, tape, mut z } = self;
        let (d, f, n) = (dims.d, 4 * dims.d, x.len());
        let [layer1, layer2] = layers(dims, x.first, n);
        let [weights1, weights2] = parts(w, d);
        let (t, tape) = Learned::carve(dims, tape);
        let lens = Self::lens(dims);
        let [q, xbar2, m, neg] = carve(&mut tape[..lens.iter().sum()], lens);
        copy_rows(q, x.q);
        layer1.output(simd, xbar2, q, weights1, [t.k, t.ghat1], x.tok, [m, neg, t.narrow_t]);
        gelu(simd, &mut xbar2[..n * f], &mut [], &mut []);
        layer2.output(simd, t.z2, xbar2, weights2, [t.x2, t.ghat2], x.tok, [m, neg, t.wide_t]);
        for i in 0..n {
            let r = i * d..(i + 1) * d;
            output_row(simd, &t.z2[r.clone()], &mut t.xhat[..d], &q[r], [x.gamma, x.beta], z.row_mut(i));
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
        let Commit { dims, tau, w, tape } = self;
        let d = dims.d;
        let [layer1, layer2] = layers(dims, 0, dims.k);
        let [w1, b1, w2, b2] = carve(w, [4 * d * d, 4 * d, 4 * d * d, d]);
        let (t, _) = Learned::carve(dims, tape);
        layer1.descend(simd, -tau, [w1, b1], t.k, t.ghat1);
        layer2.descend(simd, -tau, [w2, b2], t.x2, t.ghat2);
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

impl Backward<'_> {
    fn lens(Dims { d, k }: Dims) -> [usize; 19] {
        let (kd, kf, c) = (k * d, k * 4 * d, token_columns(k));
        let (kc, dc, fc) = (k * c, d * c, 4 * d * c);
        [kd, kd, kd, kd, kd, kd, d, kf, kf, kf, kf, kf, kc, kc, kc, kc, kc, dc, fc]
    }
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { dims, x, w, dw, commits, dz, tape, mut grads } = self;
        simd.vectorize(Learn { dims, x, w, tape, second: true });

        let (d, f, n) = (dims.d, 4 * dims.d, x.len());
        let [layer1, layer2] = layers(dims, 0, n);
        let columns = layer1.columns;
        let [weights1, weights2] = parts(w, d);
        let [dw1, db1, dw2, db2] = carve(dw, [4 * d * d, 4 * d, 4 * d * d, d]);
        let (t, tape) = Learned::carve(dims, tape);
        let lens = Self::lens(dims);
        let [q, dzbar2, dghat2, dq, dk, dt, xo, xbar2, dzbar1, dx2, dghat1, du, m1, neg1, m2, neg2, dm, ghat2_t, ghat1_t] =
            carve(&mut tape[..lens.iter().sum()], lens);
        // `du` holds gelu'(Z̄1) until (c), then P1 in (e): few tiles, so that they and both weights fit the second-level cache.
        copy_rows(q, x.q);
        layer1.output(simd, xbar2, q, weights1, [t.k, t.ghat1], x.tok, [m1, neg1, t.narrow_t]);
        gelu(simd, &mut xbar2[..n * f], &mut du[..n * f], &mut []);
        layer2.output(simd, dzbar2, xbar2, weights2, [t.x2, t.ghat2], x.tok, [m2, neg2, t.wide_t]);

        // (a) output LayerNorm
        for i in 0..n {
            let sums = [&mut *grads.dgamma, &mut *grads.dbeta];
            output_row_backward(simd, &mut dzbar2[i * d..][..d], xo, dz.row(i), x.gamma, sums);
        }
        // (b) Z̄2, (c) X̄2 = gelu(Z̄1): dX̄2 arrives in `dzbar1`
        let reads = [&*xbar2, weights2[0], t.x2, t.ghat2];
        let writes = [&mut *dghat2, &mut *dzbar1, &mut *dx2, &mut *grads.dtok];
        layer2.output_backward(simd, dzbar2, reads, x.tok, [m2, neg2], writes, [dm, ghat2_t, t.narrow_t, t.wide_t]);
        multiply_by(simd, &mut dzbar1[..n * f], du);
        // (d) Z̄1
        let reads = [&*q, weights1[0], t.k, t.ghat1];
        let writes = [&mut *dghat1, &mut *dq, &mut *dk, &mut *grads.dtok];
        layer1.output_backward(simd, dzbar1, reads, x.tok, [m1, neg1], writes, [dm, ghat1_t, t.wide_t, t.narrow_t]);
        // (e) state updates
        if commits {
            let tau = x.tok[n - 1];
            let reads = [&*t.k, t.ghat1, ghat1_t];
            let dtau1 = layer1.commit_backward(simd, tau, [dw1, db1], reads, [dghat1, dk], [du, t.narrow_t]);
            let reads = [&*t.x2, t.ghat2, ghat2_t];
            let dtau2 = layer2.commit_backward(simd, tau, [dw2, db2], reads, [dghat2, dx2], [t.z2, t.wide_t]);
            grads.dtok[n - 1] += dtau1 + dtau2;
        }
        // (f) Ĝ = r ⊙ G, (g) U = G2 W2ᵀ
        for i in 0..n {
            let (rd, rf, lr) = (i * d..(i + 1) * d, i * f..(i + 1) * f, x.lr.row(i)[0]);
            let (dg1, dg2) = (&mut dghat1[rf.clone()], &mut dghat2[rd.clone()]);
            grads.dlr.row_mut(i)[0] = dot3(simd, dg1, &t.u[rf.clone()], &t.d1[rf.clone()]) + dot(simd, dg2, &t.g2[rd]);
            scale(simd, dg1, lr);
            scale(simd, dg2, lr);
            multiply(simd, &mut du[rf.clone()], dg1, &t.d1[rf]);
        }
        let (dg1, dg2) = (dghat1, dghat2);
        layer2.add_product(simd, dg2, du, weights2[0]);
        // (h) G2
        for i in 0..n {
            let r = i * d..(i + 1) * d;
            let stats = [t.stats[2 * i], t.stats[2 * i + 1]];
            let sums = [&mut dt[r.clone()], &mut *grads.dgamma, &mut *grads.dbeta];
            let dg2 = &mut dg2[r.clone()];
            inner_row_backward(simd, dg2, [&t.g2[r.clone()], &t.xhat[r.clone()], &t.e[r], x.gamma], stats, sums);
        }
        let dz2 = dg2;
        // (i) Z2 = X2 W2 + b2, (j) X2 = gelu(Z1): dZ1 replaces dX2
        times_transposed(simd, dx2, dz2, weights2[0], [n, f, d, columns], [t.narrow_t, t.wide_t], (1.0, true));
        let all = ..n * f;
        multiply_add3(simd, &mut dx2[all], &t.d1[all], [&dg1[all], &t.u[all], &t.d2[all]]);
        let dz1 = dx2;
        // (k) Z1 = k W1 + b1, t = v - k
        times_transposed(simd, dk, dz1, weights1[0], [n, d, f, columns], [t.wide_t, t.narrow_t], (1.0, true));
        layer1.gradient(simd, 1.0, dw1, &[[&*q, &*dzbar1], [&*t.k, &*dz1]]);
        layer2.gradient(simd, 1.0, dw2, &[[&*xbar2, &*dzbar2], [&*t.x2, &*dz2], [&*du, &*t.g2]]);
        for (layer, bias, right) in [(layer1, db1, [dzbar1, dz1]), (layer2, db2, [dzbar2, dz2])] {
            layer.bias_gradient(simd, 1.0, bias, right[0]);
            layer.bias_gradient(simd, 1.0, bias, right[1]);
        }
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
        let learned: usize = Learned::lens(dims).iter().sum();
        let [output, backward] = [Output::lens(dims).iter().sum::<usize>(), Backward::lens(dims).iter().sum()];
        [learned + output, learned + backward]
    }

    fn learn(&self, dims: Dims, x: &Chunk<'_, f32>, w: &[f32], tape: &mut [f32]) {
        self.0.dispatch(Learn { dims, x: *x, w, tape, second: false });
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
        agree(Inner::Mlp, Fast(Arch::Scalar), super::super::reference::Reference(Rounding::Exact));
        agree(Inner::Mlp, Fast(Arch::new()), super::super::reference::Reference(Rounding::Exact));
    }
}
