//! Progress on the standard error: a bar on a terminal, elsewhere a line every few seconds.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Progress of one piece of work.
pub struct Bar {
    bar: Option<ProgressBar>,
    length: u64,
    what: Unit,
    last: Cell<Instant>,
}

#[derive(Clone, Copy)]
enum Unit {
    Bytes,
    Steps,
}

impl Bar {
    /// Work on so many bytes.
    pub fn bytes(length: u64) -> Bar {
        Bar::new(length, Unit::Bytes, "{bar:32} {bytes}/{total_bytes}  {msg}")
    }

    /// So many steps of training.
    pub fn steps(length: u64) -> Bar {
        Bar::new(length, Unit::Steps, "{bar:32} {pos}/{len}  {msg}")
    }

    fn new(length: u64, what: Unit, template: &str) -> Bar {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(template).expect("a template of known keys").progress_chars("━╸ ");
            ProgressBar::new(length).with_style(style)
        });
        Bar { bar, length, what, last: Cell::new(Instant::now()) }
    }

    /// Shows how far the work is.
    pub fn set(&self, position: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
            if !message.is_empty() {
                bar.set_message(message.to_owned());
            }
        } else if self.last.get().elapsed() >= LINE_EVERY {
            self.last.set(Instant::now());
            // Progress that nobody can see is no reason to stop.
            let _ = match self.what {
                Unit::Steps => writeln!(std::io::stderr(), "step {position}/{}  {message}", self.length),
                Unit::Bytes => {
                    let percent = 100.0 * position as f64 / self.length.max(1) as f64;
                    writeln!(std::io::stderr(), "{percent:3.0} %  {message}")
                }
            };
        }
    }

    /// Writes something while the bar is out of the way.
    pub fn above<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Writes a warning to the standard error. The work goes on when nobody reads it.
pub fn warn(text: &str) {
    let _ = writeln!(std::io::stderr(), "warning: {text}");
}
