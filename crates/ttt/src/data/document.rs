//! The documents of a file, one after the other.

use std::{
    io::BufRead,
    sync::{Arc, atomic::AtomicU64},
};

use serde_json::Value;

use crate::{
    Error, Result,
    data::{
        cut,
        read::{self, Packing},
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
    file: &'a SourceFile,
    separator: Option<&'a str>,
    pub(super) reader: Box<dyn BufRead + Send>,
    taken: Arc<AtomicU64>,
    /// Whether each line is a JSON object.
    pub(super) lines: bool,
    /// Bytes, lines and documents that were read.
    bytes: u64,
    line: u64,
    documents: u64,
    done: bool,
}

impl<'a> Documents<'a> {
    /// Opens `file`. Lines that hold only `separator` separate documents, except in `.jsonl` files.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub fn open(file: &'a SourceFile, separator: Option<&'a str>) -> Result<Documents<'a>> {
        let read::Opened { reader, taken } = read::open(&file.path)?;
        let unpacked = match Packing::of(&file.path) {
            Packing::Plain => file.path.clone(),
            _ => file.path.with_extension(""),
        };
        let lines = matches!(unpacked.extension().and_then(|e| e.to_str()), Some("jsonl" | "ndjson"));
        Ok(Documents { file, separator, reader, taken, lines, bytes: 0, line: 0, documents: 0, done: false })
    }

    /// Counter of the bytes taken from the file, packed.
    pub(super) fn taken(&self) -> Arc<AtomicU64> {
        self.taken.clone()
    }

    /// The error of a read of this file.
    pub(super) fn read_error(&self, error: std::io::Error) -> Error {
        read::read_error(&self.file.path, error)
    }

    /// The next line with its end, or `None` at the end of the file.
    fn next_line(&mut self) -> Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let n = self.reader.read_until(b'\n', &mut line).map_err(|e| read::read_error(&self.file.path, e))?;
        self.line += 1;
        Ok((n > 0).then_some(line))
    }

    /// Checks bytes that start where `self.bytes` says, and moves past them.
    pub(super) fn utf8(&mut self, bytes: Vec<u8>) -> Result<String> {
        let (start, len) = (self.bytes, bytes.len());
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            let message = format!(
                "not UTF-8: byte {} is {:#04x}{}; convert the file, for example with `iconv -t UTF-8`",
                start + at as u64,
                e.as_bytes()[at],
                if self.lines { format!(" (line {})", self.line) } else { String::new() }
            );
            Error::format(&self.file.path, message)
        })?;
        self.bytes += len as u64;
        Ok(match text.strip_prefix('\u{FEFF}') {
            Some(rest) if start == 0 => rest.to_owned(),
            _ => text,
        })
    }

    fn next_json(&mut self) -> Result<Option<Document>> {
        while let Some(line) = self.next_line()? {
            let text = self.utf8(line)?;
            if text.trim().is_empty() {
                continue;
            }
            let (text, completion_from) = parse(&text).map_err(|e| self.in_line(&e))?;
            if !text.is_empty() {
                return Ok(Some(Document { name: format!("{}:{}", self.file.name, self.line), text, completion_from }));
            }
        }
        Ok(None)
    }

    fn in_line(&self, message: &str) -> Error {
        Error::format(&self.file.path, format!("line {}: {message}", self.line))
    }

    fn next_text(&mut self) -> Result<Option<Document>> {
        let Some(separator) = self.separator else {
            self.done = true;
            let mut bytes = Vec::new();
            self.reader.read_to_end(&mut bytes).map_err(|e| read::read_error(&self.file.path, e))?;
            let text = self.utf8(bytes)?;
            let document = Document { name: self.file.name.clone(), text, completion_from: None };
            return Ok((!document.text.is_empty()).then_some(document));
        };
        while !self.done {
            let mut bytes = Vec::new();
            let mut separator_bytes = 0;
            loop {
                let Some(line) = self.next_line()? else {
                    self.done = true;
                    break;
                };
                if line.trim_ascii_end() == separator.as_bytes() {
                    separator_bytes = line.len();
                    break;
                }
                bytes.extend(line);
            }
            let text = self.utf8(bytes)?;
            self.bytes += separator_bytes as u64;
            self.documents += 1;
            if !text.trim().is_empty() {
                return Ok(Some(Document { name: format!("{}:{}", self.file.name, self.documents), text, completion_from: None }));
            }
        }
        Ok(None)
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Result<Document>> {
        if self.done {
            return None;
        }
        let next = if self.lines { self.next_json() } else { self.next_text() };
        if !matches!(next, Ok(Some(_))) {
            self.done = true;
        }
        next.transpose()
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
