//! What a model costs before anything is allocated: parameters, memory by part, and arithmetic per token.
//!
//! The memory plan replays, with sizes only, the allocations that [`crate::lm`] and [`crate::layer`] make in one training step or
//! one prefill (`replay`, and `mixer` for what is of one mixer); a test holds it against the measured peak.

mod mixer;
mod replay;

use crate::config::{Config, Mixer};
use crate::device::memory::size_class;
use crate::generate::PREFILL_CHUNK;
use crate::layer::{Keep, Learner};
use crate::params::{Entry, ParamTable};
use crate::weights::Storage;
use replay::{Ledger, Of, Shape};

/// Floating-point operations for one token (a multiply-add counts as two).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flops {
    /// Matrix products of the forward pass, the output matrix included.
    pub matmul: f64,
    /// What mixes tokens in the forward pass, its projections aside: the inner loop, scores and sums of values, or the scan.
    pub mixing: f64,
    /// Forward and backward together, nothing recomputed: what "model FLOPs utilisation" counts.
    pub training: f64,
}

impl Flops {
    /// Of the forward pass.
    pub fn forward(&self) -> f64 {
        self.matmul + self.mixing
    }

    /// Forward and backward together when the initial fast weights alone are learned: products with frozen matrices have one
    /// gradient, that of their input.
    pub fn training_initial_state(&self) -> f64 {
        2.0 * self.matmul + 3.0 * self.mixing
    }
}

/// Floating-point operations per token of a model, a mean over a sequence of `tokens` tokens: those of attention grow with it.
pub fn flops(config: &Config, tokens: usize) -> Flops {
    let (d, i, v) = (config.hidden_size as f64, config.intermediate_size as f64, config.vocab_size as f64);
    let feed_forward = if config.has_feed_forward() { 2.0 * 3.0 * d * i } else { 0.0 };
    let (projections, mixing) = match config.mixer {
        Mixer::Ttt => {
            let (h, hd) = (config.num_attention_heads as f64, config.head_dim() as f64);
            let gate = if config.learns_lr() { d * h } else { 0.0 };
            let projections = 3.0 + f64::from(u8::from(!config.share_qk)) + f64::from(u8::from(config.use_gate));
            (2.0 * (projections * d * d + gate), h * Learner::of(config).flops(hd))
        }
        // q, k, v and the output; scores and sums of values over half of the tokens, a token's own among them.
        Mixer::Attention => (2.0 * (2.0 * d * d + 2.0 * d * config.key_value_size() as f64), 4.0 * d * (tokens as f64 + 1.0) / 2.0),
        // Projections in and out, those to steps, B and C; of each state of a channel a decay, an input, their sum and the output.
        Mixer::Mamba => {
            let (inner, n, rank) = (config.inner_size() as f64, config.state_size as f64, config.step_rank() as f64);
            (2.0 * inner * (3.0 * d + 2.0 * rank + 2.0 * n), inner * (7.0 * n + 2.0 * config.conv_kernel as f64))
        }
    };
    let layers = config.num_hidden_layers as f64;
    let matmul = layers * (projections + feed_forward) + 2.0 * d * v;
    let mixing = layers * mixing;
    Flops { matmul, mixing, training: 3.0 * (matmul + mixing) }
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

/// Training in segments that continue states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Sequences that a step continues, over all its micro-batches.
    pub slots: usize,
    /// Consecutive segments of each in a step.
    pub per_step: usize,
    /// Tokens of a whole sequence: as many as a state that grows may hold.
    pub sequence: usize,
    /// Whether gradient crosses the cuts between them.
    pub gradient: bool,
    /// Whether segments are then read again for the backward pass, from the states at their beginning.
    pub recompute: bool,
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
    let tokens = segments.map_or(0, |s| s.sequence);
    let shape = Shape { config, n: lens.iter().sum(), lens, tokens };
    let l = &mut Ledger::default();
    let slots = segments.map_or(0, |s| s.slots);
    let of = if segments.is_some() { Of::Copies(slots) } else { Of::None };
    let mut states = shape.take_all(l, slots, Shape::take_states);
    let (mut activations, mut fast_weights) = (0, 0);
    // States that grow, when so many segments of a step are still to be read.
    let len = lens.iter().copied().max().unwrap_or(0);
    let at = |left: usize| Shape { tokens: tokens.saturating_sub(left * len), ..shape };
    let across = segments.filter(|s| s.gradient);
    // Of the segments before the last, what their backward passes need.
    let mut earlier = Vec::new();
    for left in (2..=across.map_or(1, |s| s.per_step)).rev() {
        if across.is_some_and(|s| s.recompute) {
            let start = at(left).take_all(l, slots, Shape::take_states);
            states += start;
            let pass = at(left - 1).forward_all(l, Keep::Nothing, of);
            l.free(pass.x + pass.hidden);
            earlier.push((start, None));
        } else {
            let pass = at(left - 1).forward_all(l, keep, of);
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
    for (i, (start, pass)) in earlier.into_iter().rev().enumerate() {
        let pass = pass.unwrap_or_else(|| at(i + 1).forward_all(l, keep, of));
        at(i + 1).backward_all(l, pass, keep, of, across.is_some());
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
    let at_once = tokens.min(PREFILL_CHUNK);
    let lens = vec![at_once; slots];
    let shape = Shape { config, n: slots * at_once, lens: &lens, tokens };
    let states = shape.take_all(&mut Ledger::default(), slots, Shape::take_states);
    let mut l = Ledger::default();
    let rope = shape.take_rope(&mut l);
    let mut x = l.take(shape.rows());
    for _ in 0..config.num_hidden_layers {
        x = shape.forward(&mut l, x, None, Of::Slots).0;
    }
    l.touch(shape.rows());
    l.free(rope);
    Memory { weights: size_class(ParamTable::new(config).0.len() * 4), states, transient: l.peak, ..Memory::default() }
}
