//! Ids of documents of any length, piece by piece.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    Result,
    data::{
        cut,
        document::{self, Document, Lines},
        plain::PlainText,
        read,
        source::SourceFile,
        tokenizer::Tokenizer,
    },
};

/// Part of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextPiece {
    /// Name of the document, with its first piece.
    pub begins: Option<String>,
    /// Ids.
    pub ids: Vec<u32>,
    /// How many of them are a prompt's.
    pub prompt: usize,
    /// Bytes of text that the piece takes, and how many of them are a prompt's.
    pub bytes: usize,
    /// See `bytes`.
    pub prompt_bytes: usize,
    /// Whether the document ends with this piece.
    pub ends: bool,
}

/// Iterator over the documents of a file as pieces of ids: the same documents as [`crate::data::Documents`], and the same ids as
/// [`crate::data::Store`] makes of them, in constant memory. Only a line of JSON is read as a whole, and a prompt and its
/// completion become ids at once. After an error it ends.
pub struct Pieces<'a> {
    tokenizer: &'a Tokenizer,
    source: Source<'a>,
    taken: Arc<AtomicU64>,
    /// The document of a line of JSON, and where its rest begins.
    open: Option<(Document, usize)>,
    done: bool,
}

enum Source<'a> {
    Lines(Lines<'a>),
    Plain(PlainText<'a>),
}

impl<'a> Pieces<'a> {
    /// Opens `file`. Lines that hold only `separator` separate documents, except in `.jsonl` files.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub fn open(file: &'a SourceFile, separator: Option<&'a str>, tokenizer: &'a Tokenizer) -> Result<Pieces<'a>> {
        let opened = read::open(&file.path)?;
        let taken = opened.taken.clone();
        let source = match document::is_lines(&file.path) {
            true => Source::Lines(Lines::new(file, opened)),
            false => Source::Plain(PlainText::new(file, separator, opened)),
        };
        Ok(Pieces { tokenizer, source, taken, open: None, done: false })
    }

    /// Bytes that were taken from the file, packed.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    fn next_piece(&mut self) -> Result<Option<TextPiece>> {
        match &mut self.source {
            Source::Plain(text) => {
                let mut begins = None;
                if text.ended && text.text.is_empty() {
                    begins = text.begin(cut::ENOUGH)?;
                    if begins.is_none() {
                        return Ok(None);
                    }
                }
                text.more(cut::ENOUGH)?;
                let (range, next) = cut::piece(self.tokenizer, &text.text, 0)?;
                let ids = self.tokenizer.encode(&text.text[range])?;
                text.text.drain(..next);
                if text.text.is_empty() {
                    text.more(1)?;
                }
                let ends = text.ended && text.text.is_empty();
                Ok(Some(TextPiece { begins, ids, prompt: 0, bytes: next, prompt_bytes: 0, ends }))
            }
            Source::Lines(lines) => {
                let (document, from, begins) = match self.open.take() {
                    Some((document, from)) => (document, from, None),
                    None => match lines.next_document()? {
                        Some(document) => {
                            let name = document.name.clone();
                            (document, 0, Some(name))
                        }
                        None => return Ok(None),
                    },
                };
                let len = document.text.len();
                if let Some(prompt_bytes) = document.completion_from {
                    let (ids, prompt) = document.encode(self.tokenizer)?;
                    return Ok(Some(TextPiece { begins, ids, prompt, bytes: len, prompt_bytes, ends: true }));
                }
                let (range, next) = cut::piece(self.tokenizer, &document.text, from)?;
                let ids = self.tokenizer.encode(&document.text[range])?;
                if next < len {
                    self.open = Some((document, next));
                }
                Ok(Some(TextPiece { begins, ids, prompt: 0, bytes: next - from, prompt_bytes: 0, ends: next == len }))
            }
        }
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<TextPiece>;

    fn next(&mut self) -> Option<Result<TextPiece>> {
        if self.done {
            return None;
        }
        let next = self.next_piece();
        self.done = !matches!(next, Ok(Some(_)));
        next.transpose()
    }
}
