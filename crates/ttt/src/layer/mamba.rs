//! The Mamba layer (Gu and Dao, arXiv 2312.00752, section 3.4 and figure 3): an input projection to x and a gate, a causal
//! convolution and SiLU over x, step sizes, B and C selected by what comes out, the selective scan with its skip, the gate, and an
//! output projection.

use crate::Result;
use crate::config::Config;
use crate::device::view::View;
use crate::layer::state::{CONV_WINDOW, RECURRENT};
use crate::layer::{Carried, Pass, carry};
use crate::ops::selective_scan::{self, InputGrads, Inputs, ParamGrads};
use crate::ops::{add, conv, linear, silu};
use crate::params::{MambaIds, Params};
use crate::tensor::Tensor;
use crate::weights::Weights;

/// A Mamba layer's parameters and sizes.
#[derive(Clone, Debug)]
pub struct MambaLayer {
    ids: MambaIds,
    /// Inner channels.
    inner: usize,
    /// States of a channel.
    states: usize,
    /// Rank of the projection to step sizes.
    rank: usize,
    /// Inputs that the convolution looks back at.
    memory: usize,
}

/// What a Mamba layer carries.
#[derive(Clone, Debug)]
pub struct MambaState {
    /// Last inputs of the convolution, `[slots, taps - 1, inner]`.
    pub window: Tensor,
    /// The recurrence's state, `[slots, states, inner]`.
    pub recurrent: Tensor,
}

/// What a Mamba layer's backward pass needs. The convolution, its activation and the step sizes are computed again, as in the
/// authors' code: three tensors of the inner width for four taps and a product of low rank.
#[derive(Debug)]
pub struct MambaSaved {
    /// `[x | gate] [n, 2 inner]`.
    projected: Tensor,
    /// `[step | B | C] [n, rank + 2 states]`.
    selected: Tensor,
    /// Output of the scan, `[n, inner]`.
    y: Tensor,
    /// Kept states of the scan.
    scan: selective_scan::Saved,
    /// The convolution's window at the beginning, when the sequences had one.
    window: Option<Tensor>,
}

/// What [`MambaSaved`] has, whether or not it is kept.
struct Mixed {
    projected: Tensor,
    selected: Tensor,
    y: Tensor,
    scan: Option<selective_scan::Saved>,
    window: Option<Tensor>,
}

impl MambaSaved {
    /// Bytes held for the backward pass.
    pub fn bytes(&self) -> usize {
        let tensors = [Some(&self.projected), Some(&self.selected), Some(&self.y), self.window.as_ref()];
        tensors.into_iter().flatten().map(Tensor::bytes).sum::<usize>() + self.scan.bytes()
    }
}

impl MambaLayer {
    /// The layer of a model whose parameters are `ids`.
    pub fn new(config: &Config, ids: &MambaIds) -> MambaLayer {
        MambaLayer {
            ids: ids.clone(),
            inner: config.inner_size(),
            states: config.state_size,
            rank: config.step_rank(),
            memory: config.conv_kernel - 1,
        }
    }

    /// The state of `slots` sequences, each at its beginning: zeros.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn state(&self, weights: &Weights, slots: usize) -> Result<MambaState> {
        let zeros = |rows, dtype| Tensor::zeros(weights.device(), &[slots, rows, self.inner], dtype);
        // The recurrence sums up over a whole text, so its state is never narrower than f32.
        let recurrent = zeros(self.states, weights.storage().dtype())?;
        Ok(MambaState { window: zeros(self.memory, weights.dtype())?, recurrent })
    }

    /// `x [n, D]` (normed) to `[n, D]`. Without a state every sequence starts at its beginning.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward(&self, pass: &Pass<'_>, x: View<'_>, state: Option<&mut MambaState>) -> Result<(Tensor, Option<MambaSaved>)> {
        let Mixed { projected, selected, y, scan, window } = self.mix(pass, x, state)?;
        let gated = silu::gate(self.gate(&projected), y.view())?;
        let out = linear::forward(gated.view(), pass.weights.matrix(self.ids.out_proj))?;
        Ok((out, scan.map(|scan| MambaSaved { projected, selected, y, scan, window })))
    }

    /// [`MambaLayer::forward`] of which only some rows are wanted: gate and output are computed for `rows` alone. Keeps nothing.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward_rows(&self, pass: &Pass<'_>, x: View<'_>, rows: &[usize], state: &mut MambaState) -> Result<Tensor> {
        let Mixed { projected, y, .. } = self.mix(pass, x, Some(state))?;
        let (gate, y) = (add::gather(self.gate(&projected), rows)?, add::gather(y.view(), rows)?);
        linear::forward(silu::gate(gate.view(), y.view())?.view(), pass.weights.matrix(self.ids.out_proj))
    }

    /// The gate's projection.
    fn gate<'a>(&self, projected: &'a Tensor) -> View<'a> {
        projected.view().col_range(self.inner..2 * self.inner)
    }

    /// The convolution's input.
    fn input<'a>(&self, projected: &'a Tensor) -> View<'a> {
        projected.view().col_range(0..self.inner)
    }

    /// The convolution of sequences that began with `window`.
    fn convolve(&self, pass: &Pass<'_>, projected: &Tensor, window: Option<&Tensor>) -> Result<Tensor> {
        let (weight, bias) = self.ids.conv;
        conv::forward(self.input(projected), pass.weights.view(weight), pass.weights.view(bias), pass.segments, window)
    }

    /// Step sizes before bias and softplus, `[n, inner]`.
    fn steps(&self, pass: &Pass<'_>, selected: &Tensor) -> Result<Tensor> {
        linear::forward(selected.view().col_range(0..self.rank), pass.weights.matrix(self.ids.dt_proj.0))
    }

    fn scan_inputs<'a>(&self, pass: &Pass<'a>, x: &'a Tensor, dt: &'a Tensor, selected: &'a Tensor) -> Inputs<'a> {
        let (weights, ids, b) = (pass.weights, &self.ids, self.rank);
        Inputs {
            x: x.view(),
            dt: dt.view(),
            b: selected.view().col_range(b..b + self.states),
            c: selected.view().col_range(b + self.states..b + 2 * self.states),
            a_log: weights.view(ids.a_log),
            d: weights.view(ids.d),
            dt_bias: weights.view(ids.dt_proj.1),
            segments: pass.segments,
        }
    }

    /// Everything up to the output of the scan.
    fn mix(&self, pass: &Pass<'_>, x: View<'_>, state: Option<&mut MambaState>) -> Result<Mixed> {
        let kept = pass.keep.activations();
        let (mut window, recurrent) = match state {
            Some(MambaState { window, recurrent }) => (Some(window), Some(recurrent)),
            None => (None, None),
        };
        let start = window.as_deref().filter(|_| kept).map(Tensor::copy).transpose()?;
        let projected = linear::forward(x, pass.weights.matrix(self.ids.in_proj))?;
        let convolved = self.convolve(pass, &projected, window.as_deref())?;
        if let Some(window) = &mut window {
            conv::advance(self.input(&projected), pass.segments, window);
        }
        let u = silu::forward(convolved.view())?;
        drop(convolved);
        let selected = linear::forward(u.view(), pass.weights.matrix(self.ids.x_proj))?;
        let dt = self.steps(pass, &selected)?;
        let (y, scan) = selective_scan::forward(&self.scan_inputs(pass, &u, &dt, &selected), recurrent, kept)?;
        Ok(Mixed { projected, selected, y, scan, window: start })
    }

    /// Gradient of `x` from the gradient of the output. `dstate`, of one slot a sequence, holds the gradient of what the sequences
    /// ended with and becomes that of what they began with; without it nothing follows them.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        x: View<'_>,
        saved: MambaSaved,
        dout: View<'_>,
        dstate: Option<&mut Carried>,
        grads: &mut Params,
    ) -> Result<Tensor> {
        let (w, ids) = (pass.weights, &self.ids);
        let MambaSaved { projected, selected, y, scan, window } = saved;
        let (device, dtype) = (&y.device().clone(), y.dtype());
        let [dwindow, drecurrent] = dstate.map_or([None, None], |dstate| dstate.some_mut([CONV_WINDOW, RECURRENT]));
        let mut dprojected = Tensor::empty(device, projected.shape(), dtype)?;

        // Output projection and gate.
        let gated = silu::gate(self.gate(&projected), y.view())?;
        linear::backward_weight(dout, gated.view(), grads.view_mut(ids.out_proj));
        drop(gated);
        let dgated = linear::backward_input(dout, w.operand(ids.out_proj, ids.out_proj))?;
        let dgate = dprojected.view_mut().col_range(self.inner..2 * self.inner);
        let dy = silu::backward_gate(dgated.view(), self.gate(&projected), y.view(), dgate)?;
        drop((dgated, y));

        // The scan.
        let convolved = self.convolve(pass, &projected, window.as_ref())?;
        let u = silu::forward(convolved.view())?;
        let dt = self.steps(pass, &selected)?;
        let mut du = Tensor::empty(device, u.shape(), dtype)?;
        let mut ddt = Tensor::empty(device, dt.shape(), dtype)?;
        let mut dselected = Tensor::empty(device, selected.shape(), dtype)?;
        {
            let (_, rest) = dselected.view_mut().split_cols(self.rank);
            let (db, dc) = rest.split_cols(self.states);
            let activations = InputGrads { dx: du.view_mut(), ddt: ddt.view_mut(), db, dc };
            let [da_log, dd, ddt_bias] = grads.views_mut([ids.a_log, ids.d, ids.dt_proj.1]);
            let parameters = ParamGrads { da_log, dd, ddt_bias };
            let inputs = self.scan_inputs(pass, &u, &dt, &selected);
            selective_scan::backward(&inputs, &scan, dy.view(), drecurrent, activations, parameters)?;
        }
        drop((scan, dy, dt));

        // What was selected.
        linear::backward_weight(ddt.view(), selected.view().col_range(0..self.rank), grads.view_mut(ids.dt_proj.0));
        let dsteps = linear::backward_input(ddt.view(), w.operand(ids.dt_proj.0, ids.dt_proj.0))?;
        add::copy_to(dselected.view_mut().col_range(0..self.rank), dsteps.view());
        drop((ddt, dsteps, selected));
        linear::backward_weight(dselected.view(), u.view(), grads.view_mut(ids.x_proj));
        let du_selected = linear::backward_input(dselected.view(), w.operand(ids.x_proj, ids.x_proj))?;
        add::add_to(du.view_mut(), du_selected.view());
        drop((du_selected, dselected, u));

        // The convolution.
        let dconvolved = silu::backward(du.view(), convolved.view())?;
        drop((du, convolved));
        let [dweight, dbias] = grads.views_mut([ids.conv.0, ids.conv.1]);
        let mut dstart = dwindow.as_deref().map(|w| carry::zeros(w, pass.segments.len())).transpose()?;
        let (input, weight) = (self.input(&projected), w.view(ids.conv.0));
        let before = window.as_ref();
        let dinput = conv::backward(dconvolved.view(), input, weight, pass.segments, before, dweight, dbias, dstart.as_mut());
        let mut dinput = dinput?;
        if let (Some(dwindow), Some(mut dstart)) = (dwindow, dstart) {
            conv::backward_advance(dwindow, pass.segments, dinput.view_mut(), &mut dstart);
            *dwindow = dstart;
        }
        add::copy_to(dprojected.view_mut().col_range(0..self.inner), dinput.view());
        drop((dconvolved, dinput, projected));

        linear::backward_weight(dprojected.view(), x, grads.view_mut(ids.in_proj));
        linear::backward_input(dprojected.view(), w.operand(ids.in_proj, ids.in_proj))
    }
}
