//! What a run folder holds.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::FOLDER;
use crate::config::Config;
use crate::eval::{InnerRow, LossRow};
use crate::params::ParamTable;
use crate::plan;
use crate::train::metrics::{self, Record, Split};
use crate::train::settings::Settings;
use crate::{AtPath, Error, Result};

/// A run: what was set, what training measured, and what was measured afterwards.
#[derive(Clone, Debug)]
pub struct RunResults {
    /// What it is called in pictures and tables.
    pub name: String,
    /// Where it was read from.
    pub folder: PathBuf,
    /// Its settings.
    pub settings: Settings,
    /// Its model.
    pub config: Config,
    /// Everything in its `metrics.jsonl`.
    pub records: Vec<Record>,
    /// Evaluations of texts.
    pub evaluations: Vec<Evaluated>,
    /// Evaluations of tasks.
    pub tasks: Vec<TaskResult>,
    /// Measurements of decoding.
    pub decoding: Vec<Decoding>,
}

/// What `ttt eval --json` printed about texts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// Name of its file, without `.json`.
    #[serde(default)]
    pub name: String,
    /// Mean negative log likelihood, nats a token.
    pub loss: f64,
    /// Half the width of its 95 % interval.
    #[serde(default)]
    pub margin: Option<f64>,
    /// Bits a byte of text.
    pub bits_per_byte: f64,
    /// Tokens judged.
    pub tokens: u64,
    /// Tokens after which everything was forgotten; none: never.
    #[serde(default)]
    pub context: Option<u64>,
    /// Loss by position.
    pub positions: Vec<LossRow>,
    /// The inner models' errors by position, of each layer.
    #[serde(default)]
    pub inner: Vec<InnerLayer>,
}

/// Errors of one layer's inner models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InnerLayer {
    /// By position.
    pub positions: Vec<InnerRow>,
}

/// What `ttt eval --task --json` printed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    /// Name of its file, without `.json`.
    #[serde(default)]
    pub name: String,
    /// The task.
    pub task: String,
    /// A row for each setting of it.
    pub results: Vec<TaskRow>,
}

/// A setting of a task and how well it was done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskRow {
    /// Part of the asked tokens that were right.
    pub accuracy: f64,
    /// Half the width of its 95 % interval.
    #[serde(default)]
    pub margin: Option<f64>,
    /// What guessing reaches.
    pub chance: f64,
    /// The settings: pairs, length, depth.
    #[serde(flatten)]
    pub settings: Map<String, Value>,
}

/// What `ttt bench decode --json` printed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decoding {
    /// Name of its file, without `.json`.
    #[serde(default)]
    pub name: String,
    /// Where it was measured.
    #[serde(default)]
    pub device: String,
    /// Sequences decoded at once.
    pub batch: u64,
    /// A row for each length.
    pub results: Vec<DecodingRow>,
}

/// Decoding after a number of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodingRow {
    /// Tokens that every sequence had read.
    pub after: u64,
    /// Tokens a second, of all sequences together.
    pub tokens_per_second: Rates,
    /// Bytes of the states of all sequences.
    pub state_bytes: u64,
    /// Most bytes that tensors held, weights included.
    pub peak_memory_bytes: u64,
}

/// Speed over some repetitions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// The middle one.
    pub median: f64,
    /// The slowest.
    pub min: f64,
    /// The fastest.
    pub max: f64,
}

impl Decoding {
    /// Milliseconds from one token of a sequence to its next, at the median speed.
    pub fn latency(&self, row: &DecodingRow) -> f64 {
        1e3 * self.batch as f64 / row.tokens_per_second.median
    }
}

impl RunResults {
    /// Reads a run folder, under a name.
    ///
    /// # Errors
    /// No run folder, or a file in it is not what it should be; the message names the file.
    pub fn read(folder: &Path, name: String) -> Result<RunResults> {
        let path = folder.join("settings.toml");
        if !path.exists() {
            let message = format!("{} is no run folder: there is no settings.toml in it", folder.display());
            return Err(Error::Invalid(message));
        }
        let settings = Settings::of_run(folder)?;
        let config = settings.model_config()?;
        let records = match folder.join("metrics.jsonl") {
            path if path.exists() => metrics::read(path)?,
            _ => Vec::new(),
        };
        let mut run = RunResults {
            name,
            folder: folder.to_owned(),
            settings,
            config,
            records,
            evaluations: Vec::new(),
            tasks: Vec::new(),
            decoding: Vec::new(),
        };
        for path in kept(folder)? {
            run.add(&path)?;
        }
        Ok(run)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).at(path)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let wrong = |e: serde_json::Error| {
            let message = format!("this is no result of `ttt eval --json` or `ttt bench decode --json`: {e}; move it elsewhere");
            Error::format(path, message)
        };
        let value: Value = serde_json::from_str(&text).map_err(wrong)?;
        if value.get("positions").is_some() {
            self.evaluations.push(Evaluated { name, ..serde_json::from_value(value).map_err(wrong)? });
        } else if value.get("task").is_some() {
            self.tasks.push(TaskResult { name, ..serde_json::from_value(value).map_err(wrong)? });
        } else {
            self.decoding.push(Decoding { name, ..serde_json::from_value(value).map_err(wrong)? });
        }
        Ok(())
    }

    /// What kind of model it is, and its size.
    pub fn model(&self) -> String {
        let config = &self.config;
        let learner = config.kind();
        let backbone = if config.inner().is_some() && config.use_gate && config.share_qk { ", Mamba backbone" } else { "" };
        format!("{learner}{backbone}, {} x {}", config.num_hidden_layers, config.hidden_size)
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        ParamTable::new(&self.config).0.parameters()
    }

    /// Floating-point operations of training on a token, nothing recomputed.
    pub fn flops_per_token(&self) -> f64 {
        let flops = plan::flops(&self.config, self.settings.train.sequence_length);
        if self.settings.train.only_initial_state { flops.training_initial_state() } else { flops.training }
    }

    /// Records of a split that have a finite loss.
    pub fn losses(&self, split: Split) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(move |record| record.split == split && record.loss.is_finite())
    }

    /// The last validation.
    pub fn validation(&self) -> Option<&Record> {
        self.losses(Split::Validation).last()
    }

    /// The validation of lowest loss.
    pub fn best(&self) -> Option<&Record> {
        self.losses(Split::Validation).min_by(|a, b| a.loss.total_cmp(&b.loss))
    }

    /// Tokens trained on so far.
    pub fn tokens(&self) -> u64 {
        self.records.iter().map(|record| record.tokens).max().unwrap_or(0)
    }

    /// Seconds trained so far.
    pub fn seconds(&self) -> Option<f64> {
        self.records.iter().filter_map(|record| record.elapsed_seconds).reduce(f64::max)
    }

    /// Most memory that training used.
    pub fn memory(&self) -> Option<u64> {
        self.records.iter().filter_map(|record| record.memory_bytes).max()
    }

    /// The middle one of the speeds that training logged, in tokens a second.
    pub fn speed(&self) -> Option<f64> {
        let mut speeds: Vec<f64> = self.records.iter().filter_map(|r| r.tokens_per_second).filter(|s| s.is_finite()).collect();
        speeds.sort_by(f64::total_cmp);
        speeds.get(speeds.len() / 2).copied()
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "name": self.name,
            "folder": self.folder,
            "model": self.model(),
            "config": self.config,
            "seed": self.settings.train.seed,
            "parameters": self.parameters(),
            "tokens": self.tokens(),
            "flops_per_token": self.flops_per_token(),
            "flops": self.flops_per_token() * self.tokens() as f64,
            "seconds": self.seconds(),
            "tokens_per_second": self.speed(),
            "memory_bytes": self.memory(),
            "validation": self.validation(),
            "best": self.best(),
            "evaluations": self.evaluations,
            "tasks": self.tasks,
            "decoding": self.decoding,
        })
    }
}

/// The files of measurements, by name.
fn kept(folder: &Path) -> Result<Vec<PathBuf>> {
    let folder = folder.join(FOLDER);
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&folder).at(&folder)? {
        let path = entry.at(&folder)?.path();
        if path.extension().is_some_and(|e| e == "json") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
