//! What a state file says about itself, and the check of its list of tensors.

use std::path::Path;

use serde::Serialize;

use super::file::{PENDING, StateFile};
use crate::config::{Config, Inner, Mixer};
use crate::hub::safetensors::{Dtype, File};
use crate::layer::state::{CONV_WINDOW, Extent, FAST_WEIGHTS, KEYS, OPEN_ROWS, PRE_CONV, QK_CONV, RECURRENT, VALUES};
use crate::lm::Lm;
use crate::tensor::DType;
use crate::{Error, Result};

/// Version of the format; a newer one is refused.
pub(super) const VERSION: u32 = 1;
/// Version of what a row of an open mini-batch holds, and of the order of a head's fast weights.
pub(super) const LAYOUT: u32 = 1;

/// What a state is the state of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Learner {
    /// TTT-Linear.
    Linear,
    /// TTT-MLP.
    Mlp,
    /// TTT-Linear in one mini-batch as long as the sequence.
    Batch,
    /// Linear attention.
    LinearAttention,
    /// Attention.
    Attention,
    /// Mamba.
    Mamba,
}

impl Learner {
    const ALL: [Learner; 6] =
        [Learner::Linear, Learner::Mlp, Learner::Batch, Learner::LinearAttention, Learner::Attention, Learner::Mamba];

    /// That of a model.
    pub fn of(config: &Config) -> Learner {
        match (config.mixer, config.ttt_layer_type) {
            (Mixer::Ttt, _) if config.linear_attention.is_some() => Learner::LinearAttention,
            (Mixer::Ttt, _) if config.sums() => Learner::Batch,
            (Mixer::Ttt, Inner::Linear) => Learner::Linear,
            (Mixer::Ttt, Inner::Mlp) => Learner::Mlp,
            (Mixer::Attention, _) => Learner::Attention,
            (Mixer::Mamba, _) => Learner::Mamba,
        }
    }

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Learner::Linear => "linear",
            Learner::Mlp => "mlp",
            Learner::Batch => "batch",
            Learner::LinearAttention => "linear_attention",
            Learner::Attention => "attention",
            Learner::Mamba => "mamba",
        }
    }

    /// The tensors of a layer: name, number of axes, whether every layer has it.
    fn tensors(self) -> &'static [(&'static str, usize, bool)] {
        match self {
            Learner::Linear | Learner::Mlp | Learner::Batch | Learner::LinearAttention => {
                &[(FAST_WEIGHTS, 2, true), (OPEN_ROWS, 3, true), (PRE_CONV, 2, false), (QK_CONV, 2, false)]
            }
            Learner::Attention => &[(KEYS, 2, true), (VALUES, 2, true)],
            Learner::Mamba => &[(CONV_WINDOW, 2, true), (RECURRENT, 2, true)],
        }
    }

    /// The tensor of fixed size that remembers the text, if there is one.
    pub(super) fn memory(self) -> Option<&'static str> {
        match self {
            Learner::Linear | Learner::Mlp | Learner::Batch | Learner::LinearAttention => Some(FAST_WEIGHTS),
            Learner::Attention => None,
            Learner::Mamba => Some(RECURRENT),
        }
    }
}

/// What a state belongs to and how far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateHeader {
    /// Hash of the model's weights ([`Lm::hash`]).
    pub model: String,
    /// What it is the state of.
    pub learner: Learner,
    /// Tokens of a mini-batch, K; 1 without an inner loop.
    pub mini_batch: usize,
    /// Tokens that were read.
    pub tokens: u64,
    /// What made the tokens ([`crate::data::Tokenizer::id`]), if that is known.
    pub tokenizer: Option<String>,
    /// Tokens that were accepted but not read: read these first when going on. Usually one, the last that was chosen or the last
    /// of the text.
    pub pending: Vec<u32>,
    /// Type of the numbers.
    pub dtype: DType,
    /// Layers of the model.
    pub layers: usize,
}

impl StateHeader {
    /// Reads the header of a file; no model is needed.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for what is no state file, or a damaged or newer one.
    pub fn read(path: impl AsRef<Path>) -> Result<StateHeader> {
        Ok(StateFile::open(path)?.into_header())
    }

    /// Tokens of the open mini-batch that were read.
    pub fn phase(&self) -> usize {
        (self.tokens % self.mini_batch as u64) as usize
    }
}

impl StateHeader {
    /// Metadata and the list of tensors, which must be that of some model.
    pub(super) fn parse(file: &File) -> Result<StateHeader> {
        let damaged = |message: String| Error::format(file.path(), format!("{message}; the file is damaged"));
        let Some(version) = file.metadata().get("ttt_state") else {
            return Err(Error::format(
                file.path(),
                "this is no state file; `--state-out` of `ttt read` or `ttt generate` writes one",
            ));
        };
        for (what, found, known) in
            [("state format", Some(version), VERSION), ("layout of the open mini-batch", file.metadata().get("layout"), LAYOUT)]
        {
            match found.map(|text| text.parse::<u32>()) {
                Some(Ok(n)) if n == known => {}
                Some(Ok(n)) if n > known => {
                    let message = format!("{what} {n} is newer than this program, which reads {known}; update it");
                    return Err(Error::format(file.path(), message));
                }
                _ => return Err(damaged(format!("{what} {found:?} is unknown"))),
            }
        }
        let text = |key: &str| file.metadata().get(key).ok_or_else(|| damaged(format!("`{key}` is missing in its metadata")));
        let number = |key: &str, least: u64, most: u64| {
            let text = text(key)?;
            let number = text.parse::<u64>().ok().filter(|n| (least..=most).contains(n));
            number.ok_or_else(|| damaged(format!("`{key}` in its metadata is {text:?}, not a number from {least} to {most}")))
        };
        let learner = text("learner")?;
        let learner = Learner::ALL.into_iter().find(|known| known.name() == learner);
        let learner = learner.ok_or_else(|| {
            let known = Learner::ALL.map(Learner::name).join(", ");
            damaged(format!("`learner` in its metadata is none of {known}"))
        })?;
        let mini_batch = number("mini_batch_size", 1, 1 << 32)? as usize;
        // A position that counts on would overflow.
        let tokens = number("tokens", 0, i64::MAX as u64)?;
        let phase = number("phase", 0, u64::MAX)?;
        if phase != tokens % mini_batch as u64 {
            let message = format!("phase {phase} is not that of {tokens} tokens in mini-batches of {mini_batch}");
            return Err(damaged(message));
        }
        let pending = file.tensor(PENDING)?;
        if pending.shape.len() != 1 || pending.dtype != Dtype::U32 {
            return Err(pending.wrong("is no list of U32; the file is damaged"));
        }
        let (dtype, layers) = Self::check_tensors(file, learner, tokens, phase as usize)?;
        Ok(StateHeader {
            model: text("model")?.clone(),
            learner,
            mini_batch,
            tokens,
            tokenizer: file.metadata().get("tokenizer").cloned(),
            pending: pending.to_u32()?,
            dtype,
            layers,
        })
    }

    /// Checks names, ranks and types; returns the type and the number of layers.
    fn check_tensors(file: &File, learner: Learner, tokens: u64, phase: usize) -> Result<(DType, usize)> {
        let tensors = learner.tensors();
        let layers = (0..).take_while(|i| file.find(&full_name(*i, tensors[0].0)).is_some()).count();
        if layers == 0 {
            let what = tensors[0].0.replace('_', " ");
            return Err(Error::format(file.path(), format!("it has no {what}; the file is damaged")));
        }
        let (mut known, mut dtype) = (1, None);
        for layer in 0..layers {
            for (name, rank, always) in tensors {
                let tensor = match file.find(&full_name(layer, name)) {
                    Some(tensor) => tensor,
                    None if *always => file.tensor(&full_name(layer, name))?,
                    None => continue,
                };
                known += 1;
                if !matches!(tensor.dtype, Dtype::F32 | Dtype::F64) || *dtype.get_or_insert(tensor.dtype) != tensor.dtype {
                    return Err(tensor.wrong(format!("holds {}; a state is all F32, or all F64", tensor.dtype)));
                }
                let ranks = tensor.shape.len() == *rank;
                let (right, wanted) = match Extent::of(name) {
                    Extent::Whole => (ranks, "two axes".into()),
                    Extent::OpenRows => (ranks && tensor.shape[1] == phase, format!("[heads, {phase}, row]")),
                    Extent::Tokens => (ranks && tensor.shape[0] as u64 == tokens, format!("[{tokens}, row]")),
                };
                if !right {
                    return Err(tensor.wrong(format!("has shape {:?}; {wanted} is needed", tensor.shape)));
                }
            }
        }
        if known != file.names().count() {
            return Err(Error::format(file.path(), "it has tensors that no state has; the file is damaged"));
        }
        Ok((if dtype == Some(Dtype::F64) { DType::F64 } else { DType::F32 }, layers))
    }

    /// Compares with a model. What is cheap comes first: the hash reads all weights when it is asked for the first time.
    pub(super) fn check(&self, model: &Lm, path: &Path) -> Result<()> {
        let config = model.config();
        let refuse = |message: String| Err(Error::Invalid(format!("{}: {message}", path.display())));
        if self.learner != Learner::of(config) {
            let (theirs, ours) = (self.learner.name(), Learner::of(config).name());
            return refuse(format!("the state of a {theirs} learner; this model's is {ours}: use the model that made the state"));
        }
        if self.mini_batch != config.mini_batch().unwrap_or(1) {
            return refuse(format!(
                "the state of a model with mini-batches of {}; this model's have {}: use the model that made the state",
                self.mini_batch,
                config.mini_batch().unwrap_or(1)
            ));
        }
        if self.dtype != model.weights().storage().dtype() {
            return refuse(format!(
                "the state was made in {:?} and the model runs in {:?}: run it in the state's precision (--dtype)",
                self.dtype,
                model.weights().storage().dtype()
            ));
        }
        if self.model != model.hash() {
            return refuse(format!(
                "the state of another model: that one's hash is {}, this one's {} (`ttt info` prints it); \
                 use the model that made the state, or read the text again with this one",
                short(&self.model),
                short(model.hash())
            ));
        }
        match self.pending.iter().find(|id| **id as usize >= config.vocab_size) {
            Some(id) => {
                refuse(format!("pending token {id} is beyond the vocabulary of {} ids; the file is damaged", config.vocab_size))
            }
            None => Ok(()),
        }
    }
}

/// Name of a layer's tensor in a file.
pub(super) fn full_name(layer: usize, name: &str) -> String {
    format!("layers.{layer}.{name}")
}

/// The first digits of a hash.
pub(super) fn short(hash: &str) -> String {
    hash.chars().take(12).collect()
}
