//! `ttt tokenizer`: train one, or try one.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use ttt::data::{Documents, Sources, Tokenizer};

use crate::args::{Tokenizer as Command, TokenizerEncode, TokenizerName, TokenizerTrain};
use crate::commands::info::{id, kind};
use crate::{model, units};

/// Ids of the byte tokenizer where no model says how many.
const BYTE_IDS: usize = 258;

/// Runs the command.
pub fn run(command: &Command, out: &mut dyn Write) -> Result<()> {
    match command {
        Command::Train(args) => train(args, out),
        Command::Encode(args) => encode(args, out),
        Command::Decode(args) => Ok(writeln!(out, "{}", open(&args.name)?.decode(&args.ids))?),
        Command::Info(args) => info(&open(args)?, out),
    }
}

fn open(name: &TokenizerName) -> Result<Tokenizer> {
    if name.tokenizer == "bytes" {
        return Ok(Tokenizer::bytes(BYTE_IDS));
    }
    let path = Path::new(&name.tokenizer);
    // A run folder's tokenizer is its model's.
    let folder = model::resolve(path).ok();
    Ok(Tokenizer::from_file(folder.as_deref().unwrap_or(path))?)
}

fn train(args: &TokenizerTrain, out: &mut dyn Write) -> Result<()> {
    let sources = Sources::resolve(&args.data)?;
    if args.out.join("tokenizer.json").exists() {
        bail!("{} exists; name another folder with --out", args.out.join("tokenizer.json").display());
    }
    // The trainer takes texts, not errors: the first error ends them and is kept.
    let failure = Mutex::new(None);
    let mut read = 0;
    let documents = sources.files.iter().flat_map(|file| match Documents::open(file, args.separator.as_deref()) {
        Ok(documents) => Box::new(documents) as Box<dyn Iterator<Item = ttt::Result<ttt::data::Document>> + Send>,
        Err(error) => Box::new(std::iter::once(Err(error))),
    });
    let texts = documents.map_while(|document| match document {
        Ok(document) => {
            read += document.text.len() as u64;
            Some(document.text)
        }
        Err(error) => {
            *failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
            None
        }
    });
    let tokenizer = Tokenizer::train_bpe(texts, args.vocab_size, &["<s>", "</s>"])?;
    if let Some(error) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(error.into());
    }
    if read == 0 {
        bail!("the data holds no text to train a tokenizer on");
    }
    tokenizer.save(&args.out)?;
    writeln!(
        out,
        "{}: {} ids from {} of text",
        args.out.join("tokenizer.json").display(),
        tokenizer.vocab_size(),
        units::bytes(read)
    )?;
    if tokenizer.vocab_size() < args.vocab_size {
        writeln!(out, "fewer than {}: the text has no more pairs that occur twice", args.vocab_size)?;
    }
    let folder = args.out.display();
    writeln!(out, "use it with: ttt train --tokenizer {folder} model.vocab_size={} --data ...", tokenizer.vocab_size())?;
    Ok(())
}

fn encode(args: &TokenizerEncode, out: &mut dyn Write) -> Result<()> {
    let text = match (&args.text, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) if path.as_os_str() != "-" => {
            std::fs::read_to_string(path).with_context(|| path.display().to_string())?
        }
        (None, _) => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input")?;
            text
        }
    };
    let ids = open(&args.name)?.encode(&text)?;
    Ok(writeln!(out, "{}", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","))?)
}

fn info(t: &Tokenizer, out: &mut dyn Write) -> Result<()> {
    writeln!(out, "kind         {}", kind(t))?;
    writeln!(out, "ids          {}", t.vocab_size())?;
    writeln!(out, "BOS          {}", id(t.bos()))?;
    writeln!(out, "EOS          {}", id(t.eos()))?;
    writeln!(out, "fingerprint  {}", t.fingerprint())?;
    Ok(())
}
