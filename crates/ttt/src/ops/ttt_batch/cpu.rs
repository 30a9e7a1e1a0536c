//! f32 on one of the processor's cores: one segment of one head, in chunks. Products are the `gemm` crate's; LayerNorm and its
//! gradients are row by row, a few percent of the arithmetic at a head width of 64.

use super::{Head, HeadGrads};
use crate::device::view::{Mat, MatMut};
use crate::ops::inner::drive::carve;
use crate::ops::inner::math::{axpy, dot, fill_rows};
use crate::ops::inner::wrap::InnerRow;
use crate::ops::linear_attention::Kind;
use crate::ops::linear_attention::cpu::{CHUNK, advance, backward_kv, backward_q, read, times, times_transposed, transposed_times};

/// Below so many tokens the plain loops are no slower than products.
const FEW: usize = 4;

/// Elements of scratch of [`forward`].
pub(super) fn scratch(d: usize) -> usize {
    CHUNK * CHUNK + 3 * CHUNK * d + 2 * d
}

/// Elements of scratch of [`backward`], for `n` tokens.
pub(super) fn backward_scratch(n: usize, d: usize) -> usize {
    2 * CHUNK * CHUNK + d * d + d + 5 * n * d + 2 * n + 3 * CHUNK * d
}

fn kind(bias: bool) -> Kind {
    if bias { Kind::Biased } else { Kind::Plain }
}

fn mat(x: &[f32], rows: usize) -> Mat<'_, f32> {
    Mat::new(x, rows, x.len() / rows.max(1))
}

fn mat_mut(x: &mut [f32], rows: usize) -> MatMut<'_, f32> {
    let cols = x.len() / rows.max(1);
    MatMut::new(x, rows, cols)
}

/// y = x W0 + b0.
fn affine(x: Mat<f32>, initial: &[f32], y: &mut [f32]) {
    let d = x.cols();
    let (weight, bias) = initial.split_at(d * d);
    fill_rows(y, bias);
    times(x, mat(weight, d), mat_mut(y, x.rows()), true);
}

/// One segment of one head; `state` moves on.
pub(super) fn forward(x: Head<'_, f32>, state: &mut [f32], mut z: MatMut<'_, f32>, scratch: &mut [f32]) {
    let (n, d) = (x.q.rows(), x.q.cols());
    let [a, ghat, zbar, sum, xhat, e] = carve(scratch, [CHUNK * CHUNK, CHUNK * d, CHUNK * d, CHUNK * d, d, d]);
    for at in (0..n).step_by(CHUNK) {
        let c = CHUNK.min(n - at);
        let own = at..at + c;
        let [q, k, v, lr] = [x.q, x.k, x.v, x.lr].map(|m| m.row_range(own.clone()));
        let mut z = z.reborrow().row_range(own);
        if c < FEW {
            super::reference::forward(Head { q, k, v, lr, position: x.position + at, ..x }, state, z, &mut []);
            continue;
        }
        let (initial, sums) = state.split_at_mut(d * d + d);
        let (ghat, zbar, sum) = (&mut ghat[..c * d], &mut zbar[..c * d], &mut sum[..c * d]);
        affine(k, initial, zbar);
        for i in 0..c {
            let g = &mut ghat[i * d..][..d];
            x.wrap.inner_gradient(&zbar[i * d..][..d], [k.row(i), v.row(i)], [&mut *xhat, &mut *e, &mut *g]);
            g.iter_mut().for_each(|g| *g *= lr.row(i)[0]);
        }
        affine(q, initial, zbar);
        let ghat = mat(ghat, c);
        read(kind(x.bias), [q, k, ghat], sums, &mut a[..c * c], mat_mut(sum, c));
        for i in 0..c {
            let zbar = &mut zbar[i * d..][..d];
            axpy(zbar, -x.tau(at + i), &sum[i * d..][..d]);
            x.wrap.output(zbar, q.row(i), xhat, z.row_mut(i));
        }
        advance(kind(x.bias), k, ghat, sums);
    }
}

/// Its gradients: forward once more, in which the sums are known and with them dZ̄ and dq; then back, in which the gradient of the
/// sums is known, and with it dĜ.
pub(super) fn backward(
    x: Head<'_, f32>,
    start: &[f32],
    dz: Mat<'_, f32>,
    dstate: &mut [f32],
    mut grads: HeadGrads<'_, f32>,
    scratch: &mut [f32],
) {
    let (n, d, kind) = (x.q.rows(), x.q.cols(), kind(x.bias));
    let (initial, sums) = start.split_at(d * d + d);
    let (dinitial, dsums) = dstate.split_at_mut(d * d + d);
    let (weight, _) = initial.split_at(d * d);
    let (dweight, dbias) = dinitial.split_at_mut(d * d);
    let (dgamma, dbeta) = grads.params.split_at_mut(d);
    let lens = [CHUNK * CHUNK, CHUNK * CHUNK, d * d + d, n * d, n * d, n * d, n * d, n * d, n, n, CHUNK * d, CHUNK * d, CHUNK * d];
    let [a, b, state, g, ghat, xhat, e, dzbar, rs, mean, zrow, sum, extra] = carve(scratch, lens);
    state.copy_from_slice(sums);
    let chunks = || (0..n).step_by(CHUNK).map(|at| at..(at + CHUNK).min(n));

    for r in chunks() {
        let (c, at) = (r.len(), r.start);
        let wide = at * d..r.end * d;
        let [q, k, v, lr] = [x.q, x.k, x.v, x.lr].map(|m| m.row_range(r.clone()));
        let (zrow, sum, d_o) = (&mut zrow[..c * d], &mut sum[..c * d], &mut extra[..c * d]);
        affine(k, initial, zrow);
        for i in 0..c {
            let row = (at + i) * d..(at + i + 1) * d;
            let parts = [&mut xhat[row.clone()], &mut e[row.clone()], &mut g[row.clone()]];
            let inner = x.wrap.inner_gradient(&zrow[i * d..][..d], [k.row(i), v.row(i)], parts);
            (rs[at + i], mean[at + i]) = (inner.rs, inner.m);
            ghat[row.clone()].iter_mut().zip(&g[row]).for_each(|(ghat, g)| *ghat = lr.row(i)[0] * g);
        }
        let ghat = mat(&ghat[wide.clone()], c);
        read(kind, [q, k, ghat], state, &mut a[..c * c], mat_mut(sum, c));
        affine(q, initial, zrow);
        // dq takes what goes past Z̄ last: the products overwrite.
        let mut dq = grads.dq.reborrow().row_range(r.clone());
        let dzbar = &mut dzbar[wide];
        let xo = &mut b[..d];
        for i in 0..c {
            let (zbar, own) = (&mut zrow[i * d..][..d], i * d..(i + 1) * d);
            axpy(zbar, -x.tau(at + i), &sum[own.clone()]);
            // The sum is not needed any more; its row takes what goes past Z̄.
            let outputs = [&mut dzbar[own.clone()], &mut sum[own.clone()], &mut *dgamma, &mut *dbeta];
            x.wrap.output_backward(zbar, dz.row(at + i), xo, outputs);
            let tau = x.tau(at + i);
            d_o[own.clone()].iter_mut().zip(&dzbar[own]).for_each(|(d_o, dzbar)| *d_o = -tau * dzbar);
        }
        let (d_o, dzbar) = (mat(d_o, c), mat(dzbar, c));
        backward_q([k, ghat], d_o, &[], state, &mut b[..c * c], dq.reborrow());
        times_transposed(dzbar, mat(weight, d), dq.reborrow(), true);
        (0..c).for_each(|i| axpy(dq.row_mut(i), 1.0, &sum[i * d..][..d]));
        transposed_times(q, dzbar, mat_mut(dweight, d), true);
        (0..c).for_each(|i| axpy(dbias, 1.0, dzbar.row(i)));
        advance(kind, k, ghat, state);
    }

    for r in chunks().rev() {
        let (c, at) = (r.len(), r.start);
        let wide = at * d..r.end * d;
        let [q, k, lr] = [x.q, x.k, x.lr].map(|m| m.row_range(r.clone()));
        let (d_o, dghat) = (&mut extra[..c * d], &mut sum[..c * d]);
        for i in 0..c {
            let tau = x.tau(at + i);
            let own = &dzbar[(at + i) * d..][..d];
            d_o[i * d..][..d].iter_mut().zip(own).for_each(|(d_o, dzbar)| *d_o = -tau * dzbar);
        }
        let mut dk = grads.dk.reborrow().row_range(r.clone());
        let qkv = [q, k, mat(&ghat[wide], c)];
        let scratch = [&mut a[..c * c], &mut b[..c * c]];
        backward_kv(kind, qkv, mat(d_o, c), &[], dsums, scratch, [dk.reborrow(), mat_mut(dghat, c)]);
        for i in 0..c {
            let row = (at + i) * d..(at + i + 1) * d;
            let dg = &mut dghat[i * d..][..d];
            grads.dlr.row_mut(at + i)[0] = dot(dg, &g[row.clone()]);
            dg.iter_mut().for_each(|g| *g *= lr.row(i)[0]);
            let inner = InnerRow { rs: rs[at + i], m: mean[at + i] };
            let outputs = [grads.dv.row_mut(at + i), dk.row_mut(i), &mut *dgamma, &mut *dbeta];
            x.wrap.inner_gradient_backward(dg, [&g[row.clone()], &xhat[row.clone()], &e[row]], inner, outputs);
        }
        let dz_inner = mat(dghat, c);
        times_transposed(dz_inner, mat(weight, d), dk, true);
        transposed_times(k, dz_inner, mat_mut(dweight, d), true);
        (0..c).for_each(|i| axpy(dbias, 1.0, dz_inner.row(i)));
    }
}
