//! The selective scan of Mamba (Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752,
//! section 3.2 and algorithm 2): of every channel c and state s along time
//!
//! `h[t] = exp(δ[t, c] A[c, s]) h[t − 1] + δ[t, c] x[t, c] B[t, s]`, `y[t, c] = D[c] x[t, c] + Σ_s C[t, s] h[t]`,
//!
//! with the step size `δ = softplus(dt + dt_bias)` and `A = −exp(A_log)`. Both are computed inside: of `dt` and `A_log` the backward
//! pass needs the values anyway, so that neither δ nor its gradient is ever a tensor, and one more exponential and logarithm for
//! a step size is little beside the exponentials of its N states. The gate is another operation ([`crate::ops::silu`]).
//!
//! Letters: n rows, c channels, N states of a channel. States are `[slots, N, c]`: all implementations work on neighbouring
//! channels at once (lanes of a vector on a CPU, threads on a GPU), so channels lie side by side. Each segment has a slot of its
//! own. The phase of a segment means nothing here: any cut is exact.

mod cpu;
pub(crate) mod cuda;
mod math;
pub(crate) mod reference;

pub(crate) use cpu::{backward_scratch, forward_scratch};

use crate::Result;
use crate::batch::Segment;
use crate::device::view::{Mat, MatMut, View, ViewMut};
use crate::ops::{expect_segments, expect_shape, fast};
use crate::tensor::{Element, Tensor, with_dtype};

/// Tokens between two kept states. The backward pass computes those between again: at 64 the kept states of N = 16 take a quarter
/// of the memory of x, and what a vector of channels has to remember of one chunk fits the second-level cache.
pub const CHUNK: usize = 64;

/// What the scan reads.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// `[n, c]`.
    pub x: View<'a>,
    /// Step sizes before bias and softplus, `[n, c]`.
    pub dt: View<'a>,
    /// How a token enters the states, `[n, N]`.
    pub b: View<'a>,
    /// How states are read, `[n, N]`.
    pub c: View<'a>,
    /// Logarithm of −A, `[c, N]`.
    pub a_log: View<'a>,
    /// The skip, `[1, c]`.
    pub d: View<'a>,
    /// Bias of the step sizes, `[1, c]`.
    pub dt_bias: View<'a>,
    /// The sequences.
    pub segments: &'a [Segment],
}

/// What [`backward`] needs besides the inputs.
#[derive(Debug)]
pub struct Saved {
    /// States at the start of every [`CHUNK`] of every segment, `[chunks, N, c]`; on a GPU as its kernels keep them.
    states: Tensor,
}

impl Saved {
    /// Bytes held for the backward pass.
    pub fn bytes(&self) -> usize {
        self.states.bytes()
    }

    /// `[chunks · N, c]`.
    fn rows<E: Element>(&self) -> Mat<'_, E> {
        let channels = self.states.shape()[2];
        Mat::new(self.states.as_slice(), self.states.len() / channels.max(1), channels)
    }
}

/// Where gradients of activations go; they are overwritten.
pub struct InputGrads<'a> {
    /// `[n, c]`.
    pub dx: ViewMut<'a>,
    /// `[n, c]`.
    pub ddt: ViewMut<'a>,
    /// `[n, N]`.
    pub db: ViewMut<'a>,
    /// `[n, N]`.
    pub dc: ViewMut<'a>,
}

/// Where gradients of parameters go; they are added to.
pub struct ParamGrads<'a> {
    /// `[c, N]`.
    pub da_log: ViewMut<'a>,
    /// `[1, c]`.
    pub dd: ViewMut<'a>,
    /// `[1, c]`.
    pub ddt_bias: ViewMut<'a>,
}

/// The inputs with their element type.
#[derive(Clone, Copy)]
pub(crate) struct Mats<'a, E> {
    pub(crate) x: Mat<'a, E>,
    pub(crate) dt: Mat<'a, E>,
    pub(crate) b: Mat<'a, E>,
    pub(crate) c: Mat<'a, E>,
    pub(crate) a_log: Mat<'a, E>,
    pub(crate) d: &'a [E],
    pub(crate) dt_bias: &'a [E],
    pub(crate) segments: &'a [Segment],
}

/// [`InputGrads`] with their element type.
pub(crate) struct InputGradMats<'a, E> {
    pub(crate) dx: MatMut<'a, E>,
    pub(crate) ddt: MatMut<'a, E>,
    pub(crate) db: MatMut<'a, E>,
    pub(crate) dc: MatMut<'a, E>,
}

/// [`ParamGrads`] with their element type.
pub(crate) struct ParamGradMats<'a, E> {
    pub(crate) da_log: MatMut<'a, E>,
    pub(crate) dd: MatMut<'a, E>,
    pub(crate) ddt_bias: MatMut<'a, E>,
}

impl<'a> Inputs<'a> {
    fn channels(&self) -> usize {
        self.x.cols()
    }

    fn states(&self) -> usize {
        self.a_log.cols()
    }

    fn chunks(&self) -> usize {
        self.segments.iter().map(|s| s.len.div_ceil(CHUNK)).sum()
    }

    #[track_caller]
    fn check(&self, state: Option<&Tensor>) {
        let (rows, channels, states) = (self.x.rows(), self.channels(), self.states());
        expect_segments(self.segments, rows);
        expect_shape("dt", self.dt.shape(), [rows, channels]);
        expect_shape("b", self.b.shape(), [rows, states]);
        expect_shape("c", self.c.shape(), [rows, states]);
        expect_shape("a_log", self.a_log.shape(), [channels, states]);
        expect_shape("d", self.d.shape(), [1, channels]);
        expect_shape("dt_bias", self.dt_bias.shape(), [1, channels]);
        let slots = self.segments.iter().map(|s| s.slot + 1).max().unwrap_or(0);
        if let Some(state) = state {
            let fits = matches!(*state.shape(), [s, n, c] if s >= slots && n == states && c == channels);
            assert!(fits, "states are {:?} and should be [at least {slots}, {states}, {channels}]", state.shape());
        }
    }

    fn mats<E: Element>(&self) -> Mats<'a, E> {
        Mats {
            x: self.x.as_mat(),
            dt: self.dt.as_mat(),
            b: self.b.as_mat(),
            c: self.c.as_mat(),
            a_log: self.a_log.as_mat(),
            d: self.d.as_mat().row(0),
            dt_bias: self.dt_bias.as_mat().row(0),
            segments: self.segments,
        }
    }
}

/// A tensor `[a, N, c]` as the matrix `[a · N, c]`; nothing as one without rows.
fn rows_of<E: Element>(tensor: Option<&mut Tensor>, channels: usize) -> MatMut<'_, E> {
    match tensor {
        Some(tensor) => {
            let rows = tensor.len() / channels.max(1);
            MatMut::new(tensor.as_mut_slice(), rows, channels)
        }
        None => MatMut::new(&mut [], 0, channels),
    }
}

/// `y [n, c]`, and what [`backward`] needs when `keep` says so. `state` is moved on; without one every segment starts from zero.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When a shape is not as above, or the segments do not cover the rows one behind the other; on a GPU with more than 16 states.
pub fn forward(inputs: &Inputs, state: Option<&mut Tensor>, keep: bool) -> Result<(Tensor, Option<Saved>)> {
    inputs.check(state.as_deref());
    let (device, dtype, channels) = (inputs.x.device(), inputs.x.dtype(), inputs.channels());
    let mut y = Tensor::empty(device, &inputs.x.shape(), dtype)?;
    if let Some(gpu) = device.as_cuda() {
        let kept = cuda::forward(gpu, inputs, state, keep, &mut y)?;
        return Ok((y, kept.map(|states| Saved { states })));
    }
    let mut kept = match keep {
        true => Some(Tensor::empty(device, &[inputs.chunks(), inputs.states(), channels], dtype)?),
        false => None,
    };
    if fast(device, dtype) {
        let (state, kept) = (rows_of(state, channels), rows_of(kept.as_mut(), channels));
        cpu::forward(device, inputs.mats(), state, kept, y.view_mut().into_mat())?;
    } else {
        with_dtype!(dtype, E => {
            let (state, kept) = (rows_of::<E>(state, channels), rows_of(kept.as_mut(), channels));
            reference::forward(inputs.mats(), state, kept, y.view_mut().into_mat());
        });
    }
    Ok((y, kept.map(|states| Saved { states })))
}

/// Gradients of everything from `dy [n, c]`. `dstate` holds the gradient of the states that the segments ended with and becomes
/// that of the states they began with; without it nothing follows them.
///
/// With g the gradient of `h[t]`, a = exp(δ A) and w = g a h[t − 1]: `dB = Σ_c g δ x`, `dC = Σ_c dy h[t]`,
/// `dδ = Σ_s w A + x Σ_s g B`, `dx = δ Σ_s g B + D dy`, `dA = Σ_t w δ`, and `h[t − 1]` gets `g a`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// As [`forward`]; when `saved` is of other inputs.
pub fn backward(
    inputs: &Inputs,
    saved: &Saved,
    dy: View,
    dstate: Option<&mut Tensor>,
    activations: InputGrads,
    parameters: ParamGrads,
) -> Result<()> {
    inputs.check(dstate.as_deref());
    let (rows, channels, states) = (inputs.x.rows(), inputs.channels(), inputs.states());
    expect_shape("dy", dy.shape(), [rows, channels]);
    let shapes = [
        ("dx", activations.dx.shape(), [rows, channels]),
        ("ddt", activations.ddt.shape(), [rows, channels]),
        ("db", activations.db.shape(), [rows, states]),
        ("dc", activations.dc.shape(), [rows, states]),
        ("da_log", parameters.da_log.shape(), [channels, states]),
        ("dd", parameters.dd.shape(), [1, channels]),
        ("ddt_bias", parameters.ddt_bias.shape(), [1, channels]),
    ];
    for (name, shape, should) in shapes {
        expect_shape(name, shape, should);
    }
    let (device, dtype) = (inputs.x.device(), inputs.x.dtype());
    if let Some(gpu) = device.as_cuda() {
        return cuda::backward(gpu, inputs, &saved.states, dy, dstate, activations, parameters);
    }
    let kept = [inputs.chunks(), states, channels];
    assert!(saved.states.shape() == kept, "kept states are {:?} and should be {kept:?}", saved.states.shape());
    if fast(device, dtype) {
        let (activations, parameters) = grad_mats(activations, parameters);
        let (kept, dstate) = (saved.rows(), rows_of(dstate, channels));
        return cpu::backward(device, inputs.mats(), kept, dy.as_mat(), dstate, activations, parameters);
    }
    with_dtype!(dtype, E => {
        let (activations, parameters) = grad_mats::<E>(activations, parameters);
        let (kept, dstate) = (saved.rows(), rows_of(dstate, channels));
        reference::backward(inputs.mats(), kept, dy.as_mat(), dstate, activations, parameters);
    });
    Ok(())
}

fn grad_mats<'a, E: Element>(
    activations: InputGrads<'a>,
    parameters: ParamGrads<'a>,
) -> (InputGradMats<'a, E>, ParamGradMats<'a, E>) {
    let InputGrads { dx, ddt, db, dc } = activations;
    let ParamGrads { da_log, dd, ddt_bias } = parameters;
    (
        InputGradMats { dx: dx.into_mat(), ddt: ddt.into_mat(), db: db.into_mat(), dc: dc.into_mat() },
        ParamGradMats { da_log: da_log.into_mat(), dd: dd.into_mat(), ddt_bias: ddt_bias.into_mat() },
    )
}
