//! The tokens of a split, read through a memory map.

use std::{fs::File, ops::Range, path::Path, sync::Arc};

use memmap2::Mmap;

use crate::{AtPath, Error, Result};

/// Bytes of a record of the index: first token, tokens without loss at the beginning (BOS and prompt; 0 if there is no prompt),
/// bytes of text with loss; `u64` each.
pub(super) const RECORD: usize = 24;

/// Two files: ids, and the documents' records. All numbers are little endian.
#[derive(Debug)]
pub(super) struct TokenFile {
    ids: Option<Mmap>,
    index: Option<Mmap>,
    /// Bytes of an id, 2 or 4.
    pub width: usize,
    /// Id that begins a document, and id that ends one.
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Whether any document has a prompt.
    pub prompts: bool,
}

/// A document that is cut in two: where, and the bytes of text before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    pub document: usize,
    pub at: usize,
    pub bytes_before: u64,
}

impl TokenFile {
    /// Maps `{base}.bin` and `{base}.idx`, which must hold `tokens` ids and `documents` records.
    pub fn open(
        base: &Path,
        width: usize,
        [tokens, documents]: [u64; 2],
        [bos, eos]: [Option<u32>; 2],
        prompts: bool,
    ) -> Result<TokenFile> {
        let ids = map(&base.with_extension("bin"), tokens * width as u64)?;
        let index = map(&base.with_extension("idx"), documents * RECORD as u64)?;
        Ok(TokenFile { ids, index, width, bos, eos, prompts })
    }

    fn id_bytes(&self) -> &[u8] {
        self.ids.as_deref().unwrap_or_default()
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.id_bytes().len() / self.width
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.index.as_deref().map_or(0, |index| index.len() / RECORD)
    }

    pub fn id(&self, at: usize) -> u32 {
        let bytes = &self.id_bytes()[at * self.width..][..self.width];
        match *bytes {
            [a, b] => u16::from_le_bytes([a, b]).into(),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("ids have 2 or 4 bytes"),
        }
    }

    /// Appends the ids of `range`.
    pub fn read(&self, range: Range<usize>, ids: &mut Vec<u32>) {
        let bytes = &self.id_bytes()[range.start * self.width..range.end * self.width];
        if self.width == 2 {
            ids.extend(bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))));
        } else {
            ids.extend(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
    }

    fn field(&self, document: usize, field: usize) -> u64 {
        let index = self.index.as_deref().unwrap_or_default();
        let at = document * RECORD + field * 8;
        u64::from_le_bytes(index[at..at + 8].try_into().expect("eight bytes"))
    }

    /// First token of a document; one past the last document, the number of tokens.
    pub fn first(&self, document: usize) -> usize {
        if document < self.documents() { self.field(document, 0) as usize } else { self.len() }
    }

    /// Tokens without loss at the beginning of a document.
    pub fn prompt(&self, document: usize) -> usize {
        self.field(document, 1) as usize
    }

    /// Bytes of text with loss.
    pub fn bytes(&self, document: usize) -> u64 {
        self.field(document, 2)
    }

    /// The document that holds token `at`.
    pub fn document_at(&self, at: usize) -> usize {
        let (mut low, mut high) = (0, self.documents());
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.first(middle) <= at { low = middle } else { high = middle }
        }
        low
    }
}

/// Maps a file that must have `len` bytes.
fn map(path: &Path, len: u64) -> Result<Option<Mmap>> {
    let file = File::open(path).at(path)?;
    let is = file.metadata().at(path)?.len();
    if is != len {
        return Err(Error::format(path, format!("has {is} bytes instead of {len}; delete its folder to build it again")));
    }
    if len == 0 {
        return Ok(None); // not every system maps nothing
    }
    // SAFETY: the file is written before its folder gets the name under which it is opened, and never after; a rebuild makes new
    // files. No Rust reference is made to anything but bytes, for which any value is valid.
    let map = unsafe { Mmap::map(&file) }.at(path)?;
    Ok(Some(map))
}

/// The tokens of a split, document after document: BOS if there is one, the text, EOS if there is one.
#[derive(Clone, Debug)]
pub struct Tokens {
    file: Arc<TokenFile>,
    range: Range<usize>,
    cut: Option<Cut>,
    text_bytes: u64,
}

/// Where a document lies in a split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentSpan {
    /// Its tokens.
    pub tokens: Range<usize>,
    /// So many of its first tokens carry no loss: BOS, and the prompt if there is one.
    pub prompt: usize,
    /// Bytes of its text, without the prompt.
    pub text_bytes: u64,
}

impl Tokens {
    /// The tokens `range` of `file`, of which `text_bytes` bytes of text have a loss.
    pub(super) fn new(file: Arc<TokenFile>, range: Range<usize>, cut: Option<Cut>, text_bytes: u64) -> Tokens {
        Tokens { file, range, cut, text_bytes }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Bytes of text, UTF-8, on which there is a loss: all but prompts. BOS and EOS have none.
    pub fn bytes_of_text(&self) -> u64 {
        self.text_bytes
    }

    /// Appends the ids of `range`.
    ///
    /// # Panics
    /// When `range` does not lie within the split.
    pub fn read(&self, range: Range<usize>, ids: &mut Vec<u32>) {
        self.file.read(self.in_file(&range), ids);
    }

    /// Appends, for each token of `range`, whether its prediction counts: not for BOS (as in the official JAX code), not within a prompt.
    ///
    /// # Panics
    /// When `range` does not lie within the split.
    pub fn mask(&self, range: Range<usize>, mask: &mut Vec<bool>) {
        let range = self.in_file(&range);
        let begin = mask.len();
        match self.file.bos {
            Some(bos) => mask.extend(range.clone().map(|at| self.file.id(at) != bos)),
            None => mask.resize(begin + range.len(), true),
        }
        if !self.file.prompts || range.is_empty() {
            return;
        }
        for document in self.file.document_at(range.start)..self.file.documents() {
            let first = self.file.first(document);
            if first >= range.end {
                break;
            }
            let prompt = first.max(range.start)..(first + self.file.prompt(document)).min(range.end);
            if !prompt.is_empty() {
                mask[begin + prompt.start - range.start..begin + prompt.end - range.start].fill(false);
            }
        }
    }

    /// Number of documents; a document that is cut between the splits is one in each.
    pub fn documents(&self) -> usize {
        if self.is_empty() { 0 } else { self.file.document_at(self.range.end - 1) - self.first_document() + 1 }
    }

    fn first_document(&self) -> usize {
        self.file.document_at(self.range.start)
    }

    /// Document `i` of the split.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn document(&self, i: usize) -> DocumentSpan {
        assert!(i < self.documents(), "document {i} of {}", self.documents());
        self.span(self.first_document() + i)
    }

    /// Tokens of the document that token `at` belongs to.
    ///
    /// # Panics
    /// When there is no such token.
    pub fn document_around(&self, at: usize) -> Range<usize> {
        let at = self.in_file(&(at..at + 1)).start;
        self.span(self.file.document_at(at)).tokens
    }

    fn span(&self, document: usize) -> DocumentSpan {
        let (first, next) = (self.file.first(document), self.file.first(document + 1));
        let (start, end) = (first.max(self.range.start), next.min(self.range.end));
        let begins = start == first && self.file.bos.is_some_and(|bos| self.file.id(start) == bos);
        let prompt = (first + self.file.prompt(document)).clamp(start, end) - start;
        let bytes = self.file.bytes(document);
        let text_bytes = match self.cut {
            Some(cut) if cut.document == document && end == cut.at => cut.bytes_before,
            Some(cut) if cut.document == document => bytes - cut.bytes_before,
            _ => bytes,
        };
        let tokens = start - self.range.start..end - self.range.start;
        DocumentSpan { tokens, prompt: prompt.max(begins.into()), text_bytes }
    }

    /// Bytes of text, UTF-8, that the tokens of `range` with a loss stand for. Exact for whole documents, and everywhere if ids
    /// are bytes; within a document its mean of bytes per token is taken.
    ///
    /// # Panics
    /// When `range` does not lie within the split.
    pub fn bytes_in(&self, range: Range<usize>) -> f64 {
        let in_file = self.in_file(&range);
        if range.is_empty() {
            return 0.0;
        }
        let mut bytes = 0.0;
        for document in self.file.document_at(in_file.start)..=self.file.document_at(in_file.end - 1) {
            let span = self.span(document);
            let last = self.file.id(self.range.start + span.tokens.end - 1);
            let text = span.tokens.start + span.prompt..span.tokens.end - usize::from(self.file.eos == Some(last));
            let inside = text.start.max(range.start)..text.end.min(range.end);
            if !inside.is_empty() {
                bytes += span.text_bytes as f64 * inside.len() as f64 / text.len() as f64;
            }
        }
        bytes
    }

    fn in_file(&self, range: &Range<usize>) -> Range<usize> {
        assert!(range.start <= range.end && range.end <= self.len(), "tokens {range:?} of {}", self.len());
        self.range.start + range.start..self.range.start + range.end
    }
}
