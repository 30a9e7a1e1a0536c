//! Shows a run while it is made, and stops it on Ctrl-C.

use std::collections::VecDeque;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use anyhow::Result;
use ttt::config::Config;
use ttt::layer::Keep;
use ttt::plan::Memory;
use ttt::train::Recompute;
use ttt::train::metrics::{Record, Split};
use ttt::train::observe::{Event, Observer};
use ttt::train::run::Job;
use ttt::train::settings::{Carry, Settings};

use crate::commands::plan::describe;
use crate::interrupt::Interrupt;
use crate::progress::{Bar, warn};
use crate::units;

/// Training losses that the table's mean is over.
const RECENT: usize = 20;

/// What the first Ctrl-C says.
const STOPPING: &str = "stopping after this step; Ctrl-C again gives up everything since the last checkpoint";

/// The observer of a run.
pub struct Watch {
    settings: Settings,
    folder: PathBuf,
    quiet: bool,
    interrupt: Interrupt,
    view: Mutex<View>,
}

/// What is on the screen.
struct View {
    bar: Option<Bar>,
    steps: u64,
    /// When the last step, or whatever came after it, ended.
    last: Instant,
    /// Seconds of a step, smoothed.
    step_seconds: Option<f64>,
    recent: VecDeque<f64>,
}

impl Watch {
    /// Watches a job, and Ctrl-C.
    pub fn new(job: &Job, quiet: bool) -> Result<Watch> {
        let interrupt = Interrupt::watch(STOPPING)?;
        let view = View { bar: None, steps: 0, last: Instant::now(), step_seconds: None, recent: VecDeque::new() };
        let folder = job.folder.clone();
        Ok(Watch { settings: job.settings.clone(), folder, quiet, interrupt, view: Mutex::new(view) })
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.view().bar {
            bar.finish();
        }
    }

    /// Whether the run got as far as training.
    pub fn started(&self) -> bool {
        self.interrupt.begun()
    }

    fn view(&self) -> MutexGuard<'_, View> {
        // A poisoned view is still a view.
        self.view.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Observer for Watch {
    fn event(&self, event: Event<'_>) {
        let mut view = self.view();
        match event {
            Event::Corpus(text) => say(text),
            Event::Warning(text) => warn(text),
            Event::Tokenizing(p) => {
                let bar = view.bar.get_or_insert_with(|| Bar::bytes(p.total_bytes));
                let message = if p.waiting {
                    "another process makes the tokens; waiting".into()
                } else {
                    format!("{} tokens", units::count(p.tokens as f64))
                };
                bar.set(p.bytes, &message);
            }
            Event::Start { config, memory, keep, parameters, learned, train_tokens, validation_tokens, from_step, steps } => {
                if let Some(tokenizing) = view.bar.take() {
                    tokenizing.finish();
                }
                self.header(config, [parameters, learned], [train_tokens, validation_tokens], [from_step, steps]);
                self.memory(memory, keep);
                view.steps = steps;
                view.last = Instant::now();
                view.bar = (!self.quiet).then(|| Bar::steps(steps));
                self.interrupt.begin();
            }
            Event::Step(record) => self.step(&mut view, record),
            Event::Logged(record) if record.split == Split::Train => self.step(&mut view, record),
            Event::Logged(record) => {
                let line = view.row(record, self.settings.train.batch_tokens);
                view.say(&line);
            }
            Event::Sample(text) => {
                if !self.quiet {
                    let text = units::printable(text).trim_end().replace('\n', "\n  │ ");
                    view.say(&format!("  │ {text}"));
                }
                view.last = Instant::now();
            }
            Event::Saved(_) => view.last = Instant::now(),
        }
    }

    fn interrupted(&self) -> bool {
        self.interrupt.asked()
    }
}

impl Watch {
    fn header(&self, config: &Config, [parameters, learned]: [usize; 2], tokens: [u64; 2], [from_step, steps]: [u64; 2]) {
        let train = &self.settings.train;
        say(&format!("model   {}", describe(config)));
        let learned = match train.only_initial_state {
            true => format!(", of which {} are learned", units::grouped(learned as u64)),
            false => String::new(),
        };
        say(&format!("size    {} parameters{learned}", units::grouped(parameters as u64)));
        say(&format!("data    {} tokens to learn from, {} to validate", units::grouped(tokens[0]), units::grouped(tokens[1])));
        let epochs = train.tokens as f64 / tokens[0].max(1) as f64;
        let from = if from_step > 0 { format!(", going on after step {from_step}") } else { String::new() };
        say(&format!(
            "steps   {steps} of {} tokens, {:.2} times through the data{from}",
            units::grouped(train.batch_tokens),
            epochs
        ));
        if self.settings.carries() {
            say(&format!(
                "carry   sequences of {} tokens in segments of {}; {} a step, {}",
                units::grouped(train.sequence_length as u64),
                units::grouped(self.settings.segment_length() as u64),
                train.segments_per_step,
                match train.carry {
                    Carry::State => "no gradient across cuts",
                    Carry::Gradient => "with gradient across the cuts in a step",
                }
            ));
        }
    }

    fn memory(&self, memory: Memory, keep: Keep) {
        let fixed = memory.fixed();
        let again = match Recompute::of(keep) {
            recompute if self.settings.train.recompute == Recompute::Auto && recompute != Recompute::None => {
                format!("; to fit, recompute is {}", recompute.name())
            }
            _ => String::new(),
        };
        say(&format!(
            "memory  {} planned: {} weights, gradients and moments, {} activations, fast weights and states{again}",
            units::bytes(memory.total() as u64),
            units::bytes(fixed as u64),
            units::bytes((memory.total() - fixed) as u64),
        ));
        say(&format!("folder  {}", self.folder.display()));
        say(&format!("\n{:>8} {:>9} {:>12} {:>10} {:>10} {:>9}", "step", "tokens", "train loss", "val loss", "bits/byte", "tok/s"));
    }

    fn step(&self, view: &mut View, record: &Record) {
        let now = Instant::now();
        let took = now.duration_since(view.last).as_secs_f64();
        view.last = now;
        view.step_seconds = Some(view.step_seconds.map_or(took, |mean| 0.9 * mean + 0.1 * took));
        view.recent.push_back(record.loss);
        if view.recent.len() > RECENT {
            view.recent.pop_front();
        }
        let left = view.step_seconds.unwrap_or(0.0) * view.steps.saturating_sub(record.step) as f64;
        let message = format!(
            "loss {:.4}  {:.3} bits/byte  {} tok/s  {} left",
            record.loss,
            record.bits_per_byte.unwrap_or(f64::NAN),
            units::count(view.speed(self.settings.train.batch_tokens)),
            units::seconds(left)
        );
        if let Some(bar) = &view.bar {
            bar.set(record.step, &message);
        }
    }
}

impl View {
    fn speed(&self, batch_tokens: u64) -> f64 {
        self.step_seconds.map_or(0.0, |s| (batch_tokens as f64 / s.max(1e-9)).round())
    }

    /// A line of the table of validations.
    fn row(&mut self, record: &Record, batch_tokens: u64) -> String {
        let mean = self.recent.iter().sum::<f64>() / self.recent.len() as f64;
        let (train, speed) = match self.recent.is_empty() {
            true => ("-".into(), "-".into()),
            false => (format!("{mean:.4}"), units::count(self.speed(batch_tokens))),
        };
        self.last = Instant::now();
        let (loss, bits) = (record.loss, record.bits_per_byte.unwrap_or(f64::NAN));
        format!("{:>8} {:>9} {train:>12} {loss:>10.4} {bits:>10.4} {speed:>9}", record.step, units::count(record.tokens as f64))
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.above(|| say(text)),
            None => say(text),
        }
    }
}

/// Writes a line. A run goes on when nobody reads its output any more.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}
