//! `ttt import`: a checkpoint of the official JAX code as a model folder.

use std::io::Write;

use anyhow::{Result, bail};
use serde_json::Value;
use ttt::hub::{SaveOptions, save, write_folder};
use ttt::import;

use crate::args::{DeviceName, Import};
use crate::commands::plan::describe;
use crate::{Usage, model, units};

/// Runs the command.
pub fn run(args: &Import, out: &mut dyn Write) -> Result<()> {
    if std::fs::read_dir(&args.out).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{} is not empty; name another folder, or empty it first", args.out.display());
    }
    let overrides = args.overrides.iter().map(|text| assignment(text)).collect::<Result<Vec<_>>>()?;
    let device = model::device(DeviceName::Auto, 0)?;
    let file = import::locate(&args.checkpoint)?;
    let (config, params) = import::read(&file, &overrides, &device)?;
    let tokenizer = match args.tokenizer.as_deref() {
        Some(name) => model::tokenizer(Some(name), &args.out, config.vocab_size)?,
        None => None,
    };
    let options = SaveOptions { dtype: args.dtype, max_shard_bytes: args.max_shard_size };
    write_folder(&args.out, |dir| {
        save(dir, &config, &params, options)?;
        tokenizer.as_ref().map_or(Ok(()), |tokenizer| tokenizer.save(dir))
    })?;
    writeln!(out, "{}: {}", args.out.display(), describe(&config))?;
    writeln!(out, "parameters  {}", units::grouped(params.table().parameters() as u64))?;
    writeln!(
        out,
        "taken as    ttt_base_lr={} rope_theta={} rms_norm_eps={:e} (not in the file; change with key=value)",
        config.ttt_base_lr, config.rope_theta, config.rms_norm_eps
    )?;
    if tokenizer.is_none() {
        writeln!(out, "tokenizer   none; copy its tokenizer.json into the folder, or name it with --tokenizer")?;
    }
    writeln!(out, "check it with: {} verify {} REFERENCE.safetensors", model::program(), args.out.display())?;
    Ok(())
}

/// `key=value`, the value as JSON or else as text.
fn assignment(text: &str) -> Result<(String, Value)> {
    let Some((key, value)) = text.split_once('=') else {
        return Err(Usage(format!("`{text}` is no setting of the form key=value")).into());
    };
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
    Ok((key.trim().to_owned(), value))
}
