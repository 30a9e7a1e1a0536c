//! `ttt convert`: a model in another number type or in several files.

use std::io::Write;

use anyhow::Result;
use ttt::hub::{ModelFolder, SaveOptions};

use crate::args::Convert;
use crate::{model, units};

/// Runs the command.
pub fn run(args: &Convert, out: &mut dyn Write) -> Result<()> {
    let folder = ModelFolder::open(model::resolve(&args.model)?)?;
    let device = model::cpu()?;
    folder.convert(&args.out, &device, SaveOptions { dtype: args.dtype, max_shard_bytes: args.max_shard_size })?;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&args.out)? {
        let entry = entry?;
        files.push((entry.file_name().to_string_lossy().into_owned(), entry.metadata()?.len()));
    }
    files.sort();
    writeln!(out, "{} as {}:", args.out.display(), args.dtype)?;
    for (name, size) in files {
        writeln!(out, "  {:>9}  {name}", units::bytes(size))?;
    }
    Ok(())
}
