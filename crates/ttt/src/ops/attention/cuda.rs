//! On a GPU: parameters of the kernels, and their launches.

use super::{Cache, Grads, Inputs};
use crate::Result;
use crate::batch::Segment;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, Uploaded, width};
use crate::device::view::View;
use crate::tensor::{DType, Tensor};

/// The kernels for any head size, and what fills caches.
pub(crate) static PLAIN: Source = Source {
    name: "attention_plain",
    file: "ops/attention/plain.cu",
    text: include_str!("plain.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32],
    kernels: &[
        Entry { name: "attention_forward_plain_f32", registers: 80 },
        Entry { name: "attention_forward_plain_bf16", registers: 80 },
        Entry { name: "attention_queries_plain_f32", registers: 80 },
        Entry { name: "attention_queries_plain_bf16", registers: 80 },
        Entry { name: "attention_keys_plain_f32", registers: 80 },
        Entry { name: "attention_keys_plain_bf16", registers: 80 },
        Entry { name: "attention_append_2", registers: 40 },
        Entry { name: "attention_append_4", registers: 40 },
        Entry { name: "attention_append_16", registers: 40 },
    ],
};

/// The fast kernels of a head size, in bf16.
struct Fast {
    head_dim: usize,
    forward: &'static Source,
    backward: &'static Source,
    decode: &'static Source,
}

macro_rules! fast {
    ($forward:ident, $backward:ident, $decode:ident, $d:literal) => {
        fast!($forward, "forward", $d, [("attention_forward", 255)]);
        fast!($backward, "backward", $d, [("attention_backward_queries", 255), ("attention_backward_keys", 255)]);
        fast!($decode, "decode", $d, [("attention_decode", 128), ("attention_join", 40)]);
    };
    ($name:ident, $file:literal, $d:literal, [$(($kernel:literal, $registers:expr)),*]) => {
        /// Fast kernels of one head size.
        pub(crate) static $name: Source = Source {
            name: concat!("attention_", $file, "_", $d),
            file: concat!("ops/attention/", $file, ".cu"),
            text: include_str!(concat!($file, ".cu")),
            defines: &[concat!("HEAD_DIM=", $d)],
            untuned: &[],
            types: &[DType::Bf16],
            kernels: &[$(Entry { name: $kernel, registers: $registers }),*],
        };
    };
}
fast!(FORWARD_64, BACKWARD_64, DECODE_64, "64");
fast!(FORWARD_96, BACKWARD_96, DECODE_96, "96");
fast!(FORWARD_128, BACKWARD_128, DECODE_128, "128");

static FAST: [Fast; 3] = [
    Fast { head_dim: 64, forward: &FORWARD_64, backward: &BACKWARD_64, decode: &DECODE_64 },
    Fast { head_dim: 96, forward: &FORWARD_96, backward: &BACKWARD_96, decode: &DECODE_96 },
    Fast { head_dim: 128, forward: &FORWARD_128, backward: &BACKWARD_128, decode: &DECODE_128 },
];

/// The largest head that the kernels take.
pub(crate) const MAX_HEAD_DIM: usize = 256;

/// Threads of a block of the fast kernels, and of the plain ones, four warps.
const THREADS: usize = 128;
const PLAIN_WARPS: usize = 4;
/// Rows that a block of the fast kernels walks over at a time.
const STEP: usize = 64;
/// Keys and values of as many heads side by side stay in half of an H100's L2.
const L2_BYTES: usize = 24 << 20;
/// The fewest keys that are worth a block of their own in decoding, and the most blocks of a head.
const SPLIT_KEYS: usize = 128;
const MAX_SPLITS: usize = 64;

/// Queries of a block of the fast kernels, or its keys.
fn block_rows(head_dim: usize) -> usize {
    if head_dim <= 64 { 128 } else { 64 }
}

/// Bytes of shared memory of each kernel: `BYTES` of its file.
struct Shared {
    forward: usize,
    queries: usize,
    keys: usize,
    decode: usize,
}

impl Shared {
    fn new(d: usize) -> Shared {
        let (tile, rows) = (STEP * 2 * d, block_rows(d) * 2 * d);
        Shared {
            forward: 4 * tile + rows,
            queries: 4 * tile + 2 * rows,
            keys: 2 * (2 * tile + 8 * STEP) + 2 * rows,
            decode: 4 * THREADS / 32 * (d + 2),
        }
    }
}

/// `AttentionParams` of attention_params.cuh.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Params {
    q: u64,
    k: u64,
    v: u64,
    keys: u64,
    values: u64,
    segments: u64,
    of_row: u64,
    o: u64,
    log_sum: u64,
    dout: u64,
    delta: u64,
    dq: u64,
    dk: u64,
    dv: u64,
    dkeys: u64,
    dvalues: u64,
    parts: u64,
    q_stride: u32,
    k_stride: u32,
    v_stride: u32,
    o_stride: u32,
    dout_stride: u32,
    dq_stride: u32,
    dk_stride: u32,
    dv_stride: u32,
    cache_stride: u32,
    capacity: u32,
    dcapacity: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    count: u32,
    rows: u32,
    blocks: u32,
    together: u32,
    splits: u32,
    scale: f32,
}

fn stride(view: View) -> u32 {
    view.stride() as u32
}

impl Params {
    /// Of what attention reads.
    fn new(inputs: &Inputs, segments: &Uploaded) -> Params {
        let ([heads, kv_heads], d) = (inputs.heads(), inputs.head_dim);
        let Inputs { q, k, v, past, .. } = *inputs;
        let past = past.filter(|past| past.keys.len() > 0);
        Params {
            q: q.address(),
            k: k.address(),
            v: v.address(),
            keys: past.map_or(0, |past| past.keys.address()),
            values: past.map_or(0, |past| past.values.address()),
            segments: segments.segments(),
            of_row: segments.of_row(),
            q_stride: stride(q),
            k_stride: stride(k),
            v_stride: stride(v),
            cache_stride: k.cols() as u32,
            capacity: past.map_or(0, |past| past.keys.shape()[1] as u32),
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: d as u32,
            count: segments.count() as u32,
            rows: q.rows() as u32,
            scale: 1.0 / (d as f32).sqrt(),
            ..Params::default()
        }
    }

    /// With blocks for the longest of some segments, and heads whose keys and values stay in L2 side by side.
    fn blocks(mut self, longest: usize, per_block: usize, inputs: &Inputs) -> (Params, usize) {
        let tasks = inputs.segments.len() * inputs.heads()[0];
        let seen = inputs.segments.iter().map(|s| s.phase + s.len).max().unwrap_or(0);
        self.blocks = longest.div_ceil(per_block) as u32;
        self.together = (L2_BYTES / (4 * inputs.head_dim * seen.max(1))).clamp(1, tasks.max(1)) as u32;
        (self, longest.div_ceil(per_block))
    }
}

/// The fast kernels, where they cover the type, the head size and the layout, and this GPU has the shared memory.
fn fast(cuda: &Cuda, inputs: &Inputs, others: &[View]) -> Option<&'static Fast> {
    let shared = Shared::new(inputs.head_dim);
    let fits = [shared.forward, shared.queries, shared.keys].into_iter().all(|bytes| bytes <= cuda.info().shared_bytes);
    let aligned = width(&[inputs.q, inputs.k, inputs.v]) == 8 && width(others) == 8;
    let covered = inputs.q.dtype() == DType::Bf16 && aligned && fits;
    FAST.iter().find(|fast| covered && fast.head_dim == inputs.head_dim)
}

/// A plain kernel for a type of activations.
fn plain(dtype: DType, [f32, bf16]: [&'static str; 2]) -> (DType, &'static str) {
    (DType::F32, if dtype == DType::Bf16 { bf16 } else { f32 })
}

/// Checks that the cache holds what the segments have read.
fn check_past(inputs: &Inputs) {
    for s in inputs.segments.iter().filter(|s| s.phase > 0) {
        // A part of it, which checks the slot and the length.
        inputs.parts(s);
    }
}

/// The most parts that the keys of a head are split into in decoding, so that the GPU is full. How many of them work, the GPU
/// decides from what the sequences have read, which the host does not know of a recorded step.
fn splits(cuda: &Cuda, inputs: &Inputs) -> usize {
    let blocks = inputs.segments.len() * inputs.heads()[0];
    let capacity = inputs.past.map_or(0, |past| past.keys.shape()[1]);
    (4 * cuda.info().multiprocessors).div_ceil(blocks.max(1)).min(capacity.div_ceil(SPLIT_KEYS)).clamp(1, MAX_SPLITS)
}

/// See [`super::forward`].
pub(super) fn forward(cuda: &Cuda, inputs: &Inputs<'_>) -> Result<[Tensor; 2]> {
    check_past(inputs);
    let ([heads, _], d, q) = (inputs.heads(), inputs.head_dim, inputs.q);
    assert!(d <= MAX_HEAD_DIM, "heads of {d}; the kernels take {MAX_HEAD_DIM}");
    let o = Tensor::empty(q.device(), &[q.rows(), q.cols()], q.dtype())?;
    let log_sum = Tensor::empty(q.device(), &[q.rows(), heads], DType::F32)?;
    let segments = cuda.segments(inputs.segments)?;
    let mut params = Params::new(inputs, &segments);
    (params.o, params.o_stride, params.log_sum) = (o.address(), (heads * d) as u32, log_sum.address());
    let (dtype, shared, tasks) = (q.dtype(), Shared::new(d), segments.count() * heads);
    let past: Vec<View> = inputs.past.into_iter().flat_map(|past| [past.keys.view(), past.values.view()]).collect();
    // SAFETY: shapes and what the cache holds were checked; outputs are owned; the fast kernels have the layout they want.
    unsafe {
        match fast(cuda, inputs, &past) {
            Some(fast) if inputs.segments.iter().all(|s| s.len == 1) => {
                let splits = splits(cuda, inputs);
                let parts = Tensor::empty(q.device(), &[usize::from(splits > 1) * tasks * splits, d + 2], DType::F32)?;
                (params.splits, params.parts) = (splits as u32, parts.address());
                cuda.launch_with(fast.decode, (dtype, "attention_decode"), [tasks * splits, 1, 1], THREADS, shared.decode, &params);
                if splits > 1 {
                    cuda.launch_with(fast.decode, (dtype, "attention_join"), [tasks, 1, 1], THREADS, 0, &params);
                }
            }
            Some(fast) => {
                let longest = inputs.segments.iter().map(|s| s.len).max().unwrap_or(0);
                let (params, blocks) = params.blocks(longest, block_rows(d), inputs);
                let kernel = (dtype, "attention_forward");
                cuda.launch_with(fast.forward, kernel, [tasks * blocks, 1, 1], THREADS, shared.forward, &params);
            }
            None => {
                let kernel = plain(dtype, ["attention_forward_plain_f32", "attention_forward_plain_bf16"]);
                let (grid, bytes) = ((q.rows() * heads).div_ceil(PLAIN_WARPS), 4 * PLAIN_WARPS * MAX_HEAD_DIM);
                cuda.launch_with(&PLAIN, kernel, [grid, 1, 1], 32 * PLAIN_WARPS, bytes, &params);
            }
        }
    }
    Ok([o, log_sum])
}

/// See [`super::backward`].
pub(super) fn backward(
    cuda: &Cuda,
    inputs: &Inputs<'_>,
    [o, log_sum]: [&Tensor; 2],
    dout: View,
    mut dpast: Option<[&mut Tensor; 2]>,
    grads: &Grads<'_>,
) -> Result<()> {
    check_past(inputs);
    let ([heads, kv_heads], d, q) = (inputs.heads(), inputs.head_dim, inputs.q);
    let delta = Tensor::empty(q.device(), &[q.rows(), heads], DType::F32)?;
    let segments = cuda.segments(inputs.segments)?;
    let [dq, dk, dv] = [&grads.dq, &grads.dk, &grads.dv].map(|x| x.as_view());
    let mut params = Params::new(inputs, &segments);
    (params.o, params.o_stride, params.log_sum, params.delta) =
        (o.address(), (heads * d) as u32, log_sum.address(), delta.address());
    (params.dout, params.dout_stride) = (dout.address(), stride(dout));
    (params.dq, params.dk, params.dv) = (dq.address(), dk.address(), dv.address());
    (params.dq_stride, params.dk_stride, params.dv_stride) = (stride(dq), stride(dk), stride(dv));
    // What was read before gets gradients when there is a place for them.
    let whole = dpast.is_some();
    if let Some([dkeys, dvalues]) = &mut dpast {
        let capacity = dkeys.shape()[1];
        for s in inputs.segments {
            let fits = s.slot < dkeys.shape()[0] && s.phase + s.len <= capacity && dkeys.shape() == dvalues.shape();
            assert!(fits, "gradients of {} tokens in slot {} of {:?}", s.phase + s.len, s.slot, dkeys.shape());
        }
        params.dcapacity = capacity as u32;
        [params.dkeys, params.dvalues] = [dkeys, dvalues].map(|x| x.view_mut().as_view().address());
    }
    let longest = inputs.segments.iter().map(|s| s.len).max().unwrap_or(0);
    let span = inputs.segments.iter().map(|s| s.len + if whole { s.phase } else { 0 }).max().unwrap_or(0);
    let (dtype, shared, count) = (q.dtype(), Shared::new(d), segments.count());
    let mut others: Vec<View> = inputs.past.into_iter().flat_map(|past| [past.keys.view(), past.values.view()]).collect();
    others.extend([dout, dq, dk, dv]);
    // SAFETY: shapes and what caches hold were checked; what is written is owned or mutably borrowed; the fast kernels have the
    // layout they want.
    unsafe {
        match fast(cuda, inputs, &others) {
            Some(fast) => {
                let (queries, blocks) = params.blocks(longest, block_rows(d), inputs);
                let (kernel, grid) = ((dtype, "attention_backward_queries"), [count * heads * blocks, 1, 1]);
                cuda.launch_with(fast.backward, kernel, grid, THREADS, shared.queries, &queries);
                let (keys, blocks) = params.blocks(span, block_rows(d), inputs);
                let (kernel, grid) = ((dtype, "attention_backward_keys"), [count * kv_heads * blocks, 1, 1]);
                cuda.launch_with(fast.backward, kernel, grid, THREADS, shared.keys, &keys);
            }
            None => {
                let (threads, bytes) = (32 * PLAIN_WARPS, 8 * PLAIN_WARPS * MAX_HEAD_DIM);
                let kernel = plain(dtype, ["attention_queries_plain_f32", "attention_queries_plain_bf16"]);
                let grid = (q.rows() * heads).div_ceil(PLAIN_WARPS);
                cuda.launch_with(&PLAIN, kernel, [grid, 1, 1], threads, bytes, &params);
                let kernel = plain(dtype, ["attention_keys_plain_f32", "attention_keys_plain_bf16"]);
                let (keys, blocks) = params.blocks(span, PLAIN_WARPS, inputs);
                cuda.launch_with(&PLAIN, kernel, [count * kv_heads * blocks, 1, 1], threads, bytes, &keys);
            }
        }
    }
    Ok(())
}

/// See [`Cache::append`].
pub(super) fn append(cuda: &Cuda, cache: &mut Cache, [k, v]: [View; 2], segments: &[Segment]) -> Result<()> {
    let uploaded = cuda.segments(segments)?;
    let (rows, cols, size) = (k.rows(), k.cols(), k.dtype().size());
    let capacity = cache.keys.shape()[1];
    let [keys, values] = [&mut cache.keys, &mut cache.values].map(|x| x.view_mut().as_view().address());
    // 16 bytes a thread, or an element.
    let wide = [k, v]
        .iter()
        .all(|x| (x.stride() * size).is_multiple_of(16) && x.address().is_multiple_of(16) && (cols * size).is_multiple_of(16));
    let unit = if wide { 16 / size } else { 1 };
    let kernel = match unit * size {
        16 => "attention_append_16",
        4 => "attention_append_4",
        _ => "attention_append_2",
    };
    let params = Params {
        k: k.address(),
        v: v.address(),
        dkeys: keys,
        dvalues: values,
        segments: uploaded.segments(),
        of_row: uploaded.of_row(),
        k_stride: stride(k),
        v_stride: stride(v),
        cache_stride: cols as u32,
        capacity: capacity as u32,
        head_dim: unit as u32,
        count: uploaded.count() as u32,
        rows: rows as u32,
        ..Params::default()
    };
    // SAFETY: there is room for the rows (checked by the caller), and the cache is mutably borrowed.
    unsafe { cuda.launch_with(&PLAIN, (DType::F32, kernel), [(rows * cols / unit).div_ceil(256), 1, 1], 256, 0, &params) };
    Ok(())
}
