//! The safetensors format: 8 bytes of header length (little endian), a JSON header, the tensors' bytes without gaps.
//!
//! [`File`] reads through a memory map and trusts nothing in the header; [`write()`] streams to a temporary file and renames it.

mod read;
mod write;

pub use ::safetensors::Dtype;
pub use read::{File, TensorRef};
pub use write::{Source, write, write_to};

/// Longest header that is read, in bytes: the format's own limit.
const MAX_HEADER: usize = 100_000_000;
