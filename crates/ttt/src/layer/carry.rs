//! Sequences that continue a state in a pass that is kept for a backward, or that start a slot afresh behind another sequence
//! of the same slot: each works on a copy of its own, which is taken from its slot before the layer and put back after it.
//!
//! Cuts between such passes lie at ends of mini-batches, so what crosses them is all of a state but the rows of an open mini-batch,
//! and in the backward direction its gradients.

use crate::Result;
use crate::batch::{Batch, Segment};
use crate::device::Device;
use crate::layer::LayerState;
use crate::layer::state::Extent;
use crate::state::States;
use crate::tensor::{DType, Tensor};

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
pub(crate) fn routes(batch: &Batch, states: &States, kept: bool) -> (Vec<Segment>, Vec<Route>) {
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
        let phase = states.phase_at(position);
        assert!(
            !kept || phase == 0 || !states.has_mini_batches(),
            "a pass that is kept continues slot {} after {phase} tokens of a mini-batch",
            s.slot
        );
        segments.push(Segment { first_row: s.first_row, len: s.len, slot: i, phase });
        routes.push(Route { from: (position > 0).then_some(s.slot), to: Some(s.slot) });
    }
    (segments, routes)
}

/// What crosses a cut at the end of a mini-batch in one layer: the tensors of its state, `[slots, ...]`, but those of an open
/// mini-batch; also the gradient of a loss with respect to them.
#[derive(Debug)]
pub struct Carried {
    tensors: Vec<(&'static str, Tensor)>,
}

impl Carried {
    /// The tensors of a state that cross, each replaced.
    fn map(state: &LayerState, to: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Carried> {
        let crossing = state.tensors().filter(|(name, _)| Extent::of(name) != Extent::OpenRows);
        Ok(Carried { tensors: crossing.map(|(name, tensor)| Ok((name, to(tensor)?))).collect::<Result<_>>()? })
    }

    /// Zeros for `slots` sequences of a layer.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn zeros_like(state: &LayerState, slots: usize) -> Result<Carried> {
        Carried::map(state, |tensor| zeros(tensor, slots))
    }

    /// A copy of the values that cross.
    pub(crate) fn of(state: &LayerState) -> Result<Carried> {
        Carried::map(state, Tensor::copy)
    }

    /// Bytes of its tensors.
    pub fn bytes(&self) -> usize {
        self.tensors().map(|(_, tensor)| tensor.bytes()).sum()
    }

    /// The tensors, with their names in the state.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> + Clone {
        self.tensors.iter().map(|(name, tensor)| (*name, tensor))
    }

    /// The tensor with a name, if it is carried.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors().find(|(theirs, _)| *theirs == name).map(|(_, tensor)| tensor)
    }

    /// [`Carried::tensors`], to write.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Tensor)> {
        self.tensors.iter_mut().map(|(name, tensor)| (*name, tensor))
    }

    /// Several tensors at once, to write.
    pub fn some_mut<const N: usize>(&mut self, names: [&str; N]) -> [Option<&mut Tensor>; N] {
        let mut found = [const { None }; N];
        for (name, tensor) in self.tensors_mut() {
            if let Some(at) = names.iter().position(|wanted| *wanted == name) {
                found[at] = Some(tensor);
            }
        }
        found
    }

    /// As gradients: for each route that of the slot it leaves its state in; zero for the others.
    pub(super) fn take(&self, routes: &[Route]) -> Result<Carried> {
        let zeros = |(name, tensor): (&'static str, &Tensor)| Ok((name, zeros(tensor, routes.len())?));
        let mut own = Carried { tensors: self.tensors().map(zeros).collect::<Result<_>>()? };
        for (i, route) in routes.iter().enumerate() {
            if let Some(slot) = route.to {
                own.tensors_mut().zip(self.tensors()).for_each(|((_, own), (_, slots))| copy_slot(slots, slot, own, i));
            }
        }
        Ok(own)
    }

    /// As gradients: puts those of each route's beginning into the slot it came from; slots that were started afresh get zero.
    pub(super) fn put(&mut self, routes: &[Route], own: &Carried) {
        for ((_, slots), (_, own)) in self.tensors_mut().zip(own.tensors()) {
            for slot in routes.iter().filter_map(|route| route.to) {
                let per_slot = slots.len() / slots.shape()[0];
                slots.fill_zero_range(slot * per_slot..(slot + 1) * per_slot);
            }
            for (i, route) in routes.iter().enumerate() {
                if let Some(slot) = route.from {
                    copy_slot(own, i, slots, slot);
                }
            }
        }
    }
}

/// Puts the states that sequences end with into the slots they go to.
pub(super) fn leave(own: &LayerState, routes: &[Route], slots: &mut LayerState) {
    for ((_, own), (_, slots)) in own.tensors().zip(slots.tensors_mut()) {
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
    let per_slot = from.len() / from.shape()[0];
    to.copy_from(j * per_slot, from, i * per_slot..(i + 1) * per_slot);
}
