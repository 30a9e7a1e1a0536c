//! Checkpoints: a model folder with the optimizer and the position of the run beside the weights.
//!
//! A run folder holds `checkpoints/step-00000100/` and so on, `latest` with the name of the newest, and the plain model folders
//! `best/` and `final/`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::data::Tokenizer;
use crate::hub::safetensors::{self, Dtype, File};
use crate::hub::{self, ModelFolder, SaveOptions, config_json, weights, write_atomic, write_folder};
use crate::lm::Lm;
use crate::state::States;
use crate::train::step::Optimizer;
use crate::train::{DataId, carried};
use crate::{AtPath, Error, Result};

/// Where a checkpoint says how far its run was.
pub const STATE: &str = "trainer_state.json";
/// Version of that file.
const VERSION: u32 = 2;

/// Where a run is: everything that `--resume` needs beside weights and moments. The order of the data is a pure function of seed
/// and step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Version of this file.
    pub version: u32,
    /// Updates made.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Lowest validation loss so far.
    pub best_loss: Option<f64>,
    /// Seconds trained, earlier parts included.
    pub elapsed_seconds: f64,
    /// What it learns from.
    pub data: DataId,
}

impl TrainerState {
    /// The beginning of a run on some data.
    pub fn new(data: DataId) -> TrainerState {
        TrainerState { version: VERSION, step: 0, tokens: 0, best_loss: None, elapsed_seconds: 0.0, data }
    }

    /// That of a checkpoint's folder.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another version.
    pub fn read(folder: &Path) -> Result<TrainerState> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let path = folder.join(STATE);
        let text = std::fs::read_to_string(&path).at(&path)?;
        let wrong = |e: serde_json::Error| Error::format(&path, e.to_string());
        let Version { version } = serde_json::from_str(&text).map_err(wrong)?;
        if version != VERSION {
            return Err(Error::format(path, format!("it has version {version}; this program reads version {VERSION}")));
        }
        serde_json::from_str(&text).map_err(wrong)
    }
}

/// The checkpoints of a run folder.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    run: PathBuf,
    /// Newest ones to keep, besides milestones.
    keep: usize,
    /// Steps between those that are kept for ever; 0 for none.
    milestone_every: u64,
}

impl Checkpoints {
    /// Those of the run folder `run`.
    pub fn new(run: &Path, keep: usize, milestone_every: u64) -> Checkpoints {
        Checkpoints { run: run.to_owned(), keep, milestone_every }
    }

    fn folder(&self) -> PathBuf {
        self.run.join("checkpoints")
    }

    /// The newest checkpoint's folder, if there is one.
    ///
    /// # Errors
    /// A `latest` that names no checkpoint.
    pub fn latest(&self) -> Result<Option<PathBuf>> {
        let pointer = self.run.join("latest");
        if !pointer.exists() {
            return Ok(None);
        }
        let name = std::fs::read_to_string(&pointer).at(&pointer)?;
        let folder = self.folder().join(name.trim());
        match step_of(name.trim()) {
            Some(_) if folder.is_dir() => Ok(Some(folder)),
            _ => Err(Error::format(pointer, format!("it names `{}`, which is no checkpoint of this run", name.trim()))),
        }
    }

    /// Writes a checkpoint, with the states that the next step continues, points `latest` to it, and removes old ones that are no
    /// milestones.
    ///
    /// # Errors
    /// [`Error::Io`]; earlier checkpoints are then as they were.
    pub fn save(
        &self,
        model: &Lm,
        optimizer: &Optimizer,
        tokenizer: &Tokenizer,
        state: &TrainerState,
        carried: Option<&States>,
    ) -> Result<PathBuf> {
        let folder = self.folder();
        std::fs::create_dir_all(&folder).at(&folder)?;
        let name = format!("step-{:08}", state.step);
        let path = folder.join(&name);
        write_folder(&path, |tmp| {
            write_model(tmp, model, tokenizer)?;
            let (m, v) = (optimizer.m.on_cpu()?, optimizer.v.on_cpu()?);
            let mut moments = weights::sources(&m, "m.", Dtype::F32);
            moments.extend(weights::sources(&v, "v.", Dtype::F32));
            safetensors::write(tmp.join("optimizer.safetensors"), &[], moments)?;
            carried.map(|states| carried::write(tmp, states)).transpose()?;
            let json = serde_json::to_string_pretty(state).expect("a trainer state is plain data");
            write_atomic(tmp.join(STATE), |w| w.write_all(json.as_bytes()))
        })?;
        write_atomic(self.run.join("latest"), |w| writeln!(w, "{name}"))?;
        self.prune()?;
        Ok(path)
    }

    /// Removes all but the milestones and the newest `keep` others.
    fn prune(&self) -> Result<()> {
        let folder = self.folder();
        let mut steps: Vec<(u64, PathBuf)> = Vec::new();
        for entry in std::fs::read_dir(&folder).at(&folder)? {
            let path = entry.at(&folder)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            steps.extend(step_of(&name).map(|step| (step, path)));
        }
        steps.sort();
        steps.retain(|(step, _)| self.milestone_every == 0 || !step.is_multiple_of(self.milestone_every));
        for (_, path) in steps.iter().rev().skip(self.keep) {
            std::fs::remove_dir_all(path).at(path)?;
        }
        Ok(())
    }
}

/// Step of a checkpoint's name.
fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("step-").filter(|digits| digits.len() == 8)?.parse().ok()
}

/// Writes a model folder with its tokenizer, whole or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn save_model(path: &Path, model: &Lm, tokenizer: &Tokenizer) -> Result<()> {
    write_folder(path, |tmp| write_model(tmp, model, tokenizer))
}

fn write_model(folder: &Path, model: &Lm, tokenizer: &Tokenizer) -> Result<()> {
    hub::save(folder, model.config(), model.params(), SaveOptions::default())?;
    tokenizer.save(folder)
}

/// Reads a checkpoint: weights and moments into `model` and `optimizer`, the states that the next step continues into `carried`, and
/// returns where the run was.
///
/// # Errors
/// Files that cannot be read, or that belong to another model.
pub fn load(folder: &Path, model: &mut Lm, optimizer: &mut Optimizer, carried: Option<&mut States>) -> Result<TrainerState> {
    let state = TrainerState::read(folder)?;
    let saved = ModelFolder::open(folder)?;
    // How much is kept for the backward pass, and how long sequences are, is the run's affair.
    let settled = |config: &Config| {
        config_json::fields(&Config { scan_checkpoint_group_size: 0, max_position_embeddings: 0, ..config.clone() })
    };
    if settled(saved.config()) != settled(model.config()) {
        return Err(Error::format(folder.join("config.json"), "the checkpoint's model differs from the run's settings"));
    }
    *model.params_mut() = saved.load_params(model.params().table(), model.device(), model.dtype())?;
    let moments = File::open(folder.join("optimizer.safetensors"))?;
    weights::read_into(&mut optimizer.m, &moments, "m.")?;
    weights::read_into(&mut optimizer.v, &moments, "v.")?;
    optimizer.step = state.step;
    carried.map(|states| carried::read(folder, states)).transpose()?;
    Ok(state)
}
