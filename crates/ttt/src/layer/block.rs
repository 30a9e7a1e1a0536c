//! One block: convolution (optional), TTT layer and feed-forward, each on a normed copy and added to the residual stream.

use crate::Result;
use crate::config::Config;
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
    ttt: TttLayer,
    ffn: FeedForward,
}

/// What a block's backward pass needs.
#[derive(Debug)]
pub enum BlockSaved {
    /// The activations.
    Whole(Box<Activations>),
    /// Only the input; the block is computed again.
    Input(Tensor),
}

/// Activations of a block. The normed copies are not among them: they cost one pass over memory to compute again.
#[derive(Debug)]
pub struct Activations {
    /// Input of the convolution, when the block has one.
    input: Option<Tensor>,
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
                let tensors = [a.input.as_ref(), Some(&a.ttt_input), Some(&a.ffn_input), Some(&a.gate_up)];
                tensors.into_iter().flatten().map(Tensor::bytes).sum::<usize>() + a.ttt.bytes()
            }
            BlockSaved::Input(x) => x.bytes(),
        }
    }

    /// Bytes of kept fast weights among [`BlockSaved::bytes`].
    pub fn fast_weight_bytes(&self) -> usize {
        match self {
            BlockSaved::Whole(a) => a.ttt.fast_weight_bytes(),
            BlockSaved::Input(_) => 0,
        }
    }

    fn ttt(&self) -> &TttSaved {
        match self {
            BlockSaved::Whole(saved) => &saved.ttt,
            BlockSaved::Input(_) => panic!("statistics need the activations of the block"),
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
            let (y, _) = self.forward(&Pass { keep: Keep::Nothing, ..*pass }, x.clone(), state)?;
            return Ok((y, Some(BlockSaved::Input(x))));
        }
        let (fast, pre_window, qk_window) = parts(state);
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
        let saved = ttt.map(|ttt| BlockSaved::Whole(Box::new(Activations { input, ttt_input, ttt, ffn_input, gate_up })));
        Ok((y, saved))
    }

    /// [`Block::forward`] of which only some rows are wanted, as of the last block when a prompt is read. Keeps nothing.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward_rows(&self, pass: &Pass<'_>, x: Tensor, rows: &[usize], state: Option<&mut LayerState>) -> Result<Tensor> {
        let (fast, pre_window, qk_window) = parts(state);
        let ttt_input = match &self.pre_conv {
            Some(conv) => conv.forward(pass, &x, pre_window)?,
            None => x,
        };
        let normed = rms_norm::forward(ttt_input.view(), pass.weights.view(self.seq_norm), self.eps)?;
        let mut ffn_input = self.ttt.forward_rows(pass, normed.view(), rows, fast, qk_window)?;
        add::add_to(ffn_input.view_mut(), add::gather(ttt_input.view(), rows)?.view());
        Ok(self.ffn.forward(pass, &ffn_input)?.0)
    }

    /// Gradient of `x` from the gradient of the output, for a pass without a state; adds the parameters' gradients to `grads`.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn backward(&self, pass: &Pass<'_>, saved: BlockSaved, dy: Tensor, grads: &mut Params) -> Result<Tensor> {
        let saved = match (saved, pass.keep) {
            (BlockSaved::Whole(saved), _) => saved,
            (BlockSaved::Input(x), Keep::Input { group }) => {
                match self.forward(&Pass { keep: Keep::Saved { group }, ..*pass }, x, None)? {
                    (_, Some(BlockSaved::Whole(saved))) => saved,
                    _ => unreachable!("a pass that keeps activations returns them"),
                }
            }
            (BlockSaved::Input(_), keep) => panic!("a block kept its input only, but the pass keeps {keep:?}"),
        };
        let Activations { input, ttt_input, ttt, ffn_input, gate_up } = *saved;
        let dffn_input = self.ffn.backward(pass, &ffn_input, gate_up, dy, grads)?;
        drop(ffn_input);
        let seq_norm = pass.weights.view(self.seq_norm);
        let normed = rms_norm::forward(ttt_input.view(), seq_norm, self.eps)?;
        let dnormed = self.ttt.backward(pass, normed.view(), ttt, dffn_input.view(), grads)?;
        drop(normed);
        let mut dttt_input =
            rms_norm::backward(dnormed.view(), ttt_input.view(), seq_norm, self.eps, grads.view_mut(self.seq_norm))?;
        drop((dnormed, ttt_input));
        add::add_to(dttt_input.view_mut(), dffn_input.view());
        match (&self.pre_conv, input) {
            (Some(conv), Some(input)) => conv.backward(pass, &input, dttt_input, grads),
            _ => Ok(dttt_input),
        }
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
