//! Settings of a training run: a TOML file, `key=value` overrides, and what follows from them.
//!
//! `configs/tiny.toml` holds the default and the meaning of every setting; files and overrides are layered on it.

mod derived;
pub mod recompute;
mod run;
mod sections;
mod validate;

use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use recompute::Recompute;
pub use run::MAY_CHANGE;
pub use sections::{Carry, Checkpoint, Data, Eval, Log, Model, Optimizer, Precision, Sample, Train};

use super::keys;
use crate::config::{Config, Mixer};
use crate::hub::ModelFolder;
use crate::{AtPath, Error, Result};

/// The default run, with a comment on every setting.
pub const TINY: &str = include_str!("../../../../../configs/tiny.toml");

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
