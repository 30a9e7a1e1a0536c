//! f32 on the processor's cores: blocks of [`ROWS`] queries of one head against blocks of [`KEYS`] keys, with the softmax carried
//! from block to block; few queries, as in decoding, stream the keys and values instead ([`few_rows`]).

mod few_rows;

use rayon::prelude::*;

use super::{DPast, Inputs};
use crate::batch::Segment;
use crate::device::view::{Mat, MatMut, View, ViewMut};
use crate::ops::linear::cpu::{Operand, product_here};
use crate::ops::simd::{self, vectorise};

/// Queries of a block.
const ROWS: usize = 64;
/// Keys of a block, a multiple of [`ROWS`] so that no block begins behind the first query of one that it meets. Scores of 64 x 128
/// and their gradients are 64 KiB: they stay in the second-level cache beside keys and values.
const KEYS: usize = 128;

/// Keys and values of one head, those before the segment and its own.
type Parts<'a> = [[Mat<'a, f32>; 2]; 2];

fn parts<'a>(inputs: &Inputs<'a>, segment: &Segment, kv_head: usize) -> Parts<'a> {
    let cols = kv_head * inputs.head_dim..(kv_head + 1) * inputs.head_dim;
    inputs.parts(segment).map(|part| part.map(|x| x.as_mat().col_range(cols.clone())))
}

/// Keys of each part that a block of queries which ends before token `end` of its segment sees.
fn seen(parts: &Parts<'_>, end: usize) -> [usize; 2] {
    [parts[0][0].rows(), end]
}

/// A block of queries of one head.
struct Task<'a> {
    segment: &'a Segment,
    /// Token of the segment that the block begins with.
    first: usize,
    head: usize,
    o: MatMut<'a, f32>,
    log_sum: MatMut<'a, f32>,
}

/// Writes `o` and `L`.
pub(super) fn forward(inputs: &Inputs<'_>, mut o: MatMut<f32>, mut log_sum: MatMut<f32>) {
    let [heads, kv_heads] = inputs.heads();
    let (d, q) = (inputs.head_dim, inputs.q.as_mat::<f32>());
    let (mut tasks, mut few) = (Vec::new(), Vec::new());
    for segment in inputs.segments {
        if segment.len <= few_rows::MOST {
            let (own_o, own_log_sum);
            ((own_o, o), (own_log_sum, log_sum)) = (o.split_rows(segment.len), log_sum.split_rows(segment.len));
            few.push((segment, own_o, own_log_sum));
            continue;
        }
        for first in (0..segment.len).step_by(ROWS) {
            let rows = ROWS.min(segment.len - first);
            let (mut own_o, mut own_log_sum);
            ((own_o, o), (own_log_sum, log_sum)) = (o.split_rows(rows), log_sum.split_rows(rows));
            for head in 0..heads {
                let (of_head, sums);
                ((of_head, own_o), (sums, own_log_sum)) = (own_o.split_cols(d), own_log_sum.split_cols(1));
                tasks.push(Task { segment, first, head, o: of_head, log_sum: sums });
            }
        }
    }
    few_rows::forward(inputs, few);
    tasks.into_par_iter().for_each_init(
        || vec![0.0; ROWS * KEYS],
        |scratch, task| {
            let rows = task.segment.first_row + task.first..task.segment.first_row + task.first + task.o.rows();
            let q = q.row_range(rows).col_range(task.head * d..(task.head + 1) * d);
            attend(q, &parts(inputs, task.segment, task.head / (heads / kv_heads)), task, scratch);
        },
    );
}

fn attend(q: Mat<f32>, parts: &Parts<'_>, task: Task<'_>, scratch: &mut [f32]) {
    let Task { first, mut o, mut log_sum, .. } = task;
    let rows = q.rows();
    let (mut tops, mut sums) = ([f32::NEG_INFINITY; ROWS], [0.0; ROWS]);
    (0..rows).for_each(|i| o.row_mut(i).fill(0.0));
    for (own, ([k, v], end)) in parts.iter().zip(seen(parts, first + rows)).enumerate() {
        for start in (0..end).step_by(KEYS) {
            let keys = start..end.min(start + KEYS);
            let valid = if own == 1 { first - start + 1 } else { keys.len() };
            let mut scores = MatMut::new(&mut scratch[..rows * keys.len()], rows, keys.len());
            product_here(Operand::new(q), Operand::new(k.row_range(keys.clone())).transposed(), scores.reborrow(), false);
            soften(scores.reborrow(), valid, scale(q), &mut tops, &mut sums, o.reborrow());
            product_here(Operand::new(scores.as_ref()), Operand::new(v.row_range(keys)), o.reborrow(), true);
        }
    }
    for i in 0..rows {
        let inverse = 1.0 / sums[i];
        o.row_mut(i).iter_mut().for_each(|o| *o *= inverse);
        log_sum.row_mut(i)[0] = tops[i] + sums[i].ln();
    }
}

/// 1 / √d.
fn scale(q: Mat<f32>) -> f32 {
    1.0 / (q.cols() as f32).sqrt()
}

vectorise! {
    /// Turns scores into weights relative to each row's largest score so far, and brings what was summed up before to the same
    /// measure. Row i sees its first `valid + i` keys; the weights of the others are 0.
    fn soften<'a>(
        scores: MatMut<'a, f32>,
        valid: usize,
        scale: f32,
        tops: &'a mut [f32; ROWS],
        sums: &'a mut [f32; ROWS],
        o: MatMut<'a, f32>,
    ) {
        let (mut scores, mut o) = (scores, o);
        for i in 0..scores.rows() {
            let row = scores.row_mut(i);
            let seen = row.len().min(valid + i);
            let (row, hidden) = row.split_at_mut(seen);
            hidden.fill(0.0);
            let top = tops[i].max(simd::largest(row) * scale);
            let before = if sums[i] == 0.0 { 0.0 } else { simd::exp(tops[i] - top) };
            simd::map(row, [], |[], score| simd::exp(score * scale - top));
            sums[i] = sums[i] * before + simd::sum([&*row], |[p]| p);
            tops[i] = top;
            simd::map(o.row_mut(i), [], |[], o| o * before);
        }
    }
}

/// The gradients of one segment and one head of keys and values.
struct Group<'a> {
    segment: &'a Segment,
    kv_head: usize,
    /// Of its heads of queries, `[len, (h / g)·d]`.
    dq: MatMut<'a, f32>,
    /// Of keys and values: those before the segment, if they get any, and its own.
    dkv: [Option<[MatMut<'a, f32>; 2]>; 2],
}

/// Writes `dq`, and adds to `dk`, `dv` and what came before. Each unit of work has gradients of its own, summed up in order.
pub(super) fn backward(
    inputs: &Inputs<'_>,
    [o, log_sum, dout]: [View; 3],
    dpast: Option<[DPast; 2]>,
    dq: ViewMut,
    dkv: [ViewMut; 2],
) {
    let [heads, kv_heads] = inputs.heads();
    let d = inputs.head_dim;
    let mut past = dpast.map(|dpast| dpast.map(|(capacity, x)| by_slot(x.into_mat::<f32>(), capacity)));
    let (mut dq, [mut dk, mut dv]) = (dq.into_mat::<f32>(), dkv.map(|x| x.into_mat::<f32>()));
    let mut groups = Vec::new();
    for segment in inputs.segments {
        let (mut own_q, mut own_k, mut own_v);
        (own_q, dq) = dq.split_rows(segment.len);
        ((own_k, dk), (own_v, dv)) = (dk.split_rows(segment.len), dv.split_rows(segment.len));
        let mut before = past.as_mut().map(|past| {
            past.each_mut().map(|slots| slots[segment.slot].take().expect("a slot of its own").row_range(0..segment.phase))
        });
        for kv_head in 0..kv_heads {
            let (of_q, of_k, of_v);
            (of_q, own_q) = own_q.split_cols(heads / kv_heads * d);
            ((of_k, own_k), (of_v, own_v)) = (own_k.split_cols(d), own_v.split_cols(d));
            let of_past = before.take().map(|[k, v]| {
                let ((k, rest_k), (v, rest_v)) = (k.split_cols(d), v.split_cols(d));
                before = Some([rest_k, rest_v]);
                [k, v]
            });
            groups.push(Group { segment, kv_head, dq: of_q, dkv: [of_past, Some([of_k, of_v])] });
        }
    }
    let saved = [o.as_mat::<f32>(), log_sum.as_mat(), dout.as_mat()];
    groups.into_par_iter().for_each_init(|| vec![0.0; 2 * ROWS * KEYS], |scratch, group| descend(inputs, saved, group, scratch));
}

/// The rows of each slot.
fn by_slot(mut all: MatMut<'_, f32>, capacity: usize) -> Vec<Option<MatMut<'_, f32>>> {
    let slots = all.rows().checked_div(capacity).unwrap_or(0);
    let mut of_slots = Vec::with_capacity(slots);
    for _ in 0..slots {
        let own;
        (own, all) = all.split_rows(capacity);
        of_slots.push(Some(own));
    }
    of_slots
}

fn descend(inputs: &Inputs<'_>, [o, log_sum, dout]: [Mat<f32>; 3], group: Group<'_>, scratch: &mut [f32]) {
    let Group { segment, kv_head, mut dq, mut dkv } = group;
    let d = inputs.head_dim;
    let parts = parts(inputs, segment, kv_head);
    let (p, ds) = scratch.split_at_mut(ROWS * KEYS);
    for own_head in 0..dq.cols() / d {
        let cols = own_head * d..(own_head + 1) * d;
        let head = kv_head * (dq.cols() / d) + own_head;
        for first in (0..segment.len).step_by(ROWS) {
            let rows = first..segment.len.min(first + ROWS);
            let in_batch = segment.first_row + rows.start..segment.first_row + rows.end;
            let [q, o, dout] =
                [inputs.q.as_mat(), o, dout].map(|x| x.row_range(in_batch.clone()).col_range(head * d..(head + 1) * d));
            let log_sum = log_sum.row_range(in_batch).col_range(head..head + 1);
            let mut dq = dq.reborrow().row_range(rows.clone()).col_range(cols.clone());
            (0..rows.len()).for_each(|i| dq.row_mut(i).fill(0.0));
            let ends = seen(&parts, rows.end);
            for (own, (([k, v], end), dkv)) in parts.iter().zip(ends).zip(&mut dkv).enumerate() {
                for start in (0..end).step_by(KEYS) {
                    let keys = start..end.min(start + KEYS);
                    let valid = if own == 1 { first - start + 1 } else { keys.len() };
                    let size = [rows.len(), keys.len()];
                    let [mut p, mut ds] = [&mut *p, &mut *ds].map(|x| MatMut::new(&mut x[..size[0] * size[1]], size[0], size[1]));
                    let (k, v) = (k.row_range(keys.clone()), v.row_range(keys.clone()));
                    product_here(Operand::new(q), Operand::new(k).transposed(), p.reborrow(), false);
                    product_here(Operand::new(dout), Operand::new(v).transposed(), ds.reborrow(), false);
                    harden(p.reborrow(), ds.reborrow(), valid, scale(q), log_sum, o, dout);
                    if let Some([dk, dv]) = dkv {
                        let (dk, dv) = (dk.reborrow().row_range(keys.clone()), dv.reborrow().row_range(keys));
                        product_here(Operand::new(ds.as_ref()).transposed(), Operand::new(q), dk, true);
                        product_here(Operand::new(p.as_ref()).transposed(), Operand::new(dout), dv, true);
                    }
                    product_here(Operand::new(ds.as_ref()), Operand::new(k), dq.reborrow(), true);
                }
            }
        }
    }
}

vectorise! {
    /// Turns scores into weights, and the gradients of the weights into those of the scores.
    fn harden<'a>(
        p: MatMut<'a, f32>,
        ds: MatMut<'a, f32>,
        valid: usize,
        scale: f32,
        log_sum: Mat<'a, f32>,
        o: Mat<'a, f32>,
        dout: Mat<'a, f32>,
    ) {
        let (mut p, mut ds) = (p, ds);
        for i in 0..p.rows() {
            let (p, ds, log_sum) = (p.row_mut(i), ds.row_mut(i), log_sum.row(i)[0]);
            let seen = p.len().min(valid + i);
            let delta = simd::sum([dout.row(i), o.row(i)], |[dout, o]| dout * o);
            let ((p, hidden), (ds, hidden_ds)) = (p.split_at_mut(seen), ds.split_at_mut(seen));
            hidden.fill(0.0);
            hidden_ds.fill(0.0);
            simd::map(p, [], |[], score| simd::exp(score * scale - log_sum));
            simd::map(ds, [&*p], |[p], dp| p * (dp - delta) * scale);
        }
    }
}
