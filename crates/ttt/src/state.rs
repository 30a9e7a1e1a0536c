//! What sequences carry from token to token: the learned state as a value.

use crate::Result;
use crate::batch::{Batch, Segment};
use crate::layer::LayerState;
use crate::lm::Lm;
use crate::tensor::{Tensor, with_dtype};

/// The states of a number of slots, each of which holds one sequence: fast weights, open mini-batch, convolution windows and
/// position. Its size does not depend on how much has been read.
///
/// A fork is a copy of a slot ([`States::copy_slot`]) or of all of them ([`States::fork`]).
#[derive(Debug)]
pub struct States {
    pub(crate) layers: Vec<LayerState>,
    positions: Vec<u64>,
    mini_batch: usize,
}

impl States {
    /// `slots` sequences of a model, each at its beginning.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(model: &Lm, slots: usize) -> Result<States> {
        let config = model.config();
        let (device, dtype) = (model.device(), model.dtype());
        let window = |wanted: bool| -> Result<Option<Tensor>> {
            let shape = [slots, config.conv_kernel - 1, config.hidden_size];
            wanted.then(|| Tensor::zeros(device, &shape, dtype)).transpose()
        };
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for block in model.blocks() {
            let fast = block.ttt().fast_weights(model.weights(), slots)?;
            layers.push(LayerState { fast, pre_conv: window(config.pre_conv)?, qk_conv: window(config.share_qk)? });
        }
        let mut states = States { layers, positions: vec![0; slots], mini_batch: config.mini_batch_size };
        for slot in 0..slots {
            states.reset(model, slot);
        }
        Ok(states)
    }

    /// Puts a slot back to the beginning of a sequence.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn reset(&mut self, model: &Lm, slot: usize) {
        self.positions[slot] = 0;
        for (block, layer) in model.blocks().iter().zip(&mut self.layers) {
            for tensor in layer.tensors_mut() {
                with_dtype!(tensor.dtype(), E => slot_mut::<E>(tensor, slot).fill(0.0 as E));
            }
            block.ttt().start(model.weights(), &mut layer.fast, slot);
        }
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.positions.len()
    }

    /// Tokens that a slot has read.
    pub fn position(&self, slot: usize) -> u64 {
        self.positions[slot]
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
        self.positions[to] = self.positions[from];
        for layer in &mut self.layers {
            for tensor in layer.tensors_mut() {
                with_dtype!(tensor.dtype(), E => {
                    let per_slot = tensor.len() / tensor.shape()[0];
                    tensor.as_mut_slice::<E>().copy_within(from * per_slot..(from + 1) * per_slot, to * per_slot);
                });
            }
        }
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
            let phase = (self.positions[s.slot] % self.mini_batch as u64) as usize;
            Segment { first_row: s.first_row, len: s.len, slot: s.slot, phase }
        };
        batch.seqs.iter().map(segment).collect()
    }

    /// Counts the tokens of a batch that has been read.
    pub(crate) fn advance(&mut self, batch: &Batch) {
        for s in &batch.seqs {
            self.positions[s.slot] += s.len as u64;
        }
    }
}

fn slot_mut<E: crate::tensor::Element>(tensor: &mut Tensor, slot: usize) -> &mut [E] {
    let per_slot = tensor.len() / tensor.shape()[0];
    &mut tensor.as_mut_slice()[slot * per_slot..][..per_slot]
}
