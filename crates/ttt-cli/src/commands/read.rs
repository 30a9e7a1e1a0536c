//! `ttt read`: learns texts of any length into a state file, in constant memory.

use std::io::Write;
use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use ttt::data::{Pieces, Sources};
use ttt::generate::{PREFILL_CHUNK, learn};
use ttt::lm::Lm;

use crate::args::Read;
use crate::progress::Bar;
use crate::state::{self, Start};
use crate::{model, units};

/// Tokens of a measurement.
const WINDOW: u64 = 100_000;

/// Runs the command.
pub fn run(args: &Read, out: &mut dyn Write) -> Result<()> {
    let sources = Sources::resolve(&args.files)?;
    let folder = model::resolve(&args.model)?;
    let mut lm = model::load(&folder, &args.device, args.dtype)?;
    let Some(tokenizer) = model::tokenizer(args.tokenizer.as_deref(), &folder, lm.config().vocab_size)? else {
        bail!("{} has no tokenizer; name one with --tokenizer, such as --tokenizer bytes", folder.display());
    };
    model::load_skill(&mut lm, args.skill.as_deref(), Some(&tokenizer))?;
    let Start { states, pending } = state::start(&lm, args.state_in.as_deref(), Some(&tokenizer))?;
    let mut reader = Reader { lm: &lm, start: Start { states, pending }, speed: Speed::new(), tokens: 0 };
    if args.state_in.is_none() {
        reader.start.pending.extend(tokenizer.bos());
    }

    let bar = Bar::bytes(sources.files.iter().map(|f| std::fs::metadata(&f.path).map_or(0, |m| m.len())).sum());
    let (mut before, mut position, mut documents, mut bytes) = (0, 0, 0u64, 0u64);
    for file in &sources.files {
        let mut pieces = Pieces::open(file, None, &tokenizer)?;
        while let Some(piece) = pieces.next() {
            let piece = piece?;
            if piece.begins.is_some() {
                if documents > 0 {
                    reader.start.pending.extend(tokenizer.between_documents());
                }
                documents += 1;
            }
            reader.start.pending.extend(piece.ids);
            bytes += piece.bytes as u64;
            // Files are read well ahead of what is learned from them.
            let (from, to) = (position, before + pieces.taken());
            reader.read(false, |part, rate| {
                position = from + ((to - from) as f64 * part) as u64;
                bar.set(position, &format!("{} tokens/s", units::count(rate.round())));
            })?;
        }
        before += pieces.taken();
    }
    if documents == 0 {
        bail!("the files hold no text");
    }
    reader.read(true, |_, _| ())?;
    bar.finish();
    let Reader { start: Start { states, pending }, speed, tokens, .. } = reader;
    let saved = state::save(&states, &lm, &pending, Some(&tokenizer), &args.state_out)?;
    let seconds = speed.begin.elapsed().as_secs_f64();
    if args.json {
        let object = json!({
            "documents": documents, "bytes": bytes, "tokens": tokens, "seconds": seconds,
            "tokens_per_second": tokens as f64 / seconds, "windows": speed.windows, "state": saved.json(),
        });
        return Ok(writeln!(out, "{object}")?);
    }
    writeln!(
        out,
        "read {} tokens of {} documents in {} ({} tokens/s, {}/s)",
        units::grouped(tokens),
        units::grouped(documents),
        units::seconds(seconds),
        units::count((tokens as f64 / seconds).round()),
        units::bytes((bytes as f64 / seconds) as u64)
    )?;
    Ok(writeln!(out, "{saved}")?)
}

/// Reads the tokens that wait in `start.pending`.
struct Reader<'m> {
    lm: &'m Lm,
    start: Start,
    speed: Speed,
    tokens: u64,
}

impl Reader<'_> {
    /// Reads whole chunks, or, at the end, all but the last token: whoever goes on wants its prediction.
    /// Progress is the part that is done, and tokens a second.
    fn read(&mut self, end: bool, mut progress: impl FnMut(f64, f64)) -> Result<()> {
        let Start { states, pending } = &mut self.start;
        let most = pending.len().saturating_sub(1);
        let count = if end { most } else { most / PREFILL_CHUNK * PREFILL_CHUNK };
        let mut done = 0;
        for chunk in pending[..count].chunks(PREFILL_CHUNK) {
            learn(self.lm, states, 0, chunk)?;
            done += chunk.len();
            self.tokens += chunk.len() as u64;
            progress(done as f64 / count as f64, self.speed.count(chunk.len() as u64));
        }
        pending.drain(..count);
        Ok(())
    }
}

/// Speed and memory, window by window.
struct Speed {
    begin: Instant,
    windows: Vec<Value>,
    since: Instant,
    tokens: u64,
    resident: Option<u64>,
}

impl Speed {
    fn new() -> Speed {
        Speed { begin: Instant::now(), windows: Vec::new(), since: Instant::now(), tokens: 0, resident: None }
    }

    /// Counts tokens; returns tokens a second in this window.
    fn count(&mut self, tokens: u64) -> f64 {
        self.tokens += tokens;
        self.resident = self.resident.max(resident());
        let rate = self.tokens as f64 / self.since.elapsed().as_secs_f64();
        if self.tokens >= WINDOW {
            self.windows.push(json!({"tokens": self.tokens, "tokens_per_second": rate, "resident_bytes": self.resident}));
            (self.since, self.tokens, self.resident) = (Instant::now(), 0, None);
        }
        rate
    }
}

/// Main memory that this process holds, in bytes, where the system says so (Linux).
pub fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
