//! Training: settings of a run, schedules, and what a run writes beside its checkpoints.

pub mod checkpoint;
mod corpus;
pub(crate) mod keys;
pub mod loss;
pub mod metrics;
pub mod observe;
pub mod plot;
pub mod run;
pub mod schedule;
pub mod settings;
pub mod step;
pub mod tensorboard;

pub use settings::Settings;
