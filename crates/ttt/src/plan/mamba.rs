//! The allocations of a block with a Mamba layer.

use super::{Flops, Kept, Ledger, Of, Shape};
use crate::config::Config;
use crate::ops::{partials, selective_scan};

/// Floating-point operations per token.
pub(super) fn flops(config: &Config) -> Flops {
    let (d, inner, v) = (config.hidden_size as f64, config.inner_size() as f64, config.vocab_size as f64);
    let (n, rank) = (config.state_size as f64, config.step_rank() as f64);
    let layer = 2.0 * inner * (3.0 * d + 2.0 * rank + 2.0 * n);
    // As the authors count: nine operations for each state of each channel.
    let scan = 9.0 * inner * n;
    let layers = config.num_hidden_layers as f64;
    let (matmul, inner_loop) = (layers * layer + 2.0 * d * v, layers * scan);
    Flops { matmul, inner_loop, training: 3.0 * (matmul + inner_loop) }
}

impl Shape<'_> {
    /// Elements of an activation of the inner width.
    fn wide(&self) -> usize {
        self.n * self.config.inner_size()
    }

    /// Elements of `[step | B | C]`.
    fn selected(&self) -> usize {
        self.n * (self.config.step_rank() + 2 * self.config.state_size)
    }

    fn take_window(&self, l: &mut Ledger, slots: usize) -> usize {
        l.take(slots * (self.config.conv_kernel - 1) * self.config.inner_size())
    }

    /// State of `slots` sequences of a Mamba layer, or its gradient.
    pub(super) fn take_mamba_state(&self, l: &mut Ledger, slots: usize) -> usize {
        self.take_window(l, slots) + l.take(slots * self.config.state_size * self.config.inner_size())
    }

    /// Kept states of the scan.
    fn take_kept(&self, l: &mut Ledger) -> usize {
        let chunks: usize = self.lens.iter().map(|len| len.div_ceil(selective_scan::CHUNK)).sum();
        l.take(chunks * self.config.state_size * self.config.inner_size())
    }

    /// [`Shape::forward`] of a Mamba block.
    pub(super) fn mamba_forward(&self, l: &mut Ledger, x: usize, keep: bool, of: Of) -> (usize, Kept) {
        let (rows, wide) = (self.rows(), self.wide());
        let mut kept = Kept { mixer_input: x, ..Kept::default() };
        let copies = match of {
            Of::Copies(_) => self.take_mamba_state(l, self.lens.len()),
            _ => 0,
        };
        let normed = l.take(rows);
        if let (Of::Copies(_), true) = (of, keep) {
            kept.start = self.take_window(l, self.lens.len());
        }
        kept.projected = l.take(2 * wide);
        let convolved = l.take(wide);
        let u = l.take(wide);
        l.free(convolved);
        let selected = l.take(self.selected());
        let dt = l.take(wide);
        kept.z = l.take(wide);
        kept.small = selected + if keep { self.take_kept(l) } else { 0 };
        l.touch(selective_scan::forward_scratch(self.n, self.config.inner_size(), self.config.state_size));
        l.free(u + dt);
        let gated = l.take(wide);
        let y = l.take(rows);
        l.free(gated + normed);
        if !keep {
            l.free(kept.projected + kept.small + kept.z + x);
        }
        l.free(copies);
        kept.activations = x + kept.projected + kept.small + kept.z + kept.start;
        (y, kept)
    }

    /// [`Shape::backward`] of a Mamba block.
    pub(super) fn mamba_backward(&self, l: &mut Ledger, kept: Kept, dy: usize, dstates: bool) -> usize {
        let (rows, wide) = (self.rows(), self.wide());
        let (inner, n) = (self.config.inner_size(), self.config.state_size);
        let own = if dstates { self.take_mamba_state(l, self.lens.len()) } else { 0 };
        let normed = l.take(rows);
        let dprojected = l.take(2 * wide);
        l.touch(wide);
        let dgated = l.take(wide);
        let dscan = l.take(wide);
        l.free(dgated + kept.z);
        let [convolved, u, dt, du, ddt] = [wide; 5].map(|floats| l.take(floats));
        let dselected = l.take(self.selected());
        let scratch: usize = selective_scan::backward_scratch(self.n, inner, n).into_iter().map(|floats| l.take(floats)).sum();
        l.free(scratch + kept.small + dscan + dt);
        l.touch(self.n * self.config.step_rank());
        l.free(ddt);
        l.touch(wide);
        l.free(dselected + u);
        let dconvolved = l.take(wide);
        l.free(du + convolved);
        let dstart = if dstates { self.take_window(l, self.lens.len()) } else { 0 };
        let dinput = l.take(wide);
        let blocks = self.n.div_ceil(partials::block_rows(self.n, inner));
        l.touch(blocks * (self.config.conv_kernel + 1) * inner);
        l.free(dstart + dconvolved + dinput + kept.projected);
        let dnormed = l.take(rows);
        l.free(dprojected + normed);
        let dx = l.take(rows);
        l.free(dnormed + kept.mixer_input + dy + own + kept.start);
        dx
    }
}
