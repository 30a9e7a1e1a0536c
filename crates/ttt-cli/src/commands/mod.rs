//! One file per command.

pub mod bench;
pub mod chat;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod import;
pub mod info;
pub mod kernels;
pub mod plan;
pub mod quantize;
pub mod read;
pub mod serve;
pub mod state;
pub mod task;
pub mod tokenizer;
pub mod train;
pub mod verify;
