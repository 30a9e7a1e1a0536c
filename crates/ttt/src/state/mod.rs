//! What sequences carry from token to token: the learned state as a value, and as a file ([`file`](mod@file)).

pub mod file;
mod header;

pub use file::StateFile;
pub use header::{Learner, StateHeader};

use crate::Result;
use crate::batch::{Batch, Segment};
use crate::device::Device;
use crate::layer::LayerState;
use crate::layer::state::Extent;
use crate::lm::Lm;

/// The states of a number of slots, each of which holds one sequence and its position. That of a TTT model, fast weights, open
/// mini-batch and convolution windows, has the same size however much has been read; that of a Transformer grows, its keys and
/// values.
///
/// A fork is a copy of a slot ([`States::copy_slot`]) or of all of them ([`States::fork`]).
#[derive(Debug)]
pub struct States {
    pub(crate) layers: Vec<LayerState>,
    positions: Vec<u64>,
    /// Tokens of a mini-batch of the inner loop, where there is one.
    mini_batch: Option<usize>,
}

impl States {
    /// `slots` sequences of a model, each at its beginning.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(model: &Lm, slots: usize) -> Result<States> {
        let layers = model.blocks().iter().map(|block| block.state(model.weights(), slots)).collect::<Result<_>>()?;
        Ok(States { layers, positions: vec![0; slots], mini_batch: model.config().mini_batch() })
    }

    /// Puts a slot back to the beginning of a sequence.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn reset(&mut self, model: &Lm, slot: usize) {
        self.positions[slot] = 0;
        for (block, layer) in model.blocks().iter().zip(&mut self.layers) {
            block.reset(model.weights(), layer, slot);
        }
    }

    /// A copy on the CPU when the states lie in a GPU's memory: what files are written from. All of it is f32 or f64 there.
    pub(crate) fn on_cpu(&self) -> Result<Option<States>> {
        let Some(device) = self.device().filter(|device| device.as_cuda().is_some()) else { return Ok(None) };
        let host = device.cpu_beside();
        let layers = self.layers.iter().map(|layer| layer.to(&host)).collect::<Result<_>>()?;
        Ok(Some(States { layers, positions: self.positions.clone(), mini_batch: self.mini_batch }))
    }

    /// A slot on the CPU, alone, when the states lie in a GPU's memory: what a file is written from.
    pub(crate) fn slot_on_cpu(&self, slot: usize) -> Result<Option<States>> {
        let Some(device) = self.device().filter(|device| device.as_cuda().is_some()) else { return Ok(None) };
        assert!(slot < self.slots(), "slot {slot} of {}", self.slots());
        let (host, position) = (device.cpu_beside(), self.positions[slot]);
        let layers = self.layers.iter().map(|layer| layer.slot_to(slot, position as usize, &host)).collect::<Result<_>>()?;
        Ok(Some(States { layers, positions: vec![position], mini_batch: self.mini_batch }))
    }

    /// Takes the values of a slot from states of one slot on the CPU. The others stay where they are.
    pub(crate) fn set_slot_from_cpu(&mut self, slot: usize, from: &States) -> Result<()> {
        let tokens = from.positions[0] as usize;
        self.layers.iter_mut().try_for_each(|layer| layer.reserve(tokens))?;
        self.layers.iter_mut().zip(&from.layers).try_for_each(|(to, from)| to.set_slot(slot, from, tokens))?;
        self.positions[slot] = from.positions[0];
        Ok(())
    }

    /// Makes room for sequences of `tokens` tokens in every slot, and not for more, where states grow with what is read (see
    /// [`States::bytes_per_token`]). Without it room is made as it is needed, and then for more.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.layers.iter_mut().try_for_each(|layer| layer.reserve_exact(tokens))
    }

    /// Bytes that a slot grows by with every token: keys and values; otherwise 0.
    pub fn bytes_per_token(&self) -> usize {
        let grows = |(name, tensor): (&str, &crate::tensor::Tensor)| match Extent::of(name) {
            Extent::Tokens => tensor.shape()[2] * tensor.dtype().size(),
            Extent::Whole | Extent::OpenRows => 0,
        };
        self.layers.iter().flat_map(|layer| layer.tensors()).map(grows).sum()
    }

    /// Where they live.
    fn device(&self) -> Option<&Device> {
        self.layers.first()?.tensors().next().map(|(_, tensor)| tensor.device())
    }

    /// Takes the values of states on the CPU, of the same shape.
    pub(crate) fn set_from_cpu(&mut self, from: &States) -> Result<()> {
        for (to, from) in self.layers.iter_mut().zip(&from.layers) {
            for ((_, from), (_, to)) in from.tensors().zip(to.tensors_mut()) {
                let moved = from.to(to.device())?;
                *to = if moved.dtype() == to.dtype() { moved } else { moved.cast(to.dtype())? };
            }
        }
        self.positions.clone_from(&from.positions);
        Ok(())
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.positions.len()
    }

    /// Tokens that a slot has read.
    pub fn position(&self, slot: usize) -> u64 {
        self.positions[slot]
    }

    /// Says how many tokens a slot has read, whose tensors were filled otherwise.
    pub(crate) fn set_position(&mut self, slot: usize, position: u64) {
        self.positions[slot] = position;
    }

    /// Whether the model has an inner loop, so that a slot may be inside a mini-batch.
    pub(crate) fn has_mini_batches(&self) -> bool {
        self.mini_batch.is_some()
    }

    /// What a [`Segment`] calls the phase of a slot that has read so many tokens.
    pub(crate) fn phase_at(&self, position: u64) -> usize {
        self.mini_batch.map_or(position as usize, |k| (position % k as u64) as usize)
    }

    /// Bytes of all slots.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerState::bytes).sum()
    }

    /// The state of one layer.
    pub fn layer(&self, layer: usize) -> &LayerState {
        &self.layers[layer]
    }

    /// Copies the state of slot `from` over that of slot `to`.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn copy_slot(&mut self, from: usize, to: usize) {
        let tokens = self.positions[from];
        self.positions[to] = tokens;
        self.layers.iter_mut().for_each(|layer| layer.copy_slot(from, to, tokens as usize));
    }

    /// An independent copy of all slots.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn fork(&self) -> Result<States> {
        let mut copy = States { layers: self.layers.clone(), positions: self.positions.clone(), mini_batch: self.mini_batch };
        for layer in &mut copy.layers {
            layer.unshare()?;
        }
        Ok(copy)
    }

    /// Where the sequences of a batch continue.
    ///
    /// # Panics
    /// When the batch names a slot that does not exist, or one twice.
    pub(crate) fn segments(&self, batch: &Batch) -> Vec<Segment> {
        assert!(batch.slots() <= self.slots(), "the batch names slot {}, but there are {}", batch.slots() - 1, self.slots());
        let mut seen = vec![false; self.slots()];
        let segment = |s: &crate::batch::Seq| {
            assert!(!std::mem::replace(&mut seen[s.slot], true), "the batch names slot {} twice", s.slot);
            Segment { first_row: s.first_row, len: s.len, slot: s.slot, phase: self.phase_at(self.positions[s.slot]) }
        };
        batch.seqs.iter().map(segment).collect()
    }

    /// Counts the tokens of a batch that has been read.
    pub(crate) fn advance(&mut self, batch: &Batch) {
        for s in &batch.seqs {
            let before = if s.fresh { 0 } else { self.positions[s.slot] };
            self.positions[s.slot] = before + s.len as u64;
        }
    }
}
