//! Memory of a training step, and what of it fits.

use super::replay::{Ledger, Of, Shape};
use super::{Memory, Place};
use crate::config::{Config, Mixer};
use crate::device::memory::size_class;
use crate::layer::Keep;
use crate::params::ParamTable;

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

/// A training step, of which the largest micro-batch matters.
#[derive(Clone, Debug, PartialEq)]
pub struct Step<'c> {
    /// The model.
    pub config: &'c Config,
    /// Tokens of each sequence, or segment, of a micro-batch.
    pub lens: Vec<usize>,
    /// What its forward pass keeps.
    pub keep: Keep,
    /// Where segments continue states; otherwise all sequences start afresh.
    pub segments: Option<Segments>,
    /// Whether the initial fast weights alone are learned.
    pub only_initial_state: bool,
    /// Where it is made.
    pub place: Place,
}

/// A step that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Sequences at once.
    pub sequences: usize,
    /// What the forward pass keeps.
    pub keep: Keep,
    /// Bytes that it needs.
    pub bytes: usize,
}

impl<'c> Step<'c> {
    /// One whose sequences all start afresh and which learns everything.
    pub fn new(config: &'c Config, lens: &[usize], keep: Keep, place: Place) -> Step<'c> {
        Step { config, lens: lens.to_vec(), keep, segments: None, only_initial_state: false, place }
    }

    /// The memory that it needs.
    ///
    /// # Panics
    /// When `keep` keeps nothing.
    pub fn memory(&self) -> Memory {
        let Step { config, keep, segments, place, .. } = *self;
        assert!(keep != Keep::Nothing, "a training step keeps something");
        let tokens = segments.map_or(0, |s| s.sequence);
        let shape = Shape { config, n: self.lens.iter().sum(), lens: &self.lens, tokens };
        let l = &mut Ledger::new(place);
        let slots = segments.map_or(0, |s| s.slots);
        let of = if segments.is_some() { Of::Copies(slots) } else { Of::None };
        let mut states = shape.take_all(l, slots, Shape::take_states);
        let mut held = [0; 3];
        let mut hold = |pass: [usize; 3]| held.iter_mut().zip(pass).for_each(|(sum, part)| *sum += part);
        // States that grow, when so many segments of a step are still to be read.
        let len = self.lens.iter().copied().max().unwrap_or(0);
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
                hold(pass.held());
                hold([pass.hidden, 0, 0]);
                earlier.push((0, Some(pass)));
            }
        }
        let last = shape.forward_all(l, keep, of);
        hold(last.held());
        if across.is_some() {
            states += shape.take_all(l, slots, Shape::take_carried);
        }
        shape.backward_all(l, last, keep, of, across.is_some());
        for (i, (start, pass)) in earlier.into_iter().rev().enumerate() {
            let pass = pass.unwrap_or_else(|| at(i + 1).forward_all(l, keep, of));
            at(i + 1).backward_all(l, pass, keep, of, across.is_some());
            l.free(start);
        }
        let [activations, fast_weights, inner_gradients] = held;
        let transient = l.peak.saturating_sub(activations + fast_weights + inner_gradients + states);
        let table = ParamTable::new(config).0;
        let (parameters, copies) = (size_class(4 * table.len()), place.copies(table.len()));
        let libraries = place.libraries();
        let memory = Memory {
            weights: parameters,
            copies,
            gradients: parameters,
            optimizer: 2 * parameters,
            activations,
            fast_weights,
            inner_gradients,
            states,
            transient,
            libraries,
        };
        if self.only_initial_state { memory.of_initial_state(config) } else { memory }
    }

    /// The fastest way to make this step that needs at most `room` bytes, or else the one that needs least.
    ///
    /// # Panics
    /// As [`Step::fit`].
    pub fn keep_within(&self, room: usize) -> Keep {
        let fits = |keep: &Keep| Step { keep: *keep, ..self.clone() }.memory().total() <= room;
        let ways: Vec<Keep> = self.ways().collect();
        ways.iter().copied().find(fits).unwrap_or(ways[ways.len() - 1])
    }

    /// The fastest step that needs at most `room` bytes: with as many sequences at once as can be, up to those that it has, and then
    /// with as little computed again as can be. Nothing when not even one sequence fits.
    ///
    /// # Panics
    /// When the step keeps nothing.
    pub fn fit(&self, room: usize) -> Option<Fit> {
        let sequences = std::iter::successors(Some(self.lens.len()), |n| (*n > 1).then_some(n / 2));
        sequences.flat_map(|n| self.ways().map(move |keep| (n, keep))).find_map(|(sequences, keep)| {
            let bytes = Step { lens: self.lens[..sequences].to_vec(), keep, ..self.clone() }.memory().total();
            (bytes <= room).then_some(Fit { sequences, keep, bytes })
        })
    }

    /// What a step can keep, from the fastest way on.
    ///
    /// # Panics
    /// When this one keeps nothing.
    pub fn ways(&self) -> impl Iterator<Item = Keep> + use<> {
        let (Keep::Saved { group } | Keep::Start { group } | Keep::Input { group }) = self.keep else {
            panic!("a training step keeps something")
        };
        let inner = self.config.mixer == Mixer::Ttt && self.config.mini_batch().is_some();
        [Some(Keep::Saved { group }), inner.then_some(Keep::Start { group }), Some(Keep::Input { group })].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Inner;
    use crate::tensor::DType;

    const GPU: Place = Place::Gpu(DType::Bf16);

    /// Peaks of `ttt bench train --device cuda` on an H100, in GiB, with checkpoints every 4 mini-batches; at 1.3B the card was
    /// almost full.
    #[test]
    fn near_the_peaks_that_were_measured_on_a_gpu() {
        for (preset, inner, batch, measured) in [
            ("125m", Inner::Linear, 32, 22.5),
            ("125m", Inner::Mlp, 32, 48.6),
            ("125m", Inner::Mlp, 8, 13.7),
            ("1.3b", Inner::Linear, 16, 77.0),
        ] {
            let config = Config { vocab_size: 32_000, ..Config::preset(preset, inner).unwrap() };
            let memory = Step::new(&config, &vec![2048; batch], Keep::Saved { group: 4 }, GPU).memory();
            let planned = memory.total() as f64 / (1u64 << 30) as f64;
            assert!(
                (planned / measured - 1.0).abs() < 0.1,
                "{preset} {inner:?} {batch}: planned {planned}, measured {measured}: {memory:?}"
            );
        }
    }

    /// What fits needs no more than there is, and the next faster way more.
    #[test]
    fn what_fits_is_the_fastest_that_fits() {
        let config = Config::preset("125m", Inner::Mlp).unwrap();
        let step = Step::new(&config, &[2048; 8], Keep::Saved { group: 16 }, GPU);
        let all = [Keep::Saved { group: 16 }, Keep::Start { group: 16 }, Keep::Input { group: 16 }];
        let needs = all.map(|keep| Step { keep, ..step.clone() }.memory().total());
        assert!(needs[0] > needs[1] && needs[1] > needs[2], "{needs:?}");
        for (keep, bytes) in all.into_iter().zip(needs) {
            assert_eq!(step.fit(bytes), Some(Fit { sequences: 8, keep, bytes }));
        }
        // Half the sequences, in the fastest way that fits them.
        let half = Step::new(&config, &[2048; 4], Keep::Saved { group: 16 }, GPU);
        let ways = all.map(|keep| (keep, Step { keep, ..half.clone() }.memory().total()));
        let (keep, bytes) = ways.into_iter().find(|(_, bytes)| *bytes < needs[2]).unwrap();
        assert_eq!(step.fit(needs[2] - 1), Some(Fit { sequences: 4, keep, bytes }));
        assert_eq!(step.fit(1 << 30), None);
    }
}
