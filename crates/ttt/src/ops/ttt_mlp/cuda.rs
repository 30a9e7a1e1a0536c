//! On a GPU: parameters of the kernels, and their launches.

use crate::Result;
use crate::config::Inner;
use crate::device::cuda::kernels::{Entry, HOPPER, Source, architecture};
use crate::device::cuda::{Cuda, width};
use crate::device::view::View;
use crate::ops::inner::{FastWeights, InputGrads, Inputs, ParamGrads, Saved, Variant, drive};
use crate::ops::ttt_linear::cuda::{MAX_MINI_BATCH, plain, reduce, stride, with_checkpoints};
use crate::tensor::{DType, Tensor};

/// The kernels for any head size and mini-batch.
pub(crate) static PLAIN: Source = Source {
    name: "ttt_mlp_plain",
    file: "ops/ttt_mlp/plain.cu",
    text: include_str!("plain.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32],
    kernels: &[
        Entry { name: "ttt_mlp_forward_plain_bf16", registers: 255 },
        Entry { name: "ttt_mlp_forward_plain_f32", registers: 255 },
        Entry { name: "ttt_mlp_backward_plain_bf16", registers: 255 },
        Entry { name: "ttt_mlp_backward_plain_f32", registers: 255 },
    ],
};

/// The forward for bf16, heads of 64 and mini-batches of up to 16.
pub(crate) static FORWARD: Source = Source {
    name: "ttt_mlp_forward_64",
    file: "ops/ttt_mlp/forward.cu",
    text: include_str!("forward.cu"),
    defines: &["HEAD_DIM=64"],
    untuned: &[],
    types: &[DType::Bf16],
    kernels: &[Entry { name: "ttt_mlp_forward", registers: 255 }],
};

/// One token a sequence, for bf16, heads of 64 and any mini-batch.
pub(crate) static DECODE: Source = Source {
    name: "ttt_mlp_decode_64",
    file: "ops/ttt_mlp/decode.cu",
    text: include_str!("decode.cu"),
    defines: &["HEAD_DIM=64"],
    untuned: &[],
    types: &[DType::Bf16],
    kernels: &[Entry { name: "ttt_mlp_decode", registers: 128 }],
};

/// Its backward, which needs clusters of blocks.
pub(crate) static BACKWARD: Source = Source {
    name: "ttt_mlp_backward_64",
    file: "ops/ttt_mlp/backward.cu",
    text: include_str!("backward.cu"),
    defines: &["HEAD_DIM=64"],
    untuned: &[],
    types: &[DType::Bf16],
    kernels: &[Entry { name: "ttt_mlp_backward", registers: 255 }],
};

/// Head size of the fast kernels.
const HEAD_DIM: usize = 64;
/// Bytes of shared memory of a block of the fast kernels: `Shared::BYTES` of their files.
const FORWARD_SHARED: usize = shared()[0];
/// As [`FORWARD_SHARED`].
const BACKWARD_SHARED: usize = shared()[1];
/// As [`FORWARD_SHARED`].
const DECODE_SHARED: usize = shared()[2];
/// Blocks of a cluster of the backward.
const CLUSTER: usize = 2;

const fn shared() -> [usize; 3] {
    let (d, warps, tile) = (HEAD_DIM, HEAD_DIM / 8, 16 * (2 * HEAD_DIM + 16));
    let copy = 4 * d * (2 * d + 16); // of W2
    let sum = 64 * (d + 8);
    let forward = 3 * (3 * tile + 64) + 3 * tile + copy + warps * (2 * sum + 2048) + 32 * d + 3 * 128 + 80;
    let stage = 5 * tile + 16 * (4 * d + 16) + 64 * d + 64;
    let backward = 2 * stage + 4 * tile + 3 * copy / 2 + 3 * warps * sum + 128 * d + 128 * warps + 92 * d + 3 * 128 + 368;
    let decode = 4 * (4 * d * (d + 4) + warps * d + 12 * d + 128);
    [forward, backward, decode]
}

/// Whether the kernels for one token, the fast forward and the fast backward cover type, sizes and layout, and this GPU can run them.
fn fast(cuda: &Cuda, inputs: &Inputs, others: &[View]) -> [bool; 3] {
    let (_, _, d, k) = inputs.sizes();
    let aligned = width(&[inputs.q, inputs.k, inputs.v]) == 8 && width(others) == 8;
    let sized = inputs.q.dtype() == DType::Bf16 && d == HEAD_DIM;
    let covered = sized && k <= 16 && aligned;
    let room = cuda.info().shared_bytes;
    let hopper = architecture(cuda.info().compute) == HOPPER;
    [sized && DECODE_SHARED <= room, covered && FORWARD_SHARED <= room, covered && BACKWARD_SHARED <= room && hopper]
}

/// Threads of a block of the plain kernels.
const THREADS: usize = 256;

/// `MlpForwardParams` of mlp_params.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardParams {
    q: u64,
    k: u64,
    v: u64,
    lr: u64,
    tok: u64,
    gamma: u64,
    beta: u64,
    segments: u64,
    z: u64,
    weights: u64,
    rows: u64,
    ghat: u64,
    sums: u64,
    checkpoints: u64,
    scratch: u64,
    q_stride: u32,
    k_stride: u32,
    v_stride: u32,
    z_stride: u32,
    lr_stride: u32,
    heads: u32,
    head_dim: u32,
    mini_batch: u32,
    group: u32,
}

/// `MlpBackwardParams` of mlp_params.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardParams {
    q: u64,
    k: u64,
    v: u64,
    lr: u64,
    tok: u64,
    gamma: u64,
    beta: u64,
    segments: u64,
    ghat: u64,
    sums: u64,
    checkpoints: u64,
    dz: u64,
    dq: u64,
    dk: u64,
    dv: u64,
    dlr: u64,
    dstate: u64,
    partials: u64,
    scratch: u64,
    q_stride: u32,
    k_stride: u32,
    v_stride: u32,
    lr_stride: u32,
    dz_stride: u32,
    dq_stride: u32,
    dk_stride: u32,
    dv_stride: u32,
    dlr_stride: u32,
    heads: u32,
    head_dim: u32,
    mini_batch: u32,
    group: u32,
}

/// f32 numbers of scratch for a block of the plain forward and of the plain backward.
fn scratch_lens(d: usize, k: usize) -> [usize; 2] {
    [3 * k * d + 4 * k * 4 * d + 2 * k * k, 8 * d * d + 5 * d + 8 * k * d + 10 * k * 4 * d + 4 * k * k + 3 * k]
}

/// f32 numbers of scratch of forward and backward over sequences of these lengths with `[heads, d, K]`, where views are aligned and
/// the GPU is a Hopper.
pub(crate) fn planned_scratch(dtype: DType, lens: &[usize], [heads, d, k]: [usize; 3]) -> [usize; 2] {
    let fast = dtype == DType::Bf16 && k <= 16 && d == HEAD_DIM;
    scratch_lens(d, k).map(|len| if fast { 0 } else { lens.len() * heads * len })
}

/// See [`super::forward`].
pub(crate) fn forward(
    cuda: &Cuda,
    inputs: &Inputs,
    state: &mut FastWeights,
    keep: Option<usize>,
) -> Result<(Tensor, Option<Saved>)> {
    drive::check_state(inputs, state, Inner::Mlp);
    drive::check_keep(inputs, keep);
    let (n, heads, d, k) = inputs.sizes();
    let Inputs { q, v, lr, tok, gamma, beta, segments, .. } = *inputs;
    assert!(inputs.variant == Variant::default(), "a GPU has TTT-MLP with LayerNorm and residual only");
    let mut seen = vec![false; state.slots()];
    for s in segments {
        assert!(s.slot < state.slots(), "slot {} of {}", s.slot, state.slots());
        assert!(!std::mem::replace(&mut seen[s.slot], true), "two segments of a batch name the same slot");
    }
    assert!(k <= MAX_MINI_BATCH, "mini-batches of {k}; the kernels take {MAX_MINI_BATCH}");
    let (device, dtype, group) = (q.device(), q.dtype(), keep.unwrap_or(1).max(1));
    let (list, checkpoints) = with_checkpoints(segments, k, group);
    let z = Tensor::empty(device, &[n, heads * d], dtype)?;
    let kept = match keep {
        Some(_) => {
            let states = Tensor::empty(device, &[heads * checkpoints, FastWeights::state_len(Inner::Mlp, d)], DType::F32)?;
            let ghat = Tensor::empty(device, &[n, heads * 5 * d], dtype)?;
            Some((states, ghat, Tensor::empty(device, &[n, heads * 2 * d], DType::F32)?))
        }
        None => None,
    };
    let blocks = list.len() * heads;
    let [decode, fast, _] = fast(cuda, inputs, &[]);
    let decode = decode && keep.is_none() && segments.iter().all(|s| s.len == 1);
    let scratch_len = if fast || decode { 0 } else { scratch_lens(d, k)[0] };
    let scratch = Tensor::empty(device, &[blocks * scratch_len], DType::F32)?;
    // Where nothing is kept, checkpoints have no places.
    let (with_checkpoints, without) = match keep {
        Some(_) => (Some(cuda.upload(&list)?), None),
        None => (None, Some(cuda.segments(segments)?)),
    };
    let start = if keep == Some(1) { Some(state.weights().copy()?) } else { None };
    let (weights, rows) = state.tensors_mut();
    let params = ForwardParams {
        q: q.address(),
        k: inputs.k.address(),
        v: v.address(),
        lr: lr.address(),
        tok: tok.address(),
        gamma: gamma.address(),
        beta: beta.address(),
        segments: match (&with_checkpoints, &without) {
            (Some(list), _) => list.address(),
            (None, list) => list.as_ref().map_or(0, |list| list.without_checkpoints()),
        },
        z: z.address(),
        weights: weights.view_mut().as_view().address(),
        rows: rows.view_mut().as_view().address(),
        ghat: kept.as_ref().map_or(0, |(_, ghat, _)| ghat.address()),
        sums: kept.as_ref().map_or(0, |(_, _, sums)| sums.address()),
        checkpoints: kept.as_ref().map_or(0, |(states, ..)| states.address()),
        scratch: scratch.address(),
        q_stride: stride(q),
        k_stride: stride(inputs.k),
        v_stride: stride(v),
        z_stride: (heads * d) as u32,
        lr_stride: stride(lr),
        heads: heads as u32,
        head_dim: d as u32,
        mini_batch: k as u32,
        group: group as u32,
    };
    // SAFETY: sizes and segments were checked above; what is written is owned or mutably borrowed; the plain kernel has scratch
    // for each block.
    unsafe {
        if decode {
            let kernel = (dtype, "ttt_mlp_decode");
            cuda.launch_with(&DECODE, kernel, [blocks, 1, 1], 4 * d, DECODE_SHARED, &params);
        } else if fast {
            let kernel = (dtype, "ttt_mlp_forward");
            cuda.launch_with(&FORWARD, kernel, [blocks, 1, 1], 4 * d, FORWARD_SHARED, &params);
        } else {
            let kernel = plain(dtype, ["ttt_mlp_forward_plain_bf16", "ttt_mlp_forward_plain_f32"]);
            cuda.launch_with(&PLAIN, kernel, [blocks, 1, 1], THREADS, 0, &params);
        }
    }
    let saved =
        kept.map(|(states, ghat, sums)| Saved { inner: Inner::Mlp, group, states, ghat: Some(ghat), sums: Some(sums), start });
    Ok((z, saved))
}

/// See [`super::backward`].
pub(crate) fn backward(
    cuda: &Cuda,
    inputs: &Inputs,
    saved: &Saved,
    dz: View,
    dstate: &mut Tensor,
    d: InputGrads,
    p: ParamGrads,
) -> Result<()> {
    drive::check_backward(Inner::Mlp, inputs, saved, dz, dstate, &d, &p);
    let (n, heads, width, k) = inputs.sizes();
    let Inputs { q, v, lr, tok, gamma, beta, segments, .. } = *inputs;
    let ghat = saved.ghat.as_ref().expect("a GPU's forward pass keeps the scaled inner gradients");
    let sums = saved.sums.as_ref().expect("a GPU's forward pass of an MLP keeps what LayerNorm read");
    assert_eq!(ghat.shape(), [n, heads * 5 * width], "what was kept is of another batch");
    let (device, group) = (q.device(), saved.group);
    let (list, _) = with_checkpoints(segments, k, group);
    let blocks = list.len() * heads;
    let [dq, dk, dv, dlr] = [d.dq.as_view(), d.dk.as_view(), d.dv.as_view(), d.dlr.as_view()];
    let [_, _, fast] = fast(cuda, inputs, &[dz, dq, dk, dv]);
    let scratch_len = if fast { 0 } else { scratch_lens(width, k)[1] };
    let scratch = Tensor::empty(device, &[blocks * scratch_len], DType::F32)?;
    let partials = Tensor::empty(device, &[blocks, k + 2 * width], DType::F32)?;
    let uploaded = cuda.upload(&list)?;
    let params = BackwardParams {
        q: q.address(),
        k: inputs.k.address(),
        v: v.address(),
        lr: lr.address(),
        tok: tok.address(),
        gamma: gamma.address(),
        beta: beta.address(),
        segments: uploaded.address(),
        ghat: ghat.address(),
        sums: sums.address(),
        checkpoints: saved.states.address(),
        dz: dz.address(),
        dq: dq.address(),
        dk: dk.address(),
        dv: dv.address(),
        dlr: dlr.address(),
        dstate: dstate.view_mut().as_view().address(),
        partials: partials.address(),
        scratch: scratch.address(),
        q_stride: stride(q),
        k_stride: stride(inputs.k),
        v_stride: stride(v),
        lr_stride: stride(lr),
        dz_stride: stride(dz),
        dq_stride: stride(dq),
        dk_stride: stride(dk),
        dv_stride: stride(dv),
        dlr_stride: stride(dlr),
        heads: heads as u32,
        head_dim: width as u32,
        mini_batch: k as u32,
        group: group as u32,
    };
    // SAFETY: as in `forward`; the gradients have the shapes of what they are gradients of (checked above).
    unsafe {
        if fast {
            let kernel = (q.dtype(), "ttt_mlp_backward");
            cuda.launch_with(&BACKWARD, kernel, [CLUSTER * blocks, 1, 1], 4 * width, BACKWARD_SHARED, &params);
        } else {
            let kernel = plain(q.dtype(), ["ttt_mlp_backward_plain_bf16", "ttt_mlp_backward_plain_f32"]);
            cuda.launch_with(&PLAIN, kernel, [blocks, 1, 1], THREADS, 0, &params);
        }
    }
    reduce(cuda, &partials, &p, [list.len(), heads, width, k, 1]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::device::cuda::compile::{compile, version};
    use crate::device::cuda::kernels::HEADERS;

    /// Sizes, the last offsets, and bytes of shared memory are those that the compiler finds in the sources.
    #[test]
    fn layouts_and_shared_memory_are_those_of_the_kernels() {
        if version().is_none() {
            assert!(std::env::var_os("TTT_TEST_NVRTC").is_none(), "NVRTC was not found, though TTT_TEST_NVRTC is set");
            eprintln!("NVRTC was not found: nothing was compared");
            return;
        }
        let headers: Vec<(&str, String)> = HEADERS.iter().map(|(name, _, text)| (*name, (*text).to_owned())).collect();
        let options = ["--gpu-architecture=sm_90a".to_owned(), "--std=c++17".into()];
        let equal = |what: &str, value: usize| format!("static_assert({what} == {value}, \"{what}\");\n");
        let layout = [
            equal("sizeof(MlpForwardParams)", size_of::<ForwardParams>()),
            equal("sizeof(MlpBackwardParams)", size_of::<BackwardParams>()),
            equal("__INTADDR__(&((MlpForwardParams*)0)->sums)", offset_of!(ForwardParams, sums)),
            equal("__INTADDR__(&((MlpForwardParams*)0)->q_stride)", offset_of!(ForwardParams, q_stride)),
            equal("__INTADDR__(&((MlpForwardParams*)0)->group)", offset_of!(ForwardParams, group)),
            equal("__INTADDR__(&((MlpBackwardParams*)0)->partials)", offset_of!(BackwardParams, partials)),
            equal("__INTADDR__(&((MlpBackwardParams*)0)->dlr_stride)", offset_of!(BackwardParams, dlr_stride)),
            equal("__INTADDR__(&((MlpBackwardParams*)0)->group)", offset_of!(BackwardParams, group)),
        ];
        compile("layout", &format!("#include \"mlp_params.cuh\"\n{}", layout.concat()), &headers, &options).unwrap();
        let options = [&options[..], &[format!("-DHEAD_DIM={HEAD_DIM}")]].concat();
        for (source, bytes) in [(&FORWARD, FORWARD_SHARED), (&BACKWARD, BACKWARD_SHARED), (&DECODE, DECODE_SHARED)] {
            let text = format!("{}\n{}", source.text, equal("Shared::BYTES", bytes));
            compile(source.name, &text, &headers, &options).unwrap();
        }
    }
}
