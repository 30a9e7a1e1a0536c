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
    /// States of the sequences: in inference, and in training those that segments continue, with their copies and gradients.
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

/// Training in segments that continue states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Sequences that a step continues, over all its micro-batches.
    pub slots: usize,
    /// Consecutive segments of each in a step.
    pub per_step: usize,
    /// Whether gradient crosses the cuts between them.
    pub gradient: bool,
    /// Whether segments are then read again for the backward pass, from the states at their beginning.
    pub recompute: bool,
}

/// Whose states a block of a pass works on.
#[derive(Clone, Copy)]
enum Of {
    /// Its slots themselves.
    Slots,
    /// States that start afresh and are dropped.
    None,
    /// Copies of its slots, of which there are so many.
    Copies(usize),
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
    start: usize,
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

    /// Fast weights and windows of `slots` sequences of a layer, or their gradients.
    fn take_carried(&self, l: &mut Ledger, slots: usize) -> usize {
        l.take(slots * self.state_len()) + self.take_windows(l, slots)
    }

    fn take_windows(&self, l: &mut Ledger, slots: usize) -> usize {
        let windows = usize::from(self.config.pre_conv) + usize::from(self.config.share_qk);
        (0..windows).map(|_| l.take(slots * (self.config.conv_kernel - 1) * self.config.hidden_size)).sum()
    }

    /// States of `slots` sequences of a layer.
    fn take_states(&self, l: &mut Ledger, slots: usize) -> usize {
        self.take_carried(l, slots) + l.take(slots * self.open_rows())
    }

    /// The same of all layers.
    fn take_all(&self, l: &mut Ledger, slots: usize, take: fn(&Self, &mut Ledger, usize) -> usize) -> usize {
        (0..self.config.num_hidden_layers).map(|_| take(self, l, slots)).sum()
    }

    /// A block's forward pass; its input is already counted. Returns its output and what it keeps.
    fn forward(&self, l: &mut Ledger, x: usize, keep: Option<usize>, of: Of) -> (usize, Kept) {
        let (config, rows) = (self.config, self.rows());
        let mut kept = Kept::default();
        let copies = match of {
            Of::Copies(_) => self.take_states(l, self.lens.len()),
            _ => 0,
        };
        if let (Of::Copies(_), Some(_)) = (of, keep) {
            kept.start = self.take_windows(l, self.lens.len());
        }
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
        let own = match of {
            Of::None => l.take(self.lens.len() * self.state_len()) + l.take(self.lens.len() * self.open_rows()),
            _ => 0,
        };
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
        l.free(copies);
        kept.activations = kept.input
            + kept.ttt_input
            + kept.projected
            + kept.qk
            + kept.small
            + kept.z
            + kept.ffn_input
            + kept.gate_up
            + kept.start;
        (y, kept)
    }

    /// A block's backward pass: gives back what it kept, turns the gradient of its output into that of its input.
    /// With `dstates` the gradient of its states is handed on.
    fn backward(&self, l: &mut Ledger, kept: Kept, dy: usize, dstates: bool) -> usize {
        let (config, rows) = (self.config, self.rows());
        let wide = self.n * config.intermediate_size;
        let own = if dstates { self.take_carried(l, self.lens.len()) } else { 0 };
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
        let dstate = if dstates { 0 } else { l.take(self.lens.len() * self.state_len()) };
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
            l.free(own + kept.start);
            return dttt_input;
        }
        let normed = l.take(rows);
        let dnormed = l.take(rows);
        let dx = l.take(rows);
        l.free(normed + dnormed + dttt_input + kept.input + own + kept.start);
        dx
    }
}

/// What a pass through the model has kept.
struct Pass {
    /// Input of the final norm.
    x: usize,
    hidden: usize,
    blocks: Vec<Kept>,
}

impl Pass {
    /// Activations and fast weights.
    fn held(&self) -> (usize, usize) {
        self.blocks.iter().fold((self.x, 0), |(a, f), k| (a + k.activations, f + k.fast_weights))
    }
}

impl Shape<'_> {
    fn forward_all(&self, l: &mut Ledger, keep: Keep, of: Of) -> Pass {
        let mut blocks = Vec::new();
        let mut x = l.take(self.rows());
        for _ in 0..self.config.num_hidden_layers {
            match keep {
                Keep::Saved { group } => {
                    let (y, kept) = self.forward(l, x, Some(group), of);
                    blocks.push(kept);
                    x = y;
                }
                Keep::Input { .. } => {
                    let input = x;
                    // The block frees its own handle of the input, but the saved one keeps it alive.
                    l.now += input;
                    let start = if let Of::Copies(slots) = of { self.take_carried(l, slots) } else { 0 };
                    let (y, _) = self.forward(l, input, None, of);
                    blocks.push(Kept { input, start, activations: input + start, ..Kept::default() });
                    x = y;
                }
                Keep::Nothing => x = self.forward(l, x, None, of).0,
            }
        }
        Pass { x, hidden: l.take(self.rows()), blocks }
    }

    fn backward_all(&self, l: &mut Ledger, pass: Pass, keep: Keep, of: Of, dstates: bool) {
        let dhidden = l.take(self.rows());
        // The loss brings the rows that count together, a chunk at a time.
        let chunk = (LOGITS / self.config.vocab_size).clamp(1, self.n);
        let logits = l.take(chunk * self.config.vocab_size);
        l.touch(chunk * self.config.hidden_size);
        l.free(logits + pass.hidden);
        let mut dx = l.take(self.rows());
        l.free(pass.x + dhidden);
        for kept in pass.blocks.into_iter().rev() {
            let kept = match keep {
                Keep::Input { group } => {
                    let (y, again) = self.forward(l, kept.input, Some(group), of);
                    l.free(y + kept.start);
                    again
                }
                _ => kept,
            };
            dx = self.backward(l, kept, dx, dstates);
        }
        l.free(dx);
    }
}

/// Memory of one training step with sequences of the given lengths in a micro-batch, which all start afresh.
///
/// # Panics
/// When `keep` keeps nothing.
pub fn training_memory(config: &Config, lens: &[usize], keep: Keep) -> Memory {
    step_memory(config, lens, keep, None)
}

/// [`training_memory`] of a step of segments of the given lengths, which continue states.
///
/// # Panics
/// When `keep` keeps nothing.
pub fn segmented_memory(config: &Config, lens: &[usize], keep: Keep, segments: Segments) -> Memory {
    step_memory(config, lens, keep, Some(segments))
}

fn step_memory(config: &Config, lens: &[usize], keep: Keep, segments: Option<Segments>) -> Memory {
    assert!(keep != Keep::Nothing, "a training step keeps something");
    let parameters = size_class(ParamTable::new(config).0.len() * 4);
    let shape = Shape { config, n: lens.iter().sum(), lens };
    let l = &mut Ledger::default();
    let slots = segments.map_or(0, |s| s.slots);
    let of = if segments.is_some() { Of::Copies(slots) } else { Of::None };
    let mut states = shape.take_all(l, slots, Shape::take_states);
    let (mut activations, mut fast_weights) = (0, 0);
    let across = segments.filter(|s| s.gradient);
    // Of the segments before the last, what their backward passes need.
    let mut earlier = Vec::new();
    for _ in 1..across.map_or(1, |s| s.per_step) {
        if across.is_some_and(|s| s.recompute) {
            let start = shape.take_all(l, slots, Shape::take_states);
            states += start;
            let pass = shape.forward_all(l, Keep::Nothing, of);
            l.free(pass.x + pass.hidden);
            earlier.push((start, None));
        } else {
            let pass = shape.forward_all(l, keep, of);
            activations += pass.held().0 + pass.hidden;
            fast_weights += pass.held().1;
            earlier.push((0, Some(pass)));
        }
    }
    let last = shape.forward_all(l, keep, of);
    activations += last.held().0;
    fast_weights += last.held().1;
    if across.is_some() {
        states += shape.take_all(l, slots, Shape::take_carried);
    }
    shape.backward_all(l, last, keep, of, across.is_some());
    for (start, pass) in earlier.into_iter().rev() {
        let pass = pass.unwrap_or_else(|| shape.forward_all(l, keep, of));
        shape.backward_all(l, pass, keep, of, across.is_some());
        l.free(start);
    }
    let transient = l.peak.saturating_sub(activations + fast_weights + states);
    Memory { weights: parameters, gradients: parameters, optimizer: 2 * parameters, activations, fast_weights, states, transient }
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
    let states = shape.take_all(&mut Ledger::default(), slots, Shape::take_states);
    let mut l = Ledger::default();
    let mut x = l.take(shape.rows());
    for _ in 0..config.num_hidden_layers {
        x = shape.forward(&mut l, x, None, Of::Slots).0;
    }
    l.touch(shape.rows());
    Memory { weights: size_class(ParamTable::new(config).0.len() * 4), states, transient: l.peak, ..Memory::default() }
}
