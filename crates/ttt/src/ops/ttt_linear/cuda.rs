//! On a GPU: parameters of the kernels, and their launches.

pub(crate) mod step;

use crate::Result;
use crate::batch::Segment;
use crate::config::Inner;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, width};
use crate::device::view::View;
use crate::ops::inner::{FastWeights, InputGrads, Inputs, ParamGrads, Saved, Variant, drive};
use crate::tensor::{DType, Tensor};

/// The kernels for any head size and mini-batch.
pub(crate) static PLAIN: Source = Source {
    name: "ttt_linear_plain",
    file: "ops/ttt_linear/plain.cu",
    text: include_str!("plain.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32],
    kernels: &[
        Entry { name: "ttt_linear_forward_plain_bf16", registers: 168 },
        Entry { name: "ttt_linear_forward_plain_f32", registers: 168 },
        Entry { name: "ttt_linear_backward_plain_bf16", registers: 255 },
        Entry { name: "ttt_linear_backward_plain_f32", registers: 255 },
        Entry { name: "ttt_linear_reduce", registers: 48 },
    ],
};

/// The fast kernels of a head size: bf16, mini-batches of up to 16.
struct Fast {
    head_dim: usize,
    forward: &'static Source,
    backward: &'static Source,
    chain: &'static Source,
    decode: &'static Source,
}

macro_rules! fast {
    ($forward:ident, $backward:ident, $chain:ident, $decode:ident, $d:literal, $registers:expr) => {
        fast!($forward, "forward", $d, [("ttt_linear_forward", $registers), ("ttt_linear_forward_chain", 255)]);
        fast!($backward, "backward", $d, [("ttt_linear_backward", $registers), ("ttt_linear_backward_prepare", $registers)]);
        fast!($chain, "backward_chain", $d, [("ttt_linear_backward_chain", 255)]);
        fast!($decode, "decode", $d, [("ttt_linear_decode", 168), ("ttt_linear_step", 168)]);
    };
    ($name:ident, $file:literal, $d:literal, [$(($kernel:literal, $registers:expr)),*]) => {
        /// Fast kernels of one head size.
        pub(crate) static $name: Source = Source {
            name: concat!("ttt_linear_", $file, "_", $d),
            file: concat!("ops/ttt_linear/", $file, ".cu"),
            text: include_str!(concat!($file, ".cu")),
            defines: &[concat!("HEAD_DIM=", $d)],
            untuned: &["BLOCKS_PER_SM=1"],
            types: &[DType::Bf16],
            kernels: &[$(Entry { name: $kernel, registers: $registers }),*],
        };
    };
}
// Three blocks an SM up to 64 columns.
fast!(FORWARD_48, BACKWARD_48, CHAIN_48, DECODE_48, "48", 168);
fast!(FORWARD_64, BACKWARD_64, CHAIN_64, DECODE_64, "64", 168);
fast!(FORWARD_96, BACKWARD_96, CHAIN_96, DECODE_96, "96", 255);

static FAST: [Fast; 3] = [
    Fast { head_dim: 48, forward: &FORWARD_48, backward: &BACKWARD_48, chain: &CHAIN_48, decode: &DECODE_48 },
    Fast { head_dim: 64, forward: &FORWARD_64, backward: &BACKWARD_64, chain: &CHAIN_64, decode: &DECODE_64 },
    Fast { head_dim: 96, forward: &FORWARD_96, backward: &BACKWARD_96, chain: &CHAIN_96, decode: &DECODE_96 },
];

/// The decoding kernels of a head size.
fn decode(head_dim: usize) -> Option<&'static Source> {
    FAST.iter().find(|fast| fast.head_dim == head_dim).map(|fast| fast.decode)
}

/// Bytes of shared memory of the decoding kernels.
fn decode_shared(head_dim: usize, mini_batch: usize) -> usize {
    Shared::new(head_dim, mini_batch).decode
}

/// The fast kernels, where they cover the type, the sizes and the layout, and this GPU has the shared memory.
fn fast(cuda: &Cuda, inputs: &Inputs, others: &[View]) -> Option<&'static Fast> {
    let (_, _, d, k) = inputs.sizes();
    let aligned = width(&[inputs.q, inputs.k, inputs.v]) == 8 && width(others) == 8;
    let shared = Shared::new(d, k);
    let fits = [shared.forward, shared.backward, shared.chain].into_iter().all(|bytes| bytes <= cuda.info().shared_bytes);
    let covered = inputs.q.dtype() == DType::Bf16 && k <= 16 && aligned && fits;
    FAST.iter().find(|fast| covered && fast.head_dim == d)
}

/// Bytes of shared memory of each kernel: `Shared::BYTES` of its file.
struct Shared {
    forward: usize,
    backward: usize,
    chain: usize,
    decode: usize,
}

impl Shared {
    fn new(d: usize, k: usize) -> Shared {
        let (tile, warps, patch) = (16 * (2 * d + 16), d / 16, 4 * 16 * 20);
        Shared {
            forward: 4 * (3 * tile + 64) + warps * (16 * 48 + patch) + warps * 32 * 32 + 8 * d,
            backward: 2 * (5 * tile + 64)
                + 2 * d * (2 * d + 16)
                + 3 * tile
                + warps * 2 * patch
                + warps * 32 * (16 + 4 + 16)
                + 72 * d
                + 64,
            chain: 4 * (2 * tile + RECORD * d + 512) + warps * (16 * 48 + patch + 1024),
            decode: 4 * (20 * d + (2 * d + 1) * k + warps),
        }
    }
}

/// Bytes that the preparation of a decoupled backward leaves for a mini-batch, without 512, by column of the head.
const RECORD: usize = 128;

/// Below this many sequences and heads one block each leaves the GPU idle (docs/kernels.md).
const FEW: usize = 64;
/// Mini-batches of a part of a decoupled pass, at least.
const PART: usize = 64;

/// Few heads and long sequences run decoupled: mini-batches of a part (0: not decoupled), and parts of the longest segment.
fn parts(segments: &[Segment], heads: usize, k: usize, group: usize) -> (usize, usize) {
    let longest = segments.iter().map(|s| (s.phase + s.len).div_ceil(k)).max().unwrap_or(0);
    parts_of(segments.len() * heads, longest, group)
}

/// [`parts`] of so many segments and heads, the longest of so many mini-batches.
fn parts_of(tasks: usize, longest: usize, group: usize) -> (usize, usize) {
    let split = PART.next_multiple_of(group);
    if tasks < FEW && longest > 2 * split { (split, longest.div_ceil(split)) } else { (0, 1) }
}

/// f32 numbers of scratch of forward and backward over sequences of these lengths with `[heads, d, K]`, where views are aligned and
/// the GPU has the shared memory of a Hopper.
pub(crate) fn planned_scratch(dtype: DType, lens: &[usize], [heads, d, k]: [usize; 3]) -> [usize; 2] {
    let tasks = lens.len() * heads;
    if dtype != DType::Bf16 || k > 16 || FAST.iter().all(|fast| fast.head_dim != d) {
        return scratch_lens(d, k).map(|len| tasks * len);
    }
    let longest = lens.iter().map(|len| len.div_ceil(k)).max().unwrap_or(0);
    let (split, parts) = parts_of(tasks, longest, 1);
    if split == 0 {
        return [0; 2];
    }
    let boundaries = tasks * parts * (d * d + d);
    [boundaries + tasks * (k - 1) * 2 * d, boundaries + tasks * parts * split * (RECORD * d + 512) / 4]
}

/// Threads of a block of the plain kernels.
const THREADS: usize = 256;

/// The most tokens of a mini-batch that the kernels take.
pub(crate) const MAX_MINI_BATCH: usize = 64;

/// `Segment` of params.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct GpuSegment {
    first_row: u32,
    len: u32,
    slot: u32,
    phase: u32,
    first_checkpoint: u32,
}

/// `ForwardParams` of params.cuh.
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
    checkpoints: u64,
    boundaries: u64,
    opened: u64,
    scratch: u64,
    q_stride: u32,
    k_stride: u32,
    v_stride: u32,
    z_stride: u32,
    lr_stride: u32,
    ghat_stride: u32,
    heads: u32,
    head_dim: u32,
    mini_batch: u32,
    group: u32,
    split: u32,
    parts: u32,
}

/// `BackwardParams` of params.cuh.
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
    checkpoints: u64,
    dz: u64,
    dq: u64,
    dk: u64,
    dv: u64,
    dlr: u64,
    dstate: u64,
    partials: u64,
    boundaries: u64,
    prepared: u64,
    scratch: u64,
    q_stride: u32,
    k_stride: u32,
    v_stride: u32,
    lr_stride: u32,
    ghat_stride: u32,
    dz_stride: u32,
    dq_stride: u32,
    dk_stride: u32,
    dv_stride: u32,
    dlr_stride: u32,
    heads: u32,
    head_dim: u32,
    mini_batch: u32,
    group: u32,
    split: u32,
    parts: u32,
}

/// `ReduceParams` of params.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct ReduceParams {
    partials: u64,
    dtok: u64,
    dgamma: u64,
    dbeta: u64,
    segments: u32,
    heads: u32,
    head_dim: u32,
    mini_batch: u32,
    parts: u32,
}

/// f32 numbers of scratch for a block of the forward and of the backward.
fn scratch_lens(d: usize, k: usize) -> [usize; 2] {
    [3 * k * d + k * k, d * d + d + 9 * k * d + 2 * k * k + 4 * k]
}

/// Segments with the index of their first checkpoint, and the number of all checkpoints of one head.
pub(crate) fn with_checkpoints(segments: &[Segment], k: usize, group: usize) -> (Vec<GpuSegment>, usize) {
    let mut first_checkpoint = 0;
    let list = segments.iter().map(|s| {
        let own = first_checkpoint;
        first_checkpoint += s.len.div_ceil(k).div_ceil(group);
        let [first_row, len, slot, phase, first_checkpoint] = [s.first_row, s.len, s.slot, s.phase, own].map(|n| n as u32);
        GpuSegment { first_row, len, slot, phase, first_checkpoint }
    });
    (list.collect(), first_checkpoint)
}

pub(crate) fn plain(dtype: DType, [bf16, f32]: [&'static str; 2]) -> (DType, &'static str) {
    (DType::F32, if dtype == DType::Bf16 { bf16 } else { f32 })
}

pub(crate) fn stride(view: View) -> u32 {
    view.stride() as u32
}

/// See [`super::forward`].
pub(crate) fn forward(
    cuda: &Cuda,
    inputs: &Inputs,
    state: &mut FastWeights,
    keep: Option<usize>,
) -> Result<(Tensor, Option<Saved>)> {
    drive::check_state(inputs, state, Inner::Linear);
    drive::check_keep(inputs, keep);
    let (n, heads, d, k) = inputs.sizes();
    let Inputs { q, v, lr, tok, gamma, beta, segments, .. } = *inputs;
    assert!(inputs.variant == Variant::default(), "a GPU has TTT-Linear with LayerNorm and residual only");
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
            let states = Tensor::empty(device, &[heads * checkpoints, d * d + d], DType::F32)?;
            Some((states, Tensor::empty(device, &[n, heads * d], dtype)?))
        }
        None => None,
    };
    let fast = fast(cuda, inputs, &[]);
    let [scratch_len, _] = if fast.is_some() { [0; 2] } else { scratch_lens(d, k) };
    let blocks = list.len() * heads;
    let (split, parts) = if fast.is_some() { parts(segments, heads, k, group) } else { (0, 1) };
    let decoupled = usize::from(split > 0) * blocks;
    let boundaries = Tensor::empty(device, &[decoupled * parts, d * d + d], DType::F32)?;
    let opened = Tensor::empty(device, &[decoupled, k - 1, 2 * d], DType::F32)?;
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
        ghat: kept.as_ref().map_or(0, |(_, ghat)| ghat.address()),
        checkpoints: kept.as_ref().map_or(0, |(states, _)| states.address()),
        boundaries: boundaries.address(),
        opened: opened.address(),
        scratch: scratch.address(),
        q_stride: stride(q),
        k_stride: stride(inputs.k),
        v_stride: stride(v),
        z_stride: (heads * d) as u32,
        lr_stride: stride(lr),
        ghat_stride: (heads * d) as u32,
        heads: heads as u32,
        head_dim: d as u32,
        mini_batch: k as u32,
        group: group as u32,
        split: split as u32,
        parts: parts as u32,
    };
    let shared = Shared::new(d, k);
    // SAFETY: sizes and segments were checked above; what is written is owned or mutably borrowed; the plain kernel has scratch
    // for each block, decoupled ones boundaries for each part.
    unsafe {
        match fast {
            Some(fast) if keep.is_none() && segments.iter().all(|s| s.len == 1) => {
                let kernel = (dtype, "ttt_linear_decode");
                cuda.launch_with(fast.decode, kernel, [blocks, 1, 1], 2 * d, shared.decode, &params);
            }
            Some(fast) => {
                if split > 0 {
                    let chain = (dtype, "ttt_linear_forward_chain");
                    cuda.launch_with(fast.forward, chain, [blocks, 1, 1], 2 * d, shared.forward, &params);
                }
                let kernel = (dtype, "ttt_linear_forward");
                cuda.launch_with(fast.forward, kernel, [blocks * parts, 1, 1], 2 * d, shared.forward, &params);
            }
            None => {
                let kernel = plain(dtype, ["ttt_linear_forward_plain_bf16", "ttt_linear_forward_plain_f32"]);
                cuda.launch_with(&PLAIN, kernel, [blocks, 1, 1], THREADS, 0, &params);
            }
        }
    }
    let saved = kept.map(|(states, ghat)| Saved { inner: Inner::Linear, group, states, ghat: Some(ghat), sums: None, start });
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
    drive::check_backward(Inner::Linear, inputs, saved, dz, dstate, &d, &p);
    let (n, heads, width, k) = inputs.sizes();
    let Inputs { q, v, lr, tok, gamma, beta, segments, .. } = *inputs;
    let ghat = saved.ghat.as_ref().expect("a GPU's forward pass keeps the scaled inner gradients");
    assert_eq!(ghat.shape(), [n, heads * width], "what was kept is of another batch");
    let (device, group) = (q.device(), saved.group);
    let (list, _) = with_checkpoints(segments, k, group);
    let blocks = list.len() * heads;
    let [dq, dk, dv, dlr] = [d.dq.as_view(), d.dk.as_view(), d.dv.as_view(), d.dlr.as_view()];
    let fast = fast(cuda, inputs, &[dz, dq, dk, dv]);
    let [_, scratch_len] = if fast.is_some() { [0; 2] } else { scratch_lens(width, k) };
    let scratch = Tensor::empty(device, &[blocks * scratch_len], DType::F32)?;
    let (split, parts) = if fast.is_some() { parts(segments, heads, k, group) } else { (0, 1) };
    let decoupled = usize::from(split > 0) * blocks * parts;
    let boundaries = Tensor::empty(device, &[decoupled, width * width + width], DType::F32)?;
    let prepared = cuda.memory().take(decoupled * split * (RECORD * width + 512))?;
    let partials = Tensor::empty(device, &[blocks * parts, k + 2 * width], DType::F32)?;
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
        checkpoints: saved.states.address(),
        dz: dz.address(),
        dq: dq.address(),
        dk: dk.address(),
        dv: dv.address(),
        dlr: dlr.address(),
        dstate: dstate.view_mut().as_view().address(),
        partials: partials.address(),
        boundaries: boundaries.address(),
        prepared: prepared.address(),
        scratch: scratch.address(),
        q_stride: stride(q),
        k_stride: stride(inputs.k),
        v_stride: stride(v),
        lr_stride: stride(lr),
        ghat_stride: (heads * width) as u32,
        dz_stride: stride(dz),
        dq_stride: stride(dq),
        dk_stride: stride(dk),
        dv_stride: stride(dv),
        dlr_stride: stride(dlr),
        heads: heads as u32,
        head_dim: width as u32,
        mini_batch: k as u32,
        group: group as u32,
        split: split as u32,
        parts: parts as u32,
    };
    let (shared, dtype) = (Shared::new(width, k), q.dtype());
    // SAFETY: as in `forward`; the gradients have the shapes of what they are gradients of (checked above); decoupled kernels have
    // boundaries and records for each part.
    unsafe {
        match fast {
            Some(fast) => {
                let launch = |source, kernel, blocks, shared| {
                    cuda.launch_with(source, (dtype, kernel), [blocks, 1, 1], 2 * width, shared, &params)
                };
                if split > 0 {
                    launch(fast.backward, "ttt_linear_backward_prepare", blocks * parts, shared.backward);
                    launch(fast.chain, "ttt_linear_backward_chain", blocks, shared.chain);
                }
                launch(fast.backward, "ttt_linear_backward", blocks * parts, shared.backward);
            }
            None => {
                let kernel = plain(dtype, ["ttt_linear_backward_plain_bf16", "ttt_linear_backward_plain_f32"]);
                cuda.launch_with(&PLAIN, kernel, [blocks, 1, 1], THREADS, 0, &params);
            }
        }
    }
    reduce(cuda, &partials, &p, [list.len(), heads, width, k, parts]);
    Ok(())
}

/// Adds the partial sums `[segments, h, parts, K + 2d]` of a backward to the parameters' gradients, in a fixed order.
pub(crate) fn reduce(cuda: &Cuda, partials: &Tensor, p: &ParamGrads, [segments, heads, d, k, parts]: [usize; 5]) {
    assert_eq!(partials.shape().iter().product::<usize>(), segments * heads * parts * (k + 2 * d), "partial sums");
    let reduce = ReduceParams {
        partials: partials.address(),
        dtok: p.dtok.as_view().address(),
        dgamma: p.dgamma.as_view().address(),
        dbeta: p.dbeta.as_view().address(),
        segments: segments as u32,
        heads: heads as u32,
        head_dim: d as u32,
        mini_batch: k as u32,
        parts: parts as u32,
    };
    let warps = heads * 2 * d + k;
    // SAFETY: `partials` has a row for each block; the sums are contiguous parameters' gradients, mutably borrowed.
    unsafe {
        let kernel = (DType::F32, "ttt_linear_reduce");
        cuda.launch_with(&PLAIN, kernel, [warps.div_ceil(THREADS / 32), 1, 1], THREADS, 0, &reduce);
    }
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
        let options = |d: usize| vec!["--gpu-architecture=sm_90a".into(), "--std=c++17".into(), format!("-DHEAD_DIM={d}")];
        let equal = |what: &str, value: usize| format!("static_assert({what} == {value}, \"{what}\");\n");
        let layout = [
            equal("sizeof(Segment)", size_of::<GpuSegment>()),
            equal("sizeof(ForwardParams)", size_of::<ForwardParams>()),
            equal("sizeof(BackwardParams)", size_of::<BackwardParams>()),
            equal("sizeof(ReduceParams)", size_of::<ReduceParams>()),
            equal("sizeof(StepParams)", size_of::<step::Params>()),
            equal("__INTADDR__(&((StepParams*)0)->rate_scale)", offset_of!(step::Params, rate_scale)),
            equal("__INTADDR__(&((ForwardParams*)0)->opened)", offset_of!(ForwardParams, opened)),
            equal("__INTADDR__(&((ForwardParams*)0)->q_stride)", offset_of!(ForwardParams, q_stride)),
            equal("__INTADDR__(&((ForwardParams*)0)->parts)", offset_of!(ForwardParams, parts)),
            equal("__INTADDR__(&((BackwardParams*)0)->prepared)", offset_of!(BackwardParams, prepared)),
            equal("__INTADDR__(&((BackwardParams*)0)->dlr_stride)", offset_of!(BackwardParams, dlr_stride)),
            equal("__INTADDR__(&((BackwardParams*)0)->parts)", offset_of!(BackwardParams, parts)),
        ];
        compile("layout", &format!("#include \"params.cuh\"\n{}", layout.concat()), &headers, &options(64)).unwrap();
        for fast in &FAST {
            let shared = Shared::new(fast.head_dim, 16);
            for (source, bytes) in [(fast.forward, shared.forward), (fast.chain, shared.chain), (fast.backward, shared.backward)] {
                let text = format!("{}\n{}", source.text, equal("Shared::BYTES", bytes));
                compile(source.name, &text, &headers, &options(fast.head_dim)).unwrap();
            }
            let text = format!("{}\nstatic_assert(Record::BYTES == {}, \"\");", fast.chain.text, RECORD * fast.head_dim + 512);
            compile(fast.chain.name, &text, &headers, &options(fast.head_dim)).unwrap();
        }
    }
}
