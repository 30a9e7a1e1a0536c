//! Sequences that continue a state in a pass that is kept for a backward, or that start a slot afresh behind another sequence
//! of the same slot: each works on a copy of its own, which is taken from its slot before the layer and put back after it.
//!
//! Cuts between such passes lie at ends of mini-batches, so what crosses them is fast weights and convolution windows, and in the
//! backward direction their gradients.

use crate::Result;
use crate::batch::{Batch, Segment};
use crate::device::Device;
use crate::layer::LayerState;
use crate::state::States;
use crate::tensor::{DType, Tensor, with_dtype};

/// Where a sequence's state comes from and where it is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Slot that the sequence continues. Without, it starts from the learned initial weights, which then get its gradient.
    pub from: Option<usize>,
    /// Slot that it leaves its state in. Without, a later sequence of the batch starts the slot afresh.
    pub to: Option<usize>,
}

/// The sequences of a batch, each in a slot of its own, and their routes.
///
/// # Panics
/// When the batch names a slot that does not exist, or continues one that it has named before; when the pass is kept and
/// continues a slot inside a mini-batch.
pub(crate) fn routes(batch: &Batch, states: &States, mini_batch: usize, kept: bool) -> (Vec<Segment>, Vec<Route>) {
    assert!(batch.slots() <= states.slots(), "the batch names slot {}, but there are {}", batch.slots() - 1, states.slots());
    let mut last: Vec<Option<usize>> = vec![None; states.slots()];
    let (mut segments, mut routes) = (Vec::new(), Vec::<Route>::new());
    for (i, s) in batch.seqs.iter().enumerate() {
        let earlier = last[s.slot].replace(i);
        assert!(s.fresh || earlier.is_none(), "the batch continues slot {} twice", s.slot);
        if let Some(earlier) = earlier {
            routes[earlier].to = None;
        }
        let position = if s.fresh { 0 } else { states.position(s.slot) };
        let phase = (position % mini_batch as u64) as usize;
        assert!(!kept || phase == 0, "a pass that is kept continues slot {} after {phase} tokens of a mini-batch", s.slot);
        segments.push(Segment { first_row: s.first_row, len: s.len, slot: i, phase });
        routes.push(Route { from: (position > 0).then_some(s.slot), to: Some(s.slot) });
    }
    (segments, routes)
}

/// What crosses a cut at the end of a mini-batch in one layer, `[slots, ...]`; also the gradient of a loss with respect to it.
#[derive(Debug)]
pub struct Carried {
    /// Fast weights, `[slots, h, S]`.
    pub fast: Tensor,
    /// Window of the convolution before the TTT layer, `[slots, taps - 1, D]`.
    pub pre_conv: Option<Tensor>,
    /// Window of the convolutions for q and k, `[slots, taps - 1, D]`.
    pub qk_conv: Option<Tensor>,
}

impl Carried {
    /// Zeros for `slots` sequences of a layer.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn zeros_like(state: &LayerState, slots: usize) -> Result<Carried> {
        let zeros = |t: &Tensor| zeros(t, slots);
        let windows = [&state.pre_conv, &state.qk_conv].map(|w| w.as_ref().map(zeros).transpose());
        let [pre_conv, qk_conv] = windows;
        Ok(Carried { fast: zeros(state.fast.weights())?, pre_conv: pre_conv?, qk_conv: qk_conv? })
    }

    /// A copy of the values that cross.
    pub(crate) fn of(state: &LayerState) -> Result<Carried> {
        let [pre_conv, qk_conv] = [&state.pre_conv, &state.qk_conv].map(|w| w.as_ref().map(Tensor::copy).transpose());
        Ok(Carried { fast: state.fast.weights().copy()?, pre_conv: pre_conv?, qk_conv: qk_conv? })
    }

    /// Bytes of its tensors.
    pub fn bytes(&self) -> usize {
        self.tensors().map(Tensor::bytes).sum()
    }

    /// Fast weights, then the windows that there are.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [Some(&self.fast), self.pre_conv.as_ref(), self.qk_conv.as_ref()].into_iter().flatten()
    }

    /// [`Carried::tensors`], to write.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        [Some(&mut self.fast), self.pre_conv.as_mut(), self.qk_conv.as_mut()].into_iter().flatten()
    }

    pub(super) fn parts(&self) -> Parts<'_> {
        [Some(&self.fast), None, self.pre_conv.as_ref(), self.qk_conv.as_ref()]
    }

    /// As gradients: for each route that of the slot it leaves its state in; zero for the others.
    pub(super) fn take(&self, routes: &[Route]) -> Result<Carried> {
        let zeros = |t: &Tensor| zeros(t, routes.len());
        let [pre_conv, qk_conv] = [&self.pre_conv, &self.qk_conv].map(|w| w.as_ref().map(zeros).transpose());
        let mut own = Carried { fast: zeros(&self.fast)?, pre_conv: pre_conv?, qk_conv: qk_conv? };
        for (i, route) in routes.iter().enumerate() {
            if let Some(slot) = route.to {
                own.tensors_mut().zip(self.tensors()).for_each(|(own, slots)| copy_slot(slots, slot, own, i));
            }
        }
        Ok(own)
    }

    /// As gradients: puts those of each route's beginning into the slot it came from; slots that were started afresh get zero.
    pub(super) fn put(&mut self, routes: &[Route], own: &Carried) {
        for (slots, own) in self.tensors_mut().zip(own.tensors()) {
            for slot in routes.iter().filter_map(|route| route.to) {
                with_dtype!(slots.dtype(), E => slot_mut::<E>(slots, slot).fill(0.0 as E));
            }
            for (i, route) in routes.iter().enumerate() {
                if let Some(slot) = route.from {
                    copy_slot(own, i, slots, slot);
                }
            }
        }
    }
}

/// Fast weights, open rows, windows: what there is of them.
pub(super) type Parts<'s> = [Option<&'s Tensor>; 4];

/// Those of a layer's states.
pub(super) fn parts(state: &LayerState) -> Parts<'_> {
    [Some(state.fast.weights()), Some(state.fast.rows()), state.pre_conv.as_ref(), state.qk_conv.as_ref()]
}

/// Copies what there is of slot `i` to slot `j` of `to`.
pub(super) fn copy_parts(from: Parts<'_>, i: usize, to: &mut LayerState, j: usize) {
    let LayerState { fast, pre_conv, qk_conv } = to;
    let (weights, rows) = fast.tensors_mut();
    for (from, to) in from.into_iter().zip([Some(weights), Some(rows), pre_conv.as_mut(), qk_conv.as_mut()]) {
        if let (Some(from), Some(to)) = (from, to) {
            copy_slot(from, i, to, j);
        }
    }
}

/// Puts the states that sequences end with into the slots they go to.
pub(super) fn leave(own: &LayerState, routes: &[Route], slots: &mut LayerState) {
    for ((_, own), slots) in own.tensors().zip(slots.tensors_mut()) {
        for (i, route) in routes.iter().enumerate() {
            if let Some(slot) = route.to {
                copy_slot(own, i, slots, slot);
            }
        }
    }
}

/// Zeros of the same shape for another number of slots.
pub(super) fn zeros(like: &Tensor, slots: usize) -> Result<Tensor> {
    let (device, dtype): (&Device, DType) = (like.device(), like.dtype());
    let mut shape = like.shape().to_vec();
    shape[0] = slots;
    Tensor::zeros(device, &shape, dtype)
}

/// Copies slot `i` of one tensor to slot `j` of another.
pub(super) fn copy_slot(from: &Tensor, i: usize, to: &mut Tensor, j: usize) {
    assert_eq!(from.shape()[1..], to.shape()[1..], "slots of shape {:?} and {:?}", from.shape(), to.shape());
    with_dtype!(from.dtype(), E => {
        let per_slot = from.len() / from.shape()[0];
        slot_mut::<E>(to, j).copy_from_slice(&from.as_slice::<E>()[i * per_slot..][..per_slot]);
    });
}

fn slot_mut<E: crate::tensor::Element>(tensor: &mut Tensor, slot: usize) -> &mut [E] {
    let per_slot = tensor.len() / tensor.shape()[0];
    &mut tensor.as_mut_slice()[slot * per_slot..][..per_slot]
}
