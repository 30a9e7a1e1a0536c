//! The text of a run: which files, which tokenizer, and the tokens made from them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::data::{Progress, Sources, Split, Store, StoreOptions, Tokenizer, Tokens, default_corpus};
use crate::train::Settings;
use crate::train::observe::{Event, Observer};
use crate::{Error, Result};

/// Folder beside the run folder that keeps tokens for the next run.
const CACHE: &str = "tokens";

/// Training and validation tokens of a run.
#[derive(Debug)]
pub struct Corpus {
    train: Store,
    /// A text of its own, when the settings name one.
    validation: Option<Store>,
}

impl Corpus {
    /// Tokenises the texts that the settings name, or finds the tokens of an earlier run; without any, the sources of the
    /// packages that this program is built from.
    ///
    /// # Errors
    /// Texts that are missing, empty or not UTF-8; a cache that cannot be written; fewer tokens than a sequence.
    pub fn open(
        settings: &Settings,
        run: &Path,
        config: &Config,
        tokenizer: &Tokenizer,
        observer: &dyn Observer,
    ) -> Result<Corpus> {
        let data = &settings.data;
        let sources = if data.paths.is_empty() {
            let corpus = default_corpus()?;
            let files = corpus.sources.files.len();
            observer.event(Event::Corpus(&format!(
                "no data named: reading {files} Rust sources ({:.1} MB) of the packages in {}; name your own with --data PATH",
                corpus.bytes as f64 / 1e6,
                corpus.folder.display()
            )));
            corpus.sources
        } else {
            Sources::resolve(&data.paths)?
        };
        let cache = match &data.cache {
            Some(folder) => folder.clone(),
            None => beside(run).join(CACHE),
        };
        let own_validation = !data.validation_paths.is_empty();
        let build = |sources: Sources, fraction: f64| -> Result<Store> {
            let mut options = StoreOptions::new(sources, &cache);
            options.separator = Some(data.document_separator.clone()).filter(|s| !s.is_empty());
            options.validation_fraction = fraction;
            options.min_validation_tokens = if fraction > 0.0 { settings.train.sequence_length + 1 } else { 0 };
            let store = Store::open_or_build(&options, tokenizer, &|p: Progress| observer.event(Event::Tokenizing(p)))?;
            store.check_vocabulary(config.vocab_size)?;
            Ok(store)
        };
        let train = build(sources, if own_validation { 0.0 } else { data.validation_fraction })?;
        let validation = if own_validation { Some(build(Sources::resolve(&data.validation_paths)?, 0.0)?) } else { None };
        Ok(Corpus { train, validation })
    }

    /// What is learned.
    pub fn train(&self) -> &Tokens {
        self.train.split(Split::Train)
    }

    /// What the model is judged by.
    pub fn validation(&self) -> &Tokens {
        match &self.validation {
            Some(store) => store.split(Split::Train),
            None => self.train.split(Split::Validation),
        }
    }

    /// What a run on this corpus learns from.
    pub fn id(&self, settings: &Settings, tokenizer: &Tokenizer) -> DataId {
        let text = |store: &Store| TextId {
            sha256: store.content().to_owned(),
            tokens: (store.split(Split::Train).len() + store.split(Split::Validation).len()) as u64,
        };
        DataId {
            texts: text(&self.train),
            validation_texts: self.validation.as_ref().map(text),
            validation_fraction: settings.data.validation_fraction.to_string(),
            tokenizer: tokenizer.fingerprint().to_owned(),
        }
    }
}

/// What a run learns from, by contents: where the texts lie and when they were written does not matter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataId {
    /// The training texts, with the part that is validation.
    pub texts: TextId,
    /// Texts of their own for validation.
    pub validation_texts: Option<TextId>,
    /// The part of the training texts that is validation, as text: JSON readers round numbers.
    pub validation_fraction: String,
    /// [`Tokenizer::fingerprint`].
    pub tokenizer: String,
}

/// Texts that became tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextId {
    /// [`Store::content`].
    pub sha256: String,
    /// Number of tokens.
    pub tokens: u64,
}

impl DataId {
    /// What is different now, in words; empty when nothing is.
    pub fn changes(&self, now: &DataId) -> Vec<String> {
        let count = |text: Option<&TextId>| text.map_or("none".into(), |text| format!("{} tokens", text.tokens));
        let mut changes = Vec::new();
        if self.tokenizer != now.tokenizer {
            // Other tokens are no news then.
            return vec!["the tokenizer".into()];
        }
        for (what, then, now) in [
            ("the training texts", Some(&self.texts), Some(&now.texts)),
            ("the validation texts", self.validation_texts.as_ref(), now.validation_texts.as_ref()),
        ] {
            if then != now {
                changes.push(format!("{what} ({} then, {} now)", count(then), count(now)));
            }
        }
        if self.validation_fraction != now.validation_fraction {
            changes.push(format!("the part for validation ({} then, {} now)", self.validation_fraction, now.validation_fraction));
        }
        changes
    }
}

/// The folder that holds the run folder.
fn beside(run: &Path) -> PathBuf {
    match run.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The run's tokenizer: the one of its newest checkpoint, or of the model that it starts from, or the one that the settings name.
///
/// # Errors
/// A file that cannot be read; a tokenizer with more ids than the model.
pub fn tokenizer(settings: &Settings, config: &Config, checkpoint: Option<&Path>) -> Result<Tokenizer> {
    let folder = checkpoint.or(settings.model.folder.as_deref());
    let of_model = folder.map(Tokenizer::from_folder).transpose()?.flatten();
    let tokenizer = match (of_model, settings.data.tokenizer.as_str()) {
        (Some(tokenizer), _) => tokenizer,
        (None, "bytes") => Tokenizer::bytes(config.vocab_size),
        (None, file) => Tokenizer::from_file(file)?,
    };
    if tokenizer.vocab_size() > config.vocab_size {
        return Err(Error::Config(format!(
            "the tokenizer has {0} ids, but the model's vocab_size is {1}; set model.vocab_size={0}",
            tokenizer.vocab_size(),
            config.vocab_size,
        )));
    }
    Ok(tokenizer)
}

/// Ids that samples begin with. They are made before anything is trained, so that a sample never stops a run.
pub(super) fn sample_prompt(settings: &Settings, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let mut prompt: Vec<u32> = tokenizer.bos().into_iter().collect();
    if settings.sample.every > 0 {
        let advice = "choose another sample.prompt, or no samples with sample.every=0";
        let text = tokenizer.encode(&settings.sample.prompt);
        prompt.extend(text.map_err(|e| Error::Config(format!("sample.prompt: {e}; {advice}")))?);
        if prompt.is_empty() {
            return Err(Error::Config(format!("sample.prompt is empty and the tokenizer has no id that begins a text; {advice}")));
        }
    }
    Ok(prompt)
}
