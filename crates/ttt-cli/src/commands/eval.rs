//! `ttt eval`: loss, perplexity and bits per byte of texts that are new to a model.

use std::io::Write;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use ttt::data::{Document, Documents, Sources, Tokenizer};
use ttt::eval::{Evaluation, evaluate_text};
use ttt::lm::Lm;

use crate::args::Eval;
use crate::progress::Bar;
use crate::{model, units};

/// Runs the command.
pub fn run(args: &Eval, out: &mut dyn Write) -> Result<()> {
    let sources = Sources::resolve(&args.data)?;
    let folder = model::resolve(&args.model)?;
    let device = model::device(args.device.device, args.device.threads.unwrap_or(0))?;
    let mut lm = model::load_as(&folder, &device, args.dtype)?;
    let Some(tokenizer) = model::tokenizer(args.tokenizer.as_deref(), &folder, lm.config().vocab_size)? else {
        bail!("{} has no tokenizer; name one with --tokenizer", folder.display());
    };
    model::load_skill(&mut lm, args.skill.as_deref(), Some(&tokenizer))?;

    let mut total = Evaluation::default();
    let (mut documents, mut skipped) = (0u64, 0u64);
    let mut each = Vec::new();
    let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let bar = Bar::bytes(sources.files.iter().map(|f| size(&f.path)).sum());
    let mut before = 0;
    for file in &sources.files {
        for document in Documents::open(file, args.separator.as_deref())? {
            let document = document?;
            let Some(result) = evaluate(&lm, &tokenizer, &document, args.context)? else {
                skipped += 1;
                continue;
            };
            total.add(&result);
            documents += 1;
            if args.per_document && args.json {
                each.push(with_name(&document.name, numbers(&result)));
            } else if args.per_document {
                bar.above(|| writeln!(out, "{}  {}", line(&result), document.name))?;
            }
            bar.set(before + document.text.len() as u64, &format!("{:.4} bits/byte", total.bits_per_byte()));
        }
        before += size(&file.path);
        bar.set(before, "");
    }
    bar.finish();
    if documents == 0 {
        bail!("the data holds nothing to predict: {skipped} documents of less than two tokens");
    }
    if args.json {
        let mut object = numbers(&total);
        object["documents"] = json!(documents);
        object["skipped"] = json!(skipped);
        object["context"] = json!(args.context);
        if args.per_document {
            object["per_document"] = json!(each);
        }
        writeln!(out, "{object}")?;
        return Ok(());
    }
    writeln!(out, "documents      {documents}{}", if skipped > 0 { format!(" ({skipped} too short)") } else { String::new() })?;
    writeln!(out, "tokens         {}", units::grouped(total.tokens))?;
    writeln!(out, "bytes          {}", units::grouped(total.bytes as u64))?;
    writeln!(out, "loss           {:.4} nats a token", total.loss())?;
    writeln!(out, "perplexity     {:.4}", total.perplexity())?;
    writeln!(out, "bits per byte  {:.4}", total.bits_per_byte())?;
    Ok(())
}

/// Reads one document from the beginning. Where the tokenizer has a token that begins a text, that is read first, so that the
/// document's first token is predicted too; a prompt is read and not judged. `None` when nothing is left to predict.
fn evaluate(lm: &Lm, tokenizer: &Tokenizer, document: &Document, context: Option<u64>) -> Result<Option<Evaluation>> {
    let (ids, prompt) = document.encode(tokenizer)?;
    let mut tokens: Vec<u32> = tokenizer.bos().into_iter().collect();
    let from = (tokens.len() + prompt).max(1);
    let unseen = match (document.completion_from, tokens.is_empty()) {
        (Some(at), _) => at,
        (None, true) => tokenizer.decode(&ids[..ids.len().min(1)]).len(),
        (None, false) => 0,
    };
    tokens.extend(ids);
    if tokens.len() <= from {
        return Ok(None);
    }
    let bytes = document.text.len().saturating_sub(unseen) as f64;
    Ok(Some(evaluate_text(lm, &tokens, from, context.map(|n| n as usize), bytes)?))
}

fn line(e: &Evaluation) -> String {
    format!("{:>10} tokens  loss {:.4}  {:.4} bits/byte", units::grouped(e.tokens), e.loss(), e.bits_per_byte())
}

fn numbers(e: &Evaluation) -> Value {
    json!({
        "loss": e.loss(), "perplexity": e.perplexity(), "bits_per_byte": e.bits_per_byte(), "tokens": e.tokens, "bytes": e.bytes,
    })
}

fn with_name(name: &str, mut object: Value) -> Value {
    object["name"] = json!(name);
    object
}
