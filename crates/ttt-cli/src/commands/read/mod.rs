//! `ttt read`: learns texts of any length into a state file, in constant memory.

mod reader;

use std::io::Write;

use anyhow::{Result, bail};
use serde_json::json;
use ttt::data::{Pieces, Sources, Tokenizer};

use super::eval::report;
use crate::args::{DeviceName, Read};
use crate::interrupt::Interrupt;
use crate::progress::Bar;
use crate::state;
use crate::{model, units};
pub use reader::resident;
use reader::{MEASURED, Progress, Reader};

/// What the first Ctrl-C says.
const STOPPING: &str = "stopping after this chunk; Ctrl-C again gives up what was read";

/// Runs the command.
pub fn run(args: &Read, out: &mut dyn Write) -> Result<()> {
    let interrupt = Interrupt::watch(STOPPING)?;
    let sources = Sources::resolve(&args.files)?;
    let folder = model::resolve(&args.model)?;
    let mut lm = model::load(&folder, &args.device, args.dtype)?;
    let Some(tokenizer) = model::tokenizer(args.tokenizer.as_deref(), &folder, lm.config().vocab_size)? else {
        bail!("{} has no tokenizer; name one with --tokenizer, such as --tokenizer bytes", folder.display());
    };
    model::load_skill(&mut lm, args.skill.as_deref(), Some(&tokenizer))?;
    let mut start = state::start(&lm, args.state_in.as_deref(), Some(&tokenizer))?;
    if args.state_in.is_none() {
        start.pending.extend(tokenizer.bos());
    }
    let mut reader = Reader::new(&lm, start, args.skip_tokens);
    interrupt.begin();
    let mut texts = Texts::default();
    let read = texts.read(&sources, &tokenizer, &mut reader, &interrupt);
    let (documents, bytes) = (texts.documents, texts.bytes);

    // What an error or Ctrl-C finds read is kept as well.
    let finished = matches!(read, Ok(true));
    if !finished && reader.tokens == 0 {
        read?;
        writeln!(std::io::stderr(), "interrupted before anything was read")?;
        return Err(ttt::Error::Interrupted.into());
    }
    let (tokens, seconds) = (reader.tokens, reader.speed.begin.elapsed().as_secs_f64());
    let windows = std::mem::take(&mut reader.speed.windows);
    let (inner, rows) = (report::inner(&reader.inner), reader.inner.inner());
    let (end, taken) = reader.into_state();
    let saved = state::save(&end.states, &lm, &end.pending, Some(&tokenizer), &args.state_out);
    let saved = match (saved, read) {
        (Ok(saved), Err(error)) => {
            writeln!(out, "{saved}\nnothing of it is lost; go on, once the texts can be read, with\n  {}", again(args, taken))?;
            return Err(error);
        }
        (Err(_), Err(error)) => return Err(error),
        (saved, Ok(_)) => saved?,
    };
    if args.json {
        let mut object = json!({
            "documents": documents, "bytes": bytes, "tokens": tokens, "seconds": seconds,
            "tokens_per_second": tokens as f64 / seconds, "windows": windows, "inner": inner, "state": saved.json(),
        });
        if !finished {
            object["interrupted"] = json!({"skip_tokens": taken, "command": again(args, taken)});
        }
        writeln!(out, "{object}")?;
    } else {
        let rate = units::count((tokens as f64 / seconds).round());
        let (tokens, documents) = (units::grouped(tokens), units::grouped(documents));
        let (time, bytes) = (units::seconds(seconds), units::bytes((bytes as f64 / seconds) as u64));
        writeln!(out, "read {tokens} tokens of {documents} documents in {time} ({rate} tokens/s, {bytes}/s)\n{saved}")?;
        if !rows.is_empty() {
            writeln!(out, "\ninner loss, of the first {MEASURED} of every 2,048 tokens")?;
        }
        report::inner_table(&rows, out)?;
        if !finished {
            writeln!(out, "\ninterrupted; go on with\n  {}", again(args, taken))?;
        }
    }
    if finished { Ok(()) } else { Err(ttt::Error::Interrupted.into()) }
}

/// How far the texts are.
#[derive(Default)]
struct Texts {
    documents: u64,
    bytes: u64,
}

impl Texts {
    /// Reads all of them; whether nobody interrupted that.
    fn read(&mut self, sources: &Sources, tokenizer: &Tokenizer, reader: &mut Reader<'_>, interrupt: &Interrupt) -> Result<bool> {
        let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |m| m.len());
        let bar = Bar::bytes(sources.files.iter().map(|f| size(&f.path)).sum());
        let (mut before, mut position) = (0, 0);
        for file in &sources.files {
            let mut pieces = Pieces::open(file, None, tokenizer)?;
            while let Some(piece) = pieces.next() {
                let piece = piece?;
                if piece.begins.is_some() {
                    if self.documents > 0 {
                        reader.push(&tokenizer.between_documents().collect::<Vec<_>>());
                    }
                    self.documents += 1;
                }
                reader.push(&piece.ids);
                self.bytes += piece.bytes as u64;
                // Files are read well ahead of what is learned from them.
                let (from, to) = (position, before + pieces.taken());
                let go_on = reader.read(false, interrupt, |part, progress| {
                    position = from + ((to - from) as f64 * part) as u64;
                    bar.set(position, &message(progress));
                })?;
                if !go_on {
                    bar.finish();
                    return Ok(false);
                }
            }
            before += pieces.taken();
        }
        if self.documents == 0 {
            bail!("the files hold no text");
        }
        if reader.missing() > 0 {
            bail!(
                "--skip-tokens leaves out {} tokens more than the files have: are these the files?",
                units::grouped(reader.missing())
            );
        }
        let finished = reader.read(true, interrupt, |_, _| ())?;
        bar.finish();
        Ok(finished)
    }
}

/// What the bar says.
fn message(progress: &Progress) -> String {
    let rate = units::count(progress.rate.round());
    match progress.inner {
        Some([initial, before, after]) => {
            format!("{rate} tokens/s  inner loss {before:.4} → {after:.4}, of W0 {initial:.4}")
        }
        None => format!("{rate} tokens/s"),
    }
}

/// The command that goes on where this one stopped.
fn again(args: &Read, taken: u64) -> String {
    let state = units::quoted(&args.state_out);
    let mut line = vec![model::program(), "read".into(), units::quoted(&args.model)];
    line.extend(args.files.iter().map(units::quoted));
    line.push(format!("--state-in {state} --skip-tokens {taken} --state-out {state}"));
    line.extend(args.skill.as_ref().map(|skill| format!("--skill {}", units::quoted(skill))));
    line.extend(args.tokenizer.as_ref().map(|tokenizer| format!("--tokenizer {}", units::quoted(tokenizer))));
    line.extend(args.dtype.map(|dtype| format!("--dtype {}", format!("{dtype:?}").to_lowercase())));
    line.extend(args.device.threads.map(|n| format!("--threads {n}")));
    line.extend((args.device.device != DeviceName::Auto).then(|| format!("--device {}", args.device.device)));
    line.extend(args.json.then(|| "--json".to_owned()));
    line.join(" ")
}
