//! `x + SwiGLU(RMSNorm(x))`: the feed-forward sub-block.

use crate::Result;
use crate::config::Config;
use crate::layer::Pass;
use crate::ops::{linear, rms_norm, step, swiglu};
use crate::params::{FeedForwardIds, ParamId, Params};
use crate::tensor::Tensor;

/// The sub-block's parameters.
#[derive(Clone, Debug)]
pub(super) struct FeedForward {
    norm: ParamId,
    gate: ParamId,
    up: ParamId,
    down: ParamId,
    eps: f64,
}

impl FeedForward {
    pub(super) fn new(config: &Config, ids: &FeedForwardIds) -> FeedForward {
        FeedForward { norm: ids.norm, gate: ids.gate_proj, up: ids.up_proj, down: ids.down_proj, eps: config.rms_norm_eps }
    }

    /// `x [n, D]` to `[n, D]`, and the pre-activations `[gate | up] [n, 2 I]`.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let normed = rms_norm::forward(x.view(), pass.weights.view(self.norm), self.eps)?;
        let gate_up = linear::forward(normed.view(), pass.weights.matrices(self.gate, self.up))?;
        drop(normed);
        let hidden = swiglu::forward(gate_up.view())?;
        let y = linear::forward_onto(hidden.view(), pass.weights.matrix(self.down), x.view())?;
        Ok((y, gate_up))
    }

    /// `x [n, D]` becomes the sub-block's output, in few launches on a GPU.
    pub(super) fn decode(&self, pass: &Pass<'_>, x: &mut Tensor) -> Result<()> {
        let gate_up = pass.weights.matrices(self.gate, self.up);
        let hidden = step::norm_swiglu(x.view(), pass.weights.view(self.norm), self.eps, gate_up)?;
        step::add_linear(x, hidden.view(), pass.weights.matrix(self.down))
    }

    /// Gradient of `x` from the gradient of the output.
    pub(super) fn backward(&self, pass: &Pass<'_>, x: &Tensor, gate_up: Tensor, dy: Tensor, grads: &mut Params) -> Result<Tensor> {
        if grads.holds(self.down) {
            let hidden = swiglu::forward(gate_up.view())?;
            linear::backward_weight(dy.view(), hidden.view(), grads.view_mut(self.down));
        }
        let dhidden = linear::backward_input(dy.view(), pass.weights.operand(self.down, self.down))?;
        let dgate_up = swiglu::backward(dhidden.view(), gate_up.view())?;
        drop((dhidden, gate_up));
        if grads.holds(self.gate) {
            let normed = rms_norm::forward(x.view(), pass.weights.view(self.norm), self.eps)?;
            linear::backward_weight(dgate_up.view(), normed.view(), grads.fused_mut(self.gate, self.up));
        }
        let dnormed = linear::backward_input(dgate_up.view(), pass.weights.operand(self.gate, self.up))?;
        drop(dgate_up);
        let (norm, dnorm) = (pass.weights.view(self.norm), grads.view_mut(self.norm));
        rms_norm::backward_onto(dnormed.view(), x.view(), norm, self.eps, dnorm, Some(dy.view()))
    }
}
