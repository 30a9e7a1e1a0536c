//! On a GPU: at most 16 states a channel. A warp scans the tokens of two channels, 256 at a time (`scan.cuh`).

use super::{InputGrads, Inputs, ParamGrads};
use crate::Result;
use crate::device::cuda::Cuda;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::view::View;
use crate::ops::add;
use crate::tensor::{DType, Tensor};

/// Whole sequences, and a few tokens of many.
pub(crate) static FORWARD: Source = Source {
    name: "scan_forward",
    file: "ops/selective_scan/forward.cu",
    text: include_str!("forward.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[Entry { name: "scan_forward", registers: 128 }, Entry { name: "scan_step", registers: 128 }],
};

/// The backward pass.
pub(crate) static BACKWARD: Source = Source {
    name: "scan_backward",
    file: "ops/selective_scan/backward.cu",
    text: include_str!("backward.cu"),
    defines: &[],
    untuned: &["FEW_WARPS"],
    types: &[DType::F32, DType::Bf16],
    kernels: &[Entry { name: "scan_backward", registers: 168 }, Entry { name: "scan_reduce", registers: 40 }],
};

/// The most states of a channel.
pub(crate) const MAX_STATES: usize = 16;
/// Tokens that a warp scans at a time; states are kept at the start of each.
const SPAN: usize = 256;
/// Floats of a row of a tile in shared memory.
const PITCH: usize = SPAN + 4;
/// Warps of a block of the forward pass; each works on two channels.
const FORWARD_WARPS: usize = 8;
/// Sequences of up to so many tokens that nothing is kept of are read token by token, a thread a channel.
const STEP: usize = 8;
/// Blocks of the backward pass that fill a GPU twice: with fewer, a block works on fewer groups of channels.
const ENOUGH_BLOCKS: usize = 256;

/// `ScanParams` of scan.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    x: u64,
    dt: u64,
    b: u64,
    c: u64,
    a_log: u64,
    d: u64,
    dt_bias: u64,
    segments: u64,
    state: u64,
    kept: u64,
    y: u64,
    x_stride: u32,
    dt_stride: u32,
    b_stride: u32,
    c_stride: u32,
    a_stride: u32,
    channels: u32,
    states: u32,
}

/// `ScanGradParams` of scan.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct GradParams {
    inputs: Params,
    dy: u64,
    dx: u64,
    ddt: u64,
    selected: u64,
    parameters: u64,
    dy_stride: u32,
    dx_stride: u32,
    ddt_stride: u32,
    rows: u32,
    groups: u32,
}

/// `ScanReduceParams` of backward.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct ReduceParams {
    selected: u64,
    db: u64,
    dc: u64,
    db_stride: u32,
    dc_stride: u32,
    blocks: u32,
    states: u32,
    rows: u32,
}

impl Inputs<'_> {
    fn params(&self, segments: u64, state: Option<&mut Tensor>) -> Params {
        let states = self.states();
        assert!(states <= MAX_STATES, "{states} states of a channel; the kernels take {MAX_STATES}");
        Params {
            x: self.x.address(),
            dt: self.dt.address(),
            b: self.b.address(),
            c: self.c.address(),
            a_log: self.a_log.address(),
            d: self.d.address(),
            dt_bias: self.dt_bias.address(),
            segments,
            state: state.map_or(0, |state| state.view_mut().as_view().address()),
            kept: 0,
            y: 0,
            x_stride: self.x.stride() as u32,
            dt_stride: self.dt.stride() as u32,
            b_stride: self.b.stride() as u32,
            c_stride: self.c.stride() as u32,
            a_stride: self.a_log.stride() as u32,
            channels: self.channels() as u32,
            states: states as u32,
        }
    }

    /// Rows of kept states: those of a segment's span i lie at first row / SPAN + segment + i, which needs no table.
    fn spans(&self) -> usize {
        self.x.rows() / SPAN + self.segments.len() + 1
    }
}

/// Writes `y`, moves `state` on, returns the kept states `[spans, N, c]`.
pub(super) fn forward(
    cuda: &Cuda,
    inputs: &Inputs,
    state: Option<&mut Tensor>,
    keep: bool,
    y: &mut Tensor,
) -> Result<Option<Tensor>> {
    let segments = cuda.segments(inputs.segments)?;
    let (channels, states, dtype) = (inputs.channels(), inputs.states(), inputs.x.dtype());
    let mut params = Params { y: y.view_mut().as_view().address(), ..inputs.params(segments.segments(), state) };
    if !keep && inputs.segments.iter().all(|s| s.len <= STEP) {
        let grid = [inputs.segments.len() * channels.div_ceil(128), 1, 1];
        // SAFETY: shapes, segments and slots were checked by the caller; `y` and the states are mutably borrowed.
        unsafe { cuda.launch_with(&FORWARD, (dtype, "scan_step"), grid, 128, 0, &params) };
        return Ok(None);
    }
    let kept = match keep {
        true => Some(Tensor::empty(inputs.x.device(), &[inputs.spans(), states, channels], DType::F32)?),
        false => None,
    };
    params.kept = kept.as_ref().map_or(0, Tensor::address);
    let group = 2 * FORWARD_WARPS;
    let shared = 4 * ((2 * states + 2 * group) * PITCH + 2 * states * group);
    let grid = [inputs.segments.len() * channels.div_ceil(group), 1, 1];
    // SAFETY: as above; the kept states have a row for every span.
    unsafe { cuda.launch_with(&FORWARD, (dtype, "scan_forward"), grid, 32 * FORWARD_WARPS, shared, &params) };
    Ok(kept)
}

/// Bytes of shared memory of a block of the backward pass that works on `groups` groups of channels.
fn backward_shared(states: usize, warps: usize, groups: usize) -> usize {
    let (group, sums) = (2 * warps, if groups > 1 { 2 * states } else { 0 });
    let tiles = (2 * states + 3 * group + 4 * warps + sums) * PITCH;
    4 * (tiles + (2 + 2 * groups) * states * group + 2 * groups * group)
}

/// Gradients as [`super::backward`] says.
pub(super) fn backward(
    cuda: &Cuda,
    inputs: &Inputs,
    kept: &Tensor,
    dy: View,
    dstate: Option<&mut Tensor>,
    activations: InputGrads,
    parameters: ParamGrads,
) -> Result<()> {
    let segments = cuda.segments(inputs.segments)?;
    let (rows, channels, states, dtype) = (inputs.x.rows(), inputs.channels(), inputs.states(), inputs.x.dtype());
    let device = inputs.x.device();
    let expected = [inputs.spans(), states, channels];
    assert!(kept.shape() == expected, "kept states are {:?} and should be {expected:?}", kept.shape());
    // 12 warps where their tiles fit (`WARPS` of backward.cu).
    let warps = if cuda.info().compute == (9, 0) { 12 } else { 4 };
    let group = 2 * warps;
    let blocks = |groups: usize| channels.div_ceil(group * groups);
    let fits = |groups: usize| backward_shared(states, warps, groups) <= cuda.info().shared_bytes;
    let enough = |groups: usize| blocks(groups) * inputs.segments.len() >= ENOUGH_BLOCKS;
    let groups = [4, 2].into_iter().find(|groups| fits(*groups) && enough(*groups)).unwrap_or(1);
    let blocks = blocks(groups);

    let InputGrads { dx, ddt, db, dc } = activations;
    let (dx, ddt, db, dc) = (dx.as_view(), ddt.as_view(), db.as_view(), dc.as_view());
    let selected = Tensor::empty(device, &[blocks, 2 * states, rows], DType::F32)?;
    let width = channels * (states + 2);
    let sums = Tensor::empty(device, &[inputs.segments.len(), width], DType::F32)?;
    let params = GradParams {
        inputs: Params { kept: kept.address(), ..inputs.params(segments.segments(), dstate) },
        dy: dy.address(),
        dx: dx.address(),
        ddt: ddt.address(),
        selected: selected.address(),
        parameters: sums.address(),
        dy_stride: dy.stride() as u32,
        dx_stride: dx.stride() as u32,
        ddt_stride: ddt.stride() as u32,
        rows: rows as u32,
        groups: groups as u32,
    };
    let (grid, shared) = ([inputs.segments.len() * blocks, 1, 1], backward_shared(states, warps, groups));
    // SAFETY: shapes, segments and slots were checked by the caller; what is written is mutably borrowed or was just made.
    unsafe { cuda.launch_with(&BACKWARD, (dtype, "scan_backward"), grid, 32 * warps, shared, &params) };
    let params = ReduceParams {
        selected: selected.address(),
        db: db.address(),
        dc: dc.address(),
        db_stride: db.stride() as u32,
        dc_stride: dc.stride() as u32,
        blocks: blocks as u32,
        states: states as u32,
        rows: rows as u32,
    };
    // SAFETY: as above.
    unsafe { cuda.launch_with(&BACKWARD, (dtype, "scan_reduce"), crate::device::cuda::blocks(2 * states * rows), 256, 0, &params) };
    let ParamGrads { da_log, dd, ddt_bias } = parameters;
    for (d, first) in [(&da_log, 0), (&dd, channels * states), (&ddt_bias, channels * (states + 1))] {
        add::cuda::add_up(cuda, d, sums.address(), [inputs.segments.len(), width], first);
    }
    Ok(())
}
