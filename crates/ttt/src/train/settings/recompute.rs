//! What the backward pass computes again instead of keeping, and what fits in memory.

use serde::{Deserialize, Serialize};

use super::{Carry, Settings};
use crate::config::Config;
use crate::device::Device;
use crate::layer::Keep;
use crate::plan::{Place, Segments, Step};
use crate::{Error, error};

/// What the backward pass computes again instead of keeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// On a GPU as little as fits in its memory: the first of the next three; on a CPU nothing.
    Auto,
    /// Nothing but the fast weights inside a checkpoint group.
    None,
    /// The inner loop of every TTT layer, from the fast weights that its sequences began with.
    Inner,
    /// Every block, from its input.
    Block,
    /// With gradient across cuts: every segment, from the states at its beginning.
    Segment,
}

impl Recompute {
    /// What a pass that keeps `keep` computes again.
    ///
    /// # Panics
    /// When it keeps nothing.
    pub fn of(keep: Keep) -> Recompute {
        match keep {
            Keep::Saved { .. } => Recompute::None,
            Keep::Start { .. } => Recompute::Inner,
            Keep::Input { .. } => Recompute::Block,
            Keep::Nothing => panic!("a training step keeps something"),
        }
    }

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Recompute::Auto => "auto",
            Recompute::None => "none",
            Recompute::Inner => "inner",
            Recompute::Block => "block",
            Recompute::Segment => "segment",
        }
    }
}

/// Mini-batches between two kept states of the fast weights on a GPU, at least: between them it undoes updates, which is cheap.
const GPU_GROUP: usize = 16;

/// Of the memory there is, the part that a plan may fill; the rest is for what lies unused between tensors.
const FILLED: f64 = 0.96;

impl Settings {
    /// What the segments of a step need of memory beside their own; nothing when sequences are not cut.
    pub fn planned_segments(&self) -> Option<Segments> {
        self.carries().then(|| Segments {
            slots: self.sequences_per_step(),
            per_step: self.train.segments_per_step,
            sequence: self.train.sequence_length,
            gradient: self.train.carry == Carry::Gradient,
            recompute: self.train.recompute == Recompute::Segment,
        })
    }

    /// A step of this run, for the plan of its memory; with [`Recompute::Auto`] one that keeps all activations.
    pub fn planned_step<'c>(&self, config: &'c Config, place: Place) -> Step<'c> {
        let group = match place {
            Place::Cpu => self.train.checkpoint_group.max(1),
            Place::Gpu(_) => self.train.checkpoint_group.max(GPU_GROUP),
        };
        let keep = match self.train.recompute {
            Recompute::Auto | Recompute::None | Recompute::Segment => Keep::Saved { group },
            Recompute::Inner => Keep::Start { group },
            Recompute::Block => Keep::Input { group },
        };
        let lens = vec![self.segment_length(); self.micro_batch()];
        let (segments, only_initial_state) = (self.planned_segments(), self.train.only_initial_state);
        Step { segments, only_initial_state, ..Step::new(config, &lens, keep, place) }
    }

    /// What a forward pass keeps, where tensors can have `room` bytes in all ([`crate::device::memory::Pool::room`]).
    pub fn keep(&self, config: &Config, place: Place, room: Option<usize>) -> Keep {
        let step = self.planned_step(config, place);
        match room {
            Some(room) if self.train.recompute == Recompute::Auto => step.keep_within(filled(room)),
            _ => step.keep,
        }
    }

    /// An error of a run with these settings; that of too little memory says which settings fit.
    pub(crate) fn advised(&self, device: &Device, error: Error) -> Error {
        let (Error::OutOfGpuMemory { in_use, free, .. }, Ok(config)) = (&error, self.model_config()) else { return error };
        let step = self.planned_step(&config, Place::of(device, self.train.precision.dtype(device)));
        let advice = advice(&step, in_use + free, "train.micro_batch=");
        error.with_advice(advice)
    }
}

/// Of `room` bytes those that a plan may fill.
pub fn filled(room: usize) -> usize {
    (room as f64 * FILLED) as usize
}

/// What to do when a step does not fit in `room` bytes. `sequences` is how the number of sequences at once is set.
pub fn advice(step: &Step<'_>, room: usize, sequences: &str) -> String {
    let memory = step.memory();
    let of = error::size(room);
    match step.fit(filled(room)) {
        Some(fit) => {
            let fewer = if fit.sequences < step.lens.len() { format!("{sequences}{} ", fit.sequences) } else { String::new() };
            let recompute = Recompute::of(fit.keep).name();
            format!("`{fewer}--recompute {recompute}` needs {} of the {of} there are for it", error::size(fit.bytes))
        }
        None => {
            let fixed = error::size(memory.fixed());
            format!(
                "weights, gradients and moments alone are {fixed}, and not one sequence beside them fits into {of}: take shorter \
                     sequences or a smaller model (`ttt plan --device cuda` says what each needs)"
            )
        }
    }
}
