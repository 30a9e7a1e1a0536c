//! `ttt eval`: loss, perplexity and bits per byte of texts that are new to a model.

use std::io::Write;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use ttt::data::{Document, Documents, Sources, Tokenizer};
use ttt::eval::{Evaluation, evaluate_continuation};
use ttt::lm::Lm;
use ttt::tensor::DType;

use crate::args::Eval;
use crate::progress::Bar;
use crate::state::{self, Start};
use crate::{model, units};

/// Runs the command.
pub fn run(args: &Eval, out: &mut dyn Write) -> Result<()> {
    let sources = Sources::resolve(&args.data)?;
    let folder = model::resolve(&args.model)?;
    let device = model::device(args.device.device, args.device.threads.unwrap_or(0))?;
    let mut lm = model::load(&folder, &device, DType::from(args.dtype))?;
    let Some(tokenizer) = model::tokenizer(args.tokenizer.as_deref(), &folder, lm.config().vocab_size)? else {
        bail!("{} has no tokenizer; name one with --tokenizer", folder.display());
    };
    model::load_skill(&mut lm, args.skill.as_deref(), Some(&tokenizer))?;

    let start = state::start(&lm, args.state_in.as_deref(), Some(&tokenizer))?;
    let mut end = None;
    let mut total = Evaluation::default();
    let (mut documents, mut skipped) = (0u64, 0u64);
    let mut each = Vec::new();
    let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let bar = Bar::bytes(sources.files.iter().map(|f| size(&f.path)).sum());
    let mut before = 0;
    for file in &sources.files {
        for document in Documents::open(file, args.separator.as_deref())? {
            let document = document?;
            let from = args.state_in.is_some().then_some(&start);
            let Some((result, after)) = evaluate(&lm, &tokenizer, &document, args.context, from)? else {
                skipped += 1;
                continue;
            };
            if args.state_out.is_some() && end.replace(after).is_some() {
                bail!("--state-out is the state after one document, but the data holds several; give one file");
            }
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
    let saved = match (&args.state_out, &end) {
        (Some(path), Some(Start { states, pending })) => Some(state::save(states, &lm, pending, Some(&tokenizer), path)?),
        _ => None,
    };
    if args.json {
        let mut object = numbers(&total);
        if let Some(saved) = &saved {
            object["state"] = saved.json();
        }
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
    if let Some(saved) = &saved {
        writeln!(out, "{saved}")?;
    }
    Ok(())
}

/// Reads one document from the beginning, or as the continuation of a state. Where the tokenizer has a token that begins a text, that is read first, so that the
/// document's first token is predicted too, and so a state's pending token does; a prompt is read and not judged. Returns the
/// state afterwards as well; `None` when nothing is left to predict.
fn evaluate(
    lm: &Lm,
    tokenizer: &Tokenizer,
    document: &Document,
    context: Option<u64>,
    start: Option<&Start>,
) -> Result<Option<(Evaluation, Start)>> {
    let (ids, prompt) = document.encode(tokenizer)?;
    let mut tokens: Vec<u32> = match start {
        Some(start) => start.pending.clone(),
        None => tokenizer.bos().into_iter().collect(),
    };
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
    let mut states = match start {
        Some(start) => start.states.fork()?,
        None => lm.states(1)?,
    };
    let result = evaluate_continuation(lm, &mut states, &tokens, from, context.map(|n| n as usize), bytes)?;
    let pending = vec![*tokens.last().expect("there is a token to predict")];
    Ok(Some((result, Start { states, pending })))
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
