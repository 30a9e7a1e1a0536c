//! Few queries of each sequence, as in decoding: bound by reading the keys and values, so every unit of work reads rows that lie
//! one behind the other, all heads of them, once. A long past is read in spans by several threads; what the spans found is
//! brought together in their order.

use rayon::prelude::*;

use super::super::Inputs;
use super::scale;
use crate::batch::Segment;
use crate::device::view::{Mat, MatMut};
use crate::ops::linear::few_rows;
use crate::ops::simd::{self, vectorise};

/// Tokens of a segment, at most.
pub(super) const MOST: usize = 16;

/// Rows of a span, at least: 128 rows of keys and values of 768 channels are 768 KiB, which take tens of microseconds to read.
const SPAN: usize = 128;
/// Spans of a sequence, at most, so that bringing them together costs little.
const SPANS: usize = 64;
/// Rows read for all heads before the next: few enough that each of their pages stays open until all of it is read.
const ROWS: usize = 32;

/// Segments with their outputs and `L`.
pub(super) type Few<'a> = Vec<(&'a Segment, MatMut<'a, f32>, MatMut<'a, f32>)>;

/// A span of what the queries of one segment see.
struct Span<'a> {
    segment: &'a Segment,
    /// 0: before the segment, 1: its own.
    part: usize,
    rows: std::ops::Range<usize>,
    /// For each query and head the largest score, the sum of the weights, and the sum of the values, `d + 2` numbers.
    found: &'a mut [f32],
}

/// Writes `o` and `L` of each segment.
pub(super) fn forward(inputs: &Inputs<'_>, few: Few<'_>) {
    let [heads, _] = inputs.heads();
    let width = heads * (inputs.head_dim + 2);
    let plan: Vec<_> = few.iter().map(|(segment, ..)| spans(segment)).collect();
    let numbers = few.iter().zip(&plan).map(|((segment, ..), spans)| segment.len * width * spans.len()).sum();
    let mut found = vec![0.0; numbers];
    let (mut work, mut rest) = (Vec::new(), found.as_mut_slice());
    for ((segment, ..), spans) in few.iter().zip(&plan) {
        for (part, rows) in spans.iter().cloned() {
            let own;
            (own, rest) = rest.split_at_mut(segment.len * width);
            work.push(Span { segment, part, rows, found: own });
        }
    }
    work.into_par_iter().for_each_init(|| vec![0.0; heads * ROWS], |scores, span| read(inputs, span, scores));

    let mut found = found.as_slice();
    for ((segment, mut o, mut log_sum), spans) in few.into_iter().zip(plan) {
        let own;
        (own, found) = found.split_at(segment.len * width * spans.len());
        for t in 0..segment.len {
            for head in 0..heads {
                let at =
                    |span: usize| &own[(span * segment.len + t) * width + head * (inputs.head_dim + 2)..][..inputs.head_dim + 2];
                let o = &mut o.row_mut(t)[head * inputs.head_dim..(head + 1) * inputs.head_dim];
                log_sum.row_mut(t)[head] = bring_together((0..spans.len()).map(at), o);
            }
        }
    }
}

/// Parts and rows of the spans of a segment: of what came before it, and its own rows.
fn spans(segment: &Segment) -> Vec<(usize, std::ops::Range<usize>)> {
    let span = SPAN.max(segment.phase.div_ceil(SPANS));
    let mut all: Vec<_> = (0..segment.phase).step_by(span).map(|start| (0, start..segment.phase.min(start + span))).collect();
    all.push((1, 0..segment.len));
    all
}

/// Writes the output of one query and head; returns its L.
fn bring_together<'f>(found: impl Iterator<Item = &'f [f32]> + Clone, o: &mut [f32]) -> f32 {
    let top = found.clone().fold(f32::NEG_INFINITY, |top, one| top.max(one[0]));
    let mut sum = 0.0;
    o.fill(0.0);
    for one in found.filter(|one| one[1] > 0.0) {
        let part = (one[0] - top).exp();
        sum += part * one[1];
        o.iter_mut().zip(&one[2..]).for_each(|(o, x)| *o += part * x);
    }
    o.iter_mut().for_each(|o| *o /= sum);
    top + sum.ln()
}

fn read(inputs: &Inputs<'_>, span: Span<'_>, scores: &mut [f32]) {
    let Span { segment, part, rows, found } = span;
    let ([heads, kv_heads], d) = (inputs.heads(), inputs.head_dim);
    let (shared, q) = (heads / kv_heads, inputs.q.as_mat::<f32>());
    let [k, v] = inputs.parts(segment)[part].map(|x| x.as_mat::<f32>());
    found.chunks_exact_mut(d + 2).for_each(|one| {
        one.fill(0.0);
        one[0] = f32::NEG_INFINITY;
    });
    for start in rows.clone().step_by(ROWS) {
        let block = start..rows.end.min(start + ROWS);
        for t in 0..segment.len {
            // Of its own rows a query sees those up to itself.
            let seen = if part == 1 { block.start..block.end.min(t + 1) } else { block.clone() };
            if seen.is_empty() {
                continue;
            }
            let q = q.row(segment.first_row + t);
            let found = &mut found[t * heads * (d + 2)..][..heads * (d + 2)];
            for kv_head in 0..kv_heads {
                let cols = kv_head * d..(kv_head + 1) * d;
                let [k, v] = [k, v].map(|x| x.row_range(seen.clone()).col_range(cols.clone()));
                let q = Mat::new(&q[kv_head * shared * d..(kv_head + 1) * shared * d], shared, d);
                let mut scores = MatMut::new(&mut scores[..shared * seen.len()], shared, seen.len());
                few_rows::product(q, k, scores.reborrow());
                let found = &mut found[kv_head * shared * (d + 2)..][..shared * (d + 2)];
                weigh(scores, v, scale(q), found);
            }
        }
    }
}

vectorise! {
    /// Adds values, weighted by their scores, to what was found.
    fn weigh<'a>(scores: MatMut<'a, f32>, v: Mat<'a, f32>, scale: f32, found: &'a mut [f32]) {
        let mut scores = scores;
        for (i, found) in found.chunks_exact_mut(v.cols() + 2).enumerate() {
            let row = scores.row_mut(i);
            let (sums, values) = found.split_at_mut(2);
            let top = sums[0].max(simd::largest(row) * scale);
            let before = if sums[1] == 0.0 { 0.0 } else { simd::exp(sums[0] - top) };
            simd::map(row, [], |[], score| simd::exp(score * scale - top));
            sums[1] = sums[1] * before + simd::sum([&*row], |[p]| p);
            sums[0] = top;
            simd::map(values, [], |[], x| x * before);
            // Four rows at a time, so that the sums are loaded and stored for every fourth alone.
            let whole = row.len() / 4 * 4;
            for s in (0..whole).step_by(4) {
                let p = [row[s], row[s + 1], row[s + 2], row[s + 3]];
                let rows = [v.row(s), v.row(s + 1), v.row(s + 2), v.row(s + 3)];
                simd::map(values, rows, |x, sum| sum + (x[0] * p[0] + x[1] * p[1]) + (x[2] * p[2] + x[3] * p[3]));
            }
            for (s, p) in row.iter().enumerate().skip(whole) {
                simd::map(values, [v.row(s)], |[x], sum| sum + x * p);
            }
        }
    }
}
