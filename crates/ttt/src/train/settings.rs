//! Settings of a training run: a TOML file, `key=value` overrides, and what follows from them.
//!
//! `configs/tiny.toml` holds the default and the meaning of every setting; files and overrides are layered on it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::{
    checkpoint::Checkpoints,
    keys,
    recompute::Recompute,
    schedule::{InnerLearningRate, LearningRate},
};
use crate::{
    AtPath, Error, Result,
    config::{Backbone, Config, Inner, Mixer},
    data::Segmenting,
    device::Device,
    hub::ModelFolder,
    tensor::DType,
};

/// The default run, with a comment on every setting.
pub const TINY: &str = include_str!("../../../../configs/tiny.toml");

/// What may be another when a run goes on. Every other setting fixes the model, the order of the data or what a step's number
/// means. Texts are judged by their contents ([`super::DataId`]), so that they may have moved.
pub const MAY_CHANGE: [&str; 23] = [
    "data.paths",
    "data.validation_paths",
    "data.cache",
    "optimizer.learning_rate",
    "optimizer.end_learning_rate",
    "optimizer.weight_decay",
    "optimizer.clip",
    "train.tokens",
    "train.micro_batch",
    "train.recompute",
    "train.checkpoint_group",
    "train.threads",
    "eval.every",
    "eval.tokens",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.milestone_every",
    "checkpoint.best",
    "sample.every",
    "sample.prompt",
    "sample.tokens",
    "log.every",
    "log.tensorboard",
];

/// Everything that fixes a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// What is trained.
    pub model: Model,
    /// What it is trained on.
    pub data: Data,
    /// AdamW and the learning rate.
    pub optimizer: Optimizer,
    /// Batches, their order and how they are computed.
    pub train: Train,
    /// Validation during training.
    pub eval: Eval,
    /// What is saved.
    pub checkpoint: Checkpoint,
    /// Text written during training.
    pub sample: Sample,
    /// What is reported.
    pub log: Log,
}

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
    /// Fields of [`Config`] that win over the preset or the folder.
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
    /// Sequences computed at once, at most; see [`Settings::micro_batch`].
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

impl Default for Settings {
    /// Those of [`TINY`].
    fn default() -> Self {
        toml::from_str(TINY).expect("configs/tiny.toml sets every key")
    }
}

impl Settings {
    /// Settings of a TOML file's text, over the default. `origin` names it in errors.
    ///
    /// # Errors
    /// Text that is not TOML, an unknown key (with the nearest known one), a value of another type.
    pub fn from_toml(text: &str, origin: &str) -> Result<Settings> {
        let mut settings = Settings::default();
        let table: Table = text.parse().map_err(|e| Error::Config(format!("{origin}: {e}")))?;
        for (section, value) in table {
            match value {
                Value::Table(entries) => {
                    for (name, value) in entries {
                        settings.set(&format!("{section}.{name}"), value, origin)?;
                    }
                }
                value => settings.set(&section, value, origin)?,
            }
        }
        Ok(settings)
    }

    /// [`Settings::from_toml`] of a file.
    ///
    /// # Errors
    /// The file cannot be read, or as there.
    pub fn load(path: impl AsRef<Path>) -> Result<Settings> {
        let path = path.as_ref();
        Self::from_toml(&std::fs::read_to_string(path).at(path)?, &path.display().to_string())
    }

    /// Applies `section.key=value`, the value in TOML's syntax or a bare string: `train.tokens=3M`, `data.paths=["a.txt", "b.txt"]`,
    /// `sample.prompt=Once upon`.
    ///
    /// # Errors
    /// A missing `=`, an unknown key, a value of another type.
    pub fn apply_override(&mut self, assignment: &str) -> Result<()> {
        let Some((key, text)) = assignment.split_once('=') else {
            return Err(Error::Config(format!("`{assignment}` is not of the form `section.key=value`, such as `train.tokens=3M`")));
        };
        let (key, text) = (key.trim(), text.trim());
        let first = self.set(key, keys::typed(text), "the overrides");
        // A string may look like a number or a date (`sample.prompt=1984`).
        first.or_else(|error| self.set(key, Value::String(text.into()), "the overrides").map_err(|_| error))
    }

    /// Sets one key. `origin` is where it was written, for errors.
    ///
    /// # Errors
    /// An unknown key, a value of another type.
    pub fn set(&mut self, key: &str, value: Value, origin: &str) -> Result<()> {
        check_key(key, origin)?;
        let (section, name) = key.split_once('.').expect("known keys have a section");
        let mut table = Table::try_from(&*self).expect("settings are representable in TOML");
        table[section].as_table_mut().expect("a section is a table").insert(name.into(), value);
        let wrong = |e: toml::de::Error| Error::Config(format!("`{key}` in {origin}: {}", e.message()));
        let settings = Settings::deserialize(table).map_err(wrong)?;
        settings.model.over(Config::default()).map_err(wrong)?;
        *self = settings;
        Ok(())
    }

    /// All keys, such as `train.tokens`.
    pub fn keys() -> Vec<String> {
        // The three are set elsewhere (see check_key).
        let elsewhere = ["mixer", "ttt_layer_type", "scan_checkpoint_group_size"];
        let config = keys::fields_of::<Config>().iter().filter(|name| !elsewhere.contains(name));
        let model: Vec<_> = ["preset", "mixer", "inner", "backbone", "folder"].iter().chain(config).copied().collect();
        let sections: [(&str, &[&str]); 8] = [
            ("model", &model),
            ("data", keys::fields_of::<Data>()),
            ("optimizer", keys::fields_of::<Optimizer>()),
            ("train", keys::fields_of::<Train>()),
            ("eval", keys::fields_of::<Eval>()),
            ("checkpoint", keys::fields_of::<Checkpoint>()),
            ("sample", keys::fields_of::<Sample>()),
            ("log", keys::fields_of::<Log>()),
        ];
        sections.iter().flat_map(|(section, names)| names.iter().map(move |name| format!("{section}.{name}"))).collect()
    }

    /// All settings as a file that [`Settings::from_toml`] reads back, the record of a run.
    pub fn to_toml(&self) -> String {
        let table = toml::to_string(self).expect("settings are representable in TOML");
        format!("# The settings of this run, after all overrides.\n\n{table}")
    }

    /// The model: preset or folder, then the overrides; `max_position_embeddings` is the sequence length unless it is overridden.
    ///
    /// # Errors
    /// An unknown preset, a folder without a readable `config.json`, a model that cannot exist.
    pub fn model_config(&self) -> Result<Config> {
        let mut config = match &self.model.folder {
            Some(folder) => {
                let config = ModelFolder::open(folder)?.config().clone();
                config.validate()?;
                config
            }
            None => match self.model.mixer {
                Mixer::Ttt => Config::preset(&self.model.preset, self.model.inner)?.with_backbone(self.model.backbone),
                Mixer::Attention => Config::transformer(&self.model.preset)?,
                Mixer::Mamba => Config::mamba(&self.model.preset)?,
            },
        };
        if let Some(foreign) = self.model.overrides.keys().find(|name| !config.mixer.has_field(name)) {
            let is = format!("{:?}", config.mixer).to_lowercase();
            return Err(Error::Config(format!("model.{foreign} is no field of this model, whose mixer is {is}; leave it out")));
        }
        config.max_position_embeddings = self.train.sequence_length;
        config.scan_checkpoint_group_size = self.train.checkpoint_group;
        let config = self.model.over(config).map_err(|e| Error::Config(format!("[model]: {}", e.message())))?;
        config.validate()?;
        Ok(config)
    }

    /// Tokens of a segment: a sequence, when it is not cut.
    pub fn segment_length(&self) -> usize {
        self.train.segment_length.unwrap_or(self.train.sequence_length)
    }

    /// How sequences are cut and dealt out, for mini-batches of `mini_batch` tokens.
    pub fn segmenting(&self, mini_batch: usize) -> Segmenting {
        Segmenting {
            segment: self.segment_length(),
            per_step: self.train.segments_per_step,
            mini_batch,
            reset_at_documents: self.train.reset_at_documents,
        }
    }

    /// Whether segments continue states: sequences are cut.
    pub fn carries(&self) -> bool {
        self.segment_length() < self.train.sequence_length
    }

    /// Sequences of a step, of each of which it reads [`Train::segments_per_step`] segments.
    pub fn sequences_per_step(&self) -> usize {
        self.train.batch_tokens as usize / (self.segment_length() * self.train.segments_per_step).max(1)
    }

    /// Sequences computed at once: the largest number up to `train.micro_batch` that divides those of a step, so that all micro-batches
    /// are equal.
    pub fn micro_batch(&self) -> usize {
        let sequences = self.sequences_per_step();
        (1..=self.train.micro_batch.min(sequences)).rev().find(|n| sequences.is_multiple_of(*n)).unwrap_or(1)
    }

    /// Steps of the run: enough for all its tokens.
    pub fn steps(&self) -> u64 {
        self.train.tokens.div_ceil(self.train.batch_tokens)
    }

    /// Steps of the optimizer's warm-up.
    pub fn warmup_steps(&self) -> u64 {
        let fraction = || (self.optimizer.warmup_fraction * self.steps() as f64).round() as u64;
        self.optimizer.warmup_steps.unwrap_or_else(fraction)
    }

    /// The learning rate over the run.
    pub fn learning_rate(&self) -> LearningRate {
        let Optimizer { learning_rate: peak, end_learning_rate: end, .. } = self.optimizer;
        LearningRate { peak, end, warmup: self.warmup_steps(), total: self.steps() }
    }

    /// The inner learning rate of `config`, the run's model, over the run.
    pub fn inner_learning_rate(&self, config: &Config) -> InnerLearningRate {
        let warmup = self.train.inner_lr_warmup.unwrap_or(match config.inner() {
            None | Some(Inner::Linear) => 0,
            Some(Inner::Mlp) => self.warmup_steps(),
        });
        InnerLearningRate { init: self.train.inner_lr_init, base: config.ttt_base_lr, warmup }
    }

    /// Settings of a run folder, to go on with. A run that started from another model goes on from its own newest checkpoint, so
    /// that other model may be gone.
    ///
    /// # Errors
    /// The folder holds no readable `settings.toml`.
    pub fn of_run(folder: &Path) -> Result<Settings> {
        let mut settings = Settings::load(folder.join("settings.toml"))?;
        let newest = Checkpoints::new(folder, 1, 0).latest()?;
        if settings.model.folder.is_some() && newest.is_some() {
            settings.model.folder = newest;
        }
        Ok(settings)
    }

    /// These settings with every path absolute, so that they mean the same wherever the program is started next.
    ///
    /// # Errors
    /// The current folder is gone.
    pub fn located(&self) -> Result<Settings> {
        let here = std::env::current_dir().at(".")?;
        let pattern = |text: &str| text.contains(['*', '?', '[']);
        let mut settings = self.clone();
        for path in settings.data.paths.iter_mut().chain(&mut settings.data.validation_paths) {
            // Before a pattern, a folder's own name would become a part of the pattern.
            let absolute = here.join(&*path).into_os_string().into_string().ok();
            if let Some(absolute) = absolute.filter(|_| !pattern(path) || here.to_str().is_some_and(|here| !pattern(here))) {
                *path = absolute;
            }
        }
        if settings.data.tokenizer != "bytes"
            && let Ok(absolute) = here.join(&settings.data.tokenizer).into_os_string().into_string()
        {
            settings.data.tokenizer = absolute;
        }
        for path in [&mut settings.data.cache, &mut settings.model.folder].into_iter().flatten() {
            *path = here.join(&*path);
        }
        Ok(settings)
    }

    /// These settings as those that the run in `folder`, made with `run`, goes on with. Of a run that is made longer or shorter
    /// the warm-up stays as long as it was, and the cosine ends at the new end.
    ///
    /// # Errors
    /// A setting differs that is not in [`MAY_CHANGE`].
    pub fn continued(&self, run: &Settings, folder: &Path) -> Result<Settings> {
        let mut settings = self.clone();
        // One of its own checkpoints is as good as another: the newest is read anyway.
        let own = std::path::absolute(folder).at(folder)?.join("checkpoints");
        if [self, run].iter().all(|s| s.model.folder.as_ref().is_some_and(|model| model.starts_with(&own))) {
            settings.model.folder = run.model.folder.clone();
        }
        let [now, then] = [&settings, run].map(|s| Table::try_from(s).expect("settings are representable in TOML"));
        for (section, entries) in now.iter().chain(&then) {
            for name in entries.as_table().expect("a section is a table").keys() {
                let key = format!("{section}.{name}");
                let value = |table: &Table| table[section].get(name).map_or("not set".into(), Value::to_string);
                let (now, then) = (value(&now), value(&then));
                if now == then || MAY_CHANGE.contains(&key.as_str()) {
                    continue;
                }
                return Err(Error::Config(format!(
                    "`{key}` is {then} in this run and cannot become {now}: with another model, other batches or another schedule \
                     the steps that were made would not be steps of the run; leave it out, or start a new run from this one's \
                     weights with `--init-from {}`",
                    folder.display()
                )));
            }
        }
        if settings.train.tokens != run.train.tokens {
            settings.optimizer.warmup_steps = Some(run.warmup_steps());
        }
        Ok(settings)
    }

    /// Checks that the run can be made.
    ///
    /// # Errors
    /// The first setting that is wrong, its value, and what it may be.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::Config(message));
        let Settings { data, optimizer, train, .. } = self;
        let config = self.model_config()?;
        let at_least_one = [
            ("train.tokens", train.tokens),
            ("train.sequence_length", train.sequence_length as u64),
            ("train.segment_length", self.segment_length() as u64),
            ("train.segments_per_step", train.segments_per_step as u64),
            ("train.batch_tokens", train.batch_tokens),
            ("train.micro_batch", train.micro_batch as u64),
            ("train.checkpoint_group", train.checkpoint_group as u64),
            ("checkpoint.keep", self.checkpoint.keep as u64),
            ("log.every", self.log.every),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return wrong(format!("{key} is 0; it must be at least 1"));
        }
        let (length, mini_batch, batch) =
            (train.sequence_length as u64, config.mini_batch().unwrap_or(1) as u64, train.batch_tokens);
        if !length.is_multiple_of(mini_batch) {
            return wrong(format!(
                "train.sequence_length {length} is not a multiple of the mini-batch size {mini_batch}; {} is",
                length.next_multiple_of(mini_batch)
            ));
        }
        self.validate_segments(mini_batch)?;
        let at_once = (self.segment_length() * train.segments_per_step) as u64;
        if !batch.is_multiple_of(at_once) {
            let of = match (train.segment_length, train.segments_per_step) {
                (None, _) => format!("train.sequence_length {length}"),
                (Some(segment), 1) => format!("train.segment_length {segment}"),
                (Some(segment), n) => format!("train.segments_per_step {n} times train.segment_length {segment}"),
            };
            return wrong(format!("train.batch_tokens {batch} is not a multiple of {of}; {} is", batch.next_multiple_of(at_once)));
        }
        if train.tokens < batch {
            return wrong(format!("train.tokens {} is less than one step of {batch} tokens (train.batch_tokens)", train.tokens));
        }
        if self.eval.tokens < length {
            return wrong(format!("eval.tokens {} is less than one sequence of {length} tokens", self.eval.tokens));
        }
        if self.warmup_steps() > self.steps() {
            return wrong(format!("optimizer.warmup_steps {} is more than the run's {} steps", self.warmup_steps(), self.steps()));
        }
        if train.only_initial_state && config.inner().is_none() {
            return wrong("train.only_initial_state is of a TTT model alone: this one has no initial fast weights".into());
        }
        if train.only_initial_state && self.model.folder.is_none() {
            return wrong("train.only_initial_state needs a trained model to start from: --init-from MODEL".into());
        }
        let positive = f64::MIN_POSITIVE..=f64::MAX;
        let ranges = [
            ("data.validation_fraction", data.validation_fraction, 0.0..=1.0 - f64::EPSILON, "from 0 to below 1"),
            ("optimizer.learning_rate", optimizer.learning_rate, positive.clone(), "a positive number"),
            ("optimizer.end_learning_rate", optimizer.end_learning_rate, 0.0..=optimizer.learning_rate, "from 0 to learning_rate"),
            ("optimizer.warmup_fraction", optimizer.warmup_fraction, 0.0..=1.0, "from 0 to 1"),
            ("optimizer.beta1", optimizer.beta1, 0.0..=1.0 - f64::EPSILON, "from 0 to below 1"),
            ("optimizer.beta2", optimizer.beta2, 0.0..=1.0 - f64::EPSILON, "from 0 to below 1"),
            ("optimizer.eps", optimizer.eps, positive.clone(), "a positive number"),
            ("optimizer.weight_decay", optimizer.weight_decay, 0.0..=f64::MAX, "a number from 0 up"),
            ("optimizer.clip", optimizer.clip, 0.0..=f64::MAX, "a number from 0 up"),
            ("train.inner_lr_init", train.inner_lr_init, positive, "a positive number"),
        ];
        match ranges.iter().find(|(_, value, range, _)| !range.contains(value)) {
            Some((key, value, _, allowed)) => wrong(format!("{key} is {value}; it must be {allowed}")),
            None => Ok(()),
        }
    }
}

impl Settings {
    /// The cuts of sequences, for mini-batches of `mini_batch` tokens.
    fn validate_segments(&self, mini_batch: u64) -> Result<()> {
        let train = &self.train;
        let (length, segment, at_once) = (train.sequence_length, self.segment_length(), train.segments_per_step);
        let message = if !(segment as u64).is_multiple_of(mini_batch) {
            let next = (segment as u64).next_multiple_of(mini_batch);
            format!("train.segment_length {segment} is not a multiple of the mini-batch size {mini_batch}; {next} is")
        } else if !length.is_multiple_of(segment) {
            format!("train.sequence_length {length} is not a multiple of train.segment_length {segment}")
        } else if !(length / segment).is_multiple_of(at_once) {
            let n = length / segment;
            format!("train.segments_per_step {at_once} does not divide the {n} segments of a sequence (train.segment_length)")
        } else if train.carry == Carry::Gradient && at_once == 1 {
            "train.carry is gradient, but a step has no cuts; set train.segments_per_step to 2 or more".into()
        } else if train.recompute == Recompute::Segment && train.carry != Carry::Gradient {
            "train.recompute is segment, which is of use only with train.carry=gradient; use auto, none, inner or block".into()
        } else {
            return Ok(());
        };
        Err(Error::Config(message))
    }
}

impl Model {
    /// `config` with the overrides.
    fn over(&self, config: Config) -> Result<Config, toml::de::Error> {
        let mut table = Table::try_from(config).expect("a model's configuration is representable in TOML");
        table.extend(self.overrides.clone());
        Config::deserialize(table)
    }
}

/// Refuses unknown keys, and fields of `config.json` that another setting stands for.
fn check_key(key: &str, origin: &str) -> Result<()> {
    let twin = match key {
        "model.model_type" => Some("model.mixer"),
        "model.ttt_layer_type" => Some("model.inner"),
        "model.scan_checkpoint_group_size" => Some("train.checkpoint_group"),
        _ => None,
    };
    if let Some(twin) = twin {
        return Err(Error::Config(format!("`{key}` in {origin}: use `{twin}`")));
    }
    let known = Settings::keys();
    if known.iter().any(|k| k == key) {
        return Ok(());
    }
    let hint = match keys::nearest(key, &known) {
        Some(near) => format!("did you mean `{near}`?"),
        None => "configs/tiny.toml lists all keys".into(),
    };
    Err(Error::Config(format!("unknown key `{key}` in {origin}: {hint}")))
}
