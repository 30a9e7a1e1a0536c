//! Small runs that can be stopped.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use ttt::train::Settings;
use ttt::train::metrics::{Record, Split};
use ttt::train::observe::{Event, Observer};

/// Interrupts after so many steps.
pub struct StopAfter {
    steps: u64,
    seen: AtomicU64,
    /// Warnings that came.
    pub warnings: Mutex<Vec<String>>,
}

impl StopAfter {
    pub fn steps(steps: u64) -> StopAfter {
        StopAfter { steps, seen: AtomicU64::new(0), warnings: Mutex::default() }
    }
}

impl Observer for StopAfter {
    fn event(&self, event: Event<'_>) {
        if let Event::Step(Record { step, .. }) | Event::Logged(Record { step, split: Split::Train, .. }) = event {
            self.seen.store(*step, Ordering::Relaxed);
        }
        if let Event::Warning(text) = event {
            self.warnings.lock().unwrap().push(text.to_owned());
        }
    }

    fn interrupted(&self) -> bool {
        self.seen.load(Ordering::Relaxed) >= self.steps
    }
}

pub fn never() -> StopAfter {
    StopAfter::steps(u64::MAX)
}

pub fn corpus(folder: &Path) -> PathBuf {
    let path = folder.join("text.txt");
    if path.exists() {
        return path;
    }
    let text: String = (0..2000).map(|i| format!("line {i} of {}\n", i * i % 97)).collect();
    std::fs::write(&path, text).unwrap();
    path
}

pub fn settings(folder: &Path, inner: &str) -> Settings {
    let mut settings = Settings::default();
    let data = corpus(folder);
    for assignment in [
        &format!("data.paths={}", data.display()),
        &format!("model.inner={inner}"),
        "model.hidden_size=32",
        "model.intermediate_size=48",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "train.tokens=6144",
        "train.sequence_length=64",
        "train.batch_tokens=512",
        "train.micro_batch=4",
        "eval.every=4",
        "eval.tokens=1024",
        "checkpoint.every=3",
        "checkpoint.keep=2",
        "checkpoint.milestone_every=5",
        "sample.every=0",
        "log.every=1",
    ] {
        settings.apply_override(assignment).unwrap();
    }
    settings
}
