//! Ids to text one by one, never a broken character.

use crate::data::tokenizer::{HuggingFace, Kind, Tokenizer};

/// Decodes ids as they come.
///
/// What [`TextStream::push`] returns is final: bytes that may yet become a character are held back. All that is returned,
/// joined, is [`Tokenizer::decode`] of all ids; only where SentencePiece's byte tokens do not make characters may the number of
/// U+FFFD differ.
#[derive(Clone, Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
    /// The last ids of a Hugging Face tokenizer, as far as the next id's text can depend on them.
    window: Vec<u32>,
    /// Bytes of `decode(window)` that were returned.
    returned: usize,
}

/// A window that still ends in an incomplete character after so many ids is cut.
const LONGEST_WINDOW: usize = 32;
/// An incomplete character has at most three bytes and an id with text at least one, so these many hold all of it and an id of
/// context.
const CONTEXT: usize = 4;

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> TextStream<'a> {
        TextStream { tokenizer, pending: Vec::new(), window: Vec::new(), returned: 0 }
    }

    /// Adds an id; returns the text that is now certain, which may be empty.
    pub fn push(&mut self, id: u32) -> String {
        match &self.tokenizer.kind {
            Kind::Bytes => {
                self.pending.extend(u8::try_from(id));
                take_complete(&mut self.pending)
            }
            Kind::HuggingFace(hf) => {
                if let Some(&byte) = hf.bytes.get(&id) {
                    self.pending.push(byte);
                    return take_complete(&mut self.pending);
                }
                if !hf.has_text(id) {
                    return String::new();
                }
                let mut text = take_all(&mut self.pending);
                text.push_str(&self.push_token(hf, id));
                text
            }
        }
    }

    /// Ends the text: what was held back, with U+FFFD for what did not become a character.
    pub fn finish(mut self) -> String {
        let mut text = take_all(&mut self.pending);
        if let Kind::HuggingFace(hf) = &self.tokenizer.kind {
            text.push_str(hf.decode(&self.window).get(self.returned..).unwrap_or_default());
        }
        text
    }

    fn push_token(&mut self, hf: &HuggingFace, id: u32) -> String {
        self.window.push(id);
        let text = hf.decode(&self.window);
        // A character that is not complete shows as exactly one U+FFFD at the end; those before it are certain.
        let certain = text.strip_suffix('\u{FFFD}').unwrap_or(&text).len();
        let new = text.get(self.returned..certain).unwrap_or_default().to_owned();
        self.returned = self.returned.max(certain);
        if certain == text.len() {
            // One id stays, for decoders that treat the first id differently.
            self.window = vec![id];
            self.returned = hf.decode(&self.window).len();
        } else if self.window.len() > LONGEST_WINDOW {
            self.window.drain(..self.window.len() - CONTEXT);
            let text = hf.decode(&self.window);
            self.returned = text.strip_suffix('\u{FFFD}').unwrap_or(&text).len();
        }
        new
    }
}

/// Takes the characters that `bytes` begins with, U+FFFD for what cannot become one, and leaves an incomplete one.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = &bytes[..];
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(e) => {
                text.push_str(std::str::from_utf8(&rest[..e.valid_up_to()]).expect("checked just now"));
                rest = &rest[e.valid_up_to()..];
                let Some(bad) = e.error_len() else {
                    *bytes = rest.to_vec();
                    return text;
                };
                text.push('\u{FFFD}');
                rest = &rest[bad..];
            }
        }
    }
}

/// Takes everything, with U+FFFD for what is no character.
fn take_all(bytes: &mut Vec<u8>) -> String {
    let text = String::from_utf8_lossy(bytes).into_owned();
    bytes.clear();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_comes_when_it_is_complete() {
        let tokenizer = Tokenizer::bytes(258);
        let mut stream = tokenizer.stream();
        let pieces: Vec<String> = [0xE2, 0x82, 257, 0xAC, 0x41, 0xC3, 0x41, 0xF0].map(|id| stream.push(id)).into();
        assert_eq!(pieces, ["", "", "", "€", "A", "", "\u{FFFD}A", ""]);
        assert_eq!(stream.finish(), "\u{FFFD}");
    }
}
