//! On a GPU: logits of a chunk of rows at a time, read once, overwritten by their gradient. Likelihoods alone are computed from
//! f32 logits, the loss of training from logits in the type of the activations.

use crate::Result;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, width};
use crate::device::memory::Buffer;
use crate::device::view::{View, ViewMut};
use crate::ops::{add, linear};
use crate::tensor::{DType, Tensor};

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "cross_entropy",
    file: "ops/cross_entropy/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "likelihood1", registers: 64 },
        Entry { name: "likelihood8", registers: 64 },
        Entry { name: "gradient1", registers: 64 },
        Entry { name: "gradient8", registers: 64 },
    ],
};

/// Threads of a row.
const THREADS: usize = 512;
/// Bytes of the logits of a chunk: 4096 rows of 32000 in bf16.
const CHUNK_BYTES: usize = 256 << 20;

/// Rows of a chunk of logits.
pub(crate) fn chunk_rows(vocabulary: usize, dtype: DType, rows: usize) -> usize {
    (CHUNK_BYTES / (vocabulary * dtype.size())).clamp(1, 8192).min(rows.max(1))
}

/// Negative log likelihood of each row.
pub(crate) fn forward(cuda: &Cuda, hidden: View, w: View, targets: &[u32]) -> Result<Vec<f64>> {
    let (n, device) = (targets.len(), hidden.device());
    let chunk = chunk_rows(w.rows(), DType::F32, n);
    let mut scratch = Tensor::empty(device, &[chunk, w.rows()], DType::F32)?;
    let nll = Tensor::empty(device, &[n], DType::F32)?;
    let targets = cuda.upload(targets)?;
    for first in (0..n).step_by(chunk) {
        let rows = chunk.min(n - first);
        let logits = scratch.view_mut().row_range(0..rows);
        linear::cuda::forward(cuda, hidden.row_range(first..first + rows), w, &logits);
        let wide = width(&[logits.as_view()]);
        let kernel = if wide == 8 { "likelihood8" } else { "likelihood1" };
        let at = 4 * first as u64;
        let list = args![logits.as_view().address(), targets.address() + at, 0u64, nll.address() + at, w.rows()];
        // SAFETY: a block for each row of `logits`, whose targets are below v (checked by the caller) and whose nll follow.
        unsafe { cuda.launch(&SOURCE, (hidden.dtype(), kernel), [rows, 1, 1], THREADS, 0, list) };
    }
    Ok(nll.to_f64_vec())
}

/// Likelihoods of the rows that count, and their weights, which lie in the GPU's memory.
pub(crate) struct Counted {
    rows: Vec<u32>,
    pub(crate) nll: Tensor,
    pub(crate) weights: Buffer,
}

impl Counted {
    /// Those of all of `n` rows; waits for them.
    pub(crate) fn read(&self, n: usize) -> Vec<f64> {
        let mut all = vec![0.0; n];
        for (i, nll) in self.rows.iter().zip(self.nll.to_f64_vec()) {
            all[*i as usize] = nll;
        }
        all
    }
}

/// Writes `dhidden`, adds to `dw`.
pub(crate) fn forward_backward(
    cuda: &Cuda,
    hidden: View,
    w: View,
    targets: &[u32],
    weights: &[f64],
    dw: &ViewMut,
    dhidden: &mut Tensor,
) -> Result<Counted> {
    let (device, dtype) = (hidden.device(), hidden.dtype());
    let used: Vec<u32> = (0..targets.len() as u32).filter(|i| weights[*i as usize] != 0.0).collect();
    let all = used.len() == targets.len();
    let used_targets: Vec<u32> = used.iter().map(|i| targets[*i as usize]).collect();
    let used_weights: Vec<f32> = used.iter().map(|i| weights[*i as usize] as f32).collect();
    let target_list = cuda.upload(&used_targets)?;
    let weight_list = cuda.upload(&used_weights)?;
    let chunk = chunk_rows(w.rows(), dtype, used.len());
    let mut scratch = Tensor::empty(device, &[chunk, w.rows()], dtype)?;
    let nll = Tensor::empty(device, &[used.len()], DType::F32)?;
    // The rows in use are brought together, so that the products see no holes.
    let mut gathered = if all { None } else { Some(Tensor::empty(device, &[chunk, hidden.cols()], dtype)?) };
    if !all {
        dhidden.fill_zero();
    }
    for first in (0..used.len()).step_by(chunk) {
        let rows = chunk.min(used.len() - first);
        let named = &used[first..first + rows];
        if let Some(gathered) = &mut gathered {
            add::cuda::rows(cuda, &gathered.view_mut().row_range(0..rows), hidden, named, false)?;
        }
        let logits = scratch.view_mut().row_range(0..rows);
        let input = match &gathered {
            Some(gathered) => gathered.view().row_range(0..rows),
            None => hidden.row_range(first..first + rows),
        };
        linear::cuda::forward(cuda, input, w, &logits);
        let kernel = if width(&[logits.as_view()]) == 8 { "gradient8" } else { "gradient1" };
        let at = 4 * first as u64;
        let list =
            args![logits.as_view().address(), target_list.address() + at, weight_list.address() + at, nll.address() + at, w.rows()];
        // SAFETY: as in `forward`; the weights follow too.
        unsafe { cuda.launch(&SOURCE, (dtype, kernel), [rows, 1, 1], THREADS, 0, list) };
        linear::cuda::backward_weight(cuda, logits.as_view(), input, dw);
        match &mut gathered {
            Some(gathered) => {
                linear::cuda::backward_input(cuda, logits.as_view(), w, &gathered.view_mut().row_range(0..rows));
                add::cuda::rows(cuda, &dhidden.view_mut(), gathered.view().row_range(0..rows), named, true)?;
            }
            None => {
                let to = dhidden.view_mut().row_range(first..first + rows);
                linear::cuda::backward_input(cuda, logits.as_view(), w, &to);
            }
        }
    }
    Ok(Counted { rows: used, nll, weights: weight_list })
}
