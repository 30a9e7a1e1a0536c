//! Tokenising documents into files, in parallel and with bounded memory.

use std::{
    ops::Range,
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use rayon::prelude::*;

use crate::{
    AtPath, Error, Result,
    data::{
        cut,
        document::{Document, Documents},
        store::{Progress, StoreOptions},
        tokenizer::Tokenizer,
        writer::{Built, Counts, Splits},
    },
};

/// Tokenises the documents of `options` into the files `train` and `validation` (`.bin`, `.idx`) of `folder`.
pub(super) fn build(
    folder: &Path,
    options: &StoreOptions,
    tokenizer: &Tokenizer,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Built> {
    let mut reader = Reader::new(options, tokenizer)?;
    let total = reader.total;
    let mut splits = Splits::new(folder, options, tokenizer)?;
    let mut batch = reader.next_batch()?;
    while !batch.pieces.is_empty() {
        // Reading and unpacking the next batch goes on beside tokenising this one.
        let (next, encoded) = rayon::join(
            || reader.next_batch(),
            || batch.pieces.par_iter().map(|piece| piece.encode(tokenizer)).collect::<Result<Vec<_>>>(),
        );
        for (piece, Encoded { ids, prompt }) in batch.pieces.iter().zip(encoded?) {
            let Document { name, text, completion_from } = &*piece.document;
            if piece.first {
                splits.begin(name)?;
            }
            splits.push(&ids)?;
            if piece.last {
                splits.end(prompt, text.len() - completion_from.unwrap_or(0))?;
            }
        }
        let Counts { documents, tokens, .. } = splits.counts.clone();
        progress(Progress { bytes: batch.position, total_bytes: total, documents, tokens, waiting: false });
        batch = next?;
    }
    splits.finish()
}

/// Part of a document, or all of it.
struct Piece {
    document: Arc<Document>,
    range: Range<usize>,
    first: bool,
    last: bool,
}

/// Ids of a piece; the first `prompt` of them are a prompt, if it has one.
struct Encoded {
    ids: Vec<u32>,
    prompt: Option<usize>,
}

impl Piece {
    fn encode(&self, tokenizer: &Tokenizer) -> Result<Encoded> {
        let named = |e: Error| match e {
            Error::Tokenizer(message) => Error::Tokenizer(format!("{}: {message}", self.document.name)),
            other => other,
        };
        let text = &self.document.text[self.range.clone()];
        match self.document.completion_from {
            None => Ok(Encoded { ids: tokenizer.encode(text).map_err(named)?, prompt: None }),
            Some(_) => {
                let (ids, prompt) = self.document.encode(tokenizer).map_err(named)?;
                Ok(Encoded { ids, prompt: Some(prompt) })
            }
        }
    }
}

/// Pieces to tokenise at once, and how many bytes of the files were read for them and all before.
struct Batch {
    pieces: Vec<Piece>,
    position: u64,
}

/// Reads the files as batches of pieces.
struct Reader<'a> {
    options: &'a StoreOptions,
    tokenizer: &'a Tokenizer,
    /// The files that are small enough, with their sizes.
    files: Vec<(usize, u64)>,
    next_file: usize,
    current: Option<Documents<'a>>,
    /// A document of which the text from a byte on is still to come.
    open: Option<(Arc<Document>, usize)>,
    /// Bytes of text that are still wanted.
    wanted: u64,
    /// Bytes of the files that were read to their end, and of all.
    finished: u64,
    total: u64,
    /// Bytes of text of a batch: eight pieces for each thread keep all of them busy.
    batch_bytes: usize,
}

impl<'a> Reader<'a> {
    fn new(options: &'a StoreOptions, tokenizer: &'a Tokenizer) -> Result<Reader<'a>> {
        let mut files = Vec::new();
        for (i, file) in options.sources.files.iter().enumerate() {
            let size = std::fs::metadata(&file.path).at(&file.path)?.len();
            if options.max_file_bytes.is_none_or(|most| size <= most) {
                files.push((i, size));
            }
        }
        Ok(Reader {
            options,
            tokenizer,
            total: files.iter().map(|f| f.1).sum(),
            files,
            next_file: 0,
            current: None,
            open: None,
            wanted: options.max_bytes.unwrap_or(u64::MAX),
            finished: 0,
            batch_bytes: 8 * cut::PIECE * rayon::current_num_threads(),
        })
    }

    fn next_batch(&mut self) -> Result<Batch> {
        let (mut pieces, mut bytes) = (Vec::new(), 0);
        while bytes < self.batch_bytes {
            let (document, from) = match self.open.take() {
                Some(open) => open,
                None => match self.next_document()? {
                    Some(document) => (Arc::new(document), 0),
                    None => break,
                },
            };
            let len = document.text.len();
            let (range, next) = match document.completion_from {
                Some(_) => (0..len, len),
                None => cut::piece(self.tokenizer, &document.text, from)?,
            };
            bytes += next - from;
            if next < len {
                self.open = Some((document.clone(), next));
            }
            pieces.push(Piece { document, range, first: from == 0, last: next == len });
        }
        let inside = self.current.as_ref().map_or(0, |documents| documents.taken().load(Ordering::Relaxed));
        Ok(Batch { pieces, position: self.finished + inside })
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        loop {
            if self.wanted == 0 {
                return Ok(None);
            }
            if let Some(documents) = &mut self.current {
                if let Some(mut document) = documents.next().transpose()? {
                    if document.text.len() as u64 > self.wanted {
                        // The last one is cut, unless it is a prompt and its completion.
                        let keep = cut::boundary(&document.text, self.wanted as usize);
                        self.wanted = 0;
                        if document.completion_from.is_some() || keep == 0 {
                            return Ok(None);
                        }
                        document.text.truncate(keep);
                        return Ok(Some(document));
                    }
                    self.wanted -= document.text.len() as u64;
                    return Ok(Some(document));
                }
                self.current = None;
                self.finished += self.files[self.next_file - 1].1;
            }
            let Some(&(file, _)) = self.files.get(self.next_file) else { return Ok(None) };
            self.next_file += 1;
            self.current = Some(Documents::open(&self.options.sources.files[file], self.options.separator.as_deref())?);
        }
    }
}
