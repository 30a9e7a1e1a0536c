//! The definition: token by token forward (the primal form, paper 2.5), all pairs of tokens backward (backward.md 3.2 with n the
//! whole segment, whose update is what is carried on).
#![allow(clippy::needless_range_loop)] // indices are the notation of the formulas

use super::{Head, HeadGrads};
use crate::device::view::{Mat, MatMut};
use crate::ops::inner::math::{axpy, dot, mm, mm_nt, mm_tn};
use crate::ops::inner::wrap::InnerRow;
use crate::tensor::Element;

/// One segment of one head; `state` `[W0 | b0 | SW | Sb]` moves on.
pub(crate) fn forward<E: Element>(x: Head<'_, E>, state: &mut [E], mut z: MatMut<'_, E>, _: &mut [E]) {
    let d = x.q.cols();
    let (initial, sums) = state.split_at_mut(d * d + d);
    let [mut zrow, mut xhat, mut e, mut g] = [(); 4].map(|()| vec![E::ZERO; d]);
    for t in 0..x.q.rows() {
        let [q, k, v] = [x.q, x.k, x.v].map(|m| m.row(t));
        // Ĝ at the initial weights.
        zrow.copy_from_slice(&initial[d * d..]);
        mm(&mut zrow, k, &initial[..d * d], [1, d, d]);
        x.wrap.inner_gradient(&zrow, [k, v], [&mut xhat, &mut e, &mut g]);
        g.iter_mut().for_each(|g| *g *= x.lr.row(t)[0]);
        mm_tn(&mut sums[..d * d], k, &g, [d, 1, d]);
        axpy(&mut sums[d * d..], x.one(), &g);
        // The output under W0 - τ SW, b0 - τ Sb.
        let mut moved = initial.to_vec();
        axpy(&mut moved, -x.tau(t), sums);
        zrow.copy_from_slice(&moved[d * d..]);
        mm(&mut zrow, q, &moved[..d * d], [1, d, d]);
        x.wrap.output(&zrow, q, &mut xhat, z.row_mut(t));
    }
}

/// Its gradients, from `start`, the state that it began with.
pub(crate) fn backward<E: Element>(
    x: Head<'_, E>,
    start: &[E],
    dz: Mat<'_, E>,
    dstate: &mut [E],
    mut grads: HeadGrads<'_, E>,
    _: &mut [E],
) {
    let (n, d) = (x.q.rows(), x.q.cols());
    let rows = |m: Mat<'_, E>| (0..n).flat_map(|t| m.row(t).iter().copied()).collect::<Vec<_>>();
    let [q, k, v] = [x.q, x.k, x.v].map(rows);
    let (initial, sums) = start.split_at(d * d + d);
    let (dinitial, dsums) = dstate.split_at_mut(d * d + d);
    let (weight, bias) = initial.split_at(d * d);
    let (dweight, dbias) = dinitial.split_at_mut(d * d);
    let (sum_w, sum_b) = sums.split_at(d * d);
    let (dsum_w, dsum_b) = dsums.split_at_mut(d * d);
    let (dgamma, dbeta) = grads.params.split_at_mut(d);

    // Forward: G, Ĝ, and O = q SW + Sb + tril(q kᵀ + 1) Ĝ with the state at the start.
    let [mut g, mut ghat, mut xhat, mut e, mut o, mut xo, mut dzbar, mut dghat, mut dq, mut dk] =
        [(); 10].map(|()| vec![E::ZERO; n * d]);
    let mut inner = Vec::with_capacity(n);
    let mut m = vec![E::ZERO; n * n];
    for t in 0..n {
        let r = t * d..(t + 1) * d;
        let mut z = bias.to_vec();
        mm(&mut z, &k[r.clone()], weight, [1, d, d]);
        let parts = [&mut xhat[r.clone()], &mut e[r.clone()], &mut g[r.clone()]];
        inner.push(x.wrap.inner_gradient(&z, [&k[r.clone()], &v[r.clone()]], parts));
        for c in r.clone() {
            ghat[c] = x.lr.row(t)[0] * g[c];
        }
        mm(&mut o[r.clone()], &q[r.clone()], sum_w, [1, d, d]);
        axpy(&mut o[r.clone()], x.one(), sum_b);
        for j in 0..=t {
            m[t * n + j] = dot(&q[r.clone()], &k[j * d..][..d]) + x.one();
            axpy(&mut o[r.clone()], m[t * n + j], &ghat[j * d..][..d]);
        }
    }

    // Output, and Z̄ = q W0 + b0 - τ O. From here on dO = -τ dZ̄.
    let mut d_o = vec![E::ZERO; n * d];
    for t in 0..n {
        let r = t * d..(t + 1) * d;
        let mut zbar = bias.to_vec();
        mm(&mut zbar, &q[r.clone()], weight, [1, d, d]);
        axpy(&mut zbar, -x.tau(t), &o[r.clone()]);
        let outputs = [&mut dzbar[r.clone()], &mut dq[r.clone()], &mut *dgamma, &mut *dbeta];
        x.wrap.output_backward(&zbar, dz.row(t), &mut xo[r.clone()], outputs);
        axpy(&mut d_o[r.clone()], -x.tau(t), &dzbar[r]);
    }
    mm_nt(&mut dq, &dzbar, weight, [n, d, d]);
    mm_nt(&mut dq, &d_o, sum_w, [n, d, d]);

    // The sums at the end are SW + kᵀĜ, Sb + Σ Ĝ.
    mm_nt(&mut dk, &ghat, dsum_w, [n, d, d]);
    mm(&mut dghat, &k, dsum_w, [n, d, d]);
    for t in 0..n {
        axpy(&mut dghat[t * d..][..d], x.one(), dsum_b);
    }
    for t in 0..n {
        for j in 0..=t {
            let dm = dot(&d_o[t * d..][..d], &ghat[j * d..][..d]);
            axpy(&mut dq[t * d..][..d], dm, &k[j * d..][..d]);
            axpy(&mut dk[j * d..][..d], dm, &q[t * d..][..d]);
            axpy(&mut dghat[j * d..][..d], m[t * n + j], &d_o[t * d..][..d]);
        }
    }
    mm_tn(dsum_w, &q, &d_o, [d, n, d]);
    d_o.chunks_exact(d).for_each(|row| axpy(dsum_b, x.one(), row));

    // Ĝ = r G, G, and Z = k W0 + b0.
    for t in 0..n {
        let r = t * d..(t + 1) * d;
        let dg = &mut dghat[r.clone()];
        grads.dlr.row_mut(t)[0] = dot(dg, &g[r.clone()]);
        dg.iter_mut().for_each(|g| *g *= x.lr.row(t)[0]);
        let outputs = [grads.dv.row_mut(t), &mut dk[r.clone()], &mut *dgamma, &mut *dbeta];
        let InnerRow { rs, m } = inner[t];
        x.wrap.inner_gradient_backward(dg, [&g[r.clone()], &xhat[r.clone()], &e[r]], InnerRow { rs, m }, outputs);
    }
    let dz_inner = dghat;
    mm_nt(&mut dk, &dz_inner, weight, [n, d, d]);
    mm_tn(dweight, &q, &dzbar, [d, n, d]);
    mm_tn(dweight, &k, &dz_inner, [d, n, d]);
    for t in 0..n {
        let r = t * d..(t + 1) * d;
        axpy(dbias, E::ONE, &dzbar[r.clone()]);
        axpy(dbias, E::ONE, &dz_inner[r.clone()]);
        grads.dq.row_mut(t).copy_from_slice(&dq[r.clone()]);
        grads.dk.row_mut(t).copy_from_slice(&dk[r]);
    }
}
