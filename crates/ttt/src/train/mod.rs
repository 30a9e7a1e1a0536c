//! Training: settings of a run, schedules, and what a run writes beside its checkpoints.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

use crate::{AtPath, Error, Result};

mod keys;
pub mod metrics;
pub mod plot;
pub mod schedule;
pub mod settings;
pub mod tensorboard;

pub use settings::Settings;

/// Replaces `path` by a file of these bytes, or leaves it as it was: written under another name in the same folder, synced, renamed.
fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().ok_or_else(|| Error::Invalid(format!("`{}` does not name a file", path.display())))?;
    let temporary = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| _ = fs::remove_file(&temporary)).at(path)
}
