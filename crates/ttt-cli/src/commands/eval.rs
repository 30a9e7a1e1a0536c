//! `ttt eval`: loss, perplexity and bits per byte of texts that are new to a model, by position; or a task.

mod report;
mod tasks;
mod texts;

use std::io::Write;
use std::path::Path;

use anyhow::{Result, bail};
use ttt::data::Sources;
use ttt::hub::write_atomic;

use crate::args::Eval;
use crate::model;

/// Runs the command.
pub fn run(args: &Eval, out: &mut dyn Write) -> Result<()> {
    let sources = match args.task.task {
        Some(_) => None,
        None => Some(Sources::resolve(&args.data)?),
    };
    let folder = model::resolve(&args.model)?;
    let device = model::device(args.device.device, args.device.threads.unwrap_or(0))?;
    let mut lm = model::load_as(&folder, &device, args.dtype)?;
    let tokenizer = model::tokenizer(args.tokenizer.as_deref(), &folder, lm.config().vocab_size)?;
    model::load_skill(&mut lm, args.skill.as_deref(), tokenizer.as_ref())?;
    match (sources, tokenizer) {
        (None, tokenizer) => tasks::run(args, &lm, tokenizer, out),
        (Some(sources), Some(tokenizer)) => texts::run(args, &lm, &tokenizer, &sources, out),
        (Some(_), None) => bail!("{} has no tokenizer; name one with --tokenizer", folder.display()),
    }
}

/// Writes a picture, as a whole or not at all.
fn save(path: &Path, svg: &str) -> Result<()> {
    Ok(write_atomic(path, |w| w.write_all(svg.as_bytes()))?)
}
