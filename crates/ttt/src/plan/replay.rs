//! The allocations of a pass, with sizes only.

use crate::config::Config;
use crate::device::memory::size_class;
use crate::layer::Keep;
use crate::ops::cross_entropy;
use crate::plan::Place;
use crate::tensor::DType;

/// Logits that the loss holds at once on a CPU, of whole rows: 16 MiB of them.
const LOGITS: usize = 4 << 20;

/// A running sum of bytes with its peak.
pub(super) struct Ledger {
    pub(super) place: Place,
    pub(super) now: usize,
    pub(super) peak: usize,
}

impl Ledger {
    pub(super) fn new(place: Place) -> Ledger {
        Ledger { place, now: 0, peak: 0 }
    }

    /// Takes memory for numbers of the activations' type.
    pub(super) fn take(&mut self, numbers: usize) -> usize {
        self.take_bytes(numbers * self.place.activations().size())
    }

    /// Takes memory for numbers that are f32 whatever activations are.
    pub(super) fn take_f32(&mut self, numbers: usize) -> usize {
        self.take_bytes(numbers * DType::F32.size())
    }

    fn take_bytes(&mut self, bytes: usize) -> usize {
        let bytes = size_class(bytes);
        self.now += bytes;
        self.peak = self.peak.max(self.now);
        bytes
    }

    pub(super) fn free(&mut self, bytes: usize) {
        self.now -= bytes;
    }

    /// Takes and gives back: something that lives for a moment.
    pub(super) fn touch(&mut self, numbers: usize) {
        let bytes = self.take(numbers);
        self.free(bytes);
    }

    /// [`Ledger::touch`] of f32 numbers.
    pub(super) fn touch_f32(&mut self, numbers: usize) {
        let bytes = self.take_f32(numbers);
        self.free(bytes);
    }
}

/// Whose states a block of a pass works on.
#[derive(Clone, Copy)]
pub(super) enum Of {
    /// Its slots themselves.
    Slots,
    /// States that start afresh and are dropped.
    None,
    /// Copies of its slots, of which there are so many.
    Copies(usize),
}

/// Sizes of one pass.
#[derive(Clone, Copy)]
pub(super) struct Shape<'c> {
    pub(super) config: &'c Config,
    /// Tokens in all sequences.
    pub(super) n: usize,
    /// Length of each sequence.
    pub(super) lens: &'c [usize],
    /// Tokens that a state has room for, where its size depends on them.
    pub(super) tokens: usize,
}

/// What a block keeps for its backward pass, in bytes.
#[derive(Clone, Copy, Default)]
pub(super) struct Kept {
    pub(super) activations: usize,
    pub(super) fast_weights: usize,
    /// Of a GPU's inner loop: scaled gradients, and what LayerNorm read.
    pub(super) inner_gradients: usize,
    pub(super) projected: usize,
    pub(super) qk: usize,
    pub(super) z: usize,
    pub(super) gate_up: usize,
    pub(super) mixer_input: usize,
    pub(super) ffn_input: usize,
    pub(super) input: usize,
    pub(super) small: usize,
    pub(super) start: usize,
}

impl Kept {
    /// Of the mixer, its fast weights aside.
    fn kept_by_mixer(&self) -> usize {
        self.projected + self.qk + self.small + self.z
    }
}

impl Shape<'_> {
    pub(super) fn rows(&self) -> usize {
        self.n * self.config.hidden_size
    }

    /// The same of all layers.
    pub(super) fn take_all(&self, l: &mut Ledger, slots: usize, take: fn(&Self, &mut Ledger, usize) -> usize) -> usize {
        (0..self.config.num_hidden_layers).map(|_| take(self, l, slots)).sum()
    }

    /// A block's forward pass; its input is already counted. Returns its output and what it keeps.
    pub(super) fn forward(&self, l: &mut Ledger, x: usize, keep: Keep, of: Of) -> (usize, Kept) {
        let (config, rows) = (self.config, self.rows());
        let mut kept = Kept::default();
        let mut copies = match of {
            Of::Copies(_) => self.take_states(l, self.lens.len()),
            _ => 0,
        };
        if let (Of::Copies(_), true) = (of, keep.activations()) {
            (kept.start, copies) = self.take_start(l, copies);
        }
        let mixer_input = if config.pre_conv {
            let normed = l.take(rows);
            let y = l.take(rows);
            l.free(normed);
            kept.input = x;
            y
        } else {
            x
        };
        kept.mixer_input = mixer_input;
        let normed = l.take(rows);
        let y = self.mixer_forward(l, &mut kept, keep, of);
        l.free(normed);
        if !config.has_feed_forward() {
            if !keep.activations() {
                l.free(kept.mixer_input + kept.input);
            }
            l.free(copies);
            kept.activations = kept.kept_by_mixer() + kept.input + kept.mixer_input + kept.start;
            return (y, kept);
        }
        kept.ffn_input = y;
        let normed = l.take(rows);
        kept.gate_up = l.take(2 * self.n * config.intermediate_size);
        l.free(normed);
        let hidden = l.take(self.n * config.intermediate_size);
        let y = l.take(rows);
        l.free(hidden);
        if !keep.activations() {
            l.free(kept.gate_up + kept.ffn_input + kept.mixer_input + kept.input);
        }
        l.free(copies);
        kept.activations = kept.kept_by_mixer() + kept.input + kept.mixer_input + kept.ffn_input + kept.gate_up + kept.start;
        (y, kept)
    }

    /// A block's backward pass: gives back what it kept, turns the gradient of its output into that of its input.
    /// With `dstates` the gradient of its states is handed on.
    fn backward(&self, l: &mut Ledger, kept: Kept, dy: usize, keep: Keep, dstates: bool) -> usize {
        let (config, rows) = (self.config, self.rows());
        let own = if dstates { self.take_carried(l, self.lens.len()) } else { 0 };
        let dffn_input = if config.has_feed_forward() { self.feed_forward_backward(l, &kept, dy) } else { dy };
        let normed = l.take(rows);
        let dx = self.mixer_backward(l, kept, keep, dstates);
        l.free(normed);
        let dmixer_input = l.take(rows);
        l.free(dx + kept.mixer_input + dffn_input);
        if !config.pre_conv {
            l.free(own + kept.start);
            return dmixer_input;
        }
        let normed = l.take(rows);
        let dnormed = l.take(rows);
        let dx = l.take(rows);
        l.free(normed + dnormed + dmixer_input + kept.input + own + kept.start);
        dx
    }

    /// The feed-forward part's backward pass.
    fn feed_forward_backward(&self, l: &mut Ledger, kept: &Kept, dy: usize) -> usize {
        let (rows, wide) = (self.rows(), self.n * self.config.intermediate_size);
        l.touch(wide);
        let dhidden = l.take(wide);
        let dgate_up = l.take(2 * wide);
        l.free(dhidden + kept.gate_up);
        l.touch(rows);
        let dnormed = l.take(rows);
        l.free(dgate_up);
        let dffn_input = l.take(rows);
        l.free(dnormed + dy + kept.ffn_input);
        dffn_input
    }
}

/// What a pass through the model has kept.
pub(super) struct Pass {
    /// Input of the final norm.
    pub(super) x: usize,
    pub(super) hidden: usize,
    blocks: Vec<Kept>,
}

impl Pass {
    /// Activations, fast weights and inner gradients.
    pub(super) fn held(&self) -> [usize; 3] {
        self.blocks.iter().fold([self.x, 0, 0], |[a, f, g], k| [a + k.activations, f + k.fast_weights, g + k.inner_gradients])
    }
}

impl Shape<'_> {
    pub(super) fn forward_all(&self, l: &mut Ledger, keep: Keep, of: Of) -> Pass {
        let mut blocks = Vec::new();
        let rope = self.take_rope(l);
        let mut x = l.take(self.rows());
        for _ in 0..self.config.num_hidden_layers {
            match keep {
                Keep::Saved { .. } | Keep::Start { .. } => {
                    let (y, kept) = self.forward(l, x, keep, of);
                    blocks.push(kept);
                    x = y;
                }
                Keep::Input { .. } => {
                    let input = x;
                    // The block frees its own handle of the input, but the saved one keeps it alive.
                    l.now += input;
                    let start = self.take_whole_start(l, of);
                    let (y, _) = self.forward(l, input, Keep::Nothing, of);
                    blocks.push(Kept { input, start, activations: input + start, ..Kept::default() });
                    x = y;
                }
                Keep::Nothing => x = self.forward(l, x, keep, of).0,
            }
        }
        let hidden = l.take(self.rows());
        l.free(rope);
        Pass { x, hidden, blocks }
    }

    pub(super) fn backward_all(&self, l: &mut Ledger, pass: Pass, keep: Keep, of: Of, dstates: bool) {
        let dhidden = l.take(self.rows());
        // The loss brings the rows that count together, a chunk at a time.
        let chunk = match l.place {
            Place::Cpu => (LOGITS / self.config.vocab_size).clamp(1, self.n),
            Place::Gpu(dtype) => cross_entropy::cuda::chunk_rows(self.config.vocab_size, dtype, self.n),
        };
        let logits = l.take(chunk * self.config.vocab_size);
        l.touch(chunk * self.config.hidden_size);
        l.free(logits + pass.hidden);
        let rope = self.take_rope(l);
        let mut dx = l.take(self.rows());
        l.free(pass.x + dhidden);
        for kept in pass.blocks.into_iter().rev() {
            let kept = match keep {
                Keep::Input { group } => {
                    let (y, again) = self.forward(l, kept.input, Keep::Saved { group }, of);
                    l.free(y + kept.start);
                    again
                }
                _ => kept,
            };
            dx = self.backward(l, kept, dx, keep, dstates);
        }
        l.free(dx + rope);
    }
}
