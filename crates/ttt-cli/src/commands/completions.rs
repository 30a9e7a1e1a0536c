//! `ttt completions`: a shell's completion script.

use std::io::Write;

use anyhow::Result;
use clap::CommandFactory;

use crate::args::{Args, Completions};

/// Runs the command.
pub fn run(args: &Completions, out: &mut dyn Write) -> Result<()> {
    // Into memory first: the generator panics when it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "ttt", &mut script);
    Ok(out.write_all(&script)?)
}
