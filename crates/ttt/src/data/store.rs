//! Tokenised data in a cache folder: built once, then memory-mapped.

use std::{
    fs::{File, TryLockError},
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    AtPath, Error, Result,
    data::{
        build,
        source::Sources,
        tokenizer::{self, Tokenizer},
        tokens::{Cut, TokenFile, Tokens},
        writer::{Built, Counts},
    },
    hub::write_atomic,
};

/// Changes whenever the same inputs would give other files.
const VERSION: u32 = 2;
/// What a killed build left behind is deleted when nothing was written to it for so long.
const LEFTOVER: Duration = Duration::from_secs(3600);

/// Which documents become tokens, and where these are kept.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// The files.
    pub sources: Sources,
    /// Folder that holds a folder for each tokenised data set.
    pub cache_dir: PathBuf,
    /// A line that separates documents within text files, `<|endofdoc|>` say.
    pub separator: Option<String>,
    /// About this part of the documents is validation; 0 for none.
    ///
    /// From 20 documents on, those with `crc32(name) % round(1 / fraction) == 0`. With fewer, or if the hash chooses none, it is
    /// the end of the token stream: `fraction` of it or [`StoreOptions::min_validation_tokens`], whichever is more, but at most
    /// half; from the beginning of the document it starts in if that makes it at most twice as long.
    pub validation_fraction: f64,
    /// Least number of validation tokens when these are the end of the stream; one sequence and its last target, usually.
    pub min_validation_tokens: usize,
    /// Reading stops after so many bytes of text.
    pub max_bytes: Option<u64>,
    /// Files that are larger (as they are, packed) are left out.
    pub max_file_bytes: Option<u64>,
}

impl StoreOptions {
    /// All of `sources`, 2 % of it for validation.
    pub fn new(sources: Sources, cache_dir: impl Into<PathBuf>) -> StoreOptions {
        StoreOptions {
            sources,
            cache_dir: cache_dir.into(),
            separator: None,
            validation_fraction: 0.02,
            min_validation_tokens: 0,
            max_bytes: None,
            max_file_bytes: None,
        }
    }

    pub(super) fn modulus(&self) -> Option<u32> {
        (self.validation_fraction > 0.0).then(|| (1.0 / self.validation_fraction).round().min(u32::MAX.into()) as u32)
    }
}

/// How far a build is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the files, packed, whose text is tokenised.
    pub bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
    /// Documents written.
    pub documents: u64,
    /// Tokens written.
    pub tokens: u64,
    /// Another process builds the same data; this one waits for it.
    pub waiting: bool,
}

/// A part of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// What is learned.
    Train,
    /// What the model is judged by.
    Validation,
}

/// A file that went into a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Input {
    name: String,
    path: PathBuf,
    size: u64,
    /// Nanoseconds since 1970.
    modified: u64,
}

/// Everything that determines the files of a store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Key {
    version: u32,
    tokenizer: String,
    separator: Option<String>,
    modulus: Option<u32>,
    max_bytes: Option<u64>,
    max_file_bytes: Option<u64>,
    inputs: Vec<Input>,
}

/// `meta.json`.
#[derive(Serialize, Deserialize)]
struct Meta {
    built: Built,
    /// SHA-256 of the four files of tokens.
    content: String,
    key: Key,
}

/// Tokenised data.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
    train: Tokens,
    validation: Tokens,
    largest_id: u32,
    content: String,
    reused: bool,
}

impl Store {
    /// Maps the tokens that an earlier call left in `cache_dir`, if files (by path, size and time of change), tokenizer and
    /// options are the same; tokenises the data otherwise, in parallel on the current thread pool, and calls `progress` now and
    /// then. Damaged files are built again. Of several processes that want the same data at once, one builds and the others wait.
    ///
    /// A document is held in memory whole, its ids are not.
    ///
    /// # Errors
    /// Data without text, not UTF-8, or a bad line of `.jsonl`; text that the tokenizer refuses; a folder that cannot be written.
    pub fn open_or_build(options: &StoreOptions, tokenizer: &Tokenizer, progress: &(dyn Fn(Progress) + Sync)) -> Result<Store> {
        if !(0.0..=0.5).contains(&options.validation_fraction) {
            return Err(Error::Data(format!(
                "the validation fraction is {}; it must be from 0 to 0.5",
                options.validation_fraction
            )));
        }
        let key = key(options, tokenizer)?;
        let text = serde_json::to_string(&key).expect("a key can be written as JSON");
        let name = &tokenizer::hex(text.as_bytes())[..32];
        let (cache, folder) = (&options.cache_dir, options.cache_dir.join(name));
        if let Ok(store) = open(&folder, &key, options, tokenizer) {
            return Ok(store);
        }
        std::fs::create_dir_all(cache).at(cache)?;
        let _lock = lock(&cache.join(format!(".{name}.lock")), progress)?;
        if let Ok(store) = open(&folder, &key, options, tokenizer) {
            return Ok(store);
        }
        remove_leftovers(cache, name);
        let unique = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos());
        let temporary = Temporary(cache.join(format!(".{name}-{}-{unique}", std::process::id())));
        std::fs::create_dir(&temporary.0).at(&temporary.0)?;
        let built = build::build(&temporary.0, options, tokenizer, progress)?;
        let content = content_hash(&temporary.0)?;
        let meta =
            serde_json::to_string_pretty(&Meta { built, content, key: key.clone() }).expect("meta data can be written as JSON");
        write_atomic(temporary.0.join("meta.json"), |w| w.write_all(meta.as_bytes()))?;
        if folder.exists() {
            // It could not be opened, so it is damaged.
            std::fs::remove_dir_all(&folder).at(&folder)?;
        }
        if let Err(e) = std::fs::rename(&temporary.0, &folder) {
            // Where locks do not reach (some network file systems), another process may have been first.
            return open(&folder, &key, options, tokenizer).map_err(|_| Error::io(&folder, e));
        }
        Ok(Store { reused: false, ..open(&folder, &key, options, tokenizer)? })
    }

    /// The tokens of a split.
    pub fn split(&self, split: Split) -> &Tokens {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// The folder of the files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// SHA-256, in hexadecimal, of the tokens and of where documents begin: the same wherever the texts lie and whenever they
    /// were written, another as soon as one token differs. Computed once, when the tokens are made.
    pub fn content(&self) -> &str {
        &self.content
    }

    /// Whether the files were there already.
    pub fn reused(&self) -> bool {
        self.reused
    }

    /// Checks that a model with `vocab_size` ids can read the tokens.
    ///
    /// # Errors
    /// An id beyond the vocabulary.
    pub fn check_vocabulary(&self, vocab_size: usize) -> Result<()> {
        if (self.largest_id as usize) < vocab_size {
            return Ok(());
        }
        Err(Error::Data(format!(
            "the data has id {}, but the model's vocab_size is {vocab_size}; use the model's own tokenizer, or a vocab_size of at least {}",
            self.largest_id,
            u64::from(self.largest_id) + 1
        )))
    }
}

/// The id that begins a document. A tokenizer whose BOS is its EOS (GPT-2) separates documents with one id, and it must be learned.
pub(super) fn document_bos(tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.bos().filter(|_| tokenizer.bos() != tokenizer.eos())
}

fn key(options: &StoreOptions, tokenizer: &Tokenizer) -> Result<Key> {
    let mut inputs = Vec::new();
    for file in &options.sources.files {
        let path = std::fs::canonicalize(&file.path).at(&file.path)?;
        let meta = std::fs::metadata(&path).at(&path)?;
        let modified = meta.modified().ok().and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
        let modified = modified.map_or(0, |t| t.as_nanos() as u64);
        inputs.push(Input { name: file.name.clone(), path, size: meta.len(), modified });
    }
    Ok(Key {
        version: VERSION,
        tokenizer: tokenizer.fingerprint().to_owned(),
        separator: options.separator.clone(),
        modulus: options.modulus(),
        max_bytes: options.max_bytes,
        max_file_bytes: options.max_file_bytes,
        inputs,
    })
}

/// Opens a finished store; any error means that it must be built.
fn open(folder: &Path, key: &Key, options: &StoreOptions, tokenizer: &Tokenizer) -> Result<Store> {
    let path = folder.join("meta.json");
    let text = std::fs::read_to_string(&path).at(&path)?;
    let Meta { built, content, key: found } = serde_json::from_str(&text).map_err(|e| Error::format(&path, e.to_string()))?;
    if found != *key || !matches!(built.width, 2 | 4) {
        return Err(Error::format(&path, "describes other data"));
    }
    let ids = [document_bos(tokenizer), tokenizer.eos()];
    let file = |name: &str, counts: &Counts| {
        TokenFile::open(&folder.join(name), built.width, [counts.tokens, counts.documents], ids, built.prompts).map(Arc::new)
    };
    let (train, validation) = (file("train", &built.train)?, file("validation", &built.validation)?);
    let (train_bytes, validation_bytes) = (built.train.text_bytes, built.validation.text_bytes);
    let all = train.len();
    let (train, validation) = if built.validation.documents > 0 || key.modulus.is_none() {
        let validation_range = 0..validation.len();
        (Tokens::new(train, 0..all, None, train_bytes), Tokens::new(validation, validation_range, None, validation_bytes))
    } else {
        let (at, bytes, cut) = tail(&train, options, tokenizer);
        (Tokens::new(train.clone(), 0..at, Some(cut), train_bytes - bytes), Tokens::new(train, at..all, Some(cut), bytes))
    };
    Ok(Store { folder: folder.to_owned(), train, validation, largest_id: built.largest_id, content, reused: true })
}

/// SHA-256 of the files of tokens in `folder`, each with its length before it.
fn content_hash(folder: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for name in ["train.bin", "train.idx", "validation.bin", "validation.idx"] {
        let path = folder.join(name);
        let mut file = File::open(&path).at(&path)?;
        hash.update(file.metadata().at(&path)?.len().to_le_bytes());
        loop {
            match file.read(&mut buffer).at(&path)? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The end of `file` that is validation: its first token, its bytes of text, and how that cuts a document.
fn tail(file: &TokenFile, options: &StoreOptions, tokenizer: &Tokenizer) -> (usize, u64, Cut) {
    let all = file.len();
    let wanted = (all as f64 * options.validation_fraction).ceil() as usize;
    let wanted = wanted.max(options.min_validation_tokens).min(all / 2);
    let mut at = all - wanted;
    let document = file.document_at(at.min(all - 1));
    let first = file.first(document);
    if first > 0 && at - first <= wanted && all - first <= all / 2 {
        at = first;
    } else if tokenizer.is_bytes() {
        // Not within a character.
        while at > first && at < all && (0x80..0xC0).contains(&file.id(at)) {
            at -= 1;
        }
    }
    let next = file.first(document + 1);
    let mut inside = 0; // bytes of text of the cut document behind the cut
    if at == first {
        inside = file.bytes(document);
    } else {
        let mut ids = Vec::new();
        let mut from = at.max(first + file.prompt(document));
        while from < next {
            let to = (from + (1 << 16)).min(next);
            ids.clear();
            file.read(from..to, &mut ids);
            inside += tokenizer.decode(&ids).len() as u64;
            from = to;
        }
        inside = inside.min(file.bytes(document));
    }
    let behind: u64 = (document + 1..file.documents()).map(|d| file.bytes(d)).sum();
    (at, inside + behind, Cut { document, at, bytes_before: file.bytes(document) - inside })
}

/// Waits until this process is the only one that builds. `None` where the file system has no locks.
fn lock(path: &Path, progress: &(dyn Fn(Progress) + Sync)) -> Result<Option<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(path).at(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            progress(Progress { waiting: true, ..Progress::default() });
            file.lock().at(path)?;
            Ok(Some(file))
        }
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// Deletes folders of builds of `name` that were killed.
fn remove_leftovers(cache: &Path, name: &str) {
    let old = |path: &Path| {
        let files = std::fs::read_dir(path).into_iter().flatten().flatten();
        let times = files.filter_map(|f| f.metadata().ok()?.modified().ok());
        let folder = std::fs::metadata(path).and_then(|m| m.modified());
        times.chain(folder).all(|t| t.elapsed().is_ok_and(|age| age > LEFTOVER))
    };
    for entry in std::fs::read_dir(cache).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!(".{name}-")) && old(&entry.path()) {
            _ = std::fs::remove_dir_all(entry.path()); // it costs space only
        }
    }
}

/// A folder that is deleted unless it was renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        _ = std::fs::remove_dir_all(&self.0);
    }
}
