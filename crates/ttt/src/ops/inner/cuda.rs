//! Statistics of the inner loop on a GPU.

use super::{FastWeights, Inputs, Saved, drive};
use crate::Result;
use crate::config::Inner;
use crate::device::cuda::Cuda;
use crate::device::cuda::kernels::{Entry, Source};
use crate::ops::ttt_linear::cuda::{stride, with_checkpoints};
use crate::tensor::{DType, Tensor};

/// The kernel.
pub(crate) static SOURCE: Source = Source {
    name: "inner_statistics",
    file: "ops/inner/statistics.cu",
    text: include_str!("statistics.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[Entry { name: "inner_errors", registers: 64 }],
};

/// `Params` of statistics.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    k: u64,
    v: u64,
    gamma: u64,
    beta: u64,
    segments: u64,
    initial: u64,
    start: u64,
    after: u64,
    errors: u64,
    k_stride: u32,
    v_stride: u32,
    heads: u32,
    head_dim: u32,
    mini_batch: u32,
    mini_batches: u32,
    mlp: u32,
    unused: u32,
}

/// Squared errors, as [`drive::statistics`]; the weights that the pass ended with are among those it kept.
pub(crate) fn statistics(
    cuda: &Cuda,
    inner: Inner,
    inputs: &Inputs<'_>,
    saved: &Saved,
    initial: &FastWeights,
) -> Result<Vec<[f64; 3]>> {
    drive::check_state(inputs, initial, inner);
    let (_, heads, d, k) = inputs.sizes();
    assert_eq!(saved.group, 1, "statistics of a pass that kept a state every {} mini-batches", saved.group);
    let (list, checkpoints) = with_checkpoints(inputs.segments, k, 1);
    assert_eq!(saved.states.shape(), [heads * checkpoints, FastWeights::state_len(inner, d)], "what was kept");
    let start = saved.start.as_ref().expect("weights before the pass");
    let full = inputs.segments.iter().map(|s| s.len / k).max().unwrap_or(0);
    let errors = Tensor::empty(inputs.k.device(), &[list.len() * heads * full, 3], DType::F32)?;
    let uploaded = cuda.upload(&list)?;
    let params = Params {
        k: inputs.k.address(),
        v: inputs.v.address(),
        gamma: inputs.gamma.address(),
        beta: inputs.beta.address(),
        segments: uploaded.address(),
        initial: initial.weights().address(),
        start: start.address(),
        after: saved.states.address(),
        errors: errors.address(),
        k_stride: stride(inputs.k),
        v_stride: stride(inputs.v),
        heads: heads as u32,
        head_dim: d as u32,
        mini_batch: k as u32,
        mini_batches: full as u32,
        mlp: u32::from(inner == Inner::Mlp),
        unused: 0,
    };
    let shared = 4 * (6 * d + 32);
    // SAFETY: shapes were checked; a block writes the three errors of its place.
    unsafe {
        let kernel = (inputs.k.dtype(), "inner_errors");
        cuda.launch_with(&SOURCE, kernel, [list.len() * heads * full, 1, 1], 128, shared, &params);
    }
    let mut sums = vec![[0.0; 3]; full];
    for (i, errors) in errors.to_f64_vec().chunks_exact(3).enumerate() {
        sums[i % full].iter_mut().zip(errors).for_each(|(sum, error)| *sum += error);
    }
    drive::average(&mut sums, inputs);
    Ok(sums)
}
