//! Text to ids and back: bytes, or any Hugging Face `tokenizer.json`.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::{AtPath, Error, Result, data::stream::TextStream, hub::write_atomic};

/// Class name in `tokenizer_config.json` that says that ids are bytes.
const BYTE_CLASS: &str = "ByteTokenizer";
/// Beginnings of text, where `tokenizer_config.json` names none.
const USUAL_BOS: [&str; 3] = ["<s>", "<|begin_of_text|>", "<|endoftext|>"];
/// Ends of text, where `tokenizer_config.json` names none.
const USUAL_EOS: [&str; 3] = ["</s>", "<|end_of_text|>", "<|endoftext|>"];

/// A tokenizer and the ids that begin and end a text.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    pub(super) kind: Kind,
    bos: Option<u32>,
    eos: Option<u32>,
    vocab_size: usize,
    fingerprint: String,
}

/// How ids are made.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// An id is a byte; BOS and EOS come after the 256.
    Bytes,
    /// A `tokenizer.json`.
    HuggingFace(Box<HuggingFace>),
}

/// A Hugging Face tokenizer with what decoding needs to know of it.
#[derive(Clone, Debug)]
pub(super) struct HuggingFace {
    /// The tokenizer, without truncation and padding.
    pub inner: tokenizers::Tokenizer,
    /// Ids that decode to nothing.
    pub special: HashSet<u32>,
    /// Ids that stand for one byte of a character that the vocabulary lacks (`<0xE2>`; SentencePiece's byte fallback).
    pub bytes: HashMap<u32, u8>,
    /// `tokenizer_config.json`, kept so that saving loses nothing.
    config: Map<String, Value>,
}

impl Tokenizer {
    /// Ids 0 to 255 are the bytes; 256 is BOS and 257 EOS where a vocabulary of `vocab_size` has room for both.
    pub fn bytes(vocab_size: usize) -> Tokenizer {
        let (bos, eos) = if vocab_size >= 258 { (Some(256), Some(257)) } else { (None, None) };
        Tokenizer::byte_level(vocab_size, bos, eos)
    }

    fn byte_level(vocab_size: usize, bos: Option<u32>, eos: Option<u32>) -> Tokenizer {
        let fingerprint = hex(format!("bytes {vocab_size} {bos:?} {eos:?}").as_bytes());
        Tokenizer { kind: Kind::Bytes, bos, eos, vocab_size, fingerprint }
    }

    /// Reads a `tokenizer.json`, and the names of BOS and EOS from a `tokenizer_config.json` beside it; a folder is read as by
    /// [`Tokenizer::from_folder`]. Truncation and padding that the file asks for are switched off.
    ///
    /// # Errors
    /// A missing file, one that is no tokenizer, a BOS or EOS that is not in the vocabulary.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Tokenizer> {
        let path = path.as_ref();
        if path.is_dir() {
            let missing = || Error::Tokenizer(format!("{} holds neither tokenizer.json nor a byte tokenizer", path.display()));
            return Tokenizer::from_folder(path)?.ok_or_else(missing);
        }
        let bytes = std::fs::read(path).at(path)?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| Error::format(path, format!("not a Hugging Face tokenizer.json: {e}")))?;
        let config_path = path.with_file_name("tokenizer_config.json");
        let config = if config_path.is_file() { read_config(&config_path)? } else { Map::new() };
        Tokenizer::hugging_face(inner, config, &config_path)
    }

    /// The tokenizer of a model folder: `tokenizer.json`, or a `tokenizer_config.json` of class `ByteTokenizer`; `None` where
    /// the folder has neither.
    ///
    /// # Errors
    /// Those of [`Tokenizer::from_file`]; a folder with nothing but a SentencePiece `tokenizer.model`.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Option<Tokenizer>> {
        let folder = folder.as_ref();
        let (file, config_path) = (folder.join("tokenizer.json"), folder.join("tokenizer_config.json"));
        if file.is_file() {
            return Tokenizer::from_file(file).map(Some);
        }
        if config_path.is_file() {
            let config = read_config(&config_path)?;
            if config.get("tokenizer_class").and_then(Value::as_str) == Some(BYTE_CLASS) {
                return byte_config(&config, &config_path).map(Some);
            }
        }
        if folder.join("tokenizer.model").is_file() {
            return Err(Error::Tokenizer(format!(
                "{} has a SentencePiece tokenizer.model but no tokenizer.json; convert it with \
                 `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` of Python's transformers",
                folder.display()
            )));
        }
        Ok(None)
    }

    /// Wraps a tokenizer; `config` may name BOS and EOS, `config_path` is where errors say that it came from.
    pub(super) fn hugging_face(
        mut inner: tokenizers::Tokenizer,
        config: Map<String, Value>,
        config_path: &Path,
    ) -> Result<Tokenizer> {
        let other = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
        inner.with_truncation(None).map_err(other)?;
        inner.with_padding(None);
        let bos = special_id(&inner, &config, "bos_token", &USUAL_BOS, config_path)?;
        let eos = special_id(&inner, &config, "eos_token", &USUAL_EOS, config_path)?;
        let serialized = inner.to_string(false).map_err(other)?;
        let fallback = serialized.contains("\"ByteFallback\"");
        let vocabulary = inner.get_vocab(true);
        let bytes = vocabulary.iter().filter(|_| fallback).filter_map(|(name, &id)| Some((id, fallback_byte(name)?))).collect();
        let special = inner.get_added_tokens_decoder().into_iter().filter(|(_, t)| t.special).map(|(id, _)| id).collect();
        // Ids may have holes, so the size is not the number of entries.
        let vocab_size = vocabulary.values().max().map_or(0, |&id| id as usize + 1);
        let fingerprint = hex(format!("{serialized} {bos:?} {eos:?}").as_bytes());
        let kind = Kind::HuggingFace(Box::new(HuggingFace { inner, special, bytes, config }));
        Ok(Tokenizer { kind, bos, eos, vocab_size, fingerprint })
    }

    /// Ids of `text`, without BOS and EOS. As everywhere in Hugging Face's libraries, the spelling of an added token
    /// (`</s>`, say) becomes that token.
    ///
    /// # Errors
    /// A byte beyond a vocabulary of less than 256; what the Hugging Face tokenizer refuses.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.kind {
            Kind::Bytes => {
                let beyond = text.bytes().position(|b| usize::from(b) >= self.vocab_size);
                match beyond {
                    None => Ok(text.bytes().map(u32::from).collect()),
                    Some(at) => Err(Error::Tokenizer(format!(
                        "byte {:#04x} at offset {at} is beyond the vocabulary of {} ids; bytes need a vocab_size of 256, or 258 with BOS and EOS",
                        text.as_bytes()[at],
                        self.vocab_size
                    ))),
                }
            }
            Kind::HuggingFace(hf) => {
                let encoding = hf.inner.encode_fast(text, false).map_err(|e| Error::Tokenizer(e.to_string()))?;
                Ok(encoding.get_ids().to_vec())
            }
        }
    }

    /// Text of `ids`. Special and unknown ids give nothing, bytes that are not UTF-8 give U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.kind {
            Kind::Bytes => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Kind::HuggingFace(hf) => hf.decode(ids),
        }
    }

    /// Decodes ids one by one.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// A name of an id that no other id has, as OpenAI's API gives it: its text in the middle of a text, `bytes:\xE2` for part of a
    /// character, the spelling of a special token; empty for an id that stands for nothing.
    pub fn token_name(&self, id: u32) -> String {
        match &self.kind {
            Kind::Bytes => match u8::try_from(id) {
                Ok(byte) if byte.is_ascii() => char::from(byte).into(),
                Ok(byte) => format!("bytes:\\x{byte:02X}"),
                Err(_) if Some(id) == self.bos => "<s>".into(),
                Err(_) if Some(id) == self.eos => "</s>".into(),
                Err(_) => String::new(),
            },
            Kind::HuggingFace(hf) => {
                if let Some(byte) = hf.bytes.get(&id) {
                    return format!("bytes:\\x{byte:02X}");
                }
                // Behind itself a token keeps a space that decoders take from the beginning of a text.
                let (once, twice) = (hf.decode(&[id]), hf.decode(&[id, id]));
                match twice.strip_prefix(once.as_str()) {
                    Some(text) if !text.is_empty() && !twice.contains('\u{FFFD}') => text.to_owned(),
                    _ => hf.inner.id_to_token(id).unwrap_or_default(),
                }
            }
        }
    }

    /// Id that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Id that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Ids between two documents that are read one after the other: EOS and BOS, as far as there are two such ids.
    pub fn between_documents(&self) -> impl Iterator<Item = u32> {
        [self.eos, super::store::document_bos(self)].into_iter().flatten()
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// A sentence about ids of a model with `vocab_size` ids that stand for no text (padding, usually), when there are any.
    pub fn unused_ids(&self, vocab_size: usize) -> Option<String> {
        let used = match self.kind {
            Kind::Bytes => self.bos.into_iter().chain(self.eos).map(|id| id as usize + 1).fold(256, usize::max),
            Kind::HuggingFace(_) => self.vocab_size,
        };
        let last = vocab_size.checked_sub(1).filter(|last| used <= *last)?;
        Some(format!("the model has {vocab_size} ids, the tokenizer makes {used}: ids {used} to {last} stand for no text"))
    }

    /// SHA-256, in hexadecimal, of everything that determines ids.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// What a state file calls it: `bytes`, or the fingerprint. Ids of tokenizers with one name stand for the same text.
    pub fn id(&self) -> &str {
        if self.is_bytes() { "bytes" } else { &self.fingerprint }
    }

    /// Whether ids are the bytes of the text.
    pub fn is_bytes(&self) -> bool {
        matches!(self.kind, Kind::Bytes)
    }

    /// Writes the files that [`Tokenizer::from_folder`] reads: `tokenizer_config.json`, and `tokenizer.json` unless ids are
    /// bytes.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).at(folder)?;
        let config = match &self.kind {
            Kind::Bytes => json!({
                "tokenizer_class": BYTE_CLASS, "bos_token_id": self.bos, "eos_token_id": self.eos, "vocab_size": self.vocab_size,
            }),
            Kind::HuggingFace(hf) => {
                let file = hf.inner.to_string(true).map_err(|e| Error::Tokenizer(e.to_string()))?;
                write_atomic(folder.join("tokenizer.json"), |w| w.write_all(file.as_bytes()))?;
                let mut config = hf.config.clone();
                config.entry("tokenizer_class").or_insert_with(|| json!("PreTrainedTokenizerFast"));
                for (name, id) in [("bos_token", self.bos), ("eos_token", self.eos)] {
                    // An entry that was read may be an object with more in it than the name.
                    config.entry(name).or_insert_with(|| json!(id.and_then(|id| hf.inner.id_to_token(id))));
                }
                Value::Object(config)
            }
        };
        let text = serde_json::to_string_pretty(&config).expect("a JSON value can be written");
        write_atomic(folder.join("tokenizer_config.json"), |w| w.write_all(text.as_bytes()))
    }
}

impl HuggingFace {
    /// Text of `ids`, without special ones.
    pub fn decode(&self, ids: &[u32]) -> String {
        // No decoder of the library fails on ids that it gave out; those it does not know it leaves out.
        self.inner.decode(ids, true).unwrap_or_default()
    }

    /// Whether `id` decodes to something.
    pub fn has_text(&self, id: u32) -> bool {
        !self.special.contains(&id) && self.inner.id_to_token(id).is_some()
    }
}

/// The byte that a token such as `<0xE2>` stands for.
fn fallback_byte(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

fn read_config(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).at(path)?;
    serde_json::from_str(&text).map_err(|e| Error::format(path, format!("not a JSON object: {e}")))
}

/// Id of `config[key]` (a name, or an object with `content`); where the key is absent, of the first usual name in the vocabulary.
fn special_id(
    inner: &tokenizers::Tokenizer,
    config: &Map<String, Value>,
    key: &str,
    usual: &[&str],
    path: &Path,
) -> Result<Option<u32>> {
    let name = match config.get(key) {
        None => return Ok(usual.iter().find_map(|name| inner.token_to_id(name))),
        Some(Value::Null) => return Ok(None),
        Some(Value::String(name)) => name,
        Some(value) => value
            .get("content")
            .and_then(Value::as_str)
            .map(|s| s as &str)
            .ok_or_else(|| Error::format(path, format!("`{key}` must be a string, or an object with a string `content`")))?,
    };
    let id = inner.token_to_id(name);
    id.map(Some).ok_or_else(|| Error::format(path, format!("`{key}` is `{name}`, which the vocabulary of tokenizer.json lacks")))
}

/// The byte tokenizer that `config` describes.
fn byte_config(config: &Map<String, Value>, path: &Path) -> Result<Tokenizer> {
    let number = |key: &str| match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => Err(Error::format(path, format!("`{key}` is {value}; it must be an integer from 0 to {}", u32::MAX))),
        },
    };
    let (bos, eos) = (number("bos_token_id")?, number("eos_token_id")?);
    let vocab_size = number("vocab_size")?.map_or(if bos.is_some() || eos.is_some() { 258 } else { 256 }, |n| n as usize);
    for (key, id) in [("bos_token_id", bos), ("eos_token_id", eos)] {
        if let Some(id) = id.filter(|&id| id < 256 || id as usize >= vocab_size) {
            return Err(Error::format(
                path,
                format!("`{key}` is {id}; it must be at least 256 and less than vocab_size {vocab_size}"),
            ));
        }
    }
    Ok(Tokenizer::byte_level(vocab_size, bos, eos))
}

/// Lower-case hexadecimal SHA-256 of `bytes`.
pub(super) fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_specials_where_there_is_room() {
        for (vocab, bos, eos) in [(256, None, None), (257, None, None), (258, Some(256), Some(257)), (512, Some(256), Some(257))] {
            let t = Tokenizer::bytes(vocab);
            assert_eq!((t.bos(), t.eos(), t.vocab_size()), (bos, eos, vocab));
        }
        let t = Tokenizer::bytes(258);
        assert_eq!(t.encode("aé").unwrap(), [97, 0xC3, 0xA9]);
        assert_eq!(t.decode(&[256, 97, 0xC3, 257, 0xA9, 0xFF]), "aé\u{FFFD}");
    }

    #[test]
    fn ids_have_names() {
        let t = Tokenizer::bytes(300);
        assert_eq!([97, 10, 0xE2, 256, 257, 299].map(|id| t.token_name(id)), ["a", "\n", "bytes:\\xE2", "<s>", "</s>", ""]);
    }

    #[test]
    fn small_vocabulary_names_the_byte() {
        let error = Tokenizer::bytes(64).encode("\t a").unwrap_err();
        assert!(matches!(&error, Error::Tokenizer(m) if m.contains("0x61 at offset 2")), "{error}");
    }

    #[test]
    fn fallback_names() {
        assert_eq!(fallback_byte("<0xE2>"), Some(0xE2));
        assert_eq!((fallback_byte("<0xE>"), fallback_byte("<s>"), fallback_byte("<0xé>")), (None, None, None));
    }
}
