//! One optimizer step: gradients of one or more micro-batches, global-norm clip, AdamW.
//!
//! A GPU's step is only queued ([`Optimizer::queue`]): its loss and the norm of its gradient are read when they are asked for
//! ([`Optimizer::settle`]), a step late in a training loop, so that the GPU never waits for the host.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::batch::Batch;
use crate::dstates::DStates;
use crate::layer::Keep;
use crate::layer::state::Extent;
use crate::lm::{Lm, Saved};
use crate::ops::adamw::{self, Settings};
use crate::ops::grad_norm;
use crate::ops::verdict::{Found, cuda::Verdict};
use crate::params::{ParamTable, Params};
use crate::state::States;
use crate::tensor::{DType, Tensor};
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
    /// Tokens of each sequence as the loss sees it: the documents of one slot are one.
    fn lens(&self) -> Vec<usize> {
        self.batch.seqs.chunk_by(|a, b| a.slot == b.slot).map(|seqs| seqs.iter().map(|s| s.len).sum()).collect()
    }
}

/// States that go on from segment to segment and from step to step.
#[derive(Debug)]
pub struct Carry<'s> {
    /// They are moved on by the step, whatever becomes of it.
    pub states: &'s mut States,
    /// Whether gradient crosses the cuts between the segments of a step; between steps it never does.
    pub gradient: bool,
    /// Whether only the states at those cuts are kept and the segments are read again for the backward pass.
    pub recompute: bool,
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

impl StepReport {
    fn new(Found { loss, nll, norm }: Found, counted: f64) -> StepReport {
        StepReport { loss, nll, counted, grad_norm: norm }
    }
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
    /// Updates made so far, those that are queued included.
    pub step: u64,
    /// On a GPU, what its steps find.
    verdict: Option<Verdict>,
    /// Steps whose verdict was not read.
    queued: VecDeque<Queued>,
    /// Reports that nobody asked for yet.
    reports: VecDeque<StepReport>,
}

/// A step that is queued.
#[derive(Debug)]
struct Queued {
    step: u64,
    counted: f64,
    settings: StepSettings,
    /// What it learned from, to look for numbers that are not finite.
    groups: Vec<Vec<MicroBatch>>,
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
    /// [`Error::OutOfMemory`], or a model in f64.
    pub fn new(model: &Lm) -> Result<Optimizer> {
        check_dtype(model)?;
        let zeros = || Params::zeros(model.params().table(), model.device(), DType::F32);
        Optimizer::with(model, [zeros()?, zeros()?, zeros()?], None)
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
        let zeros = |table: &Arc<ParamTable>| Params::zeros(table, model.device(), DType::F32);
        let part = Some(Part { weights: zeros(&table)?, grads: zeros(&table)? });
        let grads = zeros(&Arc::new(all.gradients_of_initial_state()))?;
        Optimizer::with(model, [zeros(&table)?, zeros(&table)?, grads], part)
    }

    fn with(model: &Lm, [m, v, grads]: [Params; 3], part: Option<Part>) -> Result<Optimizer> {
        let verdict = model.device().as_cuda().map(Verdict::new).transpose()?;
        Ok(Optimizer { m, v, grads, part, step: 0, verdict, queued: VecDeque::new(), reports: VecDeque::new() })
    }

    /// One step over `micro_batches`, whose sequences all weigh the same.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when the loss or the gradient is not finite: the weights and moments are as before the step. Memory.
    pub fn step(&mut self, model: &mut Lm, micro_batches: &[MicroBatch], settings: &StepSettings) -> Result<StepReport> {
        self.queue(model, micro_batches, settings)?;
        Ok(self.settle(model, None)?.expect("a step was queued"))
    }

    /// [`Optimizer::step`] whose report [`Optimizer::settle`] gives. On a GPU at most two steps may be queued.
    ///
    /// # Errors
    /// As there, on a GPU but for what only the report tells.
    pub fn queue(&mut self, model: &mut Lm, micro_batches: &[MicroBatch], settings: &StepSettings) -> Result<()> {
        let groups: Vec<&[MicroBatch]> = micro_batches.chunks(1).collect();
        self.update(model, &groups, None, settings)
    }

    /// [`Optimizer::step`] over segments that continue `carry`: of each group the micro-batches are consecutive segments of the
    /// same slots, and different groups have different slots. All segments of all slots weigh the same.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As [`Lm::forward`].
    pub fn step_segments(
        &mut self,
        model: &mut Lm,
        groups: &[Vec<MicroBatch>],
        carry: Carry<'_>,
        settings: &StepSettings,
    ) -> Result<StepReport> {
        let Carry { states, gradient, recompute } = carry;
        self.queue_segments(model, groups, Carry { states, gradient, recompute }, settings)?;
        Ok(self.settle(model, Some(states))?.expect("a step was queued"))
    }

    /// [`Optimizer::step_segments`] whose report [`Optimizer::settle`] gives, as [`Optimizer::queue`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn queue_segments(
        &mut self,
        model: &mut Lm,
        groups: &[Vec<MicroBatch>],
        carry: Carry<'_>,
        settings: &StepSettings,
    ) -> Result<()> {
        let groups: Vec<&[MicroBatch]> = groups.iter().map(Vec::as_slice).collect();
        self.update(model, &groups, Some(carry), settings)
    }

    /// Steps whose report nobody has asked for.
    pub fn unsettled(&self) -> usize {
        self.reports.len() + self.queued.len()
    }

    /// The report of the oldest step that has none yet; nothing when there is no such step. `carried` are the states that it
    /// continued.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when the loss or the gradient of that step was not finite: neither it nor those queued behind it were
    /// made. Memory.
    pub fn settle(&mut self, model: &Lm, carried: Option<&States>) -> Result<Option<StepReport>> {
        if let Some(report) = self.reports.pop_front() {
            return Ok(Some(report));
        }
        let Some(Queued { step, counted, settings, groups }) = self.queued.pop_front() else { return Ok(None) };
        let (verdict, device) = (self.verdict.as_ref().expect("steps are queued on a GPU"), model.device().clone());
        if let Some(found) = verdict.read(step) {
            return Ok(Some(StepReport::new(found, counted)));
        }
        let groups: Vec<&[MicroBatch]> = groups.iter().map(Vec::as_slice).collect();
        self.step = step;
        let behind = std::mem::take(&mut self.queued).len();
        if behind > 0 && carried.is_none() {
            // Its gradient was written over.
            self.gradients(model, &groups, None, &settings)?;
        }
        self.verdict.as_ref().expect("as above").clear(device.as_cuda().expect("a GPU"));
        Err(self.not_finite(model, &groups, carried, settings.inner_lr)?)
    }

    fn update(
        &mut self,
        model: &mut Lm,
        groups: &[&[MicroBatch]],
        mut carry: Option<Carry<'_>>,
        settings: &StepSettings,
    ) -> Result<()> {
        assert!(self.queued.len() < Verdict::RING, "{} steps are queued and none was settled", self.queued.len());
        let sums = self.gradients(model, groups, carry.as_mut(), settings);
        let device = model.device().clone();
        if let (Err(_), Some(verdict), Some(gpu)) = (&sums, &self.verdict, device.as_cuda()) {
            verdict.clear(gpu);
        }
        let Sums { loss, nll, counted } = sums?;
        let grads = match &mut self.part {
            Some(part) => {
                part.grads.copy_shared(&self.grads);
                &part.grads
            }
            None => &self.grads,
        };
        let mut scale = 1.0;
        match (&self.verdict, device.as_cuda()) {
            (Some(verdict), Some(gpu)) => {
                verdict.judge(gpu, self.step, grads.data(), settings.clip)?;
                let groups = groups.iter().map(|group| group.to_vec()).collect();
                self.queued.push_back(Queued { step: self.step, counted, settings: *settings, groups });
            }
            _ => {
                let norm = device.install(|| grad_norm::sum_of_squares(grads.data())).sqrt();
                let found = Found { loss, nll, norm };
                if !found.is_finite() {
                    return Err(self.not_finite(model, groups, carry.map(|carry| &*carry.states), settings.inner_lr)?);
                }
                scale = found.scale(settings.clip);
                self.reports.push_back(StepReport::new(found, counted));
            }
        }
        let (m, v, made, verdict) = (self.m.data_mut(), self.v.data_mut(), self.step, self.verdict.as_ref());
        let mut update = |weights: &mut Params, grads: &Params| {
            let pieces = weights.table().decay_pieces();
            let (data, mut copies) = weights.data_and_operands_mut();
            device.install(|| {
                for (piece, decays) in pieces {
                    let decay = if decays { settings.adamw.weight_decay } else { 0.0 };
                    let adamw = Settings { weight_decay: decay, ..settings.adamw };
                    let copies = copies.as_deref_mut();
                    match verdict {
                        Some(verdict) => {
                            adamw::step_judged(data, copies, grads.data(), m, v, piece, made, settings.lr, verdict, &adamw);
                        }
                        None => adamw::step_part(data, copies, grads.data(), m, v, piece, made, settings.lr, scale, &adamw),
                    }
                }
            });
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
        Ok(())
    }

    /// Gradients of the mean over all sequences, which are in the gradient buffer afterwards.
    fn gradients(
        &mut self,
        model: &Lm,
        groups: &[&[MicroBatch]],
        mut carry: Option<&mut Carry<'_>>,
        settings: &StepSettings,
    ) -> Result<Sums> {
        model.device().install(|| self.grads.data_mut().fill_zero());
        let mut sums = Sums::default();
        let sequences = groups.iter().flat_map(|group| *group).map(|m| m.lens().len()).sum();
        let (grads, verdict) = (&mut self.grads, self.verdict.as_ref());
        let mut pass = Passes { model, settings, sequences, grads, sums: &mut sums, verdict };
        for group in groups {
            match &mut carry {
                Some(Carry { states, gradient: true, recompute }) => pass.across_cuts(group, states, *recompute)?,
                carry => {
                    for micro in *group {
                        let states = carry.as_mut().map(|carry| &mut *carry.states);
                        let read = pass.forward(micro, states)?;
                        pass.backward(micro, read, None)?;
                    }
                }
            }
        }
        Ok(sums)
    }

    /// Looks for the first tensor that is not finite: parameters, then activations in the order of the forward pass, every sequence
    /// from its own beginning, then carried states, then gradients.
    fn not_finite(&self, model: &Lm, groups: &[&[MicroBatch]], carried: Option<&States>, inner_lr: f64) -> Result<Error> {
        let at = |tensor: String, element| Error::NotFinite { step: self.step, tensor, element };
        let first_in = |params: &Params, what: &str| {
            params.table().entries().iter().find_map(|e| {
                let id = params.table().find(&e.name)?;
                let element = grad_norm::first_non_finite(params.view(id))?;
                Some(at(format!("{what}{}", e.name), element))
            })
        };
        if let Some(found) = first_in(model.params(), "") {
            return Ok(found);
        }
        for micro in groups.iter().flat_map(|group| *group) {
            if let Some((name, element)) = model.first_non_finite(&micro.batch, inner_lr)? {
                return Ok(at(name, element));
            }
        }
        for (i, layer) in carried.iter().flat_map(|states| states.layers.iter().enumerate()) {
            // Whole tensors alone: rows of tokens or of a mini-batch beyond what was read are arbitrary.
            for (name, tensor) in layer.tensors().filter(|(name, _)| Extent::of(name) == Extent::Whole) {
                if let Some(element) = grad_norm::first_non_finite(tensor.view()) {
                    return Ok(at(format!("carried {} of model.layers.{i}", name.replace('_', " ")), element));
                }
            }
        }
        Ok(first_in(&self.grads, "gradient of ").unwrap_or_else(|| at("global norm of the gradient".into(), 0)))
    }
}

#[derive(Debug, Default)]
struct Sums {
    loss: f64,
    nll: f64,
    counted: f64,
}

/// The passes of one step.
struct Passes<'p> {
    model: &'p Lm,
    settings: &'p StepSettings,
    /// Sequences of the step, which weigh the same in the loss.
    sequences: usize,
    grads: &'p mut Params,
    /// Sums of the losses, but for those of a GPU, which are with its verdict.
    sums: &'p mut Sums,
    verdict: Option<&'p Verdict>,
}

/// Final hidden rows, and what the backward pass needs.
type Read = (Tensor, Saved);

impl Passes<'_> {
    fn forward(&self, micro: &MicroBatch, states: Option<&mut States>) -> Result<Read> {
        let (hidden, saved) = self.model.forward(&micro.batch, states, self.settings.keep, self.settings.inner_lr)?;
        Ok((hidden, saved.expect("the pass keeps something")))
    }

    fn backward(&mut self, micro: &MicroBatch, (hidden, saved): Read, dstates: Option<&mut DStates>) -> Result<()> {
        let lens = micro.lens();
        let share = lens.len() as f64 / self.sequences as f64;
        let weights: Vec<f64> = sequence_mean_weights(&micro.mask, &lens).iter().map(|w| w * share).collect();
        let dhidden = match self.verdict {
            Some(verdict) => self.model.loss_judged(&hidden, &micro.targets, &weights, verdict, self.grads)?,
            None => {
                let (nll, dhidden) = self.model.loss(&hidden, &micro.targets, &weights, self.grads)?;
                self.sums.loss += nll.iter().zip(&weights).map(|(n, w)| n * w).sum::<f64>();
                self.sums.nll += nll.iter().zip(&micro.mask).map(|(n, m)| n * m).sum::<f64>();
                dhidden
            }
        };
        drop(hidden);
        self.model.backward(&micro.batch, saved, dhidden, dstates, self.grads)?;
        self.sums.counted += micro.mask.iter().sum::<f64>();
        Ok(())
    }

    /// Consecutive segments, with gradient across the cuts between them: forward in their order, backward against it. Losses come
    /// with the backward passes, so that the sum of the gradients does not depend on what is kept.
    fn across_cuts(&mut self, segments: &[MicroBatch], states: &mut States, recompute: bool) -> Result<()> {
        enum Kept {
            Read(Box<Read>),
            Start(States),
        }
        let mut kept = Vec::with_capacity(segments.len());
        for (i, micro) in segments.iter().enumerate() {
            if recompute && i + 1 < segments.len() {
                kept.push(Kept::Start(states.fork()?));
                self.model.forward(&micro.batch, Some(states), Keep::Nothing, self.settings.inner_lr)?;
            } else {
                kept.push(Kept::Read(Box::new(self.forward(micro, Some(states))?)));
            }
        }
        let mut dstates = DStates::zeros(states)?;
        for (micro, kept) in segments.iter().zip(kept).rev() {
            let read = match kept {
                Kept::Read(read) => *read,
                Kept::Start(mut states) => self.forward(micro, Some(&mut states))?,
            };
            self.backward(micro, read, Some(&mut dstates))?;
        }
        Ok(())
    }
}

fn check_dtype(model: &Lm) -> Result<()> {
    match model.dtype() {
        DType::F32 | DType::Bf16 => Ok(()),
        DType::F64 => Err(Error::Config("training runs in f32 on a CPU, in f32 or bf16 on a GPU".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Inner};
    use crate::device::Device;

    #[test]
    fn carried_fast_weights_that_are_not_finite_are_named() {
        let config = Config { vocab_size: 20, hidden_size: 32, ..Config::preset("tiny", Inner::Linear).unwrap() };
        let mut model = Lm::new(&config, &Device::cpu().unwrap(), DType::F32, 1).unwrap();
        let mut states = model.states(1).unwrap();
        let adamw = Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        let settings = StepSettings { lr: 1e-3, inner_lr: 1.0, clip: 1.0, adamw, keep: Keep::Saved { group: 2 } };
        let batch = Batch::one(&[3; 16]);
        let groups = [vec![MicroBatch { batch, targets: vec![5; 16], mask: vec![1.0; 16] }]];
        let mut optimizer = Optimizer::new(&model).unwrap();
        let mut step = |states: &mut States| {
            let carry = Carry { states, gradient: false, recompute: false };
            optimizer.step_segments(&mut model, &groups, carry, &settings)
        };
        step(&mut states).unwrap();
        states.layers[2].ttt_mut().fast.weights_mut().as_mut_slice::<f32>()[7] = f32::NAN;
        let error = step(&mut states).unwrap_err();
        let named = "carried fast weights of model.layers.2";
        // After the step, in which element 7 cost the whole head: its first element.
        assert!(matches!(&error, Error::NotFinite { step: 1, tensor, element: 0 } if tensor == named), "{error}");
    }
}
