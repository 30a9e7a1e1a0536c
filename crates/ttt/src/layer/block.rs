//! One block: convolution (optional), mixer and feed-forward (optional), each on a normed copy and added to the residual stream.

use crate::Result;
use crate::config::Config;
use crate::layer::carry::{self, Carried, Route};
use crate::layer::ffn::FeedForward;
use crate::layer::mixer::{MixerLayer, MixerSaved};
use crate::layer::pre_conv::PreConv;
use crate::layer::state::{Extent, FAST_WEIGHTS, PRE_CONV};
use crate::layer::{Keep, LayerState, Pass};
use crate::ops::{add, rms_norm};
use crate::params::{BlockIds, ParamId, Params};
use crate::tensor::Tensor;
use crate::weights::Weights;

/// A block's parameters and sizes.
#[derive(Clone, Debug)]
pub struct Block {
    pre_conv: Option<PreConv>,
    norm: ParamId,
    eps: f64,
    /// Taps of its convolutions.
    taps: usize,
    mixer: MixerLayer,
    ffn: Option<FeedForward>,
}

/// What a block's backward pass needs.
#[derive(Debug)]
pub enum BlockSaved {
    /// The activations.
    Whole(Box<Activations>),
    /// Only the input, and what sequences that continue a state began with; the block is computed again.
    Input(Tensor, Option<Box<Carried>>),
}

/// Activations of a block. The normed copies are not among them: they cost one pass over memory to compute again.
#[derive(Debug)]
pub struct Activations {
    /// Input of the convolution, when the block has one.
    input: Option<Tensor>,
    /// That convolution's window at the beginning, when the sequences had one.
    window: Option<Tensor>,
    /// Input of the mixer's sub-block.
    mixer_input: Tensor,
    /// What the mixer keeps.
    mixer: MixerSaved,
    /// Input and pre-activations of the feed-forward sub-block, when the block has one.
    ffn: Option<(Tensor, Tensor)>,
}

impl BlockSaved {
    /// Bytes held for the backward pass.
    pub fn bytes(&self) -> usize {
        match self {
            BlockSaved::Whole(a) => {
                let own = [a.input.as_ref(), a.window.as_ref(), Some(&a.mixer_input)].into_iter().flatten();
                let ffn = a.ffn.iter().flat_map(|(input, gate_up)| [input, gate_up]);
                own.chain(ffn).map(Tensor::bytes).sum::<usize>() + a.mixer.bytes()
            }
            BlockSaved::Input(x, start) => x.bytes() + start.as_ref().map_or(0, |start| start.bytes()),
        }
    }

    /// Bytes of kept fast weights among [`BlockSaved::bytes`].
    pub fn fast_weight_bytes(&self) -> usize {
        match self {
            BlockSaved::Whole(a) => a.mixer.fast_weight_bytes(),
            BlockSaved::Input(_, start) => start.as_ref().and_then(|start| start.tensor(FAST_WEIGHTS)).map_or(0, Tensor::bytes),
        }
    }

    /// What the mixer keeps.
    ///
    /// # Panics
    /// When the block kept its input alone.
    pub fn mixer(&self) -> &MixerSaved {
        match self {
            BlockSaved::Whole(saved) => &saved.mixer,
            BlockSaved::Input(..) => panic!("statistics need the activations of the block"),
        }
    }
}

impl Block {
    /// The block of a model whose parameters are `ids`.
    pub fn new(config: &Config, ids: &BlockIds) -> Block {
        Block {
            pre_conv: ids.pre_conv.map(|ids| PreConv::new(config, ids)),
            norm: ids.norm,
            eps: config.rms_norm_eps,
            taps: config.conv_kernel,
            mixer: MixerLayer::new(config, &ids.mixer),
            ffn: ids.feed_forward.as_ref().map(|ids| FeedForward::new(config, ids)),
        }
    }

    /// What mixes tokens.
    pub fn mixer(&self) -> &MixerLayer {
        &self.mixer
    }

    /// The state of `slots` sequences, each at its beginning.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn state(&self, weights: &Weights, slots: usize) -> Result<LayerState> {
        let mut state = self.mixer.state(weights, slots)?;
        (0..slots).for_each(|slot| self.mixer.start(weights, &mut state, slot));
        Ok(state)
    }

    /// Puts a slot back to the beginning of a sequence.
    pub fn reset(&self, weights: &Weights, state: &mut LayerState, slot: usize) {
        state.clear(slot);
        self.mixer.start(weights, state, slot);
    }

    /// `x [n, D]` to `[n, D]`. Without a state every sequence starts from the learned initial weights and its state is dropped.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward(&self, pass: &Pass<'_>, x: Tensor, mut state: Option<&mut LayerState>) -> Result<(Tensor, Option<BlockSaved>)> {
        if let Some(state) = state.as_deref_mut() {
            state.reserve(longest(pass))?;
        }
        if let Keep::Input { .. } = pass.keep {
            let continues = pass.routes.is_some_and(|routes| routes.iter().any(|route| route.from.is_some()));
            let start = state.as_deref().filter(|_| continues).map(Carried::of).transpose()?;
            let (y, _) = self.forward(&Pass { keep: Keep::Nothing, ..*pass }, x.clone(), state)?;
            return Ok((y, Some(BlockSaved::Input(x, start.map(Box::new)))));
        }
        let (Some(routes), Some(slots)) = (pass.routes, state.as_deref()) else { return self.run(pass, x, state) };
        let mut own = self.take(pass, routes, slots.tensors())?;
        let out = self.run(pass, x, Some(&mut own))?;
        carry::leave(&own, routes, state.expect("a state"));
        Ok(out)
    }

    /// A state of its own for every sequence: a copy of the slot that it continues, or the beginning.
    fn take<'t>(
        &self,
        pass: &Pass<'_>,
        routes: &[Route],
        slots: impl Iterator<Item = (&'static str, &'t Tensor)> + Clone,
    ) -> Result<LayerState> {
        let mut own = self.mixer.state(pass.weights, routes.len())?;
        // As large as the slots, so that copies of slots fit.
        own.reserve(
            slots.clone().filter(|(name, _)| Extent::of(name) == Extent::Tokens).map(|(_, t)| t.shape()[1]).max().unwrap_or(0),
        )?;
        for (i, route) in routes.iter().enumerate() {
            match route.from {
                Some(slot) => own.take(slots.clone(), slot, i),
                None => self.mixer.start(pass.weights, &mut own, i),
            }
        }
        Ok(own)
    }

    /// [`Block::forward`] with every sequence in the slot that its segment names.
    fn run(&self, pass: &Pass<'_>, x: Tensor, mut state: Option<&mut LayerState>) -> Result<(Tensor, Option<BlockSaved>)> {
        if let Some(state) = state.as_deref_mut().filter(|_| self.decodes(pass, &x)) {
            return Ok((self.decode(pass, x, state)?, None));
        }
        let pre_window = state.as_deref_mut().and_then(LayerState::pre_conv_mut);
        let kept = pass.keep.activations();
        let window = pre_window.as_deref().filter(|_| kept).map(Tensor::copy).transpose()?;
        let (input, mixer_input) = match &self.pre_conv {
            Some(conv) => {
                let y = conv.forward(pass, &x, pre_window)?;
                (Some(x), y)
            }
            None => (None, x),
        };
        let normed = rms_norm::forward(mixer_input.view(), pass.weights.view(self.norm), self.eps)?;
        let (mut y, mixer) = self.mixer.forward(pass, normed.view(), state)?;
        drop(normed);
        add::add_to(y.view_mut(), mixer_input.view());
        let (y, ffn) = match &self.ffn {
            Some(ffn) => {
                let (out, gate_up) = ffn.forward(pass, &y)?;
                (out, Some((y, gate_up)))
            }
            None => (y, None),
        };
        let saved = mixer.map(|mixer| BlockSaved::Whole(Box::new(Activations { input, window, mixer_input, mixer, ffn })));
        Ok((y, saved))
    }

    /// Whether a pass is a step of one token for each sequence on a GPU that has kernels for it.
    fn decodes(&self, pass: &Pass<'_>, x: &Tensor) -> bool {
        let one_each = pass.keep == Keep::Nothing && !pass.segments.is_empty() && pass.segments.iter().all(|s| s.len == 1);
        one_each && matches!(&self.mixer, MixerLayer::Ttt(ttt) if ttt.decodes(x, self.taps))
    }

    /// [`Block::run`] of such a pass, in few launches. Works in `x`.
    fn decode(&self, pass: &Pass<'_>, mut x: Tensor, state: &mut LayerState) -> Result<Tensor> {
        let (MixerLayer::Ttt(ttt), LayerState::Ttt(state)) = (&self.mixer, state) else {
            panic!("a TTT layer and its state decode in few launches, not {:?}", self.mixer)
        };
        let before = self.pre_conv.as_ref().zip(state.pre_conv.as_mut());
        ttt.decode(pass, &mut x, before, (self.norm, self.eps), &mut state.fast, state.qk_conv.as_mut())?;
        if let Some(ffn) = &self.ffn {
            ffn.decode(pass, &mut x)?;
        }
        Ok(x)
    }

    /// [`Block::forward`] of which only some rows are wanted, as of the last block when a prompt is read. Keeps nothing.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward_rows(&self, pass: &Pass<'_>, x: Tensor, rows: &[usize], state: &mut LayerState) -> Result<Tensor> {
        state.reserve(longest(pass))?;
        let Some(routes) = pass.routes else { return self.run_rows(pass, x, rows, state) };
        let mut own = self.take(pass, routes, state.tensors())?;
        let out = self.run_rows(pass, x, rows, &mut own)?;
        carry::leave(&own, routes, state);
        Ok(out)
    }

    fn run_rows(&self, pass: &Pass<'_>, x: Tensor, rows: &[usize], state: &mut LayerState) -> Result<Tensor> {
        let mixer_input = match &self.pre_conv {
            Some(conv) => conv.forward(pass, &x, state.pre_conv_mut())?,
            None => x,
        };
        let normed = rms_norm::forward(mixer_input.view(), pass.weights.view(self.norm), self.eps)?;
        let mut y = self.mixer.forward_rows(pass, normed.view(), rows, state)?;
        add::add_to(y.view_mut(), add::gather(mixer_input.view(), rows)?.view());
        match &self.ffn {
            Some(ffn) => Ok(ffn.forward(pass, &y)?.0),
            None => Ok(y),
        }
    }

    /// Gradient of `x` from the gradient of the output; adds the parameters' gradients to `grads`. `dstate` holds the gradient of
    /// the slots after the pass and becomes that of the slots before it; without it the loss of what follows is not looked at.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When there is a `dstate`, but the pass had no states.
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        saved: BlockSaved,
        dy: Tensor,
        dstate: Option<&mut Carried>,
        grads: &mut Params,
    ) -> Result<Tensor> {
        let routes = pass.routes.unwrap_or_default();
        assert!(dstate.is_none() || pass.routes.is_some(), "a gradient of the states of a pass without states");
        let saved = match (saved, pass.keep) {
            (BlockSaved::Whole(saved), _) => saved,
            (BlockSaved::Input(x, start), Keep::Input { group }) => {
                let mut own = start.map(|start| self.take(pass, routes, start.tensors())).transpose()?;
                match self.run(&Pass { keep: Keep::Saved { group }, ..*pass }, x, own.as_mut())? {
                    (_, Some(BlockSaved::Whole(saved))) => saved,
                    _ => unreachable!("a pass that keeps activations returns them"),
                }
            }
            (BlockSaved::Input(..), keep) => panic!("a block kept its input only, but the pass keeps {keep:?}"),
        };
        let mut own = dstate.as_deref().map(|dstate| dstate.take(routes)).transpose()?;
        let Activations { input, window, mixer_input, mixer, ffn } = *saved;
        let dffn_input = match (&self.ffn, ffn) {
            (Some(ffn), Some((input, gate_up))) => ffn.backward(pass, &input, gate_up, dy, grads)?,
            _ => dy,
        };
        let norm = pass.weights.view(self.norm);
        let normed = rms_norm::forward(mixer_input.view(), norm, self.eps)?;
        let dnormed = self.mixer.backward(pass, normed.view(), mixer, dffn_input.view(), own.as_mut(), grads)?;
        drop(normed);
        let (dnorm, residual) = (grads.view_mut(self.norm), Some(dffn_input.view()));
        let dmixer_input = rms_norm::backward_onto(dnormed.view(), mixer_input.view(), norm, self.eps, dnorm, residual)?;
        drop((dnormed, mixer_input));
        let dx = match (&self.pre_conv, input) {
            (Some(conv), Some(input)) => {
                let [dwindow] = own.as_mut().map_or([None], |own| own.some_mut([PRE_CONV]));
                conv.backward(pass, &input, dmixer_input, window.as_ref(), dwindow, grads)?
            }
            _ => dmixer_input,
        };
        if let (Some(dstate), Some(own)) = (dstate, own) {
            dstate.put(routes, &own);
        }
        Ok(dx)
    }
}

/// Tokens that the longest sequence of a pass will have read after it, where its state grows with them.
fn longest(pass: &Pass<'_>) -> usize {
    pass.segments.iter().map(|s| s.phase + s.len).max().unwrap_or(0)
}
