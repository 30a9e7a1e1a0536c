//! The text of a run: which files, which tokenizer, and the tokens made from them.

use std::path::Path;

use crate::config::Config;
use crate::data::{Store, StoreOptions, Tokenizer, default_corpus};
use crate::train::Settings;
use crate::train::run::{Event, Observer};
use crate::{Error, Result};

/// The run's tokenizer: the one of the model that it starts from, or the one that the settings name.
///
/// # Errors
/// A file that cannot be read; a tokenizer with more ids than the model.
pub fn tokenizer(settings: &Settings, config: &Config) -> Result<Tokenizer> {
    let of_model = settings.model.folder.as_ref().map(Tokenizer::from_folder).transpose()?.flatten();
    let tokenizer = match (of_model, settings.data.tokenizer.as_str()) {
        (Some(tokenizer), _) => tokenizer,
        (None, "bytes") => Tokenizer::bytes(config.vocab_size),
        (None, file) => Tokenizer::from_file(file)?,
    };
    if tokenizer.vocab_size() > config.vocab_size {
        return Err(Error::Config(format!(
            "the tokenizer has {} ids, but the model's vocab_size is {}; set model.vocab_size={}",
            tokenizer.vocab_size(),
            config.vocab_size,
            tokenizer.vocab_size()
        )));
    }
    Ok(tokenizer)
}

/// The tokenised training text, and the validation text when the settings name one of its own.
///
/// # Errors
/// Texts that are missing, empty or not UTF-8; a cache that cannot be written.
pub fn open(settings: &Settings, run: &Path, tokenizer: &Tokenizer, observer: &dyn Observer) -> Result<(Store, Option<Store>)> {
    let _ = (run, default_corpus, Event::Corpus, StoreOptions::default, tokenizer, observer);
    todo!()
}
