//! Model folders in and out: `config.json`, `model.safetensors` and `generation_config.json` with the official names and layouts,
//! so that the official PyTorch code reads what is written here and the other way round.
//!
//! [`safetensors`] is the file format, [`atomic`] how every file of the project reaches the disk, [`folder`] the model folder,
//! [`config_json`] its `config.json`, [`weights`] the way between tensors in files and [`crate::params::Params`], [`hash`] the
//! identity of a model's weights, [`skill`] initial fast weights in a file of their own.

pub mod atomic;
pub mod config_json;
pub mod folder;
pub mod hash;
pub mod safetensors;
pub mod skill;
pub mod weights;

pub use atomic::{write_atomic, write_folder};
pub use folder::{ModelFolder, Quantized, SaveOptions, save};
pub use hash::{base_hash, model_hash};
pub use skill::{Skill, SkillInfo};
pub use weights::FileDType;
pub(crate) use weights::some;

use std::path::Path;

use crate::{AtPath, Error, Result};

/// Opens a regular file for reading. Anything else is refused before it is opened: opening a pipe would wait for a writer.
pub(crate) fn open_file(path: &Path) -> Result<std::fs::File> {
    let kind = std::fs::metadata(path).at(path)?;
    if !kind.is_file() {
        let what = if kind.is_dir() { "this is a folder; a file is needed" } else { "this is not a regular file" };
        return Err(Error::io(path, std::io::Error::new(std::io::ErrorKind::InvalidInput, what)));
    }
    std::fs::File::open(path).at(path)
}
