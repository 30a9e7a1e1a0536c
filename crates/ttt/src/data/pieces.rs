//! The ids of a file's documents, a piece at a time: the memory needed does not depend on how long a document is.

use std::{io::BufRead, sync::atomic::Ordering};

use crate::{
    Result,
    data::{cut, document::Documents, source::SourceFile, tokenizer::Tokenizer},
};

/// Some ids of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The ids, without BOS and EOS.
    pub ids: Vec<u32>,
    /// Bytes of text that they stand for.
    pub bytes: usize,
    /// Whether a document begins with this piece.
    pub first: bool,
}

/// Iterator over the pieces of a file's documents ([`Documents`]). After an error it ends.
///
/// A text file is one document, read as it is needed and cut where the ids of the parts are those of the whole, as for
/// [`crate::data::Store`]. A line of a `.jsonl` file is one document and one piece: a line has to be in memory to be parsed.
pub struct Pieces<'a> {
    documents: Documents<'a>,
    tokenizer: &'a Tokenizer,
    /// Text that was read and is not cut off yet, and the bytes of an incomplete character behind it.
    text: String,
    incomplete: Vec<u8>,
    first: bool,
    /// The file has been read to its end.
    ended: bool,
}

impl<'a> Pieces<'a> {
    /// Opens `file`.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub fn open(file: &'a SourceFile, tokenizer: &'a Tokenizer) -> Result<Pieces<'a>> {
        let documents = Documents::open(file, None)?;
        Ok(Pieces { documents, tokenizer, text: String::new(), incomplete: Vec::new(), first: true, ended: false })
    }

    /// Bytes that were taken from the file, packed.
    pub fn taken(&self) -> u64 {
        self.documents.taken().load(Ordering::Relaxed)
    }

    /// Reads until there is enough text to know where the next piece ends, or the file does.
    fn fill(&mut self) -> Result<()> {
        while !self.ended && self.text.len() < cut::PIECE + cut::CONTEXT {
            let read = match self.documents.reader.fill_buf() {
                Ok(read) => read,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.documents.read_error(e)),
            };
            let mut bytes = std::mem::take(&mut self.incomplete);
            bytes.extend_from_slice(read);
            let n = read.len();
            self.ended = n == 0;
            self.documents.reader.consume(n);
            if let Err(e) = std::str::from_utf8(&bytes)
                && e.error_len().is_none()
                && !self.ended
            {
                self.incomplete = bytes.split_off(e.valid_up_to());
            }
            self.text += &self.documents.utf8(bytes)?;
        }
        Ok(())
    }

    fn next_of_text(&mut self) -> Result<Option<Piece>> {
        self.fill()?;
        if self.text.is_empty() {
            return Ok(None);
        }
        let (range, next) = cut::piece(self.tokenizer, &self.text, 0)?;
        let ids = self.tokenizer.encode(&self.text[range])?;
        self.text.drain(..next);
        Ok(Some(Piece { ids, bytes: next, first: std::mem::take(&mut self.first) }))
    }

    fn next_of_lines(&mut self) -> Result<Option<Piece>> {
        let Some(document) = self.documents.next().transpose()? else { return Ok(None) };
        Ok(Some(Piece { ids: document.encode(self.tokenizer)?.0, bytes: document.text.len(), first: true }))
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        let next = if self.documents.lines { self.next_of_lines() } else { self.next_of_text() };
        if next.is_err() {
            (self.ended, self.text) = (true, String::new());
        }
        next.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(name: &str, contents: &[u8], tokenizer: &Tokenizer) -> Result<Vec<Piece>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, contents).unwrap();
        let file = SourceFile { name: name.into(), path };
        Pieces::open(&file, tokenizer)?.collect()
    }

    #[test]
    fn pieces_of_any_file_are_the_whole() {
        let words = ["the", " cat,", "\n\nsat", " on", "  a", " mat.", " Straße", " €", "\n"];
        let text: String = (0..160_000u64).map(|i| words[(i * i % 1009 % 9) as usize]).collect();
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(text.as_bytes()).unwrap();
        let packed = packed.finish().unwrap();
        let bpe = Tokenizer::train_bpe([&text[..50_000]].into_iter(), 400, &["<s>", "</s>"]).unwrap();
        let json = serde_json::json!({ "text": text }).to_string();
        for tokenizer in [Tokenizer::bytes(258), bpe] {
            let whole = tokenizer.encode(&text).unwrap();
            for (name, contents) in [("a.txt", text.as_bytes()), ("a.txt.gz", &packed), ("a.jsonl", json.as_bytes())] {
                let pieces = read(name, contents, &tokenizer).unwrap();
                assert!(pieces.iter().flat_map(|p| &p.ids).eq(&whole), "{name}");
                assert_eq!(pieces.iter().map(|p| p.bytes).sum::<usize>(), text.len());
                assert_eq!(pieces.iter().filter(|p| p.first).count(), 1);
                assert!(pieces.len() > 2 || name == "a.jsonl");
            }
        }
    }

    #[test]
    fn documents_begin_and_bad_bytes_are_named() {
        let bytes = Tokenizer::bytes(258);
        let lines = b"{\"text\": \"ab\"}\n\n{\"prompt\": \"c\", \"completion\": \"d\"}\n";
        let pieces = read("a.jsonl", lines, &bytes).unwrap();
        assert_eq!(pieces.iter().map(|p| (p.ids.len(), p.first)).collect::<Vec<_>>(), [(2, true), (2, true)]);
        assert_eq!(read("a.txt", "\u{FEFF}ab".as_bytes(), &bytes).unwrap()[0].ids, [97, 98]);
        assert!(read("a.txt", b"", &bytes).unwrap().is_empty());
        // In the third buffer, and an incomplete character at the end.
        let mut long = vec![b'a'; 150_000];
        long[140_000] = 0xFF;
        for (contents, place) in [(&long[..], "byte 140000 is 0xff"), (b"ab\xE2\x82", "byte 2 is 0xe2")] {
            let error = read("a.txt", contents, &bytes).unwrap_err().to_string();
            assert!(error.contains("not UTF-8") && error.contains(place), "{error}");
        }
    }
}
