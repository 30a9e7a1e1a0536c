//! One token of each sequence on a GPU, in few launches.

use super::learner::Learner;
use super::{LAYER_NORM_EPS, TttLayer};
use crate::Result;
use crate::config::Inner;
use crate::layer::Pass;
use crate::layer::pre_conv::PreConv;
use crate::ops::inner::FastWeights;
use crate::ops::step;
use crate::ops::ttt_linear::cuda::step as token;
use crate::params::{LrIds, ParamId};
use crate::tensor::{DType, Tensor};

impl TttLayer {
    /// Whether [`TttLayer::decode`] is for this layer and such activations.
    pub(in crate::layer) fn decodes(&self, x: &Tensor, taps: usize) -> bool {
        let gpu = x.device().as_cuda().filter(|_| x.dtype() == DType::Bf16 && self.learned_rate().is_some());
        match (gpu, self.learner) {
            (Some(gpu), Learner::MiniBatch { inner: Inner::Linear, mini_batch }) => {
                token::covers(gpu, x.dtype(), self.head_dim, mini_batch, taps)
            }
            _ => false,
        }
    }

    /// Weight and bias of the learning rate's gate, token scale, and LayerNorm of the inner model, where all of them are learned.
    fn learned_rate(&self) -> Option<(LrIds, ParamId, (ParamId, ParamId))> {
        let lr = self.ids.lr?;
        Some((lr, lr.token_idx?, self.ids.ttt_norm?))
    }

    /// The convolution before the layer and the layer for one token of each sequence: `x` becomes `x' = x + conv(norm(x))`, or stays
    /// x where there is no convolution, and then `x' + layer(norm'(x'))`. `norm` is the weight of the latter norm.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When [`TttLayer::decodes`] says no.
    pub(in crate::layer) fn decode(
        &self,
        pass: &Pass<'_>,
        x: &mut Tensor,
        before: Option<(&PreConv, &mut Tensor)>,
        (norm, eps): (ParamId, f64),
        fast: &mut FastWeights,
        window: Option<&mut Tensor>,
    ) -> Result<()> {
        let (w, ids) = (pass.weights, &self.ids);
        let (lr, token_idx, ttt_norm) = self.learned_rate().expect("a learned rate");
        let device = x.device().clone();
        let gpu = device.as_cuda().expect("a GPU");
        let matrix = w.matrices(ids.q_proj, self.last_projection());
        let ((projected, normed), mut before) = match before {
            Some((conv, window)) => {
                let (product, now) = conv.decode(pass, x, (w.view(norm), eps), matrix, window)?;
                (product, now.map(|now| (window, now)))
            }
            None => (step::norm_linear(x.view(), w.view(norm), eps, matrix)?, None),
        };
        let inputs = token::Inputs {
            projected: projected.view(),
            normed: normed.view(),
            rate: (w.operand(lr.weight, lr.weight), w.view(lr.bias).reshape(1, self.heads), self.lr_scale(pass)),
            token_idx: w.view(token_idx),
            norm: [w.view(ttt_norm.0), w.view(ttt_norm.1)],
            rope: pass.rope(),
            convs: ids.convs.map(|convs| convs.map(|(weight, bias)| (w.view(weight), w.view(bias)))),
            segments: pass.segments,
        };
        let before = before.as_mut().map(|(window, now)| (&mut **window, &*now));
        let z = token::step(gpu, &inputs, fast, window, before)?;
        let post_norm = [w.view(ids.post_norm.0), w.view(ids.post_norm.1)];
        step::add_gated_linear(x, z.view(), post_norm, LAYER_NORM_EPS, self.gate(&projected), w.matrix(ids.o_proj))
    }
}
