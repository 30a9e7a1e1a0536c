//! Token files of the splits, written document by document.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    AtPath, Error, Result,
    data::{
        cut,
        store::{StoreOptions, document_bos},
        tokenizer::Tokenizer,
        tokens::{RECORD, TokenFile},
    },
};

/// With fewer documents than this, a hash of names is too much of a lottery, and the end of the tokens is validation.
const FEW: usize = 20;

/// What was counted while building.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counts {
    pub documents: u64,
    pub tokens: u64,
    pub text_bytes: u64,
}

/// The result of [`build`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Built {
    /// Bytes of an id.
    pub width: usize,
    pub largest_id: u32,
    pub prompts: bool,
    pub train: Counts,
    pub validation: Counts,
}

/// Distributes documents over the splits.
pub(super) struct Splits<'a> {
    folder: &'a Path,
    /// A document whose name's hash is divisible by this is validation.
    modulus: Option<u32>,
    /// Ids around a document.
    bos: Option<u32>,
    eos: Option<u32>,
    width: usize,
    writers: Writers,
    /// Whether the open document is validation, and where its tokens start.
    to_validation: bool,
    start: u64,
    /// Of both splits.
    pub counts: Counts,
    largest_id: u32,
    prompts: bool,
}

enum Writers {
    /// As long as there are few documents it is open how they are split. With them go the hashes of their names.
    Few(Writer, Vec<u32>),
    Split {
        train: Writer,
        validation: Writer,
    },
}

impl<'a> Splits<'a> {
    pub fn new(folder: &'a Path, options: &StoreOptions, tokenizer: &Tokenizer) -> Result<Splits<'a>> {
        let width = if tokenizer.vocab_size() <= 1 << 16 { 2 } else { 4 };
        Ok(Splits {
            folder,
            modulus: options.modulus(),
            bos: document_bos(tokenizer),
            eos: tokenizer.eos(),
            width,
            writers: Writers::Few(Writer::create(folder.join("few"), width)?, Vec::new()),
            to_validation: false,
            start: 0,
            counts: Counts::default(),
            largest_id: 0,
            prompts: false,
        })
    }

    /// Begins the document `name`.
    pub fn begin(&mut self, name: &str) -> Result<()> {
        self.choose(crc32fast::hash(name.as_bytes()))?;
        self.start = self.writer().counts.tokens;
        self.push(&Vec::from_iter(self.bos))
    }

    /// Ends it; `prompt` ids and all but `text_bytes` of its text are a prompt, if it has one.
    pub fn end(&mut self, prompt: Option<usize>, text_bytes: usize) -> Result<()> {
        self.push(&Vec::from_iter(self.eos))?;
        self.prompts |= prompt.is_some();
        let prompt = prompt.map_or(0, |ids| ids + usize::from(self.bos.is_some()));
        let record = [self.start, prompt as u64, text_bytes as u64];
        self.counts.documents += 1;
        self.writer().end(record)
    }

    /// Adds ids to the open document.
    pub fn push(&mut self, ids: &[u32]) -> Result<()> {
        self.largest_id = ids.iter().fold(self.largest_id, |a, &b| a.max(b));
        self.counts.tokens += ids.len() as u64;
        self.writer().push(ids)
    }

    fn writer(&mut self) -> &mut Writer {
        match &mut self.writers {
            Writers::Few(writer, _) => writer,
            Writers::Split { validation, .. } if self.to_validation => validation,
            Writers::Split { train, .. } => train,
        }
    }

    /// Chooses the split of a document.
    fn choose(&mut self, hash: u32) -> Result<()> {
        if let Writers::Few(_, hashes) = &mut self.writers {
            if hashes.len() + 1 < FEW {
                hashes.push(hash);
                return Ok(());
            }
            self.split()?;
        }
        self.to_validation = is_validation(hash, self.modulus);
        Ok(())
    }

    /// Now that there are enough documents, puts the first ones where their hashes say.
    fn split(&mut self) -> Result<()> {
        let mut train = Writer::create(self.folder.join("train"), self.width)?;
        let mut validation = Writer::create(self.folder.join("validation"), self.width)?;
        if let Writers::Few(few, hashes) = &mut self.writers {
            few.flush()?;
            let file = few.open()?;
            let mut ids = Vec::new();
            for (i, &hash) in hashes.iter().enumerate() {
                let to = if is_validation(hash, self.modulus) { &mut validation } else { &mut train };
                let start = to.counts.tokens;
                for at in (file.first(i)..file.first(i + 1)).step_by(cut::PIECE) {
                    ids.clear();
                    file.read(at..(at + cut::PIECE).min(file.first(i + 1)), &mut ids);
                    to.push(&ids)?;
                }
                to.end([start, file.prompt(i) as u64, file.bytes(i)])?;
            }
        }
        if let Writers::Few(few, _) = std::mem::replace(&mut self.writers, Writers::Split { train, validation }) {
            few.remove()?;
        }
        Ok(())
    }

    pub fn finish(self) -> Result<Built> {
        if self.counts.documents == 0 {
            return Err(Error::Data("the files hold no text; name files that are not empty, or raise the limits on bytes".into()));
        }
        let (train, validation) = match self.writers {
            Writers::Few(few, _) => {
                (few.rename(self.folder.join("train"))?, Writer::create(self.folder.join("validation"), self.width)?)
            }
            Writers::Split { train, validation } => (train, validation),
        };
        if train.counts.tokens == 0 {
            return Err(Error::Data("every document fell into validation; lower the fraction, or name more data".into()));
        }
        Ok(Built {
            width: self.width,
            largest_id: self.largest_id,
            prompts: self.prompts,
            train: train.sync()?,
            validation: validation.sync()?,
        })
    }
}

fn is_validation(hash: u32, modulus: Option<u32>) -> bool {
    modulus.is_some_and(|m| hash.is_multiple_of(m))
}

/// Writes the ids and records of one split.
struct Writer {
    base: PathBuf,
    ids: BufWriter<File>,
    index: BufWriter<File>,
    width: usize,
    counts: Counts,
    buffer: Vec<u8>,
}

impl Writer {
    fn create(base: PathBuf, width: usize) -> Result<Writer> {
        let create = |extension| {
            let path = base.with_extension(extension);
            Ok::<_, Error>(BufWriter::with_capacity(1 << 20, File::create(&path).at(&path)?))
        };
        let (ids, index) = (create("bin")?, create("idx")?);
        Ok(Writer { base, ids, index, width, counts: Counts::default(), buffer: Vec::new() })
    }

    fn push(&mut self, ids: &[u32]) -> Result<()> {
        self.buffer.clear();
        if self.width == 2 {
            // The vocabulary has at most 2^16 ids where they take two bytes.
            self.buffer.extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes()));
        } else {
            self.buffer.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        }
        self.counts.tokens += ids.len() as u64;
        self.ids.write_all(&self.buffer).at(self.base.with_extension("bin"))
    }

    fn end(&mut self, record: [u64; RECORD / 8]) -> Result<()> {
        self.counts.documents += 1;
        self.counts.text_bytes += record[2];
        self.index.write_all(record.map(u64::to_le_bytes).as_flattened()).at(self.base.with_extension("idx"))
    }

    fn flush(&mut self) -> Result<()> {
        self.ids.flush().and_then(|()| self.index.flush()).at(&self.base)
    }

    fn open(&self) -> Result<TokenFile> {
        TokenFile::open(&self.base, self.width, [self.counts.tokens, self.counts.documents], [None, None], false)
    }

    fn sync(mut self) -> Result<Counts> {
        self.flush()?;
        self.ids.get_ref().sync_all().and_then(|()| self.index.get_ref().sync_all()).at(&self.base)?;
        Ok(self.counts)
    }

    fn rename(mut self, base: PathBuf) -> Result<Writer> {
        for extension in ["bin", "idx"] {
            let to = base.with_extension(extension);
            std::fs::rename(self.base.with_extension(extension), &to).at(&to)?;
        }
        self.base = base;
        Ok(self)
    }

    fn remove(self) -> Result<()> {
        let Writer { base, ids, index, .. } = self;
        drop((ids, index));
        for extension in ["bin", "idx"] {
            let path = base.with_extension(extension);
            std::fs::remove_file(&path).at(&path)?;
        }
        Ok(())
    }
}
