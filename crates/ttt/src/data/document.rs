//! The documents of a file, one after the other.

use std::{
    io::BufRead,
    path::Path,
    sync::{Arc, atomic::AtomicU64},
};

use serde_json::Value;

use crate::{
    Error, Result,
    data::{
        cut,
        plain::{PlainText, not_utf8},
        read::{self, Opened, Packing},
        source::SourceFile,
        tokenizer::Tokenizer,
    },
};

/// A text that is learned as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The file's name; with `:` and its line for a line of a `.jsonl` file, with `:` and its number (from 1) where a line
    /// separates documents.
    pub name: String,
    /// The text.
    pub text: String,
    /// Byte of `text` where the completion starts; what comes before is a prompt, on which there is no loss.
    pub completion_from: Option<usize>,
}

impl Document {
    /// Ids of the text, and how many of the first are the prompt's.
    ///
    /// # Errors
    /// Text that the tokenizer refuses.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<(Vec<u32>, usize)> {
        let Some(at) = self.completion_from else {
            return Ok((tokenizer.encode(&self.text)?, 0));
        };
        let (mut ids, completion) = cut::encode_pair(tokenizer, &self.text[..at], &self.text[at..])?;
        let prompt = ids.len();
        ids.extend(completion);
        Ok((ids, prompt))
    }
}

/// Iterator over the documents of a file. Empty ones are left out. After an error it ends.
///
/// A `.jsonl` file (also `.jsonl.gz`, `.jsonl.zst`; `.ndjson` too) has a JSON object a line, with a field `text`, or fields
/// `prompt` and `completion`. Any other file is one document, or several with lines between them that hold only the separator.
/// A byte order mark at the beginning is left out.
pub struct Documents<'a> {
    source: Source<'a>,
    taken: Arc<AtomicU64>,
    done: bool,
}

enum Source<'a> {
    Lines(Lines<'a>),
    Plain(PlainText<'a>),
}

impl<'a> Documents<'a> {
    /// Opens `file`. Lines that hold only `separator` separate documents, except in `.jsonl` files.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub fn open(file: &'a SourceFile, separator: Option<&'a str>) -> Result<Documents<'a>> {
        let opened = read::open(&file.path)?;
        let taken = opened.taken.clone();
        let source = match is_lines(&file.path) {
            true => Source::Lines(Lines::new(file, opened)),
            false => Source::Plain(PlainText::new(file, separator, opened)),
        };
        Ok(Documents { source, taken, done: false })
    }

    /// Counter of the bytes taken from the file, packed.
    pub(super) fn taken(&self) -> Arc<AtomicU64> {
        self.taken.clone()
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        match &mut self.source {
            Source::Lines(lines) => lines.next_document(),
            Source::Plain(plain) => {
                let Some(name) = plain.begin(usize::MAX)? else { return Ok(None) };
                Ok(Some(Document { name, text: std::mem::take(&mut plain.text), completion_from: None }))
            }
        }
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Result<Document>> {
        if self.done {
            return None;
        }
        let next = self.next_document();
        if !matches!(next, Ok(Some(_))) {
            self.done = true;
        }
        next.transpose()
    }
}

/// Whether each line of a file is a JSON object, by its name.
pub(super) fn is_lines(path: &Path) -> bool {
    let unpacked = match Packing::of(path) {
        Packing::Plain => path.to_owned(),
        _ => path.with_extension(""),
    };
    matches!(unpacked.extension().and_then(|e| e.to_str()), Some("jsonl" | "ndjson"))
}

/// The documents of a file of JSON lines.
pub(super) struct Lines<'a> {
    file: &'a SourceFile,
    reader: Box<dyn BufRead + Send>,
    /// Bytes and lines that were read.
    bytes: u64,
    line: u64,
}

impl<'a> Lines<'a> {
    pub fn new(file: &'a SourceFile, opened: Opened) -> Lines<'a> {
        Lines { file, reader: opened.reader, bytes: 0, line: 0 }
    }

    /// The next document, or `None` at the end of the file.
    pub fn next_document(&mut self) -> Result<Option<Document>> {
        loop {
            let mut line = Vec::new();
            let n = self.reader.read_until(b'\n', &mut line).map_err(|e| read::read_error(&self.file.path, e))?;
            if n == 0 {
                return Ok(None);
            }
            self.line += 1;
            let text = self.utf8(line)?;
            if text.trim().is_empty() {
                continue;
            }
            let wrong = |message: String| Error::format(&self.file.path, format!("line {}: {message}", self.line));
            let (text, completion_from) = parse(&text).map_err(wrong)?;
            if !text.is_empty() {
                return Ok(Some(Document { name: format!("{}:{}", self.file.name, self.line), text, completion_from }));
            }
        }
    }

    /// Checks bytes that start where `self.bytes` says, and moves past them.
    fn utf8(&mut self, bytes: Vec<u8>) -> Result<String> {
        let (start, len) = (self.bytes, bytes.len());
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            not_utf8(self.file, start + at as u64, e.as_bytes()[at], &format!(" (line {})", self.line))
        })?;
        self.bytes += len as u64;
        Ok(match text.strip_prefix('\u{FEFF}') {
            Some(rest) if start == 0 => rest.to_owned(),
            _ => text,
        })
    }
}

/// Text and start of the completion of a line of JSON; the error lacks file and line.
fn parse(line: &str) -> std::result::Result<(String, Option<usize>), String> {
    let value: Value = serde_json::from_str(line).map_err(|e| format!("not JSON: {e}"))?;
    let Value::Object(object) = value else { return Err(format!("{} and not an object", kind(&value))) };
    let field = |name: &str| match object.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(value) => Err(format!("field `{name}` is {}, not a string", kind(value))),
    };
    if let Some(text) = field("text")? {
        return Ok((text.to_owned(), None));
    }
    match (field("prompt")?, field("completion")?) {
        (Some(prompt), Some(completion)) => Ok((prompt.to_owned() + completion, Some(prompt.len()))),
        (Some(_), None) => Err("field `completion` is missing beside `prompt`".into()),
        (None, Some(_)) => Err("field `prompt` is missing beside `completion`".into()),
        (None, None) => {
            let found: Vec<_> = object.keys().take(8).map(|k| format!("`{k}`")).collect();
            let found = if found.is_empty() { "none".into() } else { found.join(", ") };
            Err(format!("needs a field `text`, or `prompt` and `completion`; its fields are {found}"))
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_json() {
        assert_eq!(parse(r#"{"text": "é", "id": 3}"#).unwrap(), ("é".into(), None));
        assert_eq!(parse(r#"{"prompt": "é", "completion": " b"}"#).unwrap(), ("é b".into(), Some(2)));
        let errors = [
            ("{\"text\": ", "not JSON"),
            ("[1]", "an array and not an object"),
            (r#"{"text": 3}"#, "field `text` is a number"),
            (r#"{"prompt": "a"}"#, "`completion` is missing"),
            (r#"{"completion": "a"}"#, "`prompt` is missing"),
            (r#"{"body": "a"}"#, "its fields are `body`"),
            ("{}", "its fields are none"),
        ];
        for (line, message) in errors {
            let error = parse(line).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }
}
