//! What the learner of a TTT layer reads beside q, k and v: inner learning rates and token scales.

use super::{Learner, TttLayer};
use crate::Result;
use crate::device::view::View;
use crate::layer::Pass;
use crate::ops::{inner_lr, token_scale};
use crate::tensor::{DType, Tensor};

/// What the learner reads beside q, k and v. Linear attention reads none of it.
#[derive(Debug)]
pub(super) struct Rates {
    /// Inner learning rates `[n, h]`; of linear attention without rows.
    pub(super) lr: Tensor,
    /// Token scales `[1, K]`; without mini-batches without columns.
    pub(super) tok: Tensor,
    /// `[h, d]` in the place of a LayerNorm's weight and bias that the inner model does not have.
    pub(super) no_norm: Option<Tensor>,
}

impl Rates {
    pub(super) fn bytes(&self) -> usize {
        self.lr.bytes() + self.tok.bytes() + self.no_norm.as_ref().map_or(0, Tensor::bytes)
    }
}

impl TttLayer {
    /// The learned rates, those that are fixed, or none.
    pub(super) fn rates(&self, pass: &Pass<'_>, x: View<'_>) -> Result<Rates> {
        let (w, device, n) = (pass.weights, x.device(), x.rows());
        let dtype = if x.dtype() == DType::Bf16 { DType::F32 } else { x.dtype() };
        let filled = |shape: &[usize], value: &dyn Fn(usize) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = (0..shape.iter().product()).map(value).collect();
            Tensor::from_slice(&device.cpu_beside(), shape, &values)?.cast(dtype)?.to(device)
        };
        let mini_batch = match self.learner {
            Learner::MiniBatch { mini_batch, .. } => mini_batch,
            Learner::Batch { .. } | Learner::Attention(_) => 0,
        };
        let (lr, tok) = match (self.learner, self.ids.lr) {
            (Learner::Attention(_), _) => (filled(&[0, self.heads], &|_| 0.0)?, filled(&[1, 0], &|_| 0.0)?),
            (_, Some(ids)) => {
                let (weight, bias) = (w.operand(ids.weight, ids.weight), w.view(ids.bias).reshape(1, self.heads));
                let lr = inner_lr::forward(x, weight, bias, self.lr_scale(pass))?;
                let tok = match ids.token_idx {
                    Some(token_idx) => token_scale::forward(w.view(token_idx))?,
                    None => filled(&[1, 0], &|_| 0.0)?,
                };
                (lr, tok)
            }
            (_, None) => {
                let lr = filled(&[n, self.heads], &|_| self.base_lr * pass.inner_lr)?;
                (lr, filled(&[1, mini_batch], &|i| self.token_scale.at(i))?)
            }
        };
        let no_norm = match self.ids.ttt_norm {
            None => Some(Tensor::zeros(device, &[self.heads, self.head_dim], dtype)?),
            Some(_) => None,
        };
        Ok(Rates { lr, tok, no_norm })
    }
}
