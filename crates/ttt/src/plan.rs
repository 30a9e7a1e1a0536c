//! What a model costs before anything is allocated: parameters, memory by part, and arithmetic per token.
//!
//! The memory plan replays, with sizes only, the allocations that [`crate::lm`] and [`crate::layer`] make in one training step or
//! one prefill; a test holds it against the measured peak.

use crate::config::{Config, Inner};
use crate::device::memory::size_class;
use crate::generate::PREFILL_CHUNK;
use crate::layer::Keep;
use crate::ops::inner::FastWeights;
use crate::params::{Entry, ParamTable};
use crate::weights::Storage;

/// Logits that the loss holds at once, of whole rows: 16 MiB of them.
const LOGITS: usize = 4 << 20;

/// Floating-point operations for one token (a multiply-add counts as two).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flops {
    /// Matrix products of the forward pass, the output matrix included.
    pub matmul: f64,
    /// The inner loop of the forward pass.
    pub inner_loop: f64,
    /// Forward and backward together, nothing recomputed: what "model FLOPs utilisation" counts.
    pub training: f64,
}

impl Flops {
    /// Of the forward pass.
    pub fn forward(&self) -> f64 {
        self.matmul + self.inner_loop
    }

    /// Forward and backward together when the initial fast weights alone are learned: products with frozen matrices have one
    /// gradient, that of their input.
    pub fn training_initial_state(&self) -> f64 {
        2.0 * self.matmul + 3.0 * self.inner_loop
    }
}

/// Floating-point operations per token of a model.
pub fn flops(config: &Config) -> Flops {
    let (d, i, v) = (config.hidden_size as f64, config.intermediate_size as f64, config.vocab_size as f64);
    let (h, hd, k) = (config.num_attention_heads as f64, config.head_dim() as f64, config.mini_batch_size as f64);
    let projections = 2.0 + f64::from(u8::from(!config.share_qk)) + f64::from(u8::from(config.use_gate));
    let layer = 2.0 * ((projections + 1.0) * d * d + 3.0 * d * i + d * h);
    // Per mini-batch and head: 6 n d^2 + 4 n^2 d forward, twice that backward (TTT-Linear); 56 n d^2 + 20 n^2 d (TTT-MLP).
    let (square, rows) = match config.ttt_layer_type {
        Inner::Linear => (6.0, 4.0),
        Inner::Mlp => (56.0, 20.0),
    };
    let inner = h * (square * hd * hd + rows * k * hd);
    let layers = config.num_hidden_layers as f64;
    let matmul = layers * layer + 2.0 * d * v;
    let inner_loop = layers * inner;
    Flops { matmul, inner_loop, training: 3.0 * (matmul + inner_loop) }
}

/// Bytes by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The weights.
    pub weights: usize,
    /// Gradients.
    pub gradients: usize,
    /// Both moments of the optimizer.
    pub optimizer: usize,
    /// Activations kept for the backward pass, without the fast weights.
    pub activations: usize,
    /// Fast weights kept for the backward pass.
    pub fast_weights: usize,
    /// States of the sequences (inference).
    pub states: usize,
    /// What one layer or the loss needs for a moment, at its largest.
    pub transient: usize,
}

impl Memory {
    /// All parts together: the peak.
    pub fn total(&self) -> usize {
        self.weights + self.gradients + self.optimizer + self.activations + self.fast_weights + self.states + self.transient
    }

    /// That of training, when the initial fast weights alone are learned: both moments, and weights and gradients once more, of
    /// those; no gradients of frozen matrices.
    pub fn of_initial_state(self, config: &Config) -> Memory {
        let table = ParamTable::new(config).0;
        let bytes = |table: ParamTable| size_class(table.len() * 4);
        Memory { gradients: bytes(table.gradients_of_initial_state()), optimizer: 4 * bytes(table.initial_state()), ..self }
    }
}

/// A running sum of bytes with its peak.
#[derive(Default)]
struct Ledger {
    now: usize,
    peak: usize,
}

impl Ledger {
    fn take(&mut self, floats: usize) -> usize {
        let bytes = size_class(floats * 4);
        self.now += bytes;
        self.peak = self.peak.max(self.now);
        bytes
    }

    fn free(&mut self, bytes: usize) {
        self.now -= bytes;
    }

    /// Takes and gives back: something that lives for a moment.
    fn touch(&mut self, floats: usize) {
        let bytes = self.take(floats);
        self.free(bytes);
    }
}

/// Sizes of one pass.
struct Shape<'c> {
    config: &'c Config,
    /// Tokens in all sequences.
    n: usize,
    /// Length of each sequence.
    lens: &'c [usize],
}

/// What a block keeps for its backward pass, in bytes.
#[derive(Clone, Copy, Default)]
struct Kept {
    activations: usize,
    fast_weights: usize,
    projected: usize,
    qk: usize,
    z: usize,
    gate_up: usize,
    ttt_input: usize,
    ffn_input: usize,
    input: usize,
    small: usize,
}

impl Shape<'_> {
    fn rows(&self) -> usize {
        self.n * self.config.hidden_size
    }

    fn projections(&self) -> usize {
        2 + usize::from(!self.config.share_qk) + usize::from(self.config.use_gate)
    }

    fn state_len(&self) -> usize {
        self.config.num_attention_heads * FastWeights::state_len(self.config.ttt_layer_type, self.config.head_dim())
    }

    fn checkpoints(&self, group: usize) -> usize {
        let per_sequence = |len: &usize| len.div_ceil(self.config.mini_batch_size).div_ceil(group);
        self.lens.iter().map(per_sequence).sum::<usize>() * self.state_len()
    }

    fn open_rows(&self) -> usize {
        let row = FastWeights::row_len(self.config.ttt_layer_type, self.config.head_dim());
        self.config.num_attention_heads * (self.config.mini_batch_size - 1) * row
    }

    /// A block's forward pass; its input is already counted. Returns its output and what it keeps.
    fn forward(&self, l: &mut Ledger, x: usize, keep: Option<usize>, own_states: bool) -> (usize, Kept) {
        let (config, rows) = (self.config, self.rows());
        let mut kept = Kept::default();
        let ttt_input = if config.pre_conv {
            let normed = l.take(rows);
            let y = l.take(rows);
            l.free(normed);
            kept.input = x;
            y
        } else {
            x
        };
        kept.ttt_input = ttt_input;
        let normed = l.take(rows);
        kept.projected = l.take(rows * self.projections());
        if config.share_qk {
            kept.qk = l.take(rows) + l.take(rows);
        }
        kept.small = l.take(self.n * config.num_attention_heads) + l.take(config.mini_batch_size);
        let own =
            if own_states { l.take(self.lens.len() * self.state_len()) + l.take(self.lens.len() * self.open_rows()) } else { 0 };
        kept.z = l.take(rows);
        kept.fast_weights = keep.map_or(0, |group| l.take(self.checkpoints(group)));
        l.free(own);
        let mut y = l.take(rows);
        if config.use_gate {
            let gated = l.take(rows);
            l.free(y);
            y = gated;
        }
        kept.ffn_input = l.take(rows);
        l.free(y);
        if keep.is_none() {
            l.free(kept.projected + kept.qk + kept.small + kept.z);
        }
        l.free(normed);
        let normed = l.take(rows);
        kept.gate_up = l.take(2 * self.n * config.intermediate_size);
        l.free(normed);
        let hidden = l.take(self.n * config.intermediate_size);
        let y = l.take(rows);
        l.free(hidden);
        if keep.is_none() {
            l.free(kept.gate_up + kept.ffn_input + kept.ttt_input + kept.input);
        }
        kept.activations =
            kept.input + kept.ttt_input + kept.projected + kept.qk + kept.small + kept.z + kept.ffn_input + kept.gate_up;
        (y, kept)
    }

    /// A block's backward pass: gives back what it kept, turns the gradient of its output into that of its input.
    fn backward(&self, l: &mut Ledger, kept: Kept, dy: usize) -> usize {
        let (config, rows) = (self.config, self.rows());
        let wide = self.n * config.intermediate_size;
        // Feed-forward.
        l.touch(wide);
        let dhidden = l.take(wide);
        let dgate_up = l.take(2 * wide);
        l.free(dhidden + kept.gate_up);
        l.touch(rows);
        let dnormed = l.take(rows);
        l.free(dgate_up);
        let dffn_input = l.take(rows);
        l.free(dnormed + dy + kept.ffn_input);
        // TTT layer.
        let normed = l.take(rows);
        let dprojected = l.take(rows * self.projections());
        let y = l.take(rows);
        if config.use_gate {
            l.touch(rows);
        }
        l.free(y);
        let mut dnormed = l.take(rows);
        if config.use_gate {
            let post = l.take(rows);
            let dpost = l.take(rows);
            l.free(post + dnormed);
            dnormed = dpost;
        }
        let dz = l.take(rows);
        l.free(dnormed + kept.z);
        let dstate = l.take(self.lens.len() * self.state_len());
        let dlr = l.take(self.n * config.num_attention_heads) + l.take(config.mini_batch_size);
        let dqk = if config.share_qk { l.take(rows) + l.take(rows) } else { 0 };
        l.free(kept.fast_weights + dz + kept.qk + dstate);
        if config.share_qk {
            let dshared = l.take(rows);
            l.touch(rows);
            l.free(dshared + dqk);
        }
        let dx = l.take(rows);
        l.touch(rows);
        l.free(dlr + kept.projected + kept.small + dprojected + normed);
        let dttt_input = l.take(rows);
        l.free(dx + kept.ttt_input + dffn_input);
        if !config.pre_conv {
            return dttt_input;
        }
        let normed = l.take(rows);
        let dnormed = l.take(rows);
        let dx = l.take(rows);
        l.free(normed + dnormed + dttt_input + kept.input);
        dx
    }
}

/// Memory of one training step with sequences of the given lengths in a micro-batch.
///
/// # Panics
/// When `keep` keeps nothing.
pub fn training_memory(config: &Config, lens: &[usize], keep: Keep) -> Memory {
    let parameters = size_class(ParamTable::new(config).0.len() * 4);
    let shape = Shape { config, n: lens.iter().sum(), lens };
    let mut l = Ledger::default();
    let mut kept = Vec::new();
    let mut x = l.take(shape.rows());
    for _ in 0..config.num_hidden_layers {
        match keep {
            Keep::Saved { group } => {
                let (y, k) = shape.forward(&mut l, x, Some(group), true);
                kept.push(k);
                x = y;
            }
            Keep::Input { .. } => {
                let input = x;
                // The block frees its own handle of the input, but the saved one keeps it alive.
                l.now += input;
                let (y, _) = shape.forward(&mut l, input, None, true);
                kept.push(Kept { input, activations: input, ..Kept::default() });
                x = y;
            }
            Keep::Nothing => panic!("a training step keeps something"),
        }
    }
    let held: (usize, usize) = kept.iter().fold((0, 0), |(a, f), k| (a + k.activations, f + k.fast_weights));
    let (activations, fast_weights) = (held.0 + x, held.1);
    let hidden = l.take(shape.rows());
    let dhidden = l.take(shape.rows());
    // The loss brings the rows that count together, a chunk at a time.
    let chunk = (LOGITS / config.vocab_size).clamp(1, shape.n);
    let logits = l.take(chunk * config.vocab_size);
    l.touch(chunk * config.hidden_size);
    l.free(logits + hidden);
    let mut dx = l.take(shape.rows());
    l.free(x + dhidden);
    for k in kept.into_iter().rev() {
        let k = match keep {
            Keep::Input { group } => {
                let (y, again) = shape.forward(&mut l, k.input, Some(group), true);
                l.free(y);
                again
            }
            _ => k,
        };
        dx = shape.backward(&mut l, k, dx);
    }
    let transient = l.peak.saturating_sub(activations + fast_weights);
    Memory {
        weights: parameters,
        gradients: parameters,
        optimizer: 2 * parameters,
        activations,
        fast_weights,
        states: 0,
        transient,
    }
}

/// Bytes of the weights of a model that is not trained.
pub fn weight_bytes(config: &Config, storage: Storage) -> usize {
    let table = ParamTable::new(config).0;
    let bytes = |entry: &Entry| match entry.is_matrix() {
        true => storage.matrix_bytes(entry.matrix_shape()),
        false => entry.elements() * storage.dtype().size(),
    };
    table.entries().iter().map(bytes).sum()
}

/// Memory of reading `tokens` tokens in each of `slots` sequences, at most [`PREFILL_CHUNK`] of each at once.
pub fn inference_memory(config: &Config, slots: usize, tokens: usize) -> Memory {
    let tokens = tokens.min(PREFILL_CHUNK);
    let lens = vec![tokens; slots];
    let shape = Shape { config, n: slots * tokens, lens: &lens };
    let windows = usize::from(config.pre_conv) + usize::from(config.share_qk);
    let window = slots * (config.conv_kernel - 1) * config.hidden_size;
    let state =
        size_class(slots * shape.state_len() * 4) + size_class(slots * shape.open_rows() * 4) + windows * size_class(window * 4);
    let mut l = Ledger::default();
    let mut x = l.take(shape.rows());
    for _ in 0..config.num_hidden_layers {
        x = shape.forward(&mut l, x, None, false).0;
    }
    l.touch(shape.rows());
    Memory {
        weights: size_class(ParamTable::new(config).0.len() * 4),
        states: config.num_hidden_layers * state,
        transient: l.peak,
        ..Memory::default()
    }
}
