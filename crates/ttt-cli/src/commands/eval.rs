//! `ttt eval`: loss, perplexity and bits per byte of texts that are new to a model, by position; or a task.

pub mod report;
mod tasks;
mod texts;

use std::io::Write;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::Value;
use ttt::data::Sources;
use ttt::hub::write_atomic;
use ttt::lm::Lm;

use crate::args::{Eval, TaskName};
use crate::keep::Keep;
use crate::model;

/// Runs the command.
pub fn run(args: &Eval, out: &mut dyn Write) -> Result<()> {
    let sources = match args.task.task {
        Some(_) => None,
        None => Some(Sources::resolve(&args.data)?),
    };
    let folder = model::resolve(&args.model)?;
    // Before anything is measured for nothing.
    let kept = keep(args)?;
    let mut lm = model::load(&folder, &args.device, args.dtype)?;
    let tokenizer = model::tokenizer(args.tokenizer.as_deref(), &folder, lm.config().vocab_size)?;
    model::load_skill(&mut lm, args.skill.as_deref(), tokenizer.as_ref())?;
    match (sources, tokenizer) {
        (None, tokenizer) => tasks::run(args, &lm, tokenizer, kept.as_ref(), out),
        (Some(sources), Some(tokenizer)) => texts::run(args, &lm, &tokenizer, &sources, kept.as_ref(), out),
        (Some(_), None) => bail!("{} has no tokenizer; name one with --tokenizer", folder.display()),
    }
}

/// Writes a picture, as a whole or not at all.
fn save(path: &Path, svg: &str) -> Result<()> {
    Ok(write_atomic(path, |w| w.write_all(svg.as_bytes()))?)
}

/// Where the result is to be kept.
fn keep(args: &Eval) -> Result<Option<Keep>> {
    let Some(name) = &args.report.keep else { return Ok(None) };
    let usual = match args.task.task {
        None => "eval",
        Some(TaskName::Recall) => "recall",
        Some(TaskName::Needle) => "needle",
        Some(TaskName::Copy) => "copy",
    };
    Keep::new(&args.model, if name.is_empty() { usual } else { name }).map(Some)
}

/// Keeps the result and says where, if it is to be kept.
fn save_result(kept: Option<&Keep>, result: &Value, lm: &Lm, json: bool, out: &mut dyn Write) -> Result<()> {
    let Some(kept) = kept else { return Ok(()) };
    kept.write(result, lm.device())?;
    if json { Ok(()) } else { Ok(writeln!(out, "\nkept in {}", kept.path().display())?) }
}
