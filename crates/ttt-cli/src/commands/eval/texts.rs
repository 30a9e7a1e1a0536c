//! Reading texts piece by piece.

use std::io::Write;

use anyhow::{Result, bail};
use serde_json::json;
use ttt::data::{Pieces, Sources, TextPiece, Tokenizer};
use ttt::eval::{Evaluation, Judge, Judged, Report, report_svg};
use ttt::lm::Lm;

use super::{report, save, save_result};
use crate::args::Eval;
use crate::keep::Keep;
use crate::progress::Bar;
use crate::state::{self, Start};
use crate::units;

/// Evaluates the texts.
pub fn run(args: &Eval, lm: &Lm, tokenizer: &Tokenizer, sources: &Sources, kept: Option<&Keep>, out: &mut dyn Write) -> Result<()> {
    let mut reader = Reader::new(args, lm, tokenizer)?;
    let mut each = Vec::new();
    let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let bar = Bar::bytes(sources.files.iter().map(|f| size(&f.path)).sum());
    let mut before = 0;
    for file in &sources.files {
        let mut pieces = Pieces::open(file, args.separator.as_deref(), tokenizer)?;
        while let Some(piece) = pieces.next() {
            let position = before + pieces.taken();
            let show = |total: &Evaluation| bar.set(position, &format!("{:.4} nats a token", total.loss()));
            let Some(own) = reader.read(piece?, &show)? else { continue };
            if args.state_out.is_some() && reader.documents > 1 {
                bail!("--state-out is the state after one document, but the data holds several; give one file");
            }
            if args.per_document && args.json {
                each.push(report::with_name(&reader.name, report::numbers(&own)));
            } else if args.per_document {
                bar.above(|| writeln!(out, "{}  {}", report::line(&own), reader.name))?;
            }
        }
        before += size(&file.path);
    }
    bar.finish();
    let Reader { report, documents, skipped, judge, .. } = reader;
    if documents == 0 {
        bail!("the data holds nothing to predict: {skipped} documents of less than two tokens");
    }
    let saved = match &args.state_out {
        Some(path) => {
            let (states, pending) = judge.into_parts();
            Some(state::save(&states, lm, &pending, Some(tokenizer), path)?)
        }
        None => None,
    };
    if let Some(path) = &args.report.plot {
        let title = format!("{}, {} tokens", args.model.display(), units::grouped(report.total().tokens));
        save(path, &report_svg(&report, &title)?)?;
    }
    let mut object = report::object(&report);
    if let Some(saved) = &saved {
        object["state"] = saved.json();
    }
    object["documents"] = json!(documents);
    object["skipped"] = json!(skipped);
    object["context"] = json!(args.context);
    if args.json {
        if args.per_document {
            object["per_document"] = json!(each);
        }
        writeln!(out, "{object}")?;
        return save_result(kept, &object, lm, true, out);
    }
    writeln!(out, "documents      {documents}{}", if skipped > 0 { format!(" ({skipped} too short)") } else { String::new() })?;
    report::print(&report, out)?;
    if let Some(saved) = &saved {
        writeln!(out, "\n{saved}")?;
    }
    save_result(kept, &object, lm, false, out)
}

/// Reads documents one after the other, each with a fresh state or as the continuation of the same one.
struct Reader<'a> {
    tokenizer: &'a Tokenizer,
    /// What every document continues.
    start: Option<Start>,
    judge: Judge<'a>,
    report: Report,
    /// The document that is read.
    name: String,
    bytes: usize,
    /// Bytes of it that no judged token stands for.
    unseen: usize,
    documents: u64,
    skipped: u64,
}

impl<'a> Reader<'a> {
    fn new(args: &Eval, lm: &'a Lm, tokenizer: &'a Tokenizer) -> Result<Reader<'a>> {
        let judge = Judge::new(lm, args.context, !args.report.no_inner)?;
        let start = args.state_in.as_deref().map(|file| state::start(lm, Some(file), Some(tokenizer))).transpose()?;
        let report = Report::new(lm.config().mini_batch().unwrap_or(1), args.report.buckets as usize);
        Ok(Reader { tokenizer, start, judge, report, name: String::new(), bytes: 0, unseen: 0, documents: 0, skipped: 0 })
    }

    /// Reads a piece; returns the sums of a document that it ends. Where the tokenizer has a token that begins a text, that is read
    /// first, or the state's pending token, so that the document's first token is predicted too; a prompt is read and not judged.
    fn read(&mut self, piece: TextPiece, show: &dyn Fn(&Evaluation)) -> Result<Option<Evaluation>> {
        let Reader { judge, report, start, .. } = self;
        let mut sink = |judged: &Judged<'_>| {
            report.add(judged);
            show(&report.so_far());
        };
        if let Some(name) = piece.begins {
            let bos = self.tokenizer.bos();
            let first = start.as_ref().map_or(bos.as_slice(), |start| &start.pending);
            let from = first.len() + piece.prompt;
            match &*start {
                Some(start) => judge.start_from(&start.states, from)?,
                None => judge.start(from),
            }
            judge.push(first, &mut sink)?;
            (self.name, self.bytes) = (name, 0);
            self.unseen = match from {
                0 => self.tokenizer.decode(&piece.ids[..piece.ids.len().min(1)]).len(),
                _ => piece.prompt_bytes,
            };
        }
        judge.push(&piece.ids, &mut sink)?;
        self.bytes += piece.bytes;
        if !piece.ends {
            return Ok(None);
        }
        judge.finish(&mut sink)?;
        let own = self.report.end_document(self.bytes.saturating_sub(self.unseen) as f64);
        match own.tokens {
            0 => self.skipped += 1,
            _ => self.documents += 1,
        }
        Ok((own.tokens > 0).then_some(own))
    }
}
