//! What is of one mixer in the replay of a pass: its states, and its part of a block forward and backward.

use super::replay::{Kept, Ledger, Of, Shape};
use crate::config::{Inner, Mixer};
use crate::layer::{Keep, Learner};
use crate::ops::inner::FastWeights;
use crate::ops::{conv, partials, selective_scan, ttt_linear, ttt_mlp};
use crate::plan::Place;

impl Shape<'_> {
    /// The mixer's forward pass, from the normed input to its output.
    pub(super) fn mixer_forward(&self, l: &mut Ledger, kept: &mut Kept, keep: Keep, of: Of) -> usize {
        match self.config.mixer {
            Mixer::Ttt => self.ttt_forward(l, kept, keep, of),
            Mixer::Attention => self.attention_forward(l, kept, keep),
            Mixer::Mamba => self.mamba_forward(l, kept, keep),
        }
    }

    /// The mixer's backward pass, to the gradient of its normed input; gives back what it kept.
    pub(super) fn mixer_backward(&self, l: &mut Ledger, kept: Kept, keep: Keep, dstates: bool) -> usize {
        match self.config.mixer {
            Mixer::Ttt => self.ttt_backward(l, kept, keep, dstates),
            Mixer::Attention => self.attention_backward(l, &kept),
            Mixer::Mamba => self.mamba_backward(l, &kept),
        }
    }

    fn ttt_forward(&self, l: &mut Ledger, kept: &mut Kept, keep: Keep, of: Of) -> usize {
        let (config, rows) = (self.config, self.rows());
        kept.projected = l.take(rows * self.projections());
        if config.share_qk {
            kept.qk = l.take(rows) + l.take(rows);
        }
        kept.small = self.take_rates(l);
        // Where all begin with the learned weights, these need not be kept to run again.
        let again = matches!((keep, Learner::of(config)), (Keep::Start { .. }, Learner::MiniBatch { .. }));
        let start = if again && !matches!(of, Of::None) { l.take_f32(self.lens.len() * self.state_len()) } else { 0 };
        self.inner_loop(l, kept, if again { Keep::Nothing } else { keep }, of);
        kept.fast_weights += start;
        let mut y = l.take(rows);
        if config.use_gate {
            let gated = l.take(rows);
            l.free(y);
            y = gated;
        }
        let out = l.take(rows);
        l.free(y);
        if again {
            l.free(std::mem::take(&mut kept.z));
        }
        if !keep.activations() {
            l.free(kept.projected + kept.qk + kept.small + kept.z);
        }
        out
    }

    /// The inner loop with what it keeps.
    fn inner_loop(&self, l: &mut Ledger, kept: &mut Kept, keep: Keep, of: Of) {
        let own = match of {
            Of::None => l.take_f32(self.lens.len() * self.state_len()) + l.take_f32(self.lens.len() * self.open_rows()),
            _ => 0,
        };
        kept.z = l.take(self.rows());
        if let Keep::Saved { group } | Keep::Start { group } = keep {
            kept.fast_weights = l.take_f32(self.checkpoints(group));
            if let (Place::Gpu(_), Learner::MiniBatch { inner, .. }) = (l.place, Learner::of(self.config)) {
                kept.inner_gradients = match inner {
                    Inner::Linear => l.take(self.rows()),
                    Inner::Mlp => l.take(5 * self.rows()) + l.take_f32(2 * self.rows()),
                };
            }
        }
        l.touch_f32(self.inner_scratch(l.place)[0]);
        l.free(own);
    }

    /// Scratch of a GPU's inner loop, forward and backward.
    fn inner_scratch(&self, place: Place) -> [usize; 2] {
        let (Place::Gpu(dtype), Learner::MiniBatch { inner, mini_batch }) = (place, Learner::of(self.config)) else {
            return [0; 2];
        };
        let scratch = match inner {
            Inner::Linear => ttt_linear::cuda::planned_scratch,
            Inner::Mlp => ttt_mlp::cuda::planned_scratch,
        };
        scratch(dtype, self.lens, [self.config.num_attention_heads, self.config.head_dim(), mini_batch])
    }

    /// Inner learning rates and token scales, or their gradients.
    fn take_rates(&self, l: &mut Ledger) -> usize {
        match Learner::of(self.config) {
            Learner::MiniBatch { mini_batch, .. } => l.take_f32(self.n * self.config.num_attention_heads) + l.take_f32(mini_batch),
            Learner::Batch { .. } => l.take_f32(self.n * self.config.num_attention_heads),
            Learner::Attention(_) => 0,
        }
    }

    fn ttt_backward(&self, l: &mut Ledger, mut kept: Kept, keep: Keep, dstates: bool) -> usize {
        let (config, rows) = (self.config, self.rows());
        if let (Keep::Start { group }, Learner::MiniBatch { .. }) = (keep, Learner::of(config)) {
            l.free(kept.fast_weights);
            self.inner_loop(l, &mut kept, Keep::Saved { group }, Of::None);
        }
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
        let dstate = if dstates { 0 } else { l.take_f32(self.lens.len() * self.state_len()) };
        let dlr = self.take_rates(l);
        let dqk = if config.share_qk { l.take(rows) + l.take(rows) } else { 0 };
        l.touch_f32(self.inner_scratch(l.place)[1]);
        l.free(kept.fast_weights + kept.inner_gradients + dz + kept.qk + dstate);
        if config.share_qk {
            let dshared = l.take(rows);
            if let Place::Gpu(_) = l.place {
                l.touch_f32(conv::cuda::partials(self.n, config.hidden_size, config.conv_kernel));
            }
            l.touch(rows);
            l.free(dshared + dqk);
        }
        let dx = l.take(rows);
        l.touch(rows);
        l.free(dlr + kept.projected + kept.small + dprojected);
        dx
    }

    /// q, k and v.
    fn attention_projected(&self) -> usize {
        self.n * (self.config.hidden_size + 2 * self.config.key_value_size())
    }

    fn attention_forward(&self, l: &mut Ledger, kept: &mut Kept, keep: Keep) -> usize {
        kept.projected = l.take(self.attention_projected());
        kept.z = l.take(self.rows());
        kept.small = l.take_f32(self.n * self.config.num_attention_heads);
        let out = l.take(self.rows());
        if !keep.activations() {
            l.free(kept.projected + kept.z + kept.small);
        }
        out
    }

    fn attention_backward(&self, l: &mut Ledger, kept: &Kept) -> usize {
        let d_o = l.take(self.rows());
        let dprojected = l.take(self.attention_projected());
        l.free(kept.projected + kept.z + kept.small + d_o);
        let dx = l.take(self.rows());
        l.free(dprojected);
        dx
    }

    /// Of a Mamba layer: n rows of inner channels, and of `[step | B | C]`.
    fn mamba_rows(&self) -> (usize, usize) {
        let config = self.config;
        (self.n * config.inner_size(), self.n * (config.step_rank() + 2 * config.state_size))
    }

    fn mamba_forward(&self, l: &mut Ledger, kept: &mut Kept, keep: Keep) -> usize {
        let (inner, selected) = self.mamba_rows();
        let projected = l.take(2 * inner);
        let convolved = l.take(inner);
        let u = l.take(inner);
        l.free(convolved);
        kept.projected = projected + l.take(selected);
        let dt = l.take(inner);
        kept.z = l.take(inner);
        kept.small = if keep.activations() { l.take_f32(self.scan_states()) } else { 0 };
        l.touch_f32(selective_scan::forward_scratch(self.n, self.config.inner_size(), self.config.state_size));
        l.free(u + dt);
        let gated = l.take(inner);
        let out = l.take(self.rows());
        l.free(gated);
        if !keep.activations() {
            l.free(kept.projected + kept.z);
        }
        out
    }

    /// States that a scan keeps.
    fn scan_states(&self) -> usize {
        let kept: usize = self.lens.iter().map(|len| len.div_ceil(selective_scan::CHUNK)).sum();
        kept * self.config.inner_size() * self.config.state_size
    }

    fn mamba_backward(&self, l: &mut Ledger, kept: &Kept) -> usize {
        let (inner, selected) = self.mamba_rows();
        let dprojected = l.take(2 * inner);
        l.touch(inner);
        let dgated = l.take(inner);
        let dy = l.take(inner);
        l.free(dgated + kept.z);
        let convolved = l.take(inner);
        let u = l.take(inner);
        let dt = l.take(inner);
        let du = l.take(inner);
        let ddt = l.take(inner);
        let dselected = l.take(selected);
        let scratch = selective_scan::backward_scratch(self.n, self.config.inner_size(), self.config.state_size);
        let scratch: usize = scratch.into_iter().map(|floats| l.take_f32(floats)).sum();
        l.free(scratch + kept.small + dy + dt);
        l.touch(self.n * self.config.step_rank());
        l.free(ddt);
        l.touch(inner);
        l.free(dselected + u);
        let dconvolved = l.take(inner);
        l.free(du + convolved);
        let dinput = l.take(inner);
        // Partial sums of the convolution's gradient.
        let blocks = self.n.div_ceil(partials::block_rows(self.n, self.config.inner_size()));
        l.touch_f32(blocks * (self.config.conv_kernel + 1) * self.config.inner_size());
        l.free(dconvolved + dinput + kept.projected);
        let dx = l.take(self.rows());
        l.free(dprojected);
        dx
    }

    fn projections(&self) -> usize {
        2 + usize::from(!self.config.share_qk) + usize::from(self.config.use_gate)
    }

    fn state_len(&self) -> usize {
        self.config.num_attention_heads * Learner::of(self.config).state_len(self.config.head_dim())
    }

    fn checkpoints(&self, group: usize) -> usize {
        // Without mini-batches, the state that a sequence began with.
        let per_sequence = |len: &usize| self.config.mini_batch().map_or(1, |k| len.div_ceil(k).div_ceil(group));
        self.lens.iter().map(per_sequence).sum::<usize>() * self.state_len()
    }

    fn open_rows(&self) -> usize {
        let row = FastWeights::row_len(self.config.ttt_layer_type, self.config.head_dim());
        self.config.num_attention_heads * self.config.mini_batch().map_or(0, |k| k - 1) * row
    }

    /// What crosses a cut of `slots` sequences of a layer, or its gradients.
    pub(super) fn take_carried(&self, l: &mut Ledger, slots: usize) -> usize {
        match self.config.mixer {
            Mixer::Ttt => l.take_f32(slots * self.state_len()) + self.take_windows(l, slots),
            Mixer::Attention => {
                let rows = slots * self.tokens.next_multiple_of(64) * self.config.key_value_size();
                l.take(rows) + l.take(rows)
            }
            Mixer::Mamba => {
                let inner = slots * self.config.inner_size();
                l.take(inner * (self.config.conv_kernel - 1)) + l.take_f32(inner * self.config.state_size)
            }
        }
    }

    fn take_windows(&self, l: &mut Ledger, slots: usize) -> usize {
        let windows = usize::from(self.config.pre_conv) + usize::from(self.config.share_qk);
        (0..windows).map(|_| l.take(slots * (self.config.conv_kernel - 1) * self.config.hidden_size)).sum()
    }

    /// States of `slots` sequences of a layer.
    pub(super) fn take_states(&self, l: &mut Ledger, slots: usize) -> usize {
        let open = if self.config.mixer == Mixer::Ttt { l.take_f32(slots * self.open_rows()) } else { 0 };
        self.take_carried(l, slots) + open
    }

    /// What a block keeps of the states that its sequences began with, and what is left of the copies that it worked on.
    pub(super) fn take_start(&self, l: &mut Ledger, copies: usize) -> (usize, usize) {
        match self.config.mixer {
            Mixer::Ttt => (self.take_windows(l, self.lens.len()), copies),
            // The copies themselves, from which the backward pass reads keys and values.
            Mixer::Attention => (copies, 0),
            Mixer::Mamba => (l.take(self.lens.len() * (self.config.conv_kernel - 1) * self.config.inner_size()), copies),
        }
    }

    /// What a block that keeps its input alone also keeps of the states it began with.
    pub(super) fn take_whole_start(&self, l: &mut Ledger, of: Of) -> usize {
        match of {
            // What begins here has no keys and values yet.
            Of::Copies(_) if self.config.mixer == Mixer::Attention && self.lens.iter().all(|len| *len >= self.tokens) => 0,
            Of::Copies(slots) => self.take_carried(l, slots),
            Of::Slots | Of::None => 0,
        }
    }

    /// Angles of a pass.
    pub(super) fn take_rope(&self, l: &mut Ledger) -> usize {
        match self.config.mixer {
            Mixer::Ttt | Mixer::Mamba => 0,
            Mixer::Attention => {
                let angles = self.n * self.config.head_dim();
                l.take_f32(angles) + l.take_f32(angles)
            }
        }
    }
}
