//! The gradient of a loss with respect to states, handed from one segment's backward pass to that of the segment before.

use crate::Result;
use crate::layer::Carried;
use crate::state::States;

/// Gradients of what every layer and slot carries across a cut, such as fast weights and convolution windows (see [`crate::lm::Lm::backward`]).
///
/// Rows of an open mini-batch have none: segments that a backward pass follows are cut at ends of mini-batches, and the update of
/// a shorter tail reaches nothing in training.
#[derive(Debug)]
pub struct DStates {
    pub(crate) layers: Vec<Carried>,
}

impl DStates {
    /// Zero: of states that nothing follows.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn zeros(states: &States) -> Result<DStates> {
        let zeros = |layer| Carried::zeros_like(layer, states.slots());
        Ok(DStates { layers: states.layers.iter().map(zeros).collect::<Result<_>>()? })
    }

    /// Sets all of them to zero.
    pub fn clear(&mut self) {
        self.layers.iter_mut().flat_map(Carried::tensors_mut).for_each(|(_, tensor)| tensor.fill_zero());
    }

    /// Those of one layer.
    pub fn layer(&self, layer: usize) -> &Carried {
        &self.layers[layer]
    }

    /// Those of one layer, to write.
    pub fn layer_mut(&mut self, layer: usize) -> &mut Carried {
        &mut self.layers[layer]
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Carried::bytes).sum()
    }
}
