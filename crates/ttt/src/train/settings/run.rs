//! Settings of a run that goes on.

use std::path::Path;

use toml::{Table, Value};

use super::Settings;
use crate::train::checkpoint::Checkpoints;
use crate::{AtPath, Error, Result};

/// What may be another when a run goes on. Every other setting fixes the model, the order of the data or what a step's number
/// means. Texts are judged by their contents ([`crate::train::DataId`]), so that they may have moved.
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

impl Settings {
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
}
