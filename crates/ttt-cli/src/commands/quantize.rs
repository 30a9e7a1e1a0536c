//! `ttt quantize`: a model with narrow matrices, and what that changes.

use std::io::Write;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use ttt::Storage;
use ttt::data::{Documents, Sources, Tokenizer, default_corpus};
use ttt::device::Device;
use ttt::eval::{Evaluation, evaluate_text};
use ttt::hub::ModelFolder;

use crate::args::Quantize;
use crate::progress::Bar;
use crate::{model, units};

/// Runs the command.
pub fn run(args: &Quantize, out: &mut dyn Write) -> Result<()> {
    let path = model::resolve(&args.model)?;
    let folder = ModelFolder::open(&path)?;
    let device = model::device(args.device.device, args.device.threads.unwrap_or(0))?;
    let texts = if args.no_eval { Vec::new() } else { texts(args, &path, folder.config().vocab_size)? };
    let done = folder.quantize(&args.out, &device, args.to)?;
    let [before, after] = match args.no_eval {
        true => [None, None],
        false => {
            let bar = Bar::steps(2 * texts.iter().map(|t| t.tokens.len() as u64).sum::<u64>());
            let before = evaluate(&path, Some(Storage::F32), &device, &texts, &bar, 0)?;
            let after = evaluate(&args.out, None, &device, &texts, &bar, before.tokens)?;
            bar.finish();
            [Some(before), Some(after)]
        }
    };
    if args.json {
        let object = json!({
            "out": args.out, "stored_as": args.to.to_string(), "bytes_before": done.bytes_before, "bytes": done.bytes,
            "worst_matrix": done.worst_matrix, "worst_relative_error": done.worst_error,
            "before": before.as_ref().map(numbers), "after": after.as_ref().map(numbers),
        });
        return Ok(writeln!(out, "{object}")?);
    }
    writeln!(out, "{} as {}:", args.out.display(), args.to)?;
    writeln!(out, "tensors        {} -> {}", units::bytes(done.bytes_before), units::bytes(done.bytes))?;
    writeln!(out, "worst matrix   {:.2e} of its norm, {}", done.worst_error, done.worst_matrix)?;
    if let [Some(before), Some(after)] = [before, after] {
        writeln!(out, "measured on    {} tokens", units::grouped(before.tokens))?;
        for (name, of) in
            [("perplexity", Evaluation::perplexity as fn(&Evaluation) -> f64), ("bits per byte", Evaluation::bits_per_byte)]
        {
            let (before, after) = (of(&before), of(&after));
            writeln!(out, "{name:15}{before:.4} -> {after:.4} ({:+.3} %)", 100.0 * (after / before - 1.0))?;
        }
    }
    Ok(())
}

/// A text to predict, from its second token on.
struct Text {
    tokens: Vec<u32>,
    /// Bytes that the predicted tokens stand for.
    bytes: f64,
}

/// The beginnings of the documents, up to the wanted number of tokens.
fn texts(args: &Quantize, folder: &Path, vocab_size: usize) -> Result<Vec<Text>> {
    let Some(tokenizer) = model::tokenizer(args.tokenizer.as_deref(), folder, vocab_size)? else {
        bail!("{} has no tokenizer; name one with --tokenizer, or leave measuring out with --no-eval", folder.display());
    };
    let sources = match args.data.is_empty() {
        true => default_corpus()?.held_out(ttt::train::Settings::default().data.validation_fraction),
        false => Sources::resolve(&args.data)?,
    };
    let mut texts = Vec::new();
    let mut left = args.tokens as usize;
    for file in &sources.files {
        for document in Documents::open(file, None)? {
            texts.extend(text(&tokenizer, &document?.text, left)?);
            left = args.tokens as usize - texts.iter().map(|t: &Text| t.tokens.len()).sum::<usize>();
            if left < 2 {
                return Ok(texts);
            }
        }
    }
    if texts.is_empty() {
        bail!("the data holds nothing to predict: there is no document of at least two tokens");
    }
    Ok(texts)
}

/// At most `most` tokens of a text; none when fewer than two can be had.
fn text(tokenizer: &Tokenizer, text: &str, most: usize) -> Result<Option<Text>> {
    let mut tokens: Vec<u32> = tokenizer.bos().into_iter().collect();
    tokens.extend(tokenizer.encode(text)?);
    tokens.truncate(most);
    if tokens.len() < 2 {
        return Ok(None);
    }
    let bytes = tokenizer.decode(&tokens[1..]).len() as f64;
    Ok(Some(Text { tokens, bytes }))
}

/// How well a model predicts the texts.
fn evaluate(
    folder: &Path,
    storage: Option<Storage>,
    device: &Device,
    texts: &[Text],
    bar: &Bar,
    mut done: u64,
) -> Result<Evaluation> {
    let lm = model::load_as(folder, device, storage)?;
    let mut total = Evaluation::default();
    for text in texts {
        total.add(&evaluate_text(&lm, &text.tokens, 1, None, text.bytes)?);
        done += text.tokens.len() as u64;
        bar.set(done, &format!("{:.4} bits/byte", total.bits_per_byte()));
    }
    Ok(total)
}

fn numbers(e: &Evaluation) -> Value {
    json!({"loss": e.loss(), "perplexity": e.perplexity(), "bits_per_byte": e.bits_per_byte(), "tokens": e.tokens})
}
