//! The language model: embedding, blocks, final norm and output matrix, and the one way through them.

mod inner;
mod step;

pub use inner::InnerErrors;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::batch::{Batch, Segment};
use crate::config::{Config, Mixer};
use crate::device::view::View;
use crate::device::{Device, cuda};
use crate::dstates::DStates;
use crate::hub::{ModelFolder, Skill, SkillInfo, model_hash};
use crate::layer::{Block, BlockSaved, Keep, Pass, Route, routes};
use crate::narrow::Narrow;
use crate::ops::verdict::cuda::Verdict;
use crate::ops::{add, cross_entropy, embedding, linear, rms_norm, rope};
use crate::params::{ModelIds, ParamTable, Params};
use crate::state::States;
use crate::tensor::{DType, Tensor};
use crate::weights::{Storage, Weights};
use crate::{Error, Result};

/// A language model.
///
/// Training, prefill, decoding and evaluation all go through [`Lm::forward`], which returns the final hidden rows, and then
/// through [`Lm::logits`], [`Lm::nll`] or [`Lm::loss`], which compute only what is asked for.
#[derive(Debug)]
pub struct Lm {
    config: Config,
    device: Device,
    ids: ModelIds,
    blocks: Vec<Block>,
    /// Rotary angles of the positions in a mini-batch, which are all that a TTT layer turns by.
    rope: Option<rope::Table>,
    weights: Weights,
    /// [`Lm::hash`], once it was asked for.
    hash: OnceLock<String>,
}

/// What [`Lm::backward`] needs.
#[derive(Debug)]
pub struct Saved {
    segments: Vec<Segment>,
    routes: Option<Vec<Route>>,
    blocks: Vec<BlockSaved>,
    /// Input of the final norm.
    last: Tensor,
    keep: Keep,
    inner_lr: f64,
}

impl Saved {
    /// Bytes held for the backward pass.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(BlockSaved::bytes).sum::<usize>() + self.last.bytes()
    }

    /// Bytes of kept fast weights among [`Saved::bytes`].
    pub fn fast_weight_bytes(&self) -> usize {
        self.blocks.iter().map(BlockSaved::fast_weight_bytes).sum()
    }
}

impl Lm {
    /// A model with initial weights that depend on the seed alone.
    ///
    /// # Errors
    /// An impossible configuration, or memory.
    pub fn new(config: &Config, device: &Device, dtype: DType, seed: u64) -> Result<Lm> {
        if dtype == DType::Bf16 && device.as_cuda().is_none() {
            return Err(Error::Config("bf16 needs a GPU; use f32 on a CPU".into()));
        }
        check(config, device, dtype.into())?;
        let table = Arc::new(ParamTable::new(config).0);
        let params = device.install(|| Params::init(&table, device, dtype, seed))?;
        Lm::from_params(config, params)
    }

    /// A model with given weights.
    ///
    /// # Errors
    /// An impossible configuration, or memory.
    ///
    /// # Panics
    /// When the weights are laid out for another configuration.
    pub fn from_params(config: &Config, params: Params) -> Result<Lm> {
        Lm::from_weights(config, params.into())
    }

    /// A model with given weights, as wide as they are stored.
    ///
    /// # Errors
    /// An impossible configuration, or memory.
    ///
    /// # Panics
    /// When the weights are laid out for another configuration.
    pub fn from_weights(config: &Config, weights: Weights) -> Result<Lm> {
        check(config, weights.device(), weights.storage())?;
        let (table, ids) = ParamTable::new(config);
        assert_eq!(table.len(), weights.table().len(), "weights of another configuration");
        let device = weights.device().clone();
        let rope = match config.mini_batch() {
            Some(k) => Some(rope::Table::new(&device, weights.storage().dtype(), k, config.head_dim(), config.rope_theta)?),
            None => None,
        };
        let blocks = ids.blocks.iter().map(|b| Block::new(config, b)).collect();
        Ok(Lm { config: config.clone(), device, ids, blocks, rope, weights, hash: OnceLock::new() })
    }

    /// The model of a folder, its weights held as `storage`, whatever the folder stores.
    ///
    /// # Errors
    /// Files that cannot be read or are no TTT model, or memory.
    pub fn load(folder: impl AsRef<Path>, device: &Device, storage: impl Into<Storage>) -> Result<Lm> {
        let folder = ModelFolder::open(folder)?;
        Lm::from_folder(&folder, folder.config(), device, storage)
    }

    /// The weights of a folder under `config`, which may differ from the folder's in what has no weights.
    ///
    /// # Errors
    /// Weights that cannot be read or do not fit, or memory.
    pub fn from_folder(folder: &ModelFolder, config: &Config, device: &Device, storage: impl Into<Storage>) -> Result<Lm> {
        let storage = storage.into();
        check(config, device, storage)?;
        let table = Arc::new(ParamTable::new(config).0);
        Lm::from_weights(config, device.install(|| folder.load_weights(&table, device, storage))?)
    }

    /// The same model with its large matrices stored narrow.
    ///
    /// # Errors
    /// A weight that is not finite, or memory.
    ///
    /// # Panics
    /// When the matrices are narrow already, or `storage` is not.
    pub fn narrowed(&self, storage: Storage) -> Result<Lm> {
        let narrow = self.device.install(|| Narrow::new(self.weights.table(), &self.device, storage, self.weights.float()))?;
        Lm::from_weights(&self.config, Weights::Narrow(narrow))
    }

    /// Hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the model lives.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Type of its activations and states, and of all weights that are not stored narrow; `Bf16` is mixed precision on a GPU, with
    /// weights and fast weights in f32.
    pub fn dtype(&self) -> DType {
        self.weights.dtype()
    }

    /// Its blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Its weights, as they are stored.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Its weights as one flat buffer.
    ///
    /// # Panics
    /// When they are stored narrow.
    pub fn params(&self) -> &Params {
        self.weights.float()
    }

    /// Its weights as one flat buffer, to change.
    ///
    /// # Panics
    /// When they are stored narrow.
    pub fn params_mut(&mut self) -> &mut Params {
        self.hash.take();
        self.weights.float_mut()
    }

    /// Puts a skill, initial fast weights from a file, in the place of the model's own. States that were made before belong to the
    /// model as it was.
    ///
    /// # Errors
    /// A file that is no skill, is damaged, or belongs to another model; the model is then as before.
    pub fn load_skill(&mut self, path: impl AsRef<Path>) -> Result<SkillInfo> {
        let skill = Skill::open(path)?;
        self.hash.take();
        self.device.clone().install(|| skill.apply(&mut self.weights))?;
        Ok(skill.info().clone())
    }

    /// Identity of its weights ([`model_hash`]), computed when it is first asked for.
    pub fn hash(&self) -> &str {
        self.hash.get_or_init(|| model_hash(&self.weights))
    }

    /// The states of `slots` sequences, each at its beginning.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn states(&self, slots: usize) -> Result<States> {
        States::new(self, slots)
    }

    /// Reads a batch: the final hidden rows `[tokens, D]`, normed, and what [`Lm::backward`] needs when `keep` asks for it.
    ///
    /// With `states` every sequence continues its slot, or starts it afresh, and leaves its state there; without, each starts from
    /// the learned initial weights and its state is dropped. `inner_lr` is the factor of the inner learning rate: 1 but during the
    /// warm-up of training.
    ///
    /// A slot that is continued at position 0 starts from the weights that the model has now.
    ///
    /// # Errors
    /// A token outside the vocabulary, or memory.
    ///
    /// # Panics
    /// When the batch names a slot that the states do not have, or continues one twice; when a pass that is kept continues a slot
    /// inside a mini-batch: in training the update of a tail shorter than a mini-batch reaches nothing that follows, so such a
    /// slot has to be started afresh.
    pub fn forward(
        &self,
        batch: &Batch,
        states: Option<&mut States>,
        keep: Keep,
        inner_lr: f64,
    ) -> Result<(Tensor, Option<Saved>)> {
        self.check_tokens(&batch.tokens)?;
        self.device.install(|| self.forward_here(batch, states, keep, inner_lr))
    }

    fn forward_here(
        &self,
        batch: &Batch,
        mut states: Option<&mut States>,
        keep: Keep,
        inner_lr: f64,
    ) -> Result<(Tensor, Option<Saved>)> {
        let (segments, routes) = match &states {
            Some(states) => self.segments(batch, states, keep),
            None => (fresh_segments(batch), None),
        };
        let (weights, rope) = (&self.weights, self.rope(&segments)?);
        let pass = Pass { weights, segments: &segments, routes: routes.as_deref(), rope: rope.as_ref(), inner_lr, keep };
        let mut x = embedding::forward(&batch.tokens, self.weights.matrix(self.ids.embed))?;
        let mut saved = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            let state = states.as_mut().map(|s| &mut s.layers[i]);
            let (y, kept) = block.forward(&pass, x, state)?;
            saved.extend(kept);
            x = y;
        }
        if let Some(states) = states {
            states.advance(batch);
        }
        let hidden = rms_norm::forward(x.view(), self.weights.view(self.ids.norm), self.config.rms_norm_eps)?;
        let saved = (keep != Keep::Nothing).then(|| Saved { segments, routes, blocks: saved, last: x, keep, inner_lr });
        Ok((hidden, saved))
    }

    /// Reads a batch of which only some rows are wanted, as when a prompt is read: the states move on by all of it, but what the
    /// last block does after its inner loop is computed for `rows` alone. Returns their final hidden rows `[rows.len(), D]`.
    ///
    /// # Errors
    /// A token outside the vocabulary, or memory.
    ///
    /// # Panics
    /// As [`Lm::forward`]; when a row does not exist.
    pub fn forward_rows(&self, batch: &Batch, states: &mut States, rows: &[usize]) -> Result<Tensor> {
        self.check_tokens(&batch.tokens)?;
        self.device.install(|| {
            let keep = Keep::Nothing;
            let (segments, routes) = self.segments(batch, states, keep);
            let (weights, rope) = (&self.weights, self.rope(&segments)?);
            let pass = Pass { weights, segments: &segments, routes: routes.as_deref(), rope: rope.as_ref(), inner_lr: 1.0, keep };
            let mut x = embedding::forward(&batch.tokens, self.weights.matrix(self.ids.embed))?;
            let last = self.blocks.len() - 1;
            let few = rows.len() < batch.tokens.len();
            for (i, (block, state)) in self.blocks.iter().zip(&mut states.layers).enumerate() {
                x = match i == last && few {
                    true => block.forward_rows(&pass, x, rows, state)?,
                    false => block.forward(&pass, x, Some(state))?.0,
                };
            }
            states.advance(batch);
            if !few {
                x = add::gather(x.view(), rows)?;
            }
            rms_norm::forward(x.view(), self.weights.view(self.ids.norm), self.config.rms_norm_eps)
        })
    }

    /// Logits `[rows.len(), V]` of some rows of the hidden states; in f32 in mixed precision.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    ///
    /// # Panics
    /// When a row does not exist.
    pub fn logits(&self, hidden: &Tensor, rows: &[usize]) -> Result<Tensor> {
        let all: bool = rows.len() == hidden.view().rows() && rows.iter().enumerate().all(|(i, r)| i == *r);
        self.device.install(|| {
            let head = self.weights.matrix(self.ids.head);
            let dtype = if hidden.dtype() == DType::Bf16 { DType::F32 } else { hidden.dtype() };
            if all {
                return linear::forward_as(hidden.view(), head, dtype);
            }
            linear::forward_as(add::gather(hidden.view(), rows)?.view(), head, dtype)
        })
    }

    /// Negative log likelihood of a target at every hidden row, in nats.
    ///
    /// # Errors
    /// A target outside the vocabulary, or memory.
    pub fn nll(&self, hidden: View<'_>, targets: &[u32]) -> Result<Vec<f64>> {
        self.check_tokens(targets)?;
        self.device.install(|| cross_entropy::forward(hidden, self.weights.matrix(self.ids.head), targets))
    }

    /// Negative log likelihoods, and the gradient of `sum_t weights[t] * nll[t]` with respect to the hidden rows; the output
    /// matrix's gradient is added to `grads`. Rows of weight 0 are skipped and their likelihood is reported as 0.
    ///
    /// # Errors
    /// A target outside the vocabulary, or memory.
    pub fn loss(&self, hidden: &Tensor, targets: &[u32], weights: &[f64], grads: &mut Params) -> Result<(Vec<f64>, Tensor)> {
        self.check_tokens(targets)?;
        let head = self.weights.operand(self.ids.head, self.ids.head);
        self.device
            .install(|| cross_entropy::forward_backward(hidden.view(), head, targets, weights, grads.view_mut(self.ids.head)))
    }

    /// [`Lm::loss`] on a GPU, whose likelihoods stay there: they are added to `verdict`.
    pub(crate) fn loss_judged(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        weights: &[f64],
        verdict: &Verdict,
        grads: &mut Params,
    ) -> Result<Tensor> {
        self.check_tokens(targets)?;
        let gpu = self.device.as_cuda().expect("a verdict is a GPU's");
        let head = self.weights.operand(self.ids.head, self.ids.head);
        let grads = grads.view_mut(self.ids.head);
        let (counted, dhidden) = cross_entropy::on_gpu(gpu, hidden.view(), head, targets, weights, grads)?;
        verdict.add_loss(gpu, &counted);
        Ok(dhidden)
    }

    /// Adds the gradients of every parameter that `grads` has room for ([`Params::holds`]), from the gradient of the hidden rows, to
    /// `grads`.
    ///
    /// After a pass with states, `dstates` hands the gradient across the cut between it and the pass that continued its states: it
    /// holds that of the states after the pass ([`DStates::zeros`] for the last) and becomes that of the states before it. Without
    /// it the cut truncates: the states that the pass began with are constants, as are those that it left. The initial weights get
    /// the gradient of the sequences that start from them in this pass; their slots' gradients become zero.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    ///
    /// # Panics
    /// When there are `dstates`, but the pass had no states.
    pub fn backward(
        &self,
        batch: &Batch,
        saved: Saved,
        dhidden: Tensor,
        mut dstates: Option<&mut DStates>,
        grads: &mut Params,
    ) -> Result<()> {
        self.device.install(|| {
            let Saved { segments, routes, blocks, last, keep, inner_lr } = saved;
            let (weights, rope) = (&self.weights, self.rope(&segments)?);
            let pass = Pass { weights, segments: &segments, routes: routes.as_deref(), rope: rope.as_ref(), inner_lr, keep };
            let (eps, norm) = (self.config.rms_norm_eps, self.weights.view(self.ids.norm));
            let mut dx = rms_norm::backward(dhidden.view(), last.view(), norm, eps, grads.view_mut(self.ids.norm))?;
            drop((last, dhidden));
            for (i, (block, saved)) in self.blocks.iter().zip(blocks).enumerate().rev() {
                let dstate = dstates.as_mut().map(|d| &mut d.layers[i]);
                dx = block.backward(&pass, saved, dx, dstate, grads)?;
            }
            if grads.holds(self.ids.embed) {
                embedding::backward(&batch.tokens, dx.view(), grads.view_mut(self.ids.embed))?;
            }
            Ok(())
        })
    }

    /// The first output of a block, or final hidden rows, that hold a number that is not finite: its name and the element.
    ///
    /// # Errors
    /// A token outside the vocabulary, or memory.
    pub fn first_non_finite(&self, batch: &Batch, inner_lr: f64) -> Result<Option<(String, usize)>> {
        self.check_tokens(&batch.tokens)?;
        self.device.install(|| {
            let segments = fresh_segments(batch);
            let (weights, rope) = (&self.weights, self.rope(&segments)?);
            let pass = Pass { weights, segments: &segments, routes: None, rope: rope.as_ref(), inner_lr, keep: Keep::Nothing };
            let mut x = embedding::forward(&batch.tokens, self.weights.matrix(self.ids.embed))?;
            for (i, block) in self.blocks.iter().enumerate() {
                x = block.forward(&pass, x, None)?.0;
                if let Some(element) = x.to_f64_vec().iter().position(|x| !x.is_finite()) {
                    return Ok(Some((format!("output of model.layers.{i}"), element)));
                }
            }
            Ok(None)
        })
    }

    /// How a batch continues states: in their slots themselves when that is all there is to do.
    fn segments(&self, batch: &Batch, states: &States, keep: Keep) -> (Vec<Segment>, Option<Vec<Route>>) {
        let kept = keep != Keep::Nothing;
        if !kept && batch.seqs.iter().all(|s| !s.fresh) {
            return (states.segments(batch), None);
        }
        let (segments, routes) = routes(batch, states, kept);
        (segments, Some(routes))
    }

    /// The rotary angles of a pass.
    fn rope(&self, segments: &[Segment]) -> Result<Option<rope::Table>> {
        if self.config.mini_batch().is_some() || self.config.mixer == Mixer::Mamba {
            return Ok(self.rope.clone());
        }
        let (head_dim, theta) = (self.config.head_dim(), self.config.rope_theta);
        let table = match self.config.mixer {
            Mixer::Ttt => rope::Table::neighbours_of_batch,
            Mixer::Attention | Mixer::Mamba => rope::Table::of_batch,
        };
        Ok(Some(table(&self.device, self.dtype(), segments, head_dim, theta)?))
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|t| **t as usize >= self.config.vocab_size) {
            Some(t) => Err(Error::Invalid(format!(
                "token id {t} is outside the model's vocabulary of {} ids: the text was made with another tokenizer",
                self.config.vocab_size
            ))),
            None => Ok(()),
        }
    }
}

/// Checks that a model can be made on a device.
fn check(config: &Config, device: &Device, storage: Storage) -> Result<()> {
    config.validate()?;
    match (device, storage) {
        (Device::Cuda(_), Storage::F64) => Err(Error::Config("f64 needs a CPU; use --device cpu, or bf16 or f32 on a GPU".into())),
        (Device::Cuda(_), Storage::Int8) => {
            Err(Error::Config("int8 weights need a CPU; use --device cpu, or bf16 or f32 on a GPU".into()))
        }
        (Device::Cuda(_), _) => cuda::supports(config),
        (Device::Cpu(_), _) => Ok(()),
    }
}

/// Segments of a batch whose sequences all start afresh, sequence i in slot i.
fn fresh_segments(batch: &Batch) -> Vec<Segment> {
    let fresh = |(slot, s): (usize, &crate::batch::Seq)| Segment { first_row: s.first_row, len: s.len, slot, phase: 0 };
    batch.seqs.iter().enumerate().map(fresh).collect()
}
