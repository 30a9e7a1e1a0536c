//! f32 on the processor's cores: blocks of rows in parallel, vector code along the channels.
//!
//! Weights are transposed to `[taps, c]` first (a few kilobytes). Windows move on as in the reference: they are three rows.

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

/// `y += Σ_tap w[tap] ⊙ inputs[tap]`, four taps (the usual number) in one pass.
#[inline(always)]
fn add_taps<'a>(y: &mut [f32], w: Mat<'a, f32>, taps: usize, input: impl Fn(usize) -> &'a [f32]) {
    let mut tap = 0;
    while tap + 4 <= taps {
        let x = [input(tap), input(tap + 1), input(tap + 2), input(tap + 3)];
        let rows = [x[0], x[1], x[2], x[3], w.row(tap), w.row(tap + 1), w.row(tap + 2), w.row(tap + 3)];
        map(y, rows, |[a, b, c, d, v0, v1, v2, v3], y| y + a * v0 + b * v1 + c * v2 + d * v3);
        tap += 4;
    }
    for tap in tap..taps {
        map(y, [input(tap), w.row(tap)], |[x, w], y| y + x * w);
    }
}

vectorise! {
    fn forward_rows<'a>(inputs: Inputs<'a>, w: Mat<'a, f32>, bias: &'a [f32], first: usize, y: MatMut<'a, f32>) {
        let mut y = y;
        let taps = w.rows() - 1;
        for (segment, tokens) in within(inputs.segments, first..first + y.rows()) {
            for t in tokens {
                let y = y.row_mut(segment.first_row + t - first);
                y.copy_from_slice(bias);
                add_taps(y, w, taps, |tap| inputs.at(segment, t, tap, taps - 1, w.row(taps)));
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
        let mut dx = dx;
        let (taps, channels) = (w.rows() - 1, w.cols());
        let (dw, dbias) = sums.split_at_mut(taps * channels);
        for (segment, tokens) in within(inputs.segments, first..first + dx.rows()) {
            for t in tokens {
                let dx = dx.row_mut(segment.first_row + t - first);
                dx.fill(0.0);
                // Input t was met by tap `taps − 1 − ahead` at token `t + ahead`.
                add_taps(dx, w, taps, |tap| {
                    let later = t + taps - 1 - tap;
                    if later < segment.len { dy.row(segment.first_row + later) } else { w.row(taps) }
                });
                let dy = dy.row(segment.first_row + t);
                map(dbias, [dy], |[dy], sum| sum + dy);
                for (tap, dw) in dw.chunks_exact_mut(channels).enumerate() {
                    let input = inputs.at(segment, t, tap, taps - 1, w.row(taps));
                    map(dw, [dy, input], |[dy, x], sum| sum + dy * x);
                }
            }
        }
    }
}
