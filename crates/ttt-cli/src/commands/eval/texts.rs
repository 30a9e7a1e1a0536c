//! Reading texts piece by piece.

use std::io::Write;

use anyhow::{Result, bail};
use serde_json::json;
use ttt::data::{Piece, Pieces, Sources, Tokenizer};
use ttt::eval::{Evaluation, Judge, Judged, Report, report_svg};
use ttt::lm::Lm;
use ttt::state::States;

use super::{report, save};
use crate::args::Eval;
use crate::progress::Bar;
use crate::units;

/// Evaluates the texts.
pub fn run(args: &Eval, lm: &Lm, tokenizer: &Tokenizer, sources: &Sources, out: &mut dyn Write) -> Result<()> {
    let mut reader = Reader::new(args, lm, tokenizer)?;
    let mut each = Vec::new();
    let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let bar = Bar::bytes(sources.files.iter().map(|f| size(&f.path)).sum());
    let mut before = 0;
    for file in &sources.files {
        let mut pieces = Pieces::open(file, args.separator.as_deref(), tokenizer)?;
        while let Some(piece) = pieces.next_piece()? {
            let position = before + pieces.position();
            let show = |total: &Evaluation| bar.set(position, &format!("{:.4} nats a token", total.loss()));
            let Some(own) = reader.read(piece, &show)? else { continue };
            if args.per_document && args.json {
                each.push(report::with_name(&reader.name, report::numbers(&own)));
            } else if args.per_document {
                bar.above(|| writeln!(out, "{}  {}", report::line(&own), reader.name))?;
            }
        }
        before += size(&file.path);
    }
    bar.finish();
    let Reader { report, documents, skipped, .. } = reader;
    if documents == 0 {
        bail!("the data holds nothing to predict: {skipped} documents of less than two tokens");
    }
    if let Some(path) = &args.report.plot {
        let title = format!("{}, {} tokens", args.model.display(), units::grouped(report.total().tokens));
        save(path, &report_svg(&report, &title)?)?;
    }
    if args.json {
        let mut object = report::object(&report);
        object["documents"] = json!(documents);
        object["skipped"] = json!(skipped);
        object["context"] = json!(args.context);
        if args.per_document {
            object["per_document"] = json!(each);
        }
        return Ok(writeln!(out, "{object}")?);
    }
    writeln!(out, "documents      {documents}{}", if skipped > 0 { format!(" ({skipped} too short)") } else { String::new() })?;
    report::print(&report, out)
}

/// Reads documents one after the other, each with a fresh state.
struct Reader<'a> {
    tokenizer: &'a Tokenizer,
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
        let judge = Judge::new(lm, States::new(lm, 1)?, args.context, !args.report.no_inner);
        let report = Report::new(lm.config().mini_batch_size, args.report.buckets as usize);
        Ok(Reader { tokenizer, judge, report, name: String::new(), bytes: 0, unseen: 0, documents: 0, skipped: 0 })
    }

    /// Reads a piece; returns the sums of a document that it ends. Where the tokenizer has a token that begins a text, that is read
    /// first, so that the document's first token is predicted too; a prompt is read and not judged.
    fn read(&mut self, piece: Piece, show: &dyn Fn(&Evaluation)) -> Result<Option<Evaluation>> {
        let Reader { judge, report, .. } = self;
        let mut sink = |judged: &Judged<'_>| {
            report.add(judged);
            show(&report.so_far());
        };
        if let Some(name) = piece.begins {
            let bos = self.tokenizer.bos();
            judge.start(piece.prompt + usize::from(bos.is_some()));
            judge.push(bos.as_slice(), &mut sink)?;
            (self.name, self.bytes) = (name, 0);
            self.unseen = match (piece.prompt, bos) {
                (0, None) => self.tokenizer.decode(&piece.ids[..piece.ids.len().min(1)]).len(),
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
