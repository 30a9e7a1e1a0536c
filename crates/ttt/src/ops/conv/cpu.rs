//! f32 on the processor's cores: blocks of rows in parallel, vector code along the channels.
//!
//! Weights are transposed to `[taps, c]` first (a few kilobytes). Windows move on as in the reference: they are three rows.

use std::ops::Range;

use crate::Result;
use crate::batch::Segment;
use crate::device::Device;
use crate::device::par::{self, RowsPerUnit};
use crate::device::view::{Mat, MatMut};
use crate::ops::partials;
use crate::ops::segments::within;
use crate::ops::simd::{map, vectorise};
use crate::tensor::{DType, Tensor};

/// What the convolution reads: `[n, c]`, and what lies before each segment.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) x: Mat<'a, f32>,
    pub(super) segments: &'a [Segment],
    /// `[slots · (taps − 1), c]`.
    pub(super) window: Option<Mat<'a, f32>>,
}

/// Writes `y`.
pub(super) fn forward(device: &Device, inputs: Inputs, w: Mat<f32>, bias: Mat<f32>, y: MatMut<f32>) -> Result<()> {
    let taps = taps_and_zeros(device, w)?;
    let block = par::block_rows(w.rows());
    par::for_row_blocks(y, block, |first, y| forward_rows(inputs, taps.view().as_mat(), bias.row(0), first, y));
    Ok(())
}

/// Writes `dx`, adds to `dw` and `dbias`.
pub(super) fn backward(
    device: &Device,
    dy: Mat<f32>,
    inputs: Inputs,
    w: Mat<f32>,
    mut dw: MatMut<f32>,
    mut dbias: MatMut<f32>,
    dx: MatMut<f32>,
) -> Result<()> {
    let (channels, taps) = (w.rows(), w.cols());
    let weights = taps_and_zeros(device, w)?;
    let block = partials::block_rows(dy.rows(), channels);
    let units = dy.rows().div_ceil(block);
    // Of each block [dw, tap by tap | dbias].
    let mut sums = Tensor::zeros(device, &[units, (taps + 1) * channels], DType::F32)?;
    let parts = (RowsPerUnit { mat: dx, rows: block }, RowsPerUnit { mat: sums.view_mut().into_mat(), rows: 1 });
    par::for_each(units, parts, &|unit, (dx, mut sums): (RowsPerUnit<MatMut<f32>>, RowsPerUnit<MatMut<f32>>)| {
        let weights = weights.view().as_mat();
        backward_rows(dy, inputs, weights, unit * block, dx.mat, sums.mat.row_mut(0));
    });
    let mut total = Tensor::zeros(device, &[taps, channels], DType::F32)?;
    partials::add_up(sums.view().as_mat(), 0..taps * channels, total.as_mut_slice());
    let total = total.view().as_mat::<f32>();
    for c in 0..channels {
        for (tap, dw) in dw.row_mut(c).iter_mut().enumerate() {
            *dw += total.row(tap)[c];
        }
    }
    partials::add_up(sums.view().as_mat(), taps * channels..(taps + 1) * channels, dbias.row_mut(0));
    Ok(())
}

/// `[taps + 1, c]`: the weights of each tap, then a row of zeros for taps that meet nothing.
fn taps_and_zeros(device: &Device, w: Mat<f32>) -> Result<Tensor> {
    let mut out = Tensor::zeros(device, &[w.cols() + 1, w.rows()], DType::F32)?;
    let mut rows = out.view_mut().into_mat::<f32>();
    for tap in 0..w.cols() {
        for (c, out) in rows.row_mut(tap).iter_mut().enumerate() {
            *out = w.row(c)[tap];
        }
    }
    Ok(out)
}

impl<'a> Inputs<'a> {
    /// What tap `tap` meets at token `t`.
    #[inline(always)]
    fn at(&self, segment: &Segment, t: usize, tap: usize, memory: usize, zeros: &'a [f32]) -> &'a [f32] {
        match ((t + tap).checked_sub(memory), self.window) {
            (Some(t), _) => self.x.row(segment.first_row + t),
            (None, Some(window)) => window.row(segment.slot * memory + t + tap),
            (None, None) => zeros,
        }
    }
}

/// Channels that are carried through the tokens of a block at a time, their sums and the last inputs in registers: a cache line.
const LANES: usize = 16;

/// The usual number of taps, whose code keeps everything in registers.
const TAPS: usize = 4;

vectorise! {
    fn forward_rows<'a>(inputs: Inputs<'a>, w: Mat<'a, f32>, bias: &'a [f32], first: usize, y: MatMut<'a, f32>) {
        let mut y = y;
        let taps = w.rows() - 1;
        for (segment, tokens) in within(inputs.segments, first..first + y.rows()) {
            for t in tokens {
                let y = y.row_mut(segment.first_row + t - first);
                let input = |tap| inputs.at(segment, t, tap, taps - 1, w.row(taps));
                if taps == TAPS {
                    let x = [input(0), input(1), input(2), input(3)];
                    let rows = [bias, x[0], x[1], x[2], x[3], w.row(0), w.row(1), w.row(2), w.row(3)];
                    map(y, rows, |[y, a, b, c, d, v0, v1, v2, v3], _| y + a * v0 + b * v1 + c * v2 + d * v3);
                } else {
                    y.copy_from_slice(bias);
                    for tap in 0..taps {
                        map(y, [input(tap), w.row(tap)], |[x, w], y| y + x * w);
                    }
                }
            }
        }
    }
}

vectorise! {
    /// `sums` is `[dw, tap by tap | dbias]`.
    fn backward_rows<'a>(
        dy: Mat<'a, f32>,
        inputs: Inputs<'a>,
        w: Mat<'a, f32>,
        first: usize,
        dx: MatMut<'a, f32>,
        sums: &'a mut [f32],
    ) {
        let (mut dx, channels) = (dx, w.cols());
        let whole = channels / LANES * LANES;
        for (segment, tokens) in within(inputs.segments, first..first + dx.rows()) {
            let block = Block { dy, inputs, w, segment, tokens, first };
            if w.rows() - 1 == TAPS {
                for c in (0..whole).step_by(LANES) {
                    block.columns::<LANES>(c, &mut dx, sums);
                }
                for c in whole..channels {
                    block.columns::<1>(c, &mut dx, sums);
                }
            } else {
                block.rows(&mut dx, sums);
            }
        }
    }
}

/// Tokens of one segment, the gradient of whose outputs goes back.
struct Block<'a> {
    dy: Mat<'a, f32>,
    inputs: Inputs<'a>,
    /// `[taps + 1, c]`, the last row zeros.
    w: Mat<'a, f32>,
    segment: &'a Segment,
    tokens: Range<usize>,
    /// The row that `dx` begins with.
    first: usize,
}

impl<'a> Block<'a> {
    /// Input `t` was met by tap `tap` at this token, which may lie behind the segment's end.
    #[inline(always)]
    fn dy_at(&self, t: usize, tap: usize) -> &'a [f32] {
        let (taps, later) = (self.w.rows() - 1, t + self.w.rows() - 2 - tap);
        if later < self.segment.len { self.dy.row(self.segment.first_row + later) } else { self.w.row(taps) }
    }

    #[inline(always)]
    fn input(&self, t: usize, tap: usize) -> &'a [f32] {
        let taps = self.w.rows() - 1;
        self.inputs.at(self.segment, t, tap, taps - 1, self.w.row(taps))
    }

    /// Channels `c..c + C` of four taps: each row is read once, the windows over dy and x move on in registers.
    #[inline(always)]
    fn columns<const C: usize>(&self, c: usize, dx: &mut MatMut<f32>, sums: &mut [f32]) {
        let channels = self.w.cols();
        let mut w = [[0.0; C]; TAPS];
        for (tap, w) in w.iter_mut().enumerate() {
            *w = part(self.w.row(tap), c);
        }
        let mut totals = [[0.0; C]; TAPS + 1];
        for (tap, total) in totals.iter_mut().enumerate() {
            *total = part(&sums[tap * channels..][..channels], c);
        }
        let from = self.tokens.start;
        // dy of this token and of the next three; x of the three before it and of this one.
        let mut d = [part(self.dy_at(from, 3), c), part(self.dy_at(from, 2), c), part(self.dy_at(from, 1), c), [0.0; C]];
        let mut x = [part(self.input(from, 0), c), part(self.input(from, 1), c), part(self.input(from, 2), c), [0.0; C]];
        for t in self.tokens.clone() {
            d[3] = part(self.dy_at(t, 0), c);
            x[3] = part(self.input(t, 3), c);
            let dx = &mut dx.row_mut(self.segment.first_row + t - self.first)[c..c + C];
            for lane in 0..C {
                dx[lane] = d[3][lane] * w[0][lane] + d[2][lane] * w[1][lane] + d[1][lane] * w[2][lane] + d[0][lane] * w[3][lane];
                for tap in 0..TAPS {
                    totals[tap][lane] += d[0][lane] * x[tap][lane];
                }
                totals[TAPS][lane] += d[0][lane];
            }
            d = [d[1], d[2], d[3], [0.0; C]];
            x = [x[1], x[2], x[3], [0.0; C]];
        }
        for (tap, total) in totals.iter().enumerate() {
            sums[tap * channels + c..][..C].copy_from_slice(total);
        }
    }

    /// Any number of taps, row by row.
    #[inline(always)]
    fn rows(&self, dx: &mut MatMut<f32>, sums: &mut [f32]) {
        let (taps, channels) = (self.w.rows() - 1, self.w.cols());
        let (dw, dbias) = sums.split_at_mut(taps * channels);
        for t in self.tokens.clone() {
            let dx = dx.row_mut(self.segment.first_row + t - self.first);
            dx.fill(0.0);
            for tap in 0..taps {
                map(dx, [self.dy_at(t, tap), self.w.row(tap)], |[dy, w], dx| dx + dy * w);
            }
            let dy = self.dy.row(self.segment.first_row + t);
            map(dbias, [dy], |[dy], sum| sum + dy);
            for (tap, dw) in dw.chunks_exact_mut(channels).enumerate() {
                map(dw, [dy, self.input(t, tap)], |[dy, x], sum| sum + dy * x);
            }
        }
    }
}

/// Columns `c..c + C` of a row.
#[inline(always)]
fn part<const C: usize>(row: &[f32], c: usize) -> [f32; C] {
    row[c..c + C].try_into().expect("as many columns")
}
