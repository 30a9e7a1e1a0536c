//! State files: one slot as safetensors.
//!
//! | tensor | shape | what it is |
//! |---|---|---|
//! | `layers.N.fast_weights` | `[h, S]` | a head's `[W1 \| b1]`, for the MLP `[W1 \| b1 \| W2 \| b2]`, at the start of the open mini-batch |
//! | `layers.N.open_rows` | `[h, phase, R]` | the rows of the open mini-batch: `[k \| Ĝ]`, for the MLP `[k \| Ĝ1 \| X2 \| Ĝ2]` |
//! | `layers.N.pre_conv`, `layers.N.qk_conv` | `[taps - 1, D]` | last inputs of the convolutions, where the model has them |
//! | `pending` | `[n]` u32 | tokens that were accepted but not read yet |
//!
//! Numbers are those of the model's arithmetic (f32; f64 in the check mode), bit for bit. Going on means to read `pending` and then
//! what is new: the file needs no logits, and the continuation is the one of a sequence that was never interrupted. The metadata
//! ([`StateHeader`]) say what the state belongs to. The size depends on the model and the phase, never on the length read.
//!
//! A file is not trusted: what is read is bounded by its real length, every shape is compared with the model's, and every number
//! is checked to be finite before the first is taken over.

use std::path::Path;

use super::{States, slot_mut};
use crate::config::Inner;
use crate::hub::safetensors::{Dtype, File, Source, TensorRef, write, write_to};
use crate::lm::Lm;
use crate::tensor::{DType, Element, Tensor, with_dtype};
use crate::{Error, Result};

/// Version of the format; a newer one is refused.
const VERSION: u32 = 1;
/// Version of what a row of an open mini-batch holds, and of the order of a head's fast weights.
const LAYOUT: u32 = 1;
/// Tensors of a layer, the first two of which every layer has.
const TENSORS: [&str; 4] = ["fast_weights", "open_rows", "pre_conv", "qk_conv"];
const OPEN_ROWS: &str = TENSORS[1];
const PENDING: &str = "pending";

/// Metadata and tensors of a file to write.
type Contents<'a> = (Vec<(&'static str, String)>, Vec<Source<'a>>);

/// What a state belongs to and how far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateHeader {
    /// Hash of the model's weights ([`Lm::hash`]).
    pub model: String,
    /// The inner model.
    pub learner: Inner,
    /// Tokens of a mini-batch, K.
    pub mini_batch: usize,
    /// Tokens that were read.
    pub tokens: u64,
    /// What made the tokens ([`crate::data::Tokenizer::id`]), if that is known.
    pub tokenizer: Option<String>,
    /// Tokens that were accepted but not read: read these first when going on. Usually one, the last that was chosen or the last
    /// of the text.
    pub pending: Vec<u32>,
    /// Type of the numbers.
    pub dtype: DType,
    /// Layers of the model.
    pub layers: usize,
}

impl StateHeader {
    /// Reads the header of a file; no model is needed.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for what is no state file, or a damaged or newer one.
    pub fn read(path: impl AsRef<Path>) -> Result<StateHeader> {
        Ok(StateFile::open(path)?.header)
    }

    /// Tokens of the open mini-batch that were read.
    pub fn phase(&self) -> usize {
        (self.tokens % self.mini_batch as u64) as usize
    }
}

impl States {
    /// Writes a slot to a file, atomically; returns the file's size in bytes. `pending` are tokens that were accepted but not read
    /// ([`StateHeader::pending`]), `tokenizer` is what made them ([`crate::data::Tokenizer::id`]).
    ///
    /// # Errors
    /// [`Error::Io`]; a state with numbers that are not finite, which no file may hold.
    ///
    /// # Panics
    /// When there is no such slot, or the states are not of this model's shape.
    pub fn save(&self, slot: usize, model: &Lm, pending: &[u32], tokenizer: Option<&str>, path: impl AsRef<Path>) -> Result<u64> {
        let path = path.as_ref();
        let (metadata, sources) = self.sources(slot, model, pending, tokenizer)?;
        write(path, &metadata, sources)?;
        Ok(std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len())
    }

    /// The file that [`States::save`] writes, in memory.
    ///
    /// # Errors
    /// A state with numbers that are not finite.
    ///
    /// # Panics
    /// As [`States::save`].
    pub fn to_bytes(&self, slot: usize, model: &Lm, pending: &[u32], tokenizer: Option<&str>) -> Result<Vec<u8>> {
        let (metadata, sources) = self.sources(slot, model, pending, tokenizer)?;
        let mut bytes = Vec::with_capacity(sources.iter().map(Source::bytes).sum::<usize>() + (1 << 14));
        write_to(&mut bytes, &metadata, sources).expect("a vector takes all bytes");
        Ok(bytes)
    }

    /// Puts a file's state into a slot: the same call, on the same machine, then gives the same numbers as it would have given to
    /// the slot that was saved. After an error the slot is as it was.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for what is no state file, or a damaged or newer one; [`Error::Invalid`] for a state of
    /// another model.
    ///
    /// # Panics
    /// When there is no such slot, or the states are not of this model's shape.
    pub fn restore(&mut self, slot: usize, model: &Lm, path: impl AsRef<Path>) -> Result<StateHeader> {
        self.restore_file(slot, model, StateFile::open(path)?)
    }

    /// [`States::restore`] from bytes in memory, which errors call `state`.
    ///
    /// # Errors
    /// As [`States::restore`].
    ///
    /// # Panics
    /// As [`States::restore`].
    pub fn restore_bytes(&mut self, slot: usize, model: &Lm, bytes: impl Into<Vec<u8>>) -> Result<StateHeader> {
        self.restore_file(slot, model, StateFile::from_bytes(bytes)?)
    }

    /// [`States::restore`] from a file that is open.
    ///
    /// # Errors
    /// As [`States::restore`].
    ///
    /// # Panics
    /// As [`States::restore`].
    pub fn restore_file(&mut self, slot: usize, model: &Lm, state: StateFile) -> Result<StateHeader> {
        let StateFile { file, header } = &state;
        self.check_shape(slot, model);
        header.check(model, file.path())?;
        let phase = header.phase();
        let mut found = Vec::with_capacity(TENSORS.len() * self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            for (name, tensor) in layer.tensors() {
                let stored = file.tensor(&full_name(i, name))?;
                stored.check_shape(&slot_shape(name, tensor, phase))?;
                found.push(stored);
            }
        }
        if let Some(other) = file.names().find(|name| *name != PENDING && !found.iter().any(|t| t.name() == *name)) {
            return Err(Error::format(file.path(), format!("`{other}` is no tensor of this model's state; the file is damaged")));
        }
        state.check_finite()?;

        // From here on nothing can fail.
        let mut found = found.into_iter();
        for layer in &mut self.layers {
            let names: Vec<&str> = layer.tensors().map(|(name, _)| name).collect();
            for (name, tensor) in names.into_iter().zip(layer.tensors_mut()) {
                let stored = found.next().expect("one for every tensor");
                let shape = tensor.shape().to_vec();
                with_dtype!(tensor.dtype(), E => {
                    let slab = slot_mut::<E>(tensor, slot);
                    if name != OPEN_ROWS {
                        stored.read(slab).expect("a checked type");
                        continue;
                    }
                    slab.fill(E::ZERO);
                    let (room, open) = (shape[2] * shape[3], phase * shape[3]);
                    // Without open rows there is nothing to split by.
                    if open > 0 {
                        let rows = stored.to_vec::<E>().expect("a checked type");
                        let heads = slab.chunks_mut(room).zip(rows.chunks(open));
                        heads.for_each(|(to, from)| to[..open].copy_from_slice(from));
                    }
                });
            }
        }
        self.positions[slot] = header.tokens;
        Ok(state.header)
    }

    fn check_shape(&self, slot: usize, model: &Lm) {
        let config = model.config();
        assert!(slot < self.slots(), "slot {slot} of {}", self.slots());
        assert!(
            self.layers.len() == config.num_hidden_layers && self.mini_batch == config.mini_batch_size,
            "states of {} layers and mini-batches of {} for a model of {} and {}",
            self.layers.len(),
            self.mini_batch,
            config.num_hidden_layers,
            config.mini_batch_size
        );
    }

    /// Metadata and tensors of the file of a slot.
    fn sources<'a>(&'a self, slot: usize, model: &Lm, pending: &'a [u32], tokenizer: Option<&str>) -> Result<Contents<'a>> {
        self.check_shape(slot, model);
        let tokens = self.positions[slot];
        let phase = (tokens % self.mini_batch as u64) as usize;
        let mut metadata = vec![
            ("ttt_state", VERSION.to_string()),
            ("model", model.hash().to_owned()),
            ("learner", learner_name(model.config().ttt_layer_type).to_owned()),
            ("mini_batch_size", self.mini_batch.to_string()),
            ("tokens", tokens.to_string()),
            ("phase", phase.to_string()),
            ("layout", LAYOUT.to_string()),
        ];
        metadata.extend(tokenizer.map(|id| ("tokenizer", id.to_owned())));
        let mut sources = vec![Source::u32s(PENDING, &[pending.len()], pending)];
        for (i, layer) in self.layers.iter().enumerate() {
            for (name, tensor) in layer.tensors() {
                sources.push(with_dtype!(tensor.dtype(), E => source::<E>(full_name(i, name), name, tensor, slot, phase))?);
            }
        }
        Ok((metadata, sources))
    }
}

/// A slot's part of a state tensor `[slots, ...]`; of the open rows only those that exist.
fn source<'a, E: Element>(full_name: String, name: &str, tensor: &'a Tensor, slot: usize, phase: usize) -> Result<Source<'a>> {
    let per_slot = tensor.len() / tensor.shape()[0];
    let slab = &tensor.as_slice::<E>()[slot * per_slot..][..per_slot];
    let shape = slot_shape(name, tensor, phase);
    let parts = match name == OPEN_ROWS {
        true if phase == 0 => Vec::new(),
        true => slab.chunks(per_slot / shape[0]).map(|head| &head[..phase * shape[2]]).collect(),
        false => vec![slab],
    };
    if parts.iter().any(|part| part.iter().any(|x| !x.to_f64().is_finite())) {
        return Err(Error::Invalid(format!(
            "`{full_name}` of the state holds a number that is not finite, so it cannot be saved; \
             the model's inner learning rate is too high for this text"
        )));
    }
    Ok(Source::parts(full_name, &shape, parts))
}

/// Shape of a slot's part of a state tensor in a file.
fn slot_shape(name: &str, tensor: &Tensor, phase: usize) -> Vec<usize> {
    let mut shape = tensor.shape()[1..].to_vec();
    if name == OPEN_ROWS {
        shape[1] = phase;
    }
    shape
}

fn full_name(layer: usize, name: &str) -> String {
    format!("layers.{layer}.{name}")
}

fn learner_name(learner: Inner) -> &'static str {
    match learner {
        Inner::Linear => "linear",
        Inner::Mlp => "mlp",
    }
}

/// A state file, open: its header is checked, and its tensors are those of a state of some model.
pub struct StateFile {
    file: File,
    header: StateHeader,
}

impl StateFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for what is no state file, or a damaged or newer one.
    pub fn open(path: impl AsRef<Path>) -> Result<StateFile> {
        StateFile::checked(File::open(path)?)
    }

    /// A file in memory, which errors call `state`.
    ///
    /// # Errors
    /// [`Error::Format`] as [`StateFile::open`].
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Result<StateFile> {
        StateFile::checked(File::from_bytes("state", bytes.into())?)
    }

    fn checked(file: File) -> Result<StateFile> {
        let header = StateHeader::parse(&file)?;
        Ok(StateFile { file, header })
    }

    /// What the state belongs to.
    pub fn header(&self) -> &StateHeader {
        &self.header
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes()
    }

    /// Checks that every number is finite.
    ///
    /// # Errors
    /// [`Error::Format`] that names the tensor.
    pub fn check_finite(&self) -> Result<()> {
        for (_, tensor) in self.tensors() {
            if !is_finite(&tensor) {
                return Err(tensor.wrong("holds a number that is not finite; the file is damaged"));
            }
        }
        Ok(())
    }

    /// How far the fast weights of `other` are from those of this one, layer by layer: the norm of the difference over the norm
    /// of these.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the two are states of different models.
    pub fn distances(&self, other: &StateFile) -> Result<Vec<f64>> {
        let (ours, theirs) = (&self.header, &other.header);
        if ours.model != theirs.model {
            return Err(Error::Invalid(format!(
                "{} and {} are states of two models ({} and {}); only states of one model can be compared",
                self.file.path().display(),
                other.file.path().display(),
                short(&ours.model),
                short(&theirs.model)
            )));
        }
        let weights = |state: &StateFile, layer: usize| state.file.tensor(&full_name(layer, TENSORS[0]))?.to_vec::<f64>();
        (0..ours.layers)
            .map(|layer| {
                let (a, b) = (weights(self, layer)?, weights(other, layer)?);
                if a.len() != b.len() {
                    return Err(Error::format(other.file.path(), "the shapes are not those of its model; the file is damaged"));
                }
                let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                let moved = norm(&mut a.iter().zip(&b).map(|(a, b)| b - a));
                Ok(if moved == 0.0 { 0.0 } else { moved / norm(&mut a.iter().copied()) })
            })
            .collect()
    }

    /// Whether both hold the same state: model, position, pending tokens and every number bit for bit.
    pub fn same_state(&self, other: &StateFile) -> bool {
        let tensors = || self.tensors().zip(other.tensors());
        self.header == StateHeader { tokenizer: self.header.tokenizer.clone(), ..other.header.clone() }
            && self.tensors().count() == other.tensors().count()
            && tensors().all(|((a, x), (b, y))| a == b && x.shape == y.shape && x.bytes == y.bytes)
    }

    /// The floating-point tensors, by name.
    fn tensors(&self) -> impl Iterator<Item = (&str, TensorRef<'_>)> {
        self.file.names().filter(|name| *name != PENDING).filter_map(|name| Some((name, self.file.find(name)?)))
    }
}

fn is_finite(tensor: &TensorRef<'_>) -> bool {
    match tensor.dtype {
        Dtype::F64 => tensor.bytes.as_chunks().0.iter().all(|b| f64::from_le_bytes(*b).is_finite()),
        _ => tensor.bytes.as_chunks().0.iter().all(|b| f32::from_le_bytes(*b).is_finite()),
    }
}

impl StateHeader {
    /// Metadata and the list of tensors, which must be that of some model.
    fn parse(file: &File) -> Result<StateHeader> {
        let damaged = |message: String| Error::format(file.path(), format!("{message}; the file is damaged"));
        let Some(version) = file.metadata().get("ttt_state") else {
            return Err(Error::format(
                file.path(),
                "this is no state file; `--state-out` of `ttt read` or `ttt generate` writes one",
            ));
        };
        for (what, found, known) in
            [("state format", Some(version), VERSION), ("layout of the open mini-batch", file.metadata().get("layout"), LAYOUT)]
        {
            match found.map(|text| text.parse::<u32>()) {
                Some(Ok(n)) if n == known => {}
                Some(Ok(n)) if n > known => {
                    let message = format!("{what} {n} is newer than this program, which reads {known}; update it");
                    return Err(Error::format(file.path(), message));
                }
                _ => return Err(damaged(format!("{what} {found:?} is unknown"))),
            }
        }
        let text = |key: &str| file.metadata().get(key).ok_or_else(|| damaged(format!("`{key}` is missing in its metadata")));
        let number = |key: &str, least: u64, most: u64| {
            let text = text(key)?;
            let number = text.parse::<u64>().ok().filter(|n| (least..=most).contains(n));
            number.ok_or_else(|| damaged(format!("`{key}` in its metadata is {text:?}, not a number from {least} to {most}")))
        };
        let learner = text("learner")?;
        let learner = [Inner::Linear, Inner::Mlp].into_iter().find(|inner| learner_name(*inner) == learner);
        let learner = learner.ok_or_else(|| damaged("`learner` in its metadata is neither linear nor mlp".into()))?;
        let mini_batch = number("mini_batch_size", 1, 1 << 32)? as usize;
        // A position that counts on would overflow.
        let tokens = number("tokens", 0, i64::MAX as u64)?;
        let phase = number("phase", 0, u64::MAX)?;
        if phase != tokens % mini_batch as u64 {
            let message = format!("phase {phase} is not that of {tokens} tokens in mini-batches of {mini_batch}");
            return Err(damaged(message));
        }
        let pending = file.tensor(PENDING)?;
        if pending.shape.len() != 1 || pending.dtype != Dtype::U32 {
            return Err(pending.wrong("is no list of U32; the file is damaged"));
        }
        let (dtype, layers) = Self::check_tensors(file, phase as usize)?;
        Ok(StateHeader {
            model: text("model")?.clone(),
            learner,
            mini_batch,
            tokens,
            tokenizer: file.metadata().get("tokenizer").cloned(),
            pending: pending.to_u32()?,
            dtype,
            layers,
        })
    }

    /// Checks names, ranks and types; returns the type and the number of layers.
    fn check_tensors(file: &File, phase: usize) -> Result<(DType, usize)> {
        let layers = (0..).take_while(|i| file.find(&full_name(*i, TENSORS[0])).is_some()).count();
        if layers == 0 {
            return Err(Error::format(file.path(), "it has no fast weights; the file is damaged"));
        }
        let (mut known, mut dtype) = (1, None);
        for layer in 0..layers {
            for (i, name) in TENSORS.into_iter().enumerate() {
                let tensor = match file.find(&full_name(layer, name)) {
                    Some(tensor) => tensor,
                    None if i < 2 => file.tensor(&full_name(layer, name))?,
                    None => continue,
                };
                known += 1;
                if !matches!(tensor.dtype, Dtype::F32 | Dtype::F64) || *dtype.get_or_insert(tensor.dtype) != tensor.dtype {
                    return Err(tensor.wrong(format!("holds {}; a state is all F32, or all F64", tensor.dtype)));
                }
                let rank = if name == OPEN_ROWS { 3 } else { 2 };
                if tensor.shape.len() != rank || (name == OPEN_ROWS && tensor.shape[1] != phase) {
                    let wanted = if rank == 3 { format!("[heads, {phase}, row]") } else { "two axes".into() };
                    return Err(tensor.wrong(format!("has shape {:?}; {wanted} is needed", tensor.shape)));
                }
            }
        }
        if known != file.names().count() {
            return Err(Error::format(file.path(), "it has tensors that no state has; the file is damaged"));
        }
        Ok((if dtype == Some(Dtype::F64) { DType::F64 } else { DType::F32 }, layers))
    }

    /// Compares with a model. What is cheap comes first: the hash reads all weights when it is asked for the first time.
    fn check(&self, model: &Lm, path: &Path) -> Result<()> {
        let config = model.config();
        let refuse = |message: String| Err(Error::Invalid(format!("{}: {message}", path.display())));
        if self.learner != config.ttt_layer_type {
            let (theirs, ours) = (learner_name(self.learner), learner_name(config.ttt_layer_type));
            return refuse(format!("the state of a {theirs} learner; this model's is {ours}: use the model that made the state"));
        }
        if self.mini_batch != config.mini_batch_size {
            return refuse(format!(
                "the state of a model with mini-batches of {}; this model's have {}: use the model that made the state",
                self.mini_batch, config.mini_batch_size
            ));
        }
        if self.dtype != model.dtype() {
            return refuse(format!(
                "the state was made in {:?} and the model runs in {:?}: run it in the state's precision (--dtype)",
                self.dtype,
                model.dtype()
            ));
        }
        if self.model != model.hash() {
            return refuse(format!(
                "the state of another model: that one's hash is {}, this one's {} (`ttt info` prints it); \
                 use the model that made the state, or read the text again with this one",
                short(&self.model),
                short(model.hash())
            ));
        }
        match self.pending.iter().find(|id| **id as usize >= config.vocab_size) {
            Some(id) => {
                refuse(format!("pending token {id} is beyond the vocabulary of {} ids; the file is damaged", config.vocab_size))
            }
            None => Ok(()),
        }
    }
}

/// The first digits of a hash.
fn short(hash: &str) -> String {
    hash.chars().take(12).collect()
}
