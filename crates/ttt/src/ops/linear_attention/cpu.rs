//! f32 on one of the processor's cores: one segment of one head, in chunks. Products are the `gemm` crate's.
//!
//! For a chunk of c tokens a head of width d takes 4 c² d + 4 c d² operations forward, so that a token costs least, and less than the
//! 4 d² of the state alone, where c is of the order of d.

use super::{EPS, Kind};
use crate::device::view::{Mat, MatMut};
use crate::ops::inner::math::{axpy, dot};
use crate::ops::linear::cpu::{Operand, product_here};

/// Tokens of a chunk.
pub(crate) const CHUNK: usize = 64;
/// Below so many tokens the plain loops are no slower than products.
const FEW: usize = 4;

/// Elements of scratch of [`forward`].
pub(crate) fn scratch(d: usize) -> usize {
    CHUNK * CHUNK + 2 * CHUNK * d
}

/// Elements of scratch of [`backward`], for `n` tokens.
pub(super) fn backward_scratch(kind: Kind, n: usize, d: usize) -> usize {
    let own = if kind == Kind::Normalised { 3 * n * d + n + CHUNK * d } else { 0 };
    2 * CHUNK * CHUNK + d * d + d + own
}

fn one(kind: Kind) -> f32 {
    if kind == Kind::Biased { 1.0 } else { 0.0 }
}

/// x as a matrix of `rows` rows.
fn mat(x: &[f32], rows: usize) -> Mat<'_, f32> {
    Mat::new(x, rows, x.len() / rows.max(1))
}

fn mat_mut(x: &mut [f32], rows: usize) -> MatMut<'_, f32> {
    let cols = x.len() / rows.max(1);
    MatMut::new(x, rows, cols)
}

/// y = a bᵀ below the diagonal and on it, each row with what `extra` adds; 0 above.
pub(crate) fn masked(a: Mat<f32>, b: Mat<f32>, y: &mut [f32], extra: impl Fn(usize) -> f32) {
    let n = a.rows();
    product_here(Operand::new(a), Operand::new(b).transposed(), mat_mut(y, n), false);
    for (i, row) in y.chunks_exact_mut(n).enumerate() {
        let (seen, later) = row.split_at_mut(i + 1);
        let extra = extra(i);
        seen.iter_mut().for_each(|x| *x += extra);
        later.fill(0.0);
    }
}

/// y (+)= a b.
pub(crate) fn times(a: Mat<f32>, b: Mat<f32>, y: MatMut<f32>, add: bool) {
    product_here(Operand::new(a), Operand::new(b), y, add);
}

/// y (+)= a bᵀ.
pub(crate) fn times_transposed(a: Mat<f32>, b: Mat<f32>, y: MatMut<f32>, add: bool) {
    product_here(Operand::new(a), Operand::new(b).transposed(), y, add);
}

/// y (+)= aᵀ b.
pub(crate) fn transposed_times(a: Mat<f32>, b: Mat<f32>, y: MatMut<f32>, add: bool) {
    product_here(Operand::new(a).transposed(), Operand::new(b), y, add);
}

fn features(from: Mat<f32>, to: &mut [f32]) {
    let feature = |x: f32| if x > 0.0 { x + 1.0 } else { x.exp() };
    for (i, to) in to.chunks_exact_mut(from.cols()).enumerate() {
        to.iter_mut().zip(from.row(i)).for_each(|(to, x)| *to = feature(*x));
    }
}

/// The state moves on by a chunk.
pub(crate) fn advance(kind: Kind, k: Mat<f32>, v: Mat<f32>, state: &mut [f32]) {
    let d = v.cols();
    let (s, sum) = state.split_at_mut(d * d);
    transposed_times(k, v, mat_mut(s, d), true);
    match kind {
        Kind::Plain => {}
        Kind::Biased => (0..v.rows()).for_each(|i| axpy(sum, 1.0, v.row(i))),
        Kind::Normalised => (0..k.rows()).for_each(|i| axpy(sum, 1.0, k.row(i))),
    }
}

/// Sums of one chunk, without the normaliser's division: `a` becomes the masked products. The state stays.
pub(crate) fn read(kind: Kind, [q, k, v]: [Mat<f32>; 3], state: &[f32], a: &mut [f32], mut o: MatMut<f32>) {
    let d = v.cols();
    let (s, sum) = state.split_at(d * d);
    masked(q, k, a, |_| one(kind));
    times(mat(a, q.rows()), v, o.reborrow(), false);
    times(q, mat(s, d), o.reborrow(), true);
    if kind == Kind::Biased {
        (0..o.rows()).for_each(|i| axpy(o.row_mut(i), 1.0, sum));
    }
}

/// One head of one sequence.
pub(crate) fn forward(kind: Kind, qkv: [Mat<'_, f32>; 3], state: &mut [f32], mut o: MatMut<'_, f32>, scratch: &mut [f32]) {
    let (n, d) = (qkv[0].rows(), qkv[0].cols());
    let (a, rest) = scratch.split_at_mut(CHUNK * CHUNK);
    let (qf, kf) = rest.split_at_mut(CHUNK * d);
    for at in (0..n).step_by(CHUNK) {
        let c = CHUNK.min(n - at);
        let [mut q, mut k, v] = qkv.map(|m| m.row_range(at..at + c));
        let mut o = o.reborrow().row_range(at..at + c);
        if c < FEW {
            super::reference::forward(kind, [q, k, v], state, o, &mut []);
            continue;
        }
        if kind == Kind::Normalised {
            features(q, &mut qf[..c * d]);
            features(k, &mut kf[..c * d]);
            (q, k) = (mat(&qf[..c * d], c), mat(&kf[..c * d], c));
        }
        let a = &mut a[..c * c];
        read(kind, [q, k, v], state, a, o.reborrow());
        if kind == Kind::Normalised {
            for i in 0..c {
                let scale = 1.0 / total(q.row(i), &state[d * d..], &a[i * c..][..c]);
                o.row_mut(i).iter_mut().for_each(|o| *o *= scale);
            }
        }
        advance(kind, k, v, state);
    }
}

/// Sum of a token's weights: those of its chunk, and those before it.
fn total(q: &[f32], sum: &[f32], weights: &[f32]) -> f32 {
    dot(q, sum) + weights.iter().sum::<f32>() + EPS as f32
}

/// What the kinds without a normaliser have in place of its gradient.
const NONE: &[f32] = &[];

/// dq of one chunk: `b` becomes the masked products of dout and v. The state is that before the chunk.
pub(crate) fn backward_q([k, v]: [Mat<f32>; 2], dout: Mat<f32>, dtotal: &[f32], state: &[f32], b: &mut [f32], mut dq: MatMut<f32>) {
    let d = v.cols();
    let (s, sum) = state.split_at(d * d);
    masked(dout, v, b, |i| dtotal.get(i).copied().unwrap_or(0.0));
    times(mat(b, k.rows()), k, dq.reborrow(), false);
    times_transposed(dout, mat(s, d), dq.reborrow(), true);
    for (i, dtotal) in dtotal.iter().enumerate() {
        axpy(dq.row_mut(i), *dtotal, sum);
    }
}

/// dk and dv of one chunk, and `dstate`, the gradient of the state after it, becomes that of the state before it. `a` and `b` are
/// scratch.
pub(crate) fn backward_kv(
    kind: Kind,
    [q, k, v]: [Mat<f32>; 3],
    dout: Mat<f32>,
    dtotal: &[f32],
    dstate: &mut [f32],
    [a, b]: [&mut [f32]; 2],
    [mut dk, mut dv]: [MatMut<f32>; 2],
) {
    let (c, d) = (v.rows(), v.cols());
    let (ds, dsum) = dstate.split_at_mut(d * d);
    masked(q, k, a, |_| one(kind));
    masked(dout, v, b, |i| dtotal.get(i).copied().unwrap_or(0.0));
    transposed_times(mat(b, c), q, dk.reborrow(), false);
    times_transposed(v, mat(ds, d), dk.reborrow(), true);
    transposed_times(mat(a, c), dout, dv.reborrow(), false);
    times(k, mat(ds, d), dv.reborrow(), true);
    for i in 0..c {
        match kind {
            Kind::Plain => {}
            Kind::Biased => axpy(dv.row_mut(i), 1.0, dsum),
            Kind::Normalised => axpy(dk.row_mut(i), 1.0, dsum),
        }
    }
    transposed_times(q, dout, mat_mut(ds, d), true);
    match kind {
        Kind::Plain => {}
        Kind::Biased => (0..c).for_each(|i| axpy(dsum, 1.0, dout.row(i))),
        Kind::Normalised => (0..c).for_each(|i| axpy(dsum, dtotal[i], q.row(i))),
    }
}

/// The gradients of [`forward`]: dq in a walk forward, which knows the state, dk and dv in one back, which knows its gradient.
pub(super) fn backward(
    kind: Kind,
    [q, k, v]: [Mat<'_, f32>; 3],
    start: &[f32],
    dout: Mat<'_, f32>,
    dstate: &mut [f32],
    [mut dq, mut dk, mut dv]: [MatMut<'_, f32>; 3],
    scratch: &mut [f32],
) {
    let (n, d) = (q.rows(), q.cols());
    let own = if kind == Kind::Normalised { n * d } else { 0 };
    let (a, rest) = scratch.split_at_mut(CHUNK * CHUNK);
    let (b, rest) = rest.split_at_mut(CHUNK * CHUNK);
    let (state, rest) = rest.split_at_mut(d * d + d);
    let (qf, rest) = rest.split_at_mut(own);
    let (kf, rest) = rest.split_at_mut(own);
    let (dnum, rest) = rest.split_at_mut(own);
    let normalised = kind == Kind::Normalised;
    let (dtotal, rest) = rest.split_at_mut(if normalised { n } else { 0 });
    state.copy_from_slice(start);
    if normalised {
        features(q, qf);
        features(k, kf);
    }
    let (qf, kf) = (&*qf, &*kf);
    let chunks = || (0..n).step_by(CHUNK).map(|at| at..(at + CHUNK).min(n));

    for r in chunks() {
        let c = r.len();
        let v = v.row_range(r.clone());
        let [q, k] =
            [(q, qf), (k, kf)].map(|(m, f)| if normalised { mat(&f[r.start * d..r.end * d], c) } else { m.row_range(r.clone()) });
        let dq = dq.reborrow().row_range(r.clone());
        if normalised {
            let num = &mut rest[..c * d];
            read(kind, [q, k, v], state, &mut a[..c * c], mat_mut(num, c));
            for i in 0..c {
                let total = total(q.row(i), &state[d * d..], &a[i * c..][..c]);
                let own = &mut dnum[(r.start + i) * d..][..d];
                own.iter_mut().zip(dout.row(r.start + i)).for_each(|(dnum, dout)| *dnum = dout / total);
                dtotal[r.start + i] = -dot(own, &num[i * d..][..d]) / total;
            }
            let (dnum, dtotal) = (mat(&dnum[r.start * d..r.end * d], c), &dtotal[r.clone()]);
            backward_q([k, v], dnum, dtotal, state, &mut b[..c * c], dq);
        } else {
            backward_q([k, v], dout.row_range(r.clone()), NONE, state, &mut b[..c * c], dq);
        }
        advance(kind, k, v, state);
    }
    for r in chunks().rev() {
        let c = r.len();
        let v = v.row_range(r.clone());
        let [q, k] =
            [(q, qf), (k, kf)].map(|(m, f)| if normalised { mat(&f[r.start * d..r.end * d], c) } else { m.row_range(r.clone()) });
        let (dout, dtotal) = match normalised {
            true => (mat(&dnum[r.start * d..r.end * d], c), &dtotal[r.clone()]),
            false => (dout.row_range(r.clone()), NONE),
        };
        let [dk, dv] = [dk.reborrow(), dv.reborrow()].map(|m| m.row_range(r.clone()));
        backward_kv(kind, [q, k, v], dout, dtotal, dstate, [&mut a[..c * c], &mut b[..c * c]], [dk, dv]);
    }
    if normalised {
        for i in 0..n {
            for (dx, f) in [(&mut dq, qf), (&mut dk, kf)] {
                dx.row_mut(i).iter_mut().zip(&f[i * d..]).for_each(|(dx, f)| *dx *= f.min(1.0));
            }
        }
    }
}
