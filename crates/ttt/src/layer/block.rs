//! One block: convolution (optional), TTT layer and feed-forward, each on a normed copy and added to the residual stream.

use crate::Result;
use crate::config::Config;
use crate::layer::carry::{self, Carried, Route};
use crate::layer::ffn::FeedForward;
use crate::layer::pre_conv::PreConv;
use crate::layer::ttt::{InnerStatistics, TttLayer, TttSaved};
use crate::layer::{Keep, LayerState, Pass};
use crate::ops::inner::FastWeights;
use crate::ops::{add, rms_norm};
use crate::params::{BlockIds, ParamId, Params};
use crate::tensor::Tensor;

/// A block's parameters and sizes.
#[derive(Clone, Debug)]
pub struct Block {
    pre_conv: Option<PreConv>,
    seq_norm: ParamId,
    eps: f64,
    /// Taps of its convolutions.
    taps: usize,
    ttt: TttLayer,
    ffn: FeedForward,
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
    /// Input of the TTT sub-block.
    ttt_input: Tensor,
    /// What the TTT layer keeps.
    ttt: TttSaved,
    /// Input of the feed-forward sub-block.
    ffn_input: Tensor,
    /// Pre-activations of the feed-forward sub-block.
    gate_up: Tensor,
}

impl BlockSaved {
    /// Bytes held for the backward pass.
    pub fn bytes(&self) -> usize {
        match self {
            BlockSaved::Whole(a) => {
                let tensors = [a.input.as_ref(), a.window.as_ref(), Some(&a.ttt_input), Some(&a.ffn_input), Some(&a.gate_up)];
                tensors.into_iter().flatten().map(Tensor::bytes).sum::<usize>() + a.ttt.bytes()
            }
            BlockSaved::Input(x, start) => x.bytes() + start.as_ref().map_or(0, |start| start.bytes()),
        }
    }

    /// Bytes of kept fast weights among [`BlockSaved::bytes`].
    pub fn fast_weight_bytes(&self) -> usize {
        match self {
            BlockSaved::Whole(a) => a.ttt.fast_weight_bytes(),
            BlockSaved::Input(_, start) => start.as_ref().map_or(0, |start| start.fast.bytes()),
        }
    }

    fn ttt(&self) -> &TttSaved {
        match self {
            BlockSaved::Whole(saved) => &saved.ttt,
            BlockSaved::Input(..) => panic!("statistics need the activations of the block"),
        }
    }
}

impl Block {
    /// The block of a model whose parameters are `ids`.
    pub fn new(config: &Config, ids: &BlockIds) -> Block {
        Block {
            pre_conv: ids.pre_conv.map(|ids| PreConv::new(config, ids)),
            seq_norm: ids.seq_norm,
            eps: config.rms_norm_eps,
            taps: config.conv_kernel,
            ttt: TttLayer::new(config, &ids.ttt),
            ffn: FeedForward::new(config, ids),
        }
    }

    /// The TTT layer.
    pub fn ttt(&self) -> &TttLayer {
        &self.ttt
    }

    /// `x [n, D]` to `[n, D]`. Without a state every sequence starts from the learned initial weights and its state is dropped.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward(&self, pass: &Pass<'_>, x: Tensor, state: Option<&mut LayerState>) -> Result<(Tensor, Option<BlockSaved>)> {
        if let Keep::Input { .. } = pass.keep {
            let continues = pass.routes.is_some_and(|routes| routes.iter().any(|route| route.from.is_some()));
            let start = state.as_deref().filter(|_| continues).map(Carried::of).transpose()?;
            let (y, _) = self.forward(&Pass { keep: Keep::Nothing, ..*pass }, x.clone(), state)?;
            return Ok((y, Some(BlockSaved::Input(x, start.map(Box::new)))));
        }
        let (Some(routes), Some(slots)) = (pass.routes, state.as_deref()) else { return self.run(pass, x, state) };
        let mut own = self.take(pass, routes, carry::parts(slots))?;
        let out = self.run(pass, x, Some(&mut own))?;
        carry::leave(&own, routes, state.expect("a state"));
        Ok(out)
    }

    /// A state of its own for every sequence: a copy of the slot that it continues, or the beginning.
    fn take(&self, pass: &Pass<'_>, routes: &[Route], slots: carry::Parts<'_>) -> Result<LayerState> {
        let n = routes.len();
        let [_, _, pre_conv, qk_conv] = slots.map(|t| t.filter(|t| t.shape().len() == 3).map(|t| carry::zeros(t, n)).transpose());
        let mut own = LayerState { fast: self.ttt.fast_weights(pass.weights, n)?, pre_conv: pre_conv?, qk_conv: qk_conv? };
        for (i, route) in routes.iter().enumerate() {
            match route.from {
                Some(slot) => carry::copy_parts(slots, slot, &mut own, i),
                None => self.ttt.start(pass.weights, &mut own.fast, i),
            }
        }
        Ok(own)
    }

    /// [`Block::forward`] with every sequence in the slot that its segment names.
    fn run(&self, pass: &Pass<'_>, x: Tensor, mut state: Option<&mut LayerState>) -> Result<(Tensor, Option<BlockSaved>)> {
        if let Some(state) = state.as_deref_mut().filter(|_| self.decodes(pass, &x)) {
            return Ok((self.decode(pass, x, state)?, None));
        }
        let (fast, pre_window, qk_window) = parts(state);
        let kept = matches!(pass.keep, Keep::Saved { .. });
        let window = pre_window.as_deref().filter(|_| kept).map(Tensor::copy).transpose()?;
        let (input, ttt_input) = match &self.pre_conv {
            Some(conv) => {
                let y = conv.forward(pass, &x, pre_window)?;
                (Some(x), y)
            }
            None => (None, x),
        };
        let normed = rms_norm::forward(ttt_input.view(), pass.weights.view(self.seq_norm), self.eps)?;
        let (mut ffn_input, ttt) = self.ttt.forward(pass, normed.view(), fast, qk_window)?;
        drop(normed);
        add::add_to(ffn_input.view_mut(), ttt_input.view());
        let (y, gate_up) = self.ffn.forward(pass, &ffn_input)?;
        let saved = ttt.map(|ttt| BlockSaved::Whole(Box::new(Activations { input, window, ttt_input, ttt, ffn_input, gate_up })));
        Ok((y, saved))
    }

    /// Whether a pass is a step of one token for each sequence on a GPU that has kernels for it.
    fn decodes(&self, pass: &Pass<'_>, x: &Tensor) -> bool {
        let one_each = pass.keep == Keep::Nothing && !pass.segments.is_empty() && pass.segments.iter().all(|s| s.len == 1);
        one_each && self.ttt.decodes(x, self.taps)
    }

    /// [`Block::run`] of such a pass, in few launches. Works in `x`.
    fn decode(&self, pass: &Pass<'_>, mut x: Tensor, state: &mut LayerState) -> Result<Tensor> {
        let LayerState { fast, pre_conv, qk_conv } = state;
        let before = self.pre_conv.as_ref().zip(pre_conv.as_mut());
        self.ttt.decode(pass, &mut x, before, (self.seq_norm, self.eps), fast, qk_conv.as_mut())?;
        self.ffn.decode(pass, &mut x)?;
        Ok(x)
    }

    /// [`Block::forward`] of which only some rows are wanted, as of the last block when a prompt is read. Keeps nothing.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward_rows(&self, pass: &Pass<'_>, x: Tensor, rows: &[usize], state: &mut LayerState) -> Result<Tensor> {
        let Some(routes) = pass.routes else { return self.run_rows(pass, x, rows, state) };
        let mut own = self.take(pass, routes, carry::parts(state))?;
        let out = self.run_rows(pass, x, rows, &mut own)?;
        carry::leave(&own, routes, state);
        Ok(out)
    }

    fn run_rows(&self, pass: &Pass<'_>, x: Tensor, rows: &[usize], state: &mut LayerState) -> Result<Tensor> {
        let (fast, pre_window, qk_window) = parts(Some(state));
        let ttt_input = match &self.pre_conv {
            Some(conv) => conv.forward(pass, &x, pre_window)?,
            None => x,
        };
        let normed = rms_norm::forward(ttt_input.view(), pass.weights.view(self.seq_norm), self.eps)?;
        let mut ffn_input = self.ttt.forward_rows(pass, normed.view(), rows, fast, qk_window)?;
        add::add_to(ffn_input.view_mut(), add::gather(ttt_input.view(), rows)?.view());
        Ok(self.ffn.forward(pass, &ffn_input)?.0)
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
                let mut own = start.map(|start| self.take(pass, routes, start.parts())).transpose()?;
                match self.run(&Pass { keep: Keep::Saved { group }, ..*pass }, x, own.as_mut())? {
                    (_, Some(BlockSaved::Whole(saved))) => saved,
                    _ => unreachable!("a pass that keeps activations returns them"),
                }
            }
            (BlockSaved::Input(..), keep) => panic!("a block kept its input only, but the pass keeps {keep:?}"),
        };
        let mut own = dstate.as_deref().map(|dstate| dstate.take(routes)).transpose()?;
        let Activations { input, window, ttt_input, ttt, ffn_input, gate_up } = *saved;
        let dffn_input = self.ffn.backward(pass, &ffn_input, gate_up, dy, grads)?;
        drop(ffn_input);
        let seq_norm = pass.weights.view(self.seq_norm);
        let normed = rms_norm::forward(ttt_input.view(), seq_norm, self.eps)?;
        let dnormed = self.ttt.backward(pass, normed.view(), ttt, dffn_input.view(), own.as_mut(), grads)?;
        drop(normed);
        let mut dttt_input =
            rms_norm::backward(dnormed.view(), ttt_input.view(), seq_norm, self.eps, grads.view_mut(self.seq_norm))?;
        drop((dnormed, ttt_input));
        add::add_to(dttt_input.view_mut(), dffn_input.view());
        let dx = match (&self.pre_conv, input) {
            (Some(conv), Some(input)) => {
                let dwindow = own.as_mut().and_then(|own| own.pre_conv.as_mut());
                conv.backward(pass, &input, dttt_input, window.as_ref(), dwindow, grads)?
            }
            _ => dttt_input,
        };
        if let (Some(dstate), Some(own)) = (dstate, own) {
            dstate.put(routes, &own);
        }
        Ok(dx)
    }

    /// Inner-loop statistics of a block whose pass kept everything (`group` 1) and ended with `end`.
    pub fn statistics(&self, pass: &Pass<'_>, saved: &BlockSaved, end: &LayerState) -> Result<InnerStatistics> {
        self.ttt.statistics(pass, saved.ttt(), &end.fast)
    }

    /// Errors of the inner loop alone (see [`TttLayer::inner_errors`]) of such a pass.
    pub fn inner_errors(&self, pass: &Pass<'_>, saved: &BlockSaved, end: &LayerState) -> Result<Vec<[f64; 3]>> {
        self.ttt.inner_errors(pass, saved.ttt(), &end.fast)
    }
}

/// A layer's state: fast weights, window of the convolution before the TTT layer, window of those for q and k.
type Parts<'s> = (Option<&'s mut FastWeights>, Option<&'s mut Tensor>, Option<&'s mut Tensor>);

fn parts(state: Option<&mut LayerState>) -> Parts<'_> {
    match state {
        Some(s) => (Some(&mut s.fast), s.pre_conv.as_mut(), s.qk_conv.as_mut()),
        None => (None, None, None),
    }
}
