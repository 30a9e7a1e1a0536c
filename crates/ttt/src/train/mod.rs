//! Training: settings of a run, schedules, and what a run writes beside its checkpoints.

mod batches;
mod carried;
pub mod checkpoint;
mod corpus;
pub(crate) mod keys;
mod lock;
pub mod loss;
pub mod metrics;
pub mod observe;
pub mod plot;
pub mod run;
pub mod schedule;
pub mod settings;
pub mod step;
pub mod tensorboard;

pub use corpus::{DataId, TextId};
pub use settings::{Recompute, Settings};
