//! `x + conv(RMSNorm(x))`: the causal convolution before the TTT layer.

use crate::Result;
use crate::config::Config;
use crate::layer::Pass;
use crate::ops::{add, conv, rms_norm};
use crate::params::{ParamId, Params};
use crate::tensor::Tensor;

/// The sub-block's parameters.
#[derive(Clone, Debug)]
pub(super) struct PreConv {
    norm: ParamId,
    weight: ParamId,
    bias: ParamId,
    eps: f64,
}

impl PreConv {
    pub(super) fn new(config: &Config, (norm, weight, bias): (ParamId, ParamId, ParamId)) -> PreConv {
        PreConv { norm, weight, bias, eps: config.rms_norm_eps }
    }

    /// `x [n, D]` to `[n, D]`; `window` is moved on.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: &Tensor, window: Option<&mut Tensor>) -> Result<Tensor> {
        let normed = rms_norm::forward(x.view(), pass.weights.view(self.norm), self.eps)?;
        let (w, b) = (pass.weights.view(self.weight), pass.weights.view(self.bias));
        let mut y = conv::forward(normed.view(), w, b, pass.segments, window.as_deref())?;
        if let Some(window) = window {
            conv::advance(normed.view(), pass.segments, window);
        }
        add::add_to(y.view_mut(), x.view());
        Ok(y)
    }

    /// Gradient of `x` from the gradient of the output, for sequences that began with an empty window.
    pub(super) fn backward(&self, pass: &Pass<'_>, x: &Tensor, dy: Tensor, grads: &mut Params) -> Result<Tensor> {
        let normed = rms_norm::forward(x.view(), pass.weights.view(self.norm), self.eps)?;
        let [dw, db] = grads.views_mut([self.weight, self.bias]);
        let dnormed = conv::backward(dy.view(), normed.view(), pass.weights.view(self.weight), pass.segments, None, dw, db, None)?;
        let dnorm = grads.view_mut(self.norm);
        let mut dx = rms_norm::backward(dnormed.view(), x.view(), pass.weights.view(self.norm), self.eps, dnorm)?;
        add::add_to(dx.view_mut(), dy.view());
        Ok(dx)
    }
}
