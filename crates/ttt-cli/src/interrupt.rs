//! Ctrl-C, and SIGTERM: work that has something to lose saves it and stops.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

use anyhow::{Context, Result};

/// At first there is nothing to save, and Ctrl-C ends the program.
const NOTHING: u8 = 0;
/// From here on it asks the work to save and stop.
const WORKING: u8 = 1;
/// It was asked; a second Ctrl-C ends the program.
const STOPPING: u8 = 2;

/// What the signal handler and the work tell each other.
#[derive(Clone)]
pub struct Interrupt(Arc<AtomicU8>);

impl Interrupt {
    /// Watches for the signal; the first that finds work says `notice`.
    pub fn watch(notice: &'static str) -> Result<Interrupt> {
        let state = Arc::new(AtomicU8::new(NOTHING));
        let theirs = state.clone();
        let handler = move || {
            if theirs.compare_exchange(WORKING, STOPPING, SeqCst, SeqCst).is_err() {
                std::process::exit(130);
            }
            // Not `eprintln!`, which panics when nobody listens.
            let _ = writeln!(std::io::stderr(), "\n{notice}");
        };
        ctrlc::set_handler(handler).context("cannot watch for Ctrl-C")?;
        Ok(Interrupt(state))
    }

    /// From now on there is something to save.
    pub fn begin(&self) {
        self.0.store(WORKING, SeqCst);
    }

    /// Whether the work has begun.
    pub fn begun(&self) -> bool {
        self.0.load(SeqCst) != NOTHING
    }

    /// Whether the work is to stop.
    pub fn asked(&self) -> bool {
        self.0.load(SeqCst) == STOPPING
    }
}
