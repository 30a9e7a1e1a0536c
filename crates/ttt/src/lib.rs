//! Language models whose hidden state is itself a model that learns while it reads: Test-Time Training layers (Sun et al.,
//! "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", arXiv 2407.04620).

pub mod batch;
pub mod config;
pub mod data;
pub mod device;
mod error;
pub mod eval;
pub mod generate;
pub mod hub;
pub mod layer;
pub mod lm;
pub mod ops;
pub mod params;
pub mod plan;
pub mod state;
pub mod tensor;
pub mod train;
pub mod verify;

pub use error::{AtPath, Error, Result};
