//! The `ttt` program: trains, evaluates and runs language models whose hidden state learns while it reads.

mod args;
mod commands;
mod interrupt;
mod keep;
mod model;
mod progress;
mod state;
mod units;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use anyhow::{Error, Result};
use clap::Parser;

use args::{Args, Command};

fn main() -> ExitCode {
    let args = Args::parse();
    // Not locked: a run writes from other threads too.
    let mut out = std::io::stdout();
    match run(&args, &mut out).and_then(|()| Ok(out.flush()?)) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has had enough (`ttt info ... | head -1`).
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        // What to do next was printed with the rest.
        Err(error) if matches!(error.downcast_ref(), Some(ttt::Error::Interrupted)) => ExitCode::from(130),
        Err(error) => {
            // Not `eprintln!`, which panics when nobody listens.
            let _ = writeln!(std::io::stderr(), "error: {}", message(&error));
            if error.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    match &args.command {
        Command::Train(args) => commands::train::run(args, out),
        Command::Eval(args) => commands::eval::run(args, out),
        Command::Compare(args) => commands::compare::run(args, out),
        Command::Report(args) => commands::compare::report(args, out),
        Command::Task(args) => commands::task::run(args, out),
        Command::Generate(args) => commands::generate::run(args, out),
        Command::Read(args) => commands::read::run(args, out),
        Command::State(command) => commands::state::run(command, out),
        Command::Chat(args) => commands::chat::run(args, out),
        Command::Serve(args) => commands::serve::run(args, out),
        Command::Verify(args) => commands::verify::run(args, out),
        Command::Plan(args) => commands::plan::run(args, out),
        Command::Info(args) => commands::info::run(args, out),
        Command::Convert(args) => commands::convert::run(args, out),
        Command::Import(args) => commands::import::run(args, out),
        Command::Quantize(args) => commands::quantize::run(args, out),
        Command::Tokenizer(command) => commands::tokenizer::run(command, out),
        Command::Bench(args) => commands::bench::run(args, out),
        Command::Doctor(args) => commands::doctor::run(args, out),
        Command::Kernels(command) => commands::kernels::run(command, out),
        Command::Completions(args) => commands::completions::run(args, out),
    }
}

/// What was typed does not make a command: exit code 2, as for what clap refuses.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}; see --help", self.0)
    }
}

impl std::error::Error for Usage {}

fn is_broken_pipe(error: &Error) -> bool {
    let broken = |e: &std::io::Error| e.kind() == ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(broken))
}

/// The causes on one line. Many errors already end in their cause's text, which is then not said twice.
fn message(error: &Error) -> String {
    let mut all = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if all.is_empty() {
            all = cause;
        } else if !all.ends_with(&cause) {
            all = format!("{all}: {cause}");
        }
    }
    // A message of several lines (TOML shows the place) stays as it is; the first line says what is wrong.
    all.trim_end().to_owned()
}
