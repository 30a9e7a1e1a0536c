//! The errors that a user, a file or a request can cause.

use std::path::{Path, PathBuf};

/// Result of everything in this crate that can fail for a reason outside the code.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be done. Every message says what to do about it.
///
/// Broken contracts between functions (a wrong shape, say) are bugs and panic instead; the functions say so under `# Panics`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file was read, but its contents are not what they should be.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, where, and what to do.
        message: String,
    },
    /// A configuration value is missing, unknown or impossible.
    #[error("configuration: {0}")]
    Config(String),
    /// The training or evaluation data cannot be used.
    #[error("data: {0}")]
    Data(String),
    /// A text cannot be encoded, or ids cannot be decoded.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A request to an operation that its inputs cannot satisfy (a state of another model, a token outside the vocabulary).
    #[error("{0}")]
    Invalid(String),
    /// The device has not enough memory.
    #[error(
        "out of memory: {wanted} bytes were asked for with {in_use} in use; a smaller batch, shorter sequences or `--recompute block` need less"
    )]
    OutOfMemory {
        /// Bytes of the request that failed.
        wanted: usize,
        /// Bytes held by tensors at that moment.
        in_use: usize,
    },
    /// A GPU has not enough memory.
    #[error(
        "out of GPU memory: {wanted} bytes were asked for with {in_use} in use; {free} of {total} are free; a smaller micro-batch, \
         shorter sequences or `--recompute block` need less (`ttt plan` says how much)"
    )]
    OutOfGpuMemory {
        /// Bytes of the request that failed.
        wanted: usize,
        /// Bytes held by this program's tensors at that moment.
        in_use: usize,
        /// Bytes that nobody holds.
        free: usize,
        /// Bytes of the GPU.
        total: usize,
    },
    /// A GPU, its driver or its libraries cannot be used.
    #[error("{0}")]
    Device(String),
    /// A number became infinite or not-a-number.
    #[error(
        "step {step}: `{tensor}` is not finite (first at element {element}); lower the learning rate, or resume from an earlier checkpoint"
    )]
    NotFinite {
        /// Optimizer step, counted from 0.
        step: u64,
        /// Name of the tensor.
        tensor: String,
        /// Index of the first bad element.
        element: usize,
    },
    /// The work was stopped by request, after its results were saved.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An [`Error::Io`] about `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_owned(), source }
    }

    /// An [`Error::Format`] about `path`.
    pub fn format(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Format { path: path.as_ref().to_owned(), message: message.into() }
    }
}

/// Adds the path to an I/O result.
pub trait AtPath<T> {
    /// Turns an [`std::io::Error`] into an [`Error::Io`] that names `path`.
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> AtPath<T> for std::io::Result<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| Error::io(path, e))
    }
}
