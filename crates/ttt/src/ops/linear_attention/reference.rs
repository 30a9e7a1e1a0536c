//! The definition: token by token forward, all pairs of tokens backward.
#![allow(clippy::needless_range_loop)] // indices are the notation of the formulas

use super::{EPS, Kind};
use crate::device::view::{Mat, MatMut};
use crate::ops::inner::math::{axpy, dot};
use crate::tensor::Element;

/// φ(x) = elu(x) + 1.
fn feature<E: Element>(x: E) -> E {
    if x > E::ZERO { x + E::ONE } else { x.exp() }
}

fn features<E: Element>(kind: Kind, row: &[E]) -> Vec<E> {
    match kind {
        Kind::Normalised => row.iter().map(|x| feature(*x)).collect(),
        Kind::Plain | Kind::Biased => row.to_vec(),
    }
}

/// x S for S `[d, d]`.
fn read<E: Element>(x: &[E], s: &[E]) -> Vec<E> {
    let mut y = vec![E::ZERO; x.len()];
    for (x, row) in x.iter().zip(s.chunks_exact(x.len())) {
        axpy(&mut y, *x, row);
    }
    y
}

/// x Sᵀ.
fn read_back<E: Element>(x: &[E], s: &[E]) -> Vec<E> {
    s.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

/// One token: the state moves on by it, then o is read for it. Returns the normaliser, 1 where there is none.
fn step<E: Element>(kind: Kind, [q, k]: [&[E]; 2], v: &[E], state: &mut [E], o: &mut [E]) -> E {
    let d = v.len();
    let (s, sum) = state.split_at_mut(d * d);
    for (k, row) in k.iter().zip(s.chunks_exact_mut(d)) {
        axpy(row, *k, v);
    }
    o.copy_from_slice(&read(q, s));
    match kind {
        Kind::Plain => E::ONE,
        Kind::Biased => {
            axpy(sum, E::ONE, v);
            axpy(o, E::ONE, sum);
            E::ONE
        }
        Kind::Normalised => {
            axpy(sum, E::ONE, k);
            let total = dot(q, sum) + E::from_f64(EPS);
            o.iter_mut().for_each(|o| *o = *o / total);
            total
        }
    }
}

/// One head of one sequence.
pub(crate) fn forward<E: Element>(kind: Kind, [q, k, v]: [Mat<'_, E>; 3], state: &mut [E], mut o: MatMut<'_, E>, _: &mut [E]) {
    for t in 0..q.rows() {
        let [q, k] = [q, k].map(|m| features(kind, m.row(t)));
        step(kind, [&q, &k], v.row(t), state, o.row_mut(t));
    }
}

/// Its gradients, from `start`, the state that it began with.
pub(crate) fn backward<E: Element>(
    kind: Kind,
    [q, k, v]: [Mat<'_, E>; 3],
    start: &[E],
    dout: Mat<'_, E>,
    dstate: &mut [E],
    [mut dq, mut dk, mut dv]: [MatMut<'_, E>; 3],
    _: &mut [E],
) {
    let (n, d) = (q.rows(), q.cols());
    let rows = |m: Mat<'_, E>| (0..n).map(|t| features(kind, m.row(t))).collect::<Vec<_>>();
    let (q_features, k_features) = (rows(q), rows(k));
    // With a normaliser o = num / total, so dnum = do / total and dtotal = -do·o / total.
    let (mut state, mut o) = (start.to_vec(), vec![E::ZERO; d]);
    let (mut dnum, mut dtotal) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for t in 0..n {
        let total = step(kind, [&q_features[t], &k_features[t]], v.row(t), &mut state, &mut o);
        dtotal.push(if kind == Kind::Normalised { -(dot(dout.row(t), &o) / total) } else { E::ZERO });
        dnum.push(dout.row(t).iter().map(|x| *x / total).collect::<Vec<_>>());
    }
    let one = if kind == Kind::Biased { E::ONE } else { E::ZERO };
    let (s0, sum0) = start.split_at(d * d);
    let (ds, dsum) = dstate.split_at_mut(d * d);
    for t in 0..n {
        let mut dfeature = read_back(&dnum[t], s0);
        axpy(&mut dfeature, dtotal[t], sum0);
        for j in 0..=t {
            axpy(&mut dfeature, dot(&dnum[t], v.row(j)) + dtotal[t], &k_features[j]);
        }
        chain(kind, &q_features[t], &dfeature, dq.row_mut(t));

        let mut dfeature = read_back(v.row(t), ds);
        let own = dv.row_mut(t);
        own.copy_from_slice(&read(&k_features[t], ds));
        match kind {
            Kind::Plain => {}
            Kind::Biased => axpy(own, E::ONE, dsum),
            Kind::Normalised => axpy(&mut dfeature, E::ONE, dsum),
        }
        for i in t..n {
            axpy(&mut dfeature, dot(&dnum[i], v.row(t)) + dtotal[i], &q_features[i]);
            axpy(own, dot(&q_features[i], &k_features[t]) + one, &dnum[i]);
        }
        chain(kind, &k_features[t], &dfeature, dk.row_mut(t));
    }
    for t in 0..n {
        for (q, row) in q_features[t].iter().zip(ds.chunks_exact_mut(d)) {
            axpy(row, *q, &dnum[t]);
        }
        axpy(dsum, one, &dnum[t]);
        axpy(dsum, dtotal[t], &q_features[t]);
    }
}

/// Through φ: its slope is 1 above 0 and φ itself below, so the smaller of both.
fn chain<E: Element>(kind: Kind, features: &[E], dfeature: &[E], dx: &mut [E]) {
    for ((dx, d), f) in dx.iter_mut().zip(dfeature).zip(features) {
        let slope = if kind != Kind::Normalised || *f > E::ONE { E::ONE } else { *f };
        *dx = *d * slope;
    }
}
