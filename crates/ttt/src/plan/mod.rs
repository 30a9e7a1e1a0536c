//! What a model costs before anything is allocated: parameters, memory by part, and arithmetic per token.
//!
//! The memory plan replays, with sizes only, the allocations that [`crate::lm`] and [`crate::layer`] make in one training step or
//! one prefill (`replay`, and `mixer` for what is of one mixer); tests hold it against the measured peak. `step` also looks for
//! what fits.

mod mixer;
mod replay;
mod step;

pub use step::{Fit, Segments, Step};

use crate::config::{Config, Mixer};
use crate::device::Device;
use crate::device::memory::size_class;
use crate::generate::PREFILL_CHUNK;
use crate::layer::{Keep, Learner};
use crate::params::{Entry, ParamTable};
use crate::tensor::DType;
use crate::weights::Storage;
use replay::{Ledger, Of, Shape};

/// What the memory of a model depends on beside its sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A CPU, in f32.
    Cpu,
    /// A GPU, with activations of this type; bf16 is mixed precision.
    Gpu(DType),
}

impl Place {
    /// That of a model of this type on a device.
    pub fn of(device: &Device, dtype: DType) -> Place {
        if device.as_cuda().is_some() { Place::Gpu(dtype) } else { Place::Cpu }
    }

    /// Type of activations.
    fn activations(self) -> DType {
        match self {
            Place::Cpu => DType::F32,
            Place::Gpu(dtype) => dtype,
        }
    }

    /// Bytes of the copies of `parameters` weights that products read in mixed precision.
    fn copies(self, parameters: usize) -> usize {
        if self == Place::Gpu(DType::Bf16) { size_class(2 * parameters) } else { 0 }
    }

    /// Scratch of libraries, which is no tensor's.
    fn libraries(self) -> usize {
        if let Place::Gpu(_) = self { crate::device::cuda::LIBRARY_SCRATCH } else { 0 }
    }
}

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
    /// In mixed precision, their copies for products.
    pub copies: usize,
    /// Gradients.
    pub gradients: usize,
    /// Both moments of the optimizer.
    pub optimizer: usize,
    /// Activations kept for the backward pass, without the fast weights.
    pub activations: usize,
    /// Fast weights kept for the backward pass.
    pub fast_weights: usize,
    /// On a GPU, what else the inner loop keeps for it: scaled gradients, with which updates are undone, and what LayerNorm read.
    pub inner_gradients: usize,
    /// States of the sequences: in inference, and in training those that segments continue, with their copies and gradients.
    pub states: usize,
    /// What one layer or the loss needs for a moment, at its largest.
    pub transient: usize,
    /// On a GPU, scratch of its libraries' products, which is not counted among tensors.
    pub libraries: usize,
}

impl Memory {
    /// What stays from step to step.
    pub fn fixed(&self) -> usize {
        self.weights + self.copies + self.gradients + self.optimizer
    }

    /// All parts together: the peak.
    pub fn total(&self) -> usize {
        let kept = self.activations + self.fast_weights + self.inner_gradients + self.states;
        self.fixed() + kept + self.transient + self.libraries
    }

    /// That of training, when the initial fast weights alone are learned: both moments, and weights and gradients once more, of
    /// those; no gradients of frozen matrices.
    pub fn of_initial_state(self, config: &Config) -> Memory {
        let table = ParamTable::new(config).0;
        let bytes = |table: ParamTable| size_class(table.len() * 4);
        Memory { gradients: bytes(table.gradients_of_initial_state()), optimizer: 4 * bytes(table.initial_state()), ..self }
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
pub fn inference_memory(config: &Config, slots: usize, tokens: usize, place: Place) -> Memory {
    let at_once = tokens.min(PREFILL_CHUNK);
    let lens = vec![at_once; slots];
    let shape = Shape { config, n: slots * at_once, lens: &lens, tokens };
    let states = shape.take_all(&mut Ledger::new(place), slots, Shape::take_states);
    let mut l = Ledger::new(place);
    let rope = shape.take_rope(&mut l);
    let mut x = l.take(shape.rows());
    for _ in 0..config.num_hidden_layers {
        x = shape.forward(&mut l, x, Keep::Nothing, Of::Slots).0;
    }
    l.touch(shape.rows());
    l.free(rope);
    let parameters = ParamTable::new(config).0.len();
    let (weights, copies) = (size_class(4 * parameters), place.copies(parameters));
    Memory { weights, copies, states, transient: l.peak, libraries: place.libraries(), ..Memory::default() }
}
