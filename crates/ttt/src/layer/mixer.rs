//! What mixes the tokens of a sequence in a block: one of a closed set of layers, and what mirrors it.

use crate::Result;
use crate::config::Config;
use crate::device::view::View;
use crate::layer::attention::{AttentionLayer, AttentionSaved};
use crate::layer::mamba::{MambaLayer, MambaSaved};
use crate::layer::ttt::{TttLayer, TttSaved};
use crate::layer::{Carried, LayerState, Pass};
use crate::params::{MixerIds, Params};
use crate::tensor::Tensor;
use crate::weights::Weights;

/// A layer that mixes tokens.
#[derive(Clone, Debug)]
pub enum MixerLayer {
    /// A TTT layer.
    Ttt(TttLayer),
    /// An attention layer.
    Attention(AttentionLayer),
    /// A Mamba layer.
    Mamba(MambaLayer),
}

/// What a mixer's backward pass needs.
#[derive(Debug)]
pub enum MixerSaved {
    /// Of a TTT layer.
    Ttt(Box<TttSaved>),
    /// Of an attention layer.
    Attention(Box<AttentionSaved>),
    /// Of a Mamba layer.
    Mamba(Box<MambaSaved>),
}

impl MixerSaved {
    /// Bytes held for the backward pass.
    pub fn bytes(&self) -> usize {
        match self {
            MixerSaved::Ttt(saved) => saved.bytes(),
            MixerSaved::Attention(saved) => saved.bytes(),
            MixerSaved::Mamba(saved) => saved.bytes(),
        }
    }

    /// Bytes of kept fast weights among [`MixerSaved::bytes`].
    pub fn fast_weight_bytes(&self) -> usize {
        match self {
            MixerSaved::Ttt(saved) => saved.fast_weight_bytes(),
            MixerSaved::Attention(_) => 0,
            MixerSaved::Mamba(_) => 0,
        }
    }
}

impl MixerLayer {
    /// The layer of a model whose parameters are `ids`.
    pub fn new(config: &Config, ids: &MixerIds) -> MixerLayer {
        match ids {
            MixerIds::Ttt(ids) => MixerLayer::Ttt(TttLayer::new(config, ids)),
            MixerIds::Attention(ids) => MixerLayer::Attention(AttentionLayer::new(config, ids)),
            MixerIds::Mamba(ids) => MixerLayer::Mamba(MambaLayer::new(config, ids)),
        }
    }

    /// The TTT layer, if it is one.
    pub fn ttt(&self) -> Option<&TttLayer> {
        match self {
            MixerLayer::Ttt(layer) => Some(layer),
            MixerLayer::Attention(_) => None,
            MixerLayer::Mamba(_) => None,
        }
    }

    /// The state of `slots` sequences, none of them started.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn state(&self, weights: &Weights, slots: usize) -> Result<LayerState> {
        match self {
            MixerLayer::Ttt(layer) => Ok(LayerState::Ttt(layer.state(weights, slots)?)),
            MixerLayer::Attention(layer) => Ok(LayerState::Attention(layer.cache(weights, slots)?)),
            MixerLayer::Mamba(layer) => Ok(LayerState::Mamba(layer.state(weights, slots)?)),
        }
    }

    /// Puts a slot that was cleared to the beginning of a sequence.
    ///
    /// # Panics
    /// When the state is another layer's.
    pub fn start(&self, weights: &Weights, state: &mut LayerState, slot: usize) {
        match (self, state) {
            (MixerLayer::Ttt(layer), LayerState::Ttt(state)) => layer.start(weights, &mut state.fast, slot),
            (MixerLayer::Attention(_), LayerState::Attention(_)) => {}
            // A sequence begins with zeros.
            (MixerLayer::Mamba(_), LayerState::Mamba(_)) => {}
            (layer, state) => panic!("a state {state:?} of another layer than {layer:?}"),
        }
    }

    /// `x [n, D]` (normed) to `[n, D]`. Without a state every sequence starts at its beginning and its state is dropped.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When the state is another layer's.
    pub fn forward(&self, pass: &Pass<'_>, x: View<'_>, state: Option<&mut LayerState>) -> Result<(Tensor, Option<MixerSaved>)> {
        match self {
            MixerLayer::Ttt(layer) => {
                let (y, saved) = layer.forward(pass, x, state.map(LayerState::ttt_mut))?;
                Ok((y, saved.map(|saved| MixerSaved::Ttt(Box::new(saved)))))
            }
            MixerLayer::Attention(layer) => {
                let (y, saved) = layer.forward(pass, x, state.map(LayerState::attention_mut))?;
                Ok((y, saved.map(|saved| MixerSaved::Attention(Box::new(saved)))))
            }
            MixerLayer::Mamba(layer) => {
                let (y, saved) = layer.forward(pass, x, state.map(LayerState::mamba_mut))?;
                Ok((y, saved.map(|saved| MixerSaved::Mamba(Box::new(saved)))))
            }
        }
    }

    /// [`MixerLayer::forward`] of which only some rows are wanted: the state moves on by all tokens, but what can be left out of
    /// the others' outputs is. Keeps nothing.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When the state is another layer's.
    pub fn forward_rows(&self, pass: &Pass<'_>, x: View<'_>, rows: &[usize], state: &mut LayerState) -> Result<Tensor> {
        match self {
            MixerLayer::Ttt(layer) => layer.forward_rows(pass, x, rows, Some(state.ttt_mut())),
            MixerLayer::Attention(layer) => layer.forward_rows(pass, x, rows, state.attention_mut()),
            MixerLayer::Mamba(layer) => layer.forward_rows(pass, x, rows, state.mamba_mut()),
        }
    }

    /// Gradient of `x` from the gradient of the output; adds the parameters' gradients to `grads`. `dstate`, of one slot a
    /// sequence, holds the gradient of what the sequences ended with and becomes that of what they began with; without it nothing
    /// follows them.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When `saved` is another layer's.
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        x: View<'_>,
        saved: MixerSaved,
        dout: View<'_>,
        dstate: Option<&mut Carried>,
        grads: &mut Params,
    ) -> Result<Tensor> {
        match (self, saved) {
            (MixerLayer::Ttt(layer), MixerSaved::Ttt(saved)) => layer.backward(pass, x, *saved, dout, dstate, grads),
            (MixerLayer::Attention(layer), MixerSaved::Attention(saved)) => layer.backward(pass, x, *saved, dout, dstate, grads),
            (MixerLayer::Mamba(layer), MixerSaved::Mamba(saved)) => layer.backward(pass, x, *saved, dout, dstate, grads),
            (layer, _) => panic!("what another layer than {layer:?} has kept"),
        }
    }
}
