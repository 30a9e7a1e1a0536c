//! Plain text, read as far as it is wanted.

use std::io::{BufRead, Read};

use crate::{
    Error, Result,
    data::{
        read::{self, Opened},
        source::SourceFile,
    },
};

/// Bytes read at once. A line that separates documents is shorter.
const READ: u64 = 1 << 16;

/// The documents of a file that is not JSON lines; of each only as much text is held as was asked for and not taken.
pub(super) struct PlainText<'a> {
    file: &'a SourceFile,
    separator: Option<&'a str>,
    reader: Box<dyn BufRead + Send>,
    /// Text of the document that was read and not taken.
    pub text: String,
    /// Bytes behind it that are no whole character yet.
    rest: Vec<u8>,
    /// Place in the file of the first of them.
    at: u64,
    line_start: bool,
    /// Whether all of the document, and of the file, was read.
    pub ended: bool,
    end_of_file: bool,
    documents: u64,
}

impl<'a> PlainText<'a> {
    pub fn new(file: &'a SourceFile, separator: Option<&'a str>, opened: Opened) -> PlainText<'a> {
        PlainText {
            file,
            separator,
            reader: opened.reader,
            text: String::new(),
            rest: Vec::new(),
            at: 0,
            line_start: true,
            ended: true,
            end_of_file: false,
            documents: 0,
        }
    }

    /// Leaves what is left of the document and begins the next one that is not empty; of those between separators, that holds
    /// more than white space (in its first `at_least` bytes). Returns its name, or `None` at the end of the file.
    pub fn begin(&mut self, at_least: usize) -> Result<Option<String>> {
        loop {
            while !self.ended {
                self.text.clear();
                self.more(1)?;
            }
            if self.end_of_file {
                return Ok(None);
            }
            self.text.clear();
            (self.ended, self.line_start) = (false, true);
            self.documents += 1;
            self.more(at_least)?;
            let empty = match self.separator {
                None => self.text.is_empty(),
                Some(_) => self.text.trim().is_empty(),
            };
            if !(self.ended && empty) {
                let number = self.separator.map(|_| format!(":{}", self.documents)).unwrap_or_default();
                return Ok(Some(self.file.name.clone() + &number));
            }
        }
    }

    /// Reads until there are `at_least` bytes of text, or to the end of the document.
    pub fn more(&mut self, at_least: usize) -> Result<()> {
        while !self.ended && self.text.len() < at_least {
            let before = self.rest.len();
            let n = match self.separator {
                None => (&mut self.reader).take(READ).read_to_end(&mut self.rest),
                Some(_) => (&mut self.reader).take(READ).read_until(b'\n', &mut self.rest),
            };
            let n = n.map_err(|e| read::read_error(&self.file.path, e))?;
            let piece = &self.rest[before..];
            let separates = self.line_start && self.separator.is_some_and(|s| piece.trim_ascii_end() == s.as_bytes());
            self.line_start = piece.ends_with(b"\n");
            if n == 0 {
                (self.ended, self.end_of_file) = (true, true);
            } else if separates {
                self.rest.truncate(before);
                self.ended = true;
            }
            self.decode()?;
            if separates {
                self.at += n as u64;
            }
        }
        Ok(())
    }

    /// Moves whole characters from `rest` to `text`.
    fn decode(&mut self) -> Result<()> {
        let valid = match std::str::from_utf8(&self.rest) {
            Ok(text) => text.len(),
            Err(e) if e.error_len().is_some() || self.ended => {
                let at = e.valid_up_to();
                return Err(not_utf8(self.file, self.at + at as u64, self.rest[at], ""));
            }
            Err(e) => e.valid_up_to(),
        };
        let start = if self.at == 0 && self.rest.starts_with(b"\xEF\xBB\xBF") { 3 } else { 0 };
        self.text += std::str::from_utf8(&self.rest[start..valid]).expect("checked just now");
        self.rest.drain(..valid);
        self.at += valid as u64;
        Ok(())
    }
}

/// The error of a byte that is part of no character; `line` says in which line, if at all.
pub(super) fn not_utf8(file: &SourceFile, at: u64, byte: u8, line: &str) -> Error {
    let message = format!("not UTF-8: byte {at} is {byte:#04x}{line}; convert the file, for example with `iconv -t UTF-8`");
    Error::format(&file.path, message)
}
