//! State files: one slot as safetensors.
//!
//! | tensor | shape | what it is |
//! |---|---|---|
//! | `layers.N.fast_weights` | `[h, S]` | a head's `[W1 \| b1]`, for the MLP `[W1 \| b1 \| W2 \| b2]`, at the start of the open mini-batch |
//! | `layers.N.open_rows` | `[h, phase, R]` | the rows of the open mini-batch: `[k \| Ĝ]`, for the MLP `[k \| Ĝ1 \| X2 \| Ĝ2]` |
//! | `layers.N.pre_conv`, `layers.N.qk_conv` | `[taps - 1, D]` | last inputs of the convolutions, where the model has them |
//! | `layers.N.keys`, `layers.N.values` | `[tokens, ...]` | attention: the rotated keys and the values of every token, `kv heads · d` each |
//! | `pending` | `[n]` u32 | tokens that were accepted but not read yet |
//!
//! Numbers are those of the model's arithmetic (f32; f64 in the check mode), bit for bit. Going on means to read `pending` and then
//! what is new: the file needs no logits, and the continuation is the one of a sequence that was never interrupted. The metadata
//! ([`StateHeader`]) say what the state belongs to. The size of a TTT model's state depends on the model and the phase, never on the
//! length read; that of an attention model's grows with every token.
//!
//! A file is not trusted: what is read is bounded by its real length, every shape is compared with the model's, and every number
//! is checked to be finite before the first is taken over.

use std::path::Path;

use super::States;
use super::header::{LAYOUT, Learner, StateHeader, VERSION, full_name, short};
use crate::hub::safetensors::{Dtype, File, Source, TensorRef, write, write_to};
use crate::layer::state::Extent;
use crate::lm::Lm;
use crate::tensor::{Element, Tensor, with_dtype};
use crate::{Error, Result};

/// Name of the tokens that were accepted but not read.
pub(super) const PENDING: &str = "pending";

/// Metadata and tensors of a file to write.
type Contents<'a> = (Vec<(&'static str, String)>, Vec<Source<'a>>);

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
        let alone = self.slot_on_cpu(slot)?;
        let (states, slot) = alone.as_ref().map_or((self, slot), |alone| (alone, 0));
        let (metadata, sources) = states.sources(slot, model, pending, tokenizer)?;
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
        let alone = self.slot_on_cpu(slot)?;
        let (states, slot) = alone.as_ref().map_or((self, slot), |alone| (alone, 0));
        let (metadata, sources) = states.sources(slot, model, pending, tokenizer)?;
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
        if let Some(mut alone) = self.slot_on_cpu(slot)? {
            let header = alone.restore_file(0, model, state)?;
            self.set_slot_from_cpu(slot, &alone)?;
            return Ok(header);
        }
        let StateFile { file, header } = &state;
        self.check_shape(slot, model);
        header.check(model, file.path())?;
        let (tokens, phase) = (header.tokens as usize, header.phase());
        let mut found = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            for (name, tensor) in layer.tensors() {
                let stored = file.tensor(&full_name(i, name))?;
                stored.check_shape(&Extent::of(name).shape(&tensor.shape()[1..], tokens, phase))?;
                found.push(stored);
            }
        }
        if let Some(other) = file.names().find(|name| *name != PENDING && !found.iter().any(|t| t.name() == *name)) {
            return Err(Error::format(file.path(), format!("`{other}` is no tensor of this model's state; the file is damaged")));
        }
        state.check_finite()?;
        // The file is as large as what is to be held.
        self.layers.iter_mut().try_for_each(|layer| layer.reserve(tokens))?;

        // From here on nothing can fail.
        let mut found = found.into_iter();
        for layer in &mut self.layers {
            layer.clear(slot);
            for (name, tensor) in layer.tensors_mut() {
                let stored = found.next().expect("one for every tensor");
                let ranges = Extent::of(name).ranges(&tensor.shape()[1..], tokens, phase);
                with_dtype!(tensor.dtype(), E => {
                    let per_slot = tensor.len() / tensor.shape()[0];
                    let slab = &mut tensor.as_mut_slice::<E>()[slot * per_slot..][..per_slot];
                    let mut first = 0;
                    for range in ranges {
                        let part = &mut slab[range];
                        stored.read_from(first, part).expect("a checked type");
                        first += part.len();
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
            self.layers.len() == config.num_hidden_layers && self.mini_batch == config.mini_batch(),
            "states of {} layers and mini-batches of {:?} for a model of {} and {:?}",
            self.layers.len(),
            self.mini_batch,
            config.num_hidden_layers,
            config.mini_batch()
        );
    }

    /// Metadata and tensors of the file of a slot.
    fn sources<'a>(&'a self, slot: usize, model: &Lm, pending: &'a [u32], tokenizer: Option<&str>) -> Result<Contents<'a>> {
        self.check_shape(slot, model);
        let tokens = self.positions[slot];
        let mini_batch = self.mini_batch.unwrap_or(1);
        let phase = (tokens % mini_batch as u64) as usize;
        let mut metadata = vec![
            ("ttt_state", VERSION.to_string()),
            ("model", model.hash().to_owned()),
            ("learner", Learner::of(model.config()).name().to_owned()),
            ("mini_batch_size", mini_batch.to_string()),
            ("tokens", tokens.to_string()),
            ("phase", phase.to_string()),
            ("layout", LAYOUT.to_string()),
        ];
        metadata.extend(tokenizer.map(|id| ("tokenizer", id.to_owned())));
        let mut sources = vec![Source::u32s(PENDING, &[pending.len()], pending)];
        for (i, layer) in self.layers.iter().enumerate() {
            for (name, tensor) in layer.tensors() {
                let extent = Extent::of(name);
                let at = (slot, tokens as usize, phase);
                sources.push(with_dtype!(tensor.dtype(), E => source::<E>(full_name(i, name), extent, tensor, at))?);
            }
        }
        Ok((metadata, sources))
    }
}

/// What there is of a slot in a state tensor `[slots, ...]`.
fn source<'a, E: Element>(
    full_name: String,
    extent: Extent,
    tensor: &'a Tensor,
    (slot, tokens, phase): (usize, usize, usize),
) -> Result<Source<'a>> {
    let shape = &tensor.shape()[1..];
    let per_slot = tensor.len() / tensor.shape()[0];
    let slab = &tensor.as_slice::<E>()[slot * per_slot..][..per_slot];
    let parts: Vec<&[E]> = extent.ranges(shape, tokens, phase).into_iter().map(|range| &slab[range]).collect();
    if parts.iter().any(|part| part.iter().any(|x| !x.to_f64().is_finite())) {
        return Err(Error::Invalid(format!(
            "`{full_name}` of the state holds a number that is not finite, so it cannot be saved; \
             the model's inner learning rate is too high for this text"
        )));
    }
    Ok(Source::parts(full_name, &extent.shape(shape, tokens, phase), parts))
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

    /// What the state belongs to.
    pub(super) fn into_header(self) -> StateHeader {
        self.header
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
    /// of these. Of Mamba it is the state of the recurrence.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the two are states of different models, or of attention, whose states are of different sizes.
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
        let Some(name) = ours.learner.memory() else {
            return Err(Error::Invalid(
                "states of attention are lists of keys and values, between which there is no distance".into(),
            ));
        };
        let weights = |state: &StateFile, layer: usize| state.file.tensor(&full_name(layer, name))?.to_vec::<f64>();
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
