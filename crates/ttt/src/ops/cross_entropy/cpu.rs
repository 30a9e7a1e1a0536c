//! f32 on the processor's cores: logits of a chunk of rows at a time, overwritten by their gradient.

use crate::Result;
use crate::device::par::{self, RowsPerUnit};
use crate::device::view::{Mat, MatMut, View};
use crate::device::{Device, WeightView};
use crate::ops::linear::cpu as linear;
use crate::ops::simd::{exp, largest, map, sum, vectorise};
use crate::tensor::{DType, Tensor};

/// Logits of a chunk: 16 MiB, 131 rows of 32000. Half of that packs the head's matrix twice as often (the three products are a
/// fifth slower), twice that gains 3 %.
const CHUNK_LOGITS: usize = 1 << 22;

/// Negative log likelihood of each row.
pub(crate) fn forward(device: &Device, hidden: Mat<f32>, w: WeightView, targets: &[u32]) -> Result<Vec<f64>> {
    let mut nll = vec![0.0; targets.len()];
    let chunk = chunk_rows(w.rows(), targets.len());
    let mut scratch = Tensor::empty(device, &[chunk, w.rows()], DType::F32)?;
    for (c, nll) in nll.chunks_mut(chunk.max(1)).enumerate() {
        let rows = c * chunk..c * chunk + nll.len();
        let mut logits = scratch.view_mut().into_mat().row_range(0..rows.len());
        linear::forward(hidden.row_range(rows.clone()), w, logits.reborrow());
        each_row(logits, nll, &|i, logits, nll| *nll = likelihood(logits, targets[rows.start + i]));
    }
    Ok(nll)
}

/// Writes `dhidden`, adds to `dw`.
pub(crate) fn forward_backward(
    device: &Device,
    hidden: Mat<f32>,
    w: View,
    targets: &[u32],
    weights: &[f64],
    mut dw: MatMut<f32>,
    mut dhidden: MatMut<f32>,
) -> Result<Vec<f64>> {
    let used: Vec<usize> = (0..targets.len()).filter(|&i| weights[i] != 0.0).collect();
    let chunk = chunk_rows(w.rows(), used.len());
    let mut logits = Tensor::empty(device, &[chunk, w.rows()], DType::F32)?;
    // The rows in use are brought together, so that the products see no holes; that copy is small beside the logits.
    let mut gathered = Tensor::empty(device, &[chunk, hidden.cols()], DType::F32)?;
    let mut nll = vec![0.0; targets.len()];
    let mut chunk_nll = vec![0.0; chunk];
    for i in (0..targets.len()).filter(|&i| weights[i] == 0.0) {
        dhidden.row_mut(i).fill(0.0);
    }
    for rows in used.chunks(chunk.max(1)) {
        let mut logits = logits.view_mut().into_mat().row_range(0..rows.len());
        let mut gathered: MatMut<f32> = gathered.view_mut().into_mat().row_range(0..rows.len());
        for (to, &row) in rows.iter().enumerate() {
            gathered.row_mut(to).copy_from_slice(hidden.row(row));
        }
        linear::forward(gathered.as_ref(), w.into(), logits.reborrow());
        each_row(logits.reborrow(), &mut chunk_nll[..rows.len()], &|i, logits, nll| {
            *nll = likelihood_and_gradient(logits, targets[rows[i]], weights[rows[i]]);
        });
        if dw.rows() > 0 {
            linear::backward_weight(logits.as_ref(), gathered.as_ref(), dw.reborrow());
        }
        linear::backward_input(logits.as_ref(), w.as_mat(), gathered.reborrow());
        for (from, &row) in rows.iter().enumerate() {
            dhidden.row_mut(row).copy_from_slice(gathered.row(from));
            nll[row] = chunk_nll[from];
        }
    }
    Ok(nll)
}

fn chunk_rows(vocabulary: usize, rows: usize) -> usize {
    (CHUNK_LOGITS / vocabulary).clamp(1, rows.max(1)).min(rows)
}

fn each_row(logits: MatMut<f32>, nll: &mut [f64], work: &(impl Fn(usize, &mut [f32], &mut f64) + Sync)) {
    let block = par::block_rows(logits.cols());
    let (units, rows) = (nll.len().div_ceil(block), nll.len());
    let parts = (RowsPerUnit { mat: logits, rows: block }, RowsPerUnit { mat: MatMut::new(nll, rows, 1), rows: block });
    par::for_each(units, parts, &|unit, (mut logits, mut nll): (RowsPerUnit<MatMut<f32>>, RowsPerUnit<MatMut<f64>>)| {
        for i in 0..logits.mat.rows() {
            work(unit * block + i, logits.mat.row_mut(i), &mut nll.mat.row_mut(i)[0]);
        }
    });
}

/// Exponentials are added up in f32 this many at a time, and those sums in f64.
const SUM: usize = 4096;

vectorise! {
    fn likelihood<'a>(logits: &'a [f32], target: u32) -> f64 {
        let max = largest(logits);
        let total: f64 = logits.chunks(SUM).map(|logits| sum([logits], |[x]| exp(x - max)) as f64).sum();
        total.ln() + (max - logits[target as usize]) as f64
    }
}

vectorise! {
    /// Overwrites the logits by their gradient.
    fn likelihood_and_gradient<'a>(logits: &'a mut [f32], target: u32, weight: f64) -> f64 {
        let max = largest(logits);
        let below = max - logits[target as usize];
        let mut total = 0.0;
        for logits in logits.chunks_mut(SUM) {
            map(logits, [], |[], x| exp(x - max));
            total += sum([logits], |[x]| x) as f64;
        }
        let scale = (weight / total) as f32;
        map(logits, [], |[], x| x * scale);
        logits[target as usize] -= weight as f32;
        total.ln() + below as f64
    }
}
