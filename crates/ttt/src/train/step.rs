//! One optimizer step: gradients of one or more micro-batches, global-norm clip, AdamW.

use std::sync::Arc;

use crate::batch::Batch;
use crate::layer::Keep;
use crate::lm::Lm;
use crate::ops::adamw::{self, Settings};
use crate::ops::grad_norm;
use crate::params::{ParamTable, Params};
use crate::tensor::DType;
use crate::train::loss::sequence_mean_weights;
use crate::{Error, Result};

/// Sequences of one micro-batch: equal lengths or not, packed without padding.
#[derive(Clone, Debug, Default)]
pub struct MicroBatch {
    /// Inputs.
    pub batch: Batch,
    /// The token that follows each input.
    pub targets: Vec<u32>,
    /// 1 for targets that count in the loss, 0 for the others.
    pub mask: Vec<f64>,
}

impl MicroBatch {
    fn lens(&self) -> Vec<usize> {
        self.batch.seqs.iter().map(|s| s.len).collect()
    }
}

/// Rates and switches of one step.
#[derive(Clone, Copy, Debug)]
pub struct StepSettings {
    /// Learning rate.
    pub lr: f64,
    /// Factor of the inner learning rate.
    pub inner_lr: f64,
    /// Largest global norm of the gradient; a larger gradient is scaled down to it.
    pub clip: f64,
    /// The optimizer's constants.
    pub adamw: Settings,
    /// What the forward pass keeps.
    pub keep: Keep,
}

/// What a step saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean over sequences of the mean over counted targets, in nats.
    pub loss: f64,
    /// Sum of the counted negative log likelihoods, in nats.
    pub nll: f64,
    /// Number of counted targets.
    pub counted: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
}

/// The optimizer's memory: both moments, the gradient buffer and the number of updates made.
#[derive(Debug)]
pub struct Optimizer {
    /// First moment of what is learned.
    pub m: Params,
    /// Second moment of what is learned.
    pub v: Params,
    grads: Params,
    /// Where what is learned is brought together for an update, when that is not everything.
    part: Option<Part>,
    /// Updates made so far.
    pub step: u64,
}

/// Copies of the learned part of weights and gradients.
#[derive(Debug)]
struct Part {
    weights: Params,
    grads: Params,
}

impl Optimizer {
    /// Zero moments for a model.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or a model that is not in f32.
    pub fn new(model: &Lm) -> Result<Optimizer> {
        check_dtype(model)?;
        let zeros = || Params::zeros(model.params().table(), model.device(), model.dtype());
        Ok(Optimizer { m: zeros()?, v: zeros()?, grads: zeros()?, part: None, step: 0 })
    }

    /// One that learns the initial fast weights, W0, and leaves every other parameter as it is. Nothing is kept for those, and the
    /// gradients of frozen matrices are not computed. Clipping looks at the gradient of W0 alone.
    ///
    /// # Errors
    /// As [`Optimizer::new`].
    pub fn of_initial_state(model: &Lm) -> Result<Optimizer> {
        check_dtype(model)?;
        let all = model.params().table();
        let table = Arc::new(all.initial_state());
        let zeros = |table: &Arc<ParamTable>| Params::zeros(table, model.device(), model.dtype());
        let part = Some(Part { weights: zeros(&table)?, grads: zeros(&table)? });
        let grads = zeros(&Arc::new(all.gradients_of_initial_state()))?;
        Ok(Optimizer { m: zeros(&table)?, v: zeros(&table)?, grads, part, step: 0 })
    }

    /// One step over `micro_batches`, whose sequences all weigh the same.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when the loss or the gradient is not finite: the weights and moments are as before the step. Memory.
    pub fn step(&mut self, model: &mut Lm, micro_batches: &[MicroBatch], settings: &StepSettings) -> Result<StepReport> {
        let (loss, nll, counted) = self.gradients(model, micro_batches, settings)?;
        let device = model.device().clone();
        let grads = match &mut self.part {
            Some(part) => {
                part.grads.copy_shared(&self.grads);
                &part.grads
            }
            None => &self.grads,
        };
        let grad_norm = device.install(|| grad_norm::sum_of_squares(grads.data())).sqrt();
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(self.not_finite(model, micro_batches, settings.inner_lr)?);
        }
        let scale = if grad_norm > settings.clip { settings.clip / grad_norm } else { 1.0 };
        let (m, v, made) = (self.m.data_mut(), self.v.data_mut(), self.step);
        let mut update = |weights: &mut Params, grads: &Params| {
            device.install(|| adamw::step(weights.data_mut(), grads.data(), m, v, made, settings.lr, scale, &settings.adamw));
        };
        match &mut self.part {
            Some(Part { weights, grads }) => {
                weights.copy_shared(model.params());
                update(weights, grads);
                model.params_mut().copy_shared(weights);
            }
            None => update(model.params_mut(), &self.grads),
        }
        self.step += 1;
        Ok(StepReport { loss, nll, counted, grad_norm })
    }

    /// Gradients of the mean over all sequences: `(loss, sum of counted likelihoods, counted targets)`; they are in the gradient
    /// buffer afterwards.
    fn gradients(&mut self, model: &Lm, micro_batches: &[MicroBatch], settings: &StepSettings) -> Result<(f64, f64, f64)> {
        model.device().install(|| self.grads.data_mut().fill_zero());
        let sequences: usize = micro_batches.iter().map(|m| m.batch.seqs.len()).sum();
        let (mut loss, mut sum, mut counted) = (0.0, 0.0, 0.0);
        for micro in micro_batches {
            let share = micro.batch.seqs.len() as f64 / sequences as f64;
            let weights: Vec<f64> = sequence_mean_weights(&micro.mask, &micro.lens()).iter().map(|w| w * share).collect();
            let (hidden, saved) = model.forward(&micro.batch, None, settings.keep, settings.inner_lr)?;
            let (nll, dhidden) = model.loss(&hidden, &micro.targets, &weights, &mut self.grads)?;
            drop(hidden);
            model.backward(&micro.batch, saved.expect("the pass keeps something"), dhidden, &mut self.grads)?;
            loss += nll.iter().zip(&weights).map(|(n, w)| n * w).sum::<f64>();
            sum += nll.iter().zip(&micro.mask).map(|(n, m)| n * m).sum::<f64>();
            counted += micro.mask.iter().sum::<f64>();
        }
        Ok((loss, sum, counted))
    }

    /// Looks for the first tensor that is not finite: parameters, then activations in the order of the forward pass, then gradients.
    fn not_finite(&self, model: &Lm, micro_batches: &[MicroBatch], inner_lr: f64) -> Result<Error> {
        let at = |tensor: String, element| Error::NotFinite { step: self.step, tensor, element };
        let first_in = |params: &Params, what: &str| {
            params.table().entries().iter().find_map(|e| {
                let element = params.data().as_slice::<f32>()[e.range()].iter().position(|x| !x.is_finite())?;
                Some(at(format!("{what}{}", e.name), element))
            })
        };
        if let Some(found) = first_in(model.params(), "") {
            return Ok(found);
        }
        for micro in micro_batches {
            if let Some((name, element)) = model.first_non_finite(&micro.batch, inner_lr)? {
                return Ok(at(name, element));
            }
        }
        Ok(first_in(&self.grads, "gradient of ").unwrap_or_else(|| at("global norm of the gradient".into(), 0)))
    }
}

fn check_dtype(model: &Lm) -> Result<()> {
    match model.dtype() {
        DType::F32 => Ok(()),
        _ => Err(Error::Config("training runs in f32 on a CPU".into())),
    }
}
