//! Language models whose hidden state is itself a model that learns while it reads: Test-Time Training (TTT) layers (Sun et al.,
//! "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", arXiv 2407.04620).
//!
//! The hidden state of a TTT layer is a small model f with weights W. Every token is projected into a training view k, a label
//! view v and a test view q; W takes a gradient step on reconstructing v from k, also at test time, and the output is f(q; W).
//!
//! # Read a text into a state, fork it, and generate from both
//!
//! ```
//! use ttt::config::{Config, Inner};
//! use ttt::data::Tokenizer;
//! use ttt::generate::{Generator, Sampling};
//! use ttt::{Device, DType, Lm};
//!
//! # fn main() -> ttt::Result<()> {
//! let device = Device::cpu()?;
//! // With a trained model: `Lm::load("runs/tiny/final", &device, DType::F32)?` and `Tokenizer::from_folder(...)`.
//! let model = Lm::new(&Config::preset("tiny", Inner::Linear)?, &device, DType::F32, 0)?;
//! let tokenizer = Tokenizer::bytes(model.config().vocab_size);
//!
//! // The state has the same size whatever the length of the text.
//! let mut state = model.states(1)?;
//! let mut generator = Generator::new(&model, Sampling { temperature: 0.8, ..Sampling::default() })?;
//! generator.read(&mut state, 0, &tokenizer.encode("Once upon a time, a hidden state")?)?;
//!
//! // A fork is an independent copy: both go on from the same memory of the text.
//! let mut fork = state.fork()?;
//! for (state, next) in [(&mut state, " learned."), (&mut fork, " forgot.")] {
//!     generator.read(state, 0, &tokenizer.encode(next)?)?;
//!     let mut text = tokenizer.stream();
//!     for _ in 0..8 {
//!         let choice = generator.choose();
//!         print!("{}", text.push(choice.token));
//!         generator.read(state, 0, &[choice.token])?;
//!     }
//!     println!("{}", text.finish());
//! }
//! assert!(state.position(0) > fork.position(0));
//! # Ok(())
//! # }
//! ```
//!
//! # Symbols
//!
//! Names are the field's; the paper's letters appear as local names only, and mean everywhere:
//!
//! | here | paper | meaning |
//! |---|---|---|
//! | `n`, `t` | t | tokens; rows of activations `[n, ...]` |
//! | `D` | d | `hidden_size`, width of the residual stream |
//! | `h`, `d` | | heads and head size, `D = h d` |
//! | `K` | b | `mini_batch_size`, tokens of one inner gradient step |
//! | `q`, `k`, `v` | θ_Q x, θ_K x, θ_V x | test, training and label view |
//! | `W1, b1, W2, b2` | W | fast weights: the hidden state; their learned start is W0 |
//! | `f` | f | the inner model; also its inner width `4 d` in TTT-MLP |
//! | `lr`, `tok` | η | inner learning rate: `η[i, j] = tok[i] * lr[j]`, output token i, gradient of token j |
//! | `gamma`, `beta` | | weight and bias of the LayerNorm inside f |
//! | `Z`, `z` | z | pre-activation of f's LayerNorm; output of the inner loop |
//! | `G`, `Ĝ` | ∇ℓ | gradient of the inner loss with respect to Z; the same times `lr` |
//! | `g` | | mini-batches between two kept states in the backward pass, `scan_checkpoint_group_size` |
//! | `S`, `R` | | elements of one head's fast weights; of one row of its open mini-batch |
//!
//! # Where the paper is
//!
//! | section | module |
//! |---|---|
//! | 2.1-2.2 TTT layers, training a network of them | [`layer`], [`train`] |
//! | 2.3 outer-loop parameters θ, W0, η | [`params`], [`layer::TttLayer`], [`ops::inner_lr`], [`ops::token_scale`] |
//! | 2.4 mini-batch TTT, 2.5 dual form, appendix A | [`ops::ttt_linear`], [`ops::ttt_mlp`] |
//! | 2.6 theorems | `tests/theorems.rs` |
//! | 2.7 instantiations, Mamba and Transformer backbone | [`config`], [`layer::Block`] |
//! | 3 the Transformer baseline | [`layer::AttentionLayer`], [`ops::attention`] |
//! | 3 the Mamba baseline | [`layer::MambaLayer`], [`ops::selective_scan`] |
//! | appendix C recipe, checkpointing through time | [`train::settings`], [`ops::inner`] |
//!
//! Dependencies point one way: `train`, `eval`, `generate` use [`lm`], which uses [`layer`], which uses [`ops`] on a [`device`].

pub mod batch;
pub mod chart;
pub mod config;
pub mod data;
pub mod device;
pub mod dstates;
mod error;
pub mod eval;
pub mod generate;
pub mod hub;
pub mod import;
pub mod layer;
pub mod lm;
pub mod narrow;
pub mod ops;
pub mod params;
pub mod plan;
pub mod results;
pub mod state;
pub mod tensor;
pub mod train;
pub mod verify;
pub mod weights;

pub use batch::Batch;
pub use config::Config;
pub use device::Device;
pub use dstates::DStates;
pub use error::{AtPath, Error, Result};
pub use lm::Lm;
pub use state::States;
pub use tensor::DType;
pub use weights::{Storage, Weights};
