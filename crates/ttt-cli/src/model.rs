//! What a MODEL argument names, and the device that it runs on.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ttt::Storage;
use ttt::data::Tokenizer;
use ttt::device::{Device, Kernels};
use ttt::hub::ModelFolder;
use ttt::lm::Lm;
use ttt::tensor::DType;
use ttt::train::checkpoint::Checkpoints;

use crate::args::{DeviceName, Precision};

/// The model folder that a path means: the path itself, or the final model of a run folder, or else its newest checkpoint.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    if path.join("config.json").exists() {
        return Ok(path.to_owned());
    }
    if !path.exists() {
        bail!("{} does not exist; a model is a folder with config.json and model.safetensors, or a run folder", path.display());
    }
    if !path.is_dir() {
        bail!("{} is a file; a model is a folder with config.json and model.safetensors", path.display());
    }
    let last = path.join("final");
    let newest = Checkpoints::new(path, 1, 0).latest()?;
    let written = |folder: &Path| std::fs::metadata(folder.join("config.json")).and_then(|m| m.modified()).ok();
    // A run that was finished and then continued has checkpoints that are newer than its final model.
    if written(&last).is_some() && newest.as_deref().and_then(written) <= written(&last) {
        return Ok(last);
    }
    match newest {
        Some(checkpoint) => Ok(checkpoint),
        None if path.join("settings.toml").exists() => {
            bail!("the run in {} has not saved a model yet", path.display())
        }
        None => bail!(
            "{} holds no model: there is neither config.json, as in a model folder, nor settings.toml, as in a run folder",
            path.display()
        ),
    }
}

/// The model that a path means.
pub fn load(path: &Path, device: &Device, dtype: DType) -> Result<Lm> {
    let folder = resolve(path)?;
    Lm::load(&folder, device, dtype).context("cannot load the model")
}

/// The model of a folder, its weights held as `storage`, or else as the folder stores them.
pub fn load_as(folder: &Path, device: &Device, storage: Option<Storage>) -> Result<Lm> {
    let load = || {
        let folder = ModelFolder::open(folder)?;
        let storage = storage.map_or_else(|| folder.storage(), Ok)?;
        Lm::from_folder(&folder, folder.config(), device, storage)
    };
    load().context("cannot load the model")
}

/// The tokenizer that was named, or else the model folder's own, if there is one; checked to fit the model.
pub fn tokenizer(named: Option<&str>, folder: &Path, vocab_size: usize) -> Result<Option<Tokenizer>> {
    let tokenizer = match named {
        Some("bytes") => Some(Tokenizer::bytes(vocab_size)),
        Some(file) => Some(Tokenizer::from_file(file)?),
        None => Tokenizer::from_folder(folder)?,
    };
    if let Some(t) = tokenizer.as_ref().filter(|t| t.vocab_size() > vocab_size) {
        bail!("the tokenizer has {} ids, but the model only {vocab_size}; name the model's own with --tokenizer", t.vocab_size());
    }
    Ok(tokenizer)
}

/// Loads a skill over a model, when one is named; it must have been learned with the model's tokenizer.
pub fn load_skill(lm: &mut Lm, skill: Option<&Path>, tokenizer: Option<&Tokenizer>) -> Result<()> {
    let Some(path) = skill else { return Ok(()) };
    let info = lm.load_skill(path)?;
    if tokenizer.is_some_and(|t| t.fingerprint() != info.tokenizer) {
        bail!("{}: the skill {:?} was learned with another tokenizer than this one", path.display(), info.name);
    }
    Ok(())
}

/// Starts the device; 0 threads means all processors.
pub fn device(name: DeviceName, threads: usize) -> Result<Device> {
    let kernels = match name {
        DeviceName::Auto | DeviceName::Cpu => Kernels::Fast,
        DeviceName::Reference => Kernels::Reference,
    };
    Ok(Device::cpu_with(threads, kernels)?)
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> DType {
        match precision {
            Precision::F32 => DType::F32,
            Precision::F64 => DType::F64,
        }
    }
}

/// How the user can start this program again: `cargo run --release --` for a build in the workspace they are in.
pub fn program() -> String {
    let typed = std::env::args().next().unwrap_or_else(|| "ttt".into());
    let here = || -> Option<String> {
        let exe = std::env::current_exe().ok()?.canonicalize().ok()?;
        let profile = exe.parent()?;
        let target = profile.parent()?;
        let workspace = target.parent()?;
        let inside = target.file_name()? == "target" && std::env::current_dir().ok()?.canonicalize().ok()?.starts_with(workspace);
        match profile.file_name()?.to_str()? {
            "release" if inside => Some("cargo run --release --".into()),
            "debug" if inside => Some("cargo run --".into()),
            _ => None,
        }
    };
    here().unwrap_or(typed)
}
