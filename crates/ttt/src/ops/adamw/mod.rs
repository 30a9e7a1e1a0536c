//! AdamW (decoupled weight decay), as the paper's recipe has it: bias-corrected moments, eps outside the square root, decay
//! times the current learning rate. Which elements decay is the caller's choice ([`step_part`]).

mod cpu;
pub(crate) mod cuda;
mod reference;

use std::ops::Range;

use crate::ops::verdict::cuda::Verdict;
use crate::ops::{expect_shape, fast};
use crate::tensor::{Tensor, with_dtype};

/// What does not change from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decay of the parameters, times the learning rate.
    pub weight_decay: f64,
}

/// The numbers of one step.
#[derive(Clone, Copy)]
pub(crate) struct Factors {
    beta1: f64,
    beta2: f64,
    /// 1 over the bias correction of each moment.
    unbias1: f64,
    unbias2: f64,
    eps: f64,
    weight_decay: f64,
    lr: f64,
    grad_scale: f64,
}

impl Factors {
    fn new(step: u64, lr: f64, grad_scale: f64, settings: &Settings) -> Factors {
        let Settings { beta1, beta2, eps, weight_decay } = *settings;
        let unbias = |beta: f64| 1.0 / (1.0 - beta.powf((step + 1) as f64));
        Factors { beta1, beta2, unbias1: unbias(beta1), unbias2: unbias(beta2), eps, weight_decay, lr, grad_scale }
    }
}

/// One update after `step` previous ones, with g = `grad_scale` · grads and t = `step` + 1:
/// `m ← β₁m + (1 − β₁)g`, `v ← β₂v + (1 − β₂)g²`,
/// `params −= lr ((m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + eps) + weight_decay · params)`.
///
/// # Panics
/// When the four tensors differ in their number of elements.
pub fn step(
    params: &mut Tensor,
    grads: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    step: u64,
    lr: f64,
    grad_scale: f64,
    settings: &Settings,
) {
    step_with_copies(params, None, grads, m, v, step, lr, grad_scale, settings);
}

/// [`step`] that also writes the new parameters in bf16 to `operands`: mixed precision on a GPU.
///
/// # Panics
/// When the tensors differ in their number of elements; on a CPU, when there are `operands`.
pub fn step_with_copies(
    params: &mut Tensor,
    operands: Option<&mut Tensor>,
    grads: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    step: u64,
    lr: f64,
    grad_scale: f64,
    settings: &Settings,
) {
    let all = 0..params.len();
    step_part(params, operands, grads, m, v, all, step, lr, grad_scale, settings);
}

/// [`step_with_copies`] of the elements `part` alone: those that do not decay, say.
///
/// # Panics
/// As there; when there are no such elements; on a GPU, when the part does not begin and end at multiples of 4.
pub fn step_part(
    params: &mut Tensor,
    operands: Option<&mut Tensor>,
    grads: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    part: Range<usize>,
    step: u64,
    lr: f64,
    grad_scale: f64,
    settings: &Settings,
) {
    for (name, tensor) in [("grads", grads), ("m", &*m), ("v", &*v)] {
        expect_shape(name, [tensor.len(), 1], [params.len(), 1]);
    }
    let factors = Factors::new(step, lr, grad_scale, settings);
    let device = params.device().clone();
    if let Some(gpu) = device.as_cuda() {
        return cuda::step(gpu, params, operands, grads, [m, v], part, factors, None);
    }
    assert!(operands.is_none(), "copies for products are a GPU's");
    let fast = fast(params.device(), params.dtype());
    with_dtype!(params.dtype(), E => {
        let (params, grads) = (&mut params.as_mut_slice::<E>()[part.clone()], &grads.as_slice::<E>()[part.clone()]);
        let (m, v) = (&mut m.as_mut_slice::<E>()[part.clone()], &mut v.as_mut_slice::<E>()[part]);
        if fast {
            let [params, m, v] = [params, m, v].map(bytemuck::cast_slice_mut);
            cpu::step(params, bytemuck::cast_slice(grads), m, v, factors);
        } else {
            reference::step(params, grads, m, v, factors);
        }
    });
}

/// [`step_part`] on a GPU, which has found the scale of the gradient itself and makes no update where something was not finite.
///
/// # Panics
/// As there, and on a CPU.
pub(crate) fn step_judged(
    params: &mut Tensor,
    operands: Option<&mut Tensor>,
    grads: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    part: Range<usize>,
    step: u64,
    lr: f64,
    verdict: &Verdict,
    settings: &Settings,
) {
    let device = params.device().clone();
    let gpu = device.as_cuda().expect("a verdict is a GPU's");
    for (name, tensor) in [("grads", grads), ("m", &*m), ("v", &*v)] {
        expect_shape(name, [tensor.len(), 1], [params.len(), 1]);
    }
    cuda::step(gpu, params, operands, grads, [m, v], part, Factors::new(step, lr, 1.0, settings), Some(verdict));
}
