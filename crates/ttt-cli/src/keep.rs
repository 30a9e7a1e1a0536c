//! `--keep`: results that stay with their run.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use ttt::device::Device;
use ttt::hub::write_atomic;
use ttt::results::FOLDER;

/// Where to keep a result.
#[derive(Debug)]
pub struct Keep {
    path: PathBuf,
}

impl Keep {
    /// The file `results/NAME.json` in the run folder that a model argument lies in.
    ///
    /// # Errors
    /// No run folder, or a name that is no file's.
    pub fn new(model: &Path, name: &str) -> Result<Keep> {
        let Some(run) = model.ancestors().find(|folder| folder.join("settings.toml").exists()) else {
            bail!("--keep puts the result into a run folder, but {} is in none: there is no settings.toml", model.display());
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            bail!("--keep={name}: a name has letters, digits, `-`, `_` and `.` only");
        }
        Ok(Keep { path: run.join(FOLDER).join(format!("{name}.json")) })
    }

    /// Writes the result, with where and how it was measured.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, result: &Value, device: &Device) -> Result<()> {
        let mut object = result.clone();
        object["device"] = json!(name(device));
        object["command"] = json!(std::env::args().skip(1).collect::<Vec<_>>());
        object["ttt"] = json!(env!("CARGO_PKG_VERSION"));
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        Ok(write_atomic(&self.path, |w| writeln!(w, "{object}"))?)
    }

    /// Where the result is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A device as results name it.
pub fn name(device: &Device) -> String {
    match device.as_cuda() {
        Some(gpu) => gpu.info().name.clone(),
        None => format!("CPU, {} threads", device.threads()),
    }
}
