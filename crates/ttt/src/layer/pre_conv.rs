//! `x + conv(RMSNorm(x))`: the causal convolution before the TTT layer.

use crate::Result;
use crate::config::Config;
use crate::device::WeightView;
use crate::device::view::View;
use crate::layer::{Pass, carry};
use crate::ops::{add, conv, rms_norm, step};
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

    /// `x [n, D]` becomes the sub-block's output for one token of each sequence. Returns the product of its norm with a matrix and
    /// that norm ([`step::norm_linear`]), and, if `window` was not moved on yet, what comes next into it.
    pub(super) fn decode(
        &self,
        pass: &Pass<'_>,
        x: &mut Tensor,
        (scale, eps): (View<'_>, f64),
        matrix: WeightView<'_>,
        window: &mut Tensor,
    ) -> Result<((Tensor, Tensor), Option<Tensor>)> {
        let [norm, weight, bias] = [self.norm, self.weight, self.bias].map(|id| pass.weights.view(id));
        if x.view().rows() <= step::FUSED_ROWS {
            let conv = step::Conv { scale: norm, weight, bias, segments: pass.segments, window };
            let made = step::conv_norm_linear(x.view(), conv, scale, eps, matrix)?;
            *x = made.residual;
            return Ok((made.product, Some(made.now)));
        }
        step::add_conv(x, norm, self.eps, [weight, bias], pass.segments, window)?;
        Ok((step::norm_linear(x.view(), scale, eps, matrix)?, None))
    }

    /// Gradient of `x` from the gradient of the output, for sequences that began with `window`, or with an empty one. `dwindow`
    /// holds the gradient of the windows that they ended with and becomes that of the windows they began with.
    pub(super) fn backward(
        &self,
        pass: &Pass<'_>,
        x: &Tensor,
        dy: Tensor,
        window: Option<&Tensor>,
        dwindow: Option<&mut Tensor>,
        grads: &mut Params,
    ) -> Result<Tensor> {
        let normed = rms_norm::forward(x.view(), pass.weights.view(self.norm), self.eps)?;
        let [dw, db] = grads.views_mut([self.weight, self.bias]);
        let mut dstart = dwindow.as_deref().map(|w| carry::zeros(w, pass.segments.len())).transpose()?;
        let w = pass.weights.view(self.weight);
        let mut dnormed = conv::backward(dy.view(), normed.view(), w, pass.segments, window, dw, db, dstart.as_mut())?;
        if let (Some(dwindow), Some(mut dstart)) = (dwindow, dstart) {
            conv::backward_advance(dwindow, pass.segments, dnormed.view_mut(), &mut dstart);
            *dwindow = dstart;
        }
        let dnorm = grads.view_mut(self.norm);
        let norm = pass.weights.view(self.norm);
        rms_norm::backward_onto(dnormed.view(), x.view(), norm, self.eps, dnorm, Some(dy.view()))
    }
}
