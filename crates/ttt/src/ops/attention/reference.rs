//! The definition, in plain loops.

use super::{DPast, Inputs};
use crate::batch::Segment;
use crate::device::view::{Mat, MatMut, View, ViewMut};
use crate::tensor::Element;

/// Row `s` of one head of the keys or values that a segment attends to, those before it first.
fn row<'a, E>(parts: &[[Mat<'a, E>; 2]; 2], which: usize, s: usize, kv_head: usize, d: usize) -> &'a [E] {
    let before = parts[0][which].rows();
    let all = if s < before { parts[0][which].row(s) } else { parts[1][which].row(s - before) };
    &all[kv_head * d..(kv_head + 1) * d]
}

fn parts<'a, E: Element>(inputs: &Inputs<'a>, segment: &Segment) -> [[Mat<'a, E>; 2]; 2] {
    inputs.parts(segment).map(|part| part.map(|x| x.as_mat()))
}

fn dot<E: Element>(a: &[E], b: &[E]) -> E {
    a.iter().zip(b).fold(E::ZERO, |sum, (a, b)| sum + *a * *b)
}

fn axpy<E: Element>(y: &mut [E], a: E, x: &[E]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * *x);
}

/// Writes `o` and `L`.
pub(super) fn forward<E: Element>(inputs: &Inputs<'_>, mut o: MatMut<E>, mut log_sum: MatMut<E>) {
    let ([heads, kv_heads], d) = (inputs.heads(), inputs.head_dim);
    let scale = E::from_f64(1.0 / (d as f64).sqrt());
    let q = inputs.q.as_mat::<E>();
    for segment in inputs.segments {
        let parts = parts(inputs, segment);
        for t in 0..segment.len {
            let (r, seen) = (segment.first_row + t, segment.phase + t + 1);
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let q = &q.row(r)[head * d..(head + 1) * d];
                let scores: Vec<E> = (0..seen).map(|s| dot(q, row(&parts, 0, s, kv, d)) * scale).collect();
                let top = scores.iter().fold(scores[0], |top, s| top.max(*s));
                let sum = scores.iter().map(|s| (*s - top).exp()).sum::<E>();
                let o = &mut o.row_mut(r)[head * d..(head + 1) * d];
                o.fill(E::ZERO);
                for (s, score) in scores.iter().enumerate() {
                    axpy(o, (*score - top).exp() / sum, row(&parts, 1, s, kv, d));
                }
                log_sum.row_mut(r)[head] = top + sum.ln();
            }
        }
    }
}

/// Writes `dq`, and adds to `dk`, `dv` and what came before.
pub(super) fn backward<E: Element>(
    inputs: &Inputs<'_>,
    [o, log_sum, dout]: [View; 3],
    mut dpast: Option<[DPast; 2]>,
    dq: ViewMut,
    [dk, dv]: [ViewMut; 2],
) {
    let ([heads, kv_heads], d) = (inputs.heads(), inputs.head_dim);
    let scale = E::from_f64(1.0 / (d as f64).sqrt());
    let (q, o, log_sum, dout) = (inputs.q.as_mat::<E>(), o.as_mat::<E>(), log_sum.as_mat::<E>(), dout.as_mat::<E>());
    let mut dq = dq.into_mat::<E>();
    let mut own = [dk.into_mat::<E>(), dv.into_mat::<E>()];
    for segment in inputs.segments {
        let parts = parts(inputs, segment);
        for t in 0..segment.len {
            let (r, seen) = (segment.first_row + t, segment.phase + t + 1);
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let (own_cols, kv_cols) = (head * d..(head + 1) * d, kv * d..(kv + 1) * d);
                let (q, dout) = (&q.row(r)[own_cols.clone()], &dout.row(r)[own_cols.clone()]);
                let delta = dot(dout, &o.row(r)[own_cols.clone()]);
                let dq = &mut dq.row_mut(r)[own_cols];
                dq.fill(E::ZERO);
                for s in 0..seen {
                    let (k, v) = (row(&parts, 0, s, kv, d), row(&parts, 1, s, kv, d));
                    let p = (dot(q, k) * scale - log_sum.row(r)[head]).exp();
                    let ds = p * (dot(dout, v) - delta) * scale;
                    axpy(dq, ds, k);
                    for (which, a, x) in [(0, ds, q), (1, p, dout)] {
                        if s >= segment.phase {
                            let at = segment.first_row + s - segment.phase;
                            axpy(&mut own[which].row_mut(at)[kv_cols.clone()], a, x);
                        } else if let Some(past) = &mut dpast {
                            let (capacity, past) = &mut past[which];
                            axpy(&mut past.as_mat::<E>().row_mut(segment.slot * *capacity + s)[kv_cols.clone()], a, x);
                        }
                    }
                }
            }
        }
    }
}
