//! Training a byte-level BPE tokenizer.

use std::path::Path;

use serde_json::Map;
use tokenizers::{
    AddedToken,
    models::bpe::{BPE, BpeTrainer},
    pre_tokenizers::byte_level::ByteLevel,
};

use crate::{Error, Result, data::tokenizer::Tokenizer};

/// Text is fed to the trainer in lines of about so many bytes, so that a document of any size needs little memory.
const PIECE: usize = 1 << 16;

impl Tokenizer {
    /// Trains a byte-level BPE tokenizer (GPT-2's splitting, all 256 bytes in the vocabulary, so that any text round-trips).
    ///
    /// `specials` get the first ids; of these `<s>` and `</s>` become BOS and EOS. The result depends on the texts alone, not on
    /// threads. A pair must occur twice to be merged, so that small corpora give less than `vocab_size` ids.
    ///
    /// # Errors
    /// A `vocab_size` without room for the bytes and the specials.
    pub fn train_bpe<S: AsRef<str> + Send>(
        documents: impl Iterator<Item = S> + Send,
        vocab_size: usize,
        specials: &[&str],
    ) -> Result<Tokenizer> {
        let least = 256 + specials.len();
        if vocab_size < least {
            return Err(Error::Tokenizer(format!(
                "a vocabulary of {vocab_size} is too small; 256 bytes and {} special tokens need {least}",
                specials.len()
            )));
        }
        let other = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab_size)
            .min_frequency(2)
            .special_tokens(specials.iter().map(|&s| AddedToken::from(s, true)).collect())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let level = ByteLevel::default().add_prefix_space(false);
        let mut inner =
            tokenizers::TokenizerImpl::<BPE, tokenizers::NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>::new(BPE::default());
        inner.with_pre_tokenizer(Some(level)).with_post_processor(Some(level.trim_offsets(false))).with_decoder(Some(level));
        inner.train(&mut trainer, documents.flat_map(|d| lines(d.as_ref()))).map_err(other)?;
        Tokenizer::hugging_face(inner.into(), Map::new(), Path::new("tokenizer_config.json"))
    }
}

/// `text` in pieces of whole lines.
fn lines(text: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    for line in text.split_inclusive('\n') {
        let piece = pieces.last_mut().expect("never empty");
        if piece.len() + line.len() > PIECE && !piece.is_empty() {
            pieces.push(line.to_owned());
        } else {
            piece.push_str(line);
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_to_the_text() {
        let text = "a line\n".repeat(PIECE / 3) + "and a rest";
        let pieces = lines(&text);
        assert!(pieces.len() > 2 && pieces.iter().all(|p| p.len() <= PIECE));
        assert_eq!(pieces.concat(), text);
    }
}
