//! What one layer carries from token to token for every slot, and how it is walked by name: states, state files, copies for
//! training and gradients across cuts need to know no mixer.

use std::ops::Range;

use crate::Result;
use crate::device::Device;
use crate::layer::{MambaState, carry};
use crate::ops::attention::Cache;
use crate::ops::inner::FastWeights;
use crate::tensor::Tensor;

/// Name of the fast weights in a layer's state.
pub const FAST_WEIGHTS: &str = "fast_weights";
/// Name of the rows of the open mini-batch.
pub const OPEN_ROWS: &str = "open_rows";
/// Name of the window of the convolution before the TTT layer.
pub const PRE_CONV: &str = "pre_conv";
/// Name of the window of the convolutions for q and k.
pub const QK_CONV: &str = "qk_conv";
/// Name of the keys of all tokens, rotated, `[slots, capacity, kv heads · d]`.
pub const KEYS: &str = "keys";
/// Name of the values of all tokens, `[slots, capacity, kv heads · d]`.
pub const VALUES: &str = "values";
/// Name of the window of a Mamba layer's convolution, `[slots, taps - 1, inner]`.
pub const CONV_WINDOW: &str = "conv_window";
/// Name of the state of a Mamba layer's recurrence, `[slots, state, inner]`.
pub const RECURRENT: &str = "recurrent";

/// How much of a slot's part of a state tensor there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it, always.
    Whole,
    /// Of `[slots, heads, K - 1, R]` the rows of the open mini-batch, which are as many as the phase. They cross no cut of
    /// training: such cuts lie at ends of mini-batches.
    OpenRows,
    /// Of `[slots, capacity, width]` a row for each token that was read.
    Tokens,
}

impl Extent {
    /// That of the state tensor with a name.
    pub fn of(name: &str) -> Extent {
        match name {
            OPEN_ROWS => Extent::OpenRows,
            KEYS | VALUES => Extent::Tokens,
            _ => Extent::Whole,
        }
    }

    /// Shape of the part that there is of a slot `shape` (without its first axis) after `tokens` tokens, of which `phase` are in
    /// the open mini-batch.
    pub fn shape(self, shape: &[usize], tokens: usize, phase: usize) -> Vec<usize> {
        let mut shape = shape.to_vec();
        match self {
            Extent::Whole => {}
            Extent::OpenRows => shape[1] = phase,
            Extent::Tokens => shape[0] = tokens,
        }
        shape
    }

    /// The elements that there are of a slot, as ranges of equal length in its part of the tensor.
    pub fn ranges(self, shape: &[usize], tokens: usize, phase: usize) -> Vec<Range<usize>> {
        let all: usize = shape.iter().product();
        match self {
            Extent::Whole => std::iter::once(0..all).collect(),
            Extent::OpenRows if phase == 0 => Vec::new(),
            Extent::OpenRows => {
                let per_head = shape[1] * shape[2];
                (0..shape[0]).map(|head| head * per_head..head * per_head + phase * shape[2]).collect()
            }
            Extent::Tokens => std::iter::once(0..tokens * shape[1]).collect(),
        }
    }
}

/// What one layer carries from token to token for every slot.
#[derive(Clone, Debug)]
pub enum LayerState {
    /// Of a TTT layer.
    Ttt(TttState),
    /// Of an attention layer: keys and values.
    Attention(Cache),
    /// Of a Mamba layer.
    Mamba(MambaState),
}

/// What a block with a TTT layer carries.
#[derive(Clone, Debug)]
pub struct TttState {
    /// Fast weights and the rows of the open mini-batch.
    pub fast: FastWeights,
    /// Last inputs of the convolution before the TTT layer, `[slots, taps - 1, D]`.
    pub pre_conv: Option<Tensor>,
    /// Last inputs of the convolutions for q and k, `[slots, taps - 1, D]`; both read the same.
    pub qk_conv: Option<Tensor>,
}

impl LayerState {
    /// That of a TTT layer.
    ///
    /// # Panics
    /// When the layer is another.
    pub fn ttt(&self) -> &TttState {
        match self {
            LayerState::Ttt(state) => state,
            other => panic!("{other:?} where a TTT layer's state was expected"),
        }
    }

    /// That of a TTT layer, to write.
    ///
    /// # Panics
    /// When the layer is another.
    pub fn ttt_mut(&mut self) -> &mut TttState {
        match self {
            LayerState::Ttt(state) => state,
            other => panic!("{other:?} where a TTT layer's state was expected"),
        }
    }

    /// Keys and values of an attention layer, to write.
    ///
    /// # Panics
    /// When the layer is another.
    pub fn attention_mut(&mut self) -> &mut Cache {
        match self {
            LayerState::Attention(cache) => cache,
            other => panic!("{other:?} where keys and values were expected"),
        }
    }

    /// That of a Mamba layer, to write.
    ///
    /// # Panics
    /// When the layer is another.
    pub fn mamba_mut(&mut self) -> &mut MambaState {
        match self {
            LayerState::Mamba(state) => state,
            other => panic!("{other:?} where a Mamba layer's state was expected"),
        }
    }

    /// Window of the convolution before the mixer, when the block has one.
    pub(super) fn pre_conv_mut(&mut self) -> Option<&mut Tensor> {
        match self {
            LayerState::Ttt(state) => state.pre_conv.as_mut(),
            LayerState::Attention(_) => None,
            LayerState::Mamba(_) => None,
        }
    }

    /// The tensors of the state, each `[slots, ...]`, with their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> + Clone {
        let all = match self {
            LayerState::Ttt(TttState { fast, pre_conv, qk_conv }) => [
                (FAST_WEIGHTS, Some(fast.weights())),
                (OPEN_ROWS, Some(fast.rows())),
                (PRE_CONV, pre_conv.as_ref()),
                (QK_CONV, qk_conv.as_ref()),
            ],
            LayerState::Attention(Cache { keys, values }) => [(KEYS, Some(keys)), (VALUES, Some(values)), ("", None), ("", None)],
            LayerState::Mamba(MambaState { window, recurrent }) => {
                [(CONV_WINDOW, Some(window)), (RECURRENT, Some(recurrent)), ("", None), ("", None)]
            }
        };
        all.into_iter().filter_map(|(name, tensor)| Some((name, tensor?)))
    }

    /// The tensors of the state, to write, in the order of [`LayerState::tensors`].
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Tensor)> {
        let all = match self {
            LayerState::Ttt(TttState { fast, pre_conv, qk_conv }) => {
                let (weights, rows) = fast.tensors_mut();
                [(FAST_WEIGHTS, Some(weights)), (OPEN_ROWS, Some(rows)), (PRE_CONV, pre_conv.as_mut()), (QK_CONV, qk_conv.as_mut())]
            }
            LayerState::Mamba(MambaState { window, recurrent }) => {
                [(CONV_WINDOW, Some(window)), (RECURRENT, Some(recurrent)), ("", None), ("", None)]
            }
            LayerState::Attention(Cache { keys, values }) => [(KEYS, Some(keys)), (VALUES, Some(values)), ("", None), ("", None)],
        };
        all.into_iter().filter_map(|(name, tensor)| Some((name, tensor?)))
    }

    /// Bytes of the state of all slots.
    pub fn bytes(&self) -> usize {
        self.tensors().map(|(_, tensor)| tensor.bytes()).sum()
    }

    /// Makes this the only handle to its tensors.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn unshare(&mut self) -> Result<()> {
        self.tensors_mut().try_for_each(|(_, tensor)| {
            *tensor = tensor.copy()?;
            Ok(())
        })
    }

    /// A copy on another device.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn to(&self, device: &Device) -> Result<LayerState> {
        let mut copy = self.clone();
        copy.tensors_mut().try_for_each(|(_, tensor)| {
            *tensor = tensor.to(device)?;
            Ok::<_, crate::Error>(())
        })?;
        Ok(copy)
    }

    /// Makes room for sequences of `tokens` tokens in every slot. What is in the slots stays.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; the state is then as it was.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        // Half as much again, so that a sequence that grows token by token is seldom moved.
        self.grow(tokens, |capacity| tokens.max(capacity + capacity / 2).next_multiple_of(64))
    }

    /// [`LayerState::reserve`] of no more than is asked for.
    pub(crate) fn reserve_exact(&mut self, tokens: usize) -> Result<()> {
        self.grow(tokens, |_| tokens)
    }

    fn grow(&mut self, tokens: usize, new_capacity: impl Fn(usize) -> usize) -> Result<()> {
        for (name, tensor) in self.tensors_mut() {
            let &[slots, capacity, width] = tensor.shape() else { continue };
            if Extent::of(name) != Extent::Tokens || tokens <= capacity {
                continue;
            }
            let more = new_capacity(capacity);
            let mut larger = Tensor::zeros(tensor.device(), &[slots, more, width], tensor.dtype())?;
            for slot in 0..slots {
                let old = slot * capacity * width;
                larger.copy_from(slot * more * width, tensor, old..old + capacity * width);
            }
            *tensor = larger;
        }
        Ok(())
    }

    /// Slot `slot`, which has read `tokens` tokens, alone on another device.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn slot_to(&self, slot: usize, tokens: usize, device: &Device) -> Result<LayerState> {
        let alone = |tensor: &Tensor| tensor.slot(slot, tensor.shape()[1])?.to(device);
        let some = |tensor: &Option<Tensor>| tensor.as_ref().map(alone).transpose();
        Ok(match self {
            LayerState::Ttt(TttState { fast, pre_conv, qk_conv }) => {
                LayerState::Ttt(TttState { fast: fast.slot_to(slot, device)?, pre_conv: some(pre_conv)?, qk_conv: some(qk_conv)? })
            }
            LayerState::Attention(Cache { keys, values }) => LayerState::Attention(Cache {
                keys: keys.slot(slot, tokens)?.to(device)?,
                values: values.slot(slot, tokens)?.to(device)?,
            }),
            LayerState::Mamba(MambaState { window, recurrent }) => {
                LayerState::Mamba(MambaState { window: alone(window)?, recurrent: alone(recurrent)? })
            }
        })
    }

    /// Fills slot `slot` with the one slot of a state that lies elsewhere and has read `tokens` tokens, for which there is room.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn set_slot(&mut self, slot: usize, from: &LayerState, tokens: usize) -> Result<()> {
        for ((name, to), (_, from)) in self.tensors_mut().zip(from.tensors()) {
            let per_slot = to.len() / to.shape()[0];
            let some = match Extent::of(name) {
                Extent::Tokens => tokens * to.shape()[2],
                Extent::Whole | Extent::OpenRows => per_slot,
            };
            let moved = from.to(to.device())?;
            let moved = if moved.dtype() == to.dtype() { moved } else { moved.cast(to.dtype())? };
            to.copy_from(slot * per_slot, &moved, 0..some);
        }
        Ok(())
    }

    /// Forgets what slot `slot` has read.
    pub(crate) fn clear(&mut self, slot: usize) {
        for (name, tensor) in self.tensors_mut() {
            // Rows of tokens that were not read are never looked at.
            if Extent::of(name) != Extent::Tokens {
                let per_slot = tensor.len() / tensor.shape()[0];
                tensor.fill_zero_range(slot * per_slot..(slot + 1) * per_slot);
            }
        }
    }

    /// Copies slot `from`, which has read `tokens` tokens, over slot `to`.
    pub(crate) fn copy_slot(&mut self, from: usize, to: usize, tokens: usize) {
        for (name, tensor) in self.tensors_mut() {
            let per_slot = tensor.len() / tensor.shape()[0];
            let some = match Extent::of(name) {
                Extent::Tokens => tokens * tensor.shape()[2],
                Extent::Whole | Extent::OpenRows => per_slot,
            };
            tensor.copy_within(from * per_slot..from * per_slot + some, to * per_slot);
        }
    }

    /// Copies slot `i` of tensors with the names of this state's to slot `j` of this state.
    pub(super) fn take<'t>(&mut self, from: impl Iterator<Item = (&'static str, &'t Tensor)>, i: usize, j: usize) {
        let mut from: Vec<_> = from.collect();
        for (name, to) in self.tensors_mut() {
            if let Some(at) = from.iter().position(|(theirs, _)| *theirs == name) {
                carry::copy_slot(from.swap_remove(at).1, i, to, j);
            }
        }
    }
}
