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
        "out of GPU memory: {} were asked for, {} of {} are free and {} are in use; {advice}",
        size(*wanted), size(*free), size(*total), size(*in_use)
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
        /// What to do: settings that fit, where it is known what was wanted.
        advice: String,
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

/// Bytes as people read them.
pub(crate) fn size(bytes: usize) -> String {
    match bytes as f64 / f64::from(1 << 20) {
        mib if mib < 1000.0 => format!("{mib:.1} MiB"),
        mib => format!("{:.1} GiB", mib / 1024.0),
    }
}

impl Error {
    /// An [`Error::OutOfGpuMemory`] with other advice; another error as it is.
    pub fn with_advice(self, advice: String) -> Self {
        match self {
            Error::OutOfGpuMemory { wanted, in_use, free, total, .. } => {
                Error::OutOfGpuMemory { wanted, in_use, free, total, advice }
            }
            other => other,
        }
    }

    /// An [`Error::OutOfGpuMemory`] of which no more is known.
    pub(crate) fn out_of_gpu_memory(wanted: usize, in_use: usize, free: usize, total: usize) -> Self {
        let advice =
            "a smaller micro-batch, shorter sequences or `--recompute block` need less (`ttt plan --device cuda` says how much)";
        Error::OutOfGpuMemory { wanted, in_use, free, total, advice: advice.into() }
    }

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
