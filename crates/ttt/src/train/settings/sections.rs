//! The sections of a settings file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use toml::Table;

use super::Recompute;
use crate::config::{Backbone, Inner, Mixer};
use crate::device::Device;
use crate::tensor::DType;
use crate::train::keys;

/// Section `[model]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Name of a size, one of [`crate::config::PRESETS`], for Mamba also of [`crate::config::MAMBA_PRESETS`].
    pub preset: String,
    /// What mixes tokens.
    pub mixer: Mixer,
    /// The inner model of a TTT layer.
    pub inner: Inner,
    /// The block design around a TTT layer.
    pub backbone: Backbone,
    /// A model to start from; its `config.json` replaces the four fields above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// Fields of [`crate::config::Config`] that win over the preset or the folder.
    #[serde(flatten)]
    pub overrides: Table,
}

/// Section `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// Files, folders or globs of training documents; none for the built-in sample text.
    #[serde(deserialize_with = "keys::strings")]
    pub paths: Vec<String>,
    /// The same for validation; none for a part of the training documents.
    #[serde(deserialize_with = "keys::strings")]
    pub validation_paths: Vec<String>,
    /// That part, from 0 to below 1.
    pub validation_fraction: f64,
    /// `bytes`, or the path of a `tokenizer.json`.
    pub tokenizer: String,
    /// What stands between the documents of a plain text; empty when a file is one document.
    pub document_separator: String,
    /// Folder for the tokenized data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
}

/// Section `[optimizer]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// Peak of the learning rate.
    pub learning_rate: f64,
    /// Learning rate at the end of the cosine.
    pub end_learning_rate: f64,
    /// Warm-up as a part of all steps.
    pub warmup_fraction: f64,
    /// Warm-up in steps, which wins over the fraction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate; of all parameters but Mamba's A and D.
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 for no clipping.
    pub clip: f64,
}

/// Precision of training. Weights, moments and fast weights are f32 in each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 on a GPU, f32 on a CPU.
    #[default]
    Auto,
    /// f32 everywhere.
    F32,
    /// Activations and operands of products in bf16; on a GPU.
    Bf16,
}

impl Precision {
    /// The type of activations on a device.
    pub fn dtype(self, device: &Device) -> DType {
        match (self, device) {
            (Precision::F32, _) | (Precision::Auto, Device::Cpu(_)) => DType::F32,
            (Precision::Bf16, _) | (Precision::Auto, Device::Cuda(_)) => DType::Bf16,
        }
    }
}

/// What crosses the cuts between the segments of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Carry {
    /// The state alone, as everywhere: truncated backpropagation.
    State,
    /// The gradient too.
    Gradient,
}

/// Section `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Train {
    /// Tokens to train on in all.
    #[serde(deserialize_with = "keys::count")]
    pub tokens: u64,
    /// Tokens of a training sequence, which starts from the initial fast weights.
    pub sequence_length: usize,
    /// Tokens of the segments that sequences are cut into; without it, none are cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment_length: Option<usize>,
    /// Consecutive segments of every sequence in a step.
    pub segments_per_step: usize,
    /// What crosses the cuts between them.
    pub carry: Carry,
    /// Whether a document starts from the initial fast weights, also inside a sequence.
    pub reset_at_documents: bool,
    /// Tokens of a step.
    #[serde(deserialize_with = "keys::count")]
    pub batch_tokens: u64,
    /// Sequences computed at once, at most; see [`super::Settings::micro_batch`].
    pub micro_batch: usize,
    /// Seed of the initial weights and of the order of the data.
    pub seed: u64,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Precision of the arithmetic.
    #[serde(default)]
    pub precision: Precision,
    /// Mini-batches between two kept states of the fast weights, g.
    pub checkpoint_group: usize,
    /// Base inner learning rate at the first step of its warm-up.
    pub inner_lr_init: f64,
    /// Steps of that warm-up; without it, those of the optimizer for TTT-MLP and 0 for TTT-Linear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inner_lr_warmup: Option<u64>,
    /// Whether the initial fast weights, W0, alone are learned, and every other parameter stays that of `model.folder`.
    pub only_initial_state: bool,
    /// Processor threads; 0 for all.
    pub threads: usize,
}

/// Section `[eval]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Eval {
    /// Steps between two validations; 0 for one at the end.
    pub every: u64,
    /// Validation tokens to use, at most.
    #[serde(deserialize_with = "keys::count")]
    pub tokens: u64,
}

/// Section `[checkpoint]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Steps between two checkpoints; 0 for one at the end.
    pub every: u64,
    /// Newest checkpoints to keep.
    pub keep: usize,
    /// Steps between checkpoints that are kept for ever; 0 for none.
    pub milestone_every: u64,
    /// Whether the one with the lowest validation loss is kept too.
    pub best: bool,
}

/// Section `[sample]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Steps between two samples; 0 for none.
    pub every: u64,
    /// How the text begins.
    pub prompt: String,
    /// Tokens to add.
    pub tokens: usize,
}

/// Section `[log]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Log {
    /// Steps between two lines.
    pub every: u64,
    /// Whether TensorBoard event files are written.
    pub tensorboard: bool,
}
