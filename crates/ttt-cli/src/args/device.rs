//! Where to compute, and what is chosen for a whole pass.

use clap::ValueEnum;

/// Where to compute.
#[derive(Debug, clap::Args)]
pub struct DeviceArgs {
    /// Processor threads; 0 means all [default: 0]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Where to compute: auto, cpu, cuda (an NVIDIA GPU; cuda:1 is the second), or reference (the slow loops that define every
    /// operation)
    #[arg(long, value_name = "NAME", default_value = "auto", value_parser = DeviceName::parse)]
    pub device: DeviceName,
}

// In the enums of these modules the comments on values are no documentation comments: those would turn the table of flags into paragraphs.

/// A device by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// A GPU that there is and that runs the model, otherwise the processor.
    Auto,
    /// The processor.
    Cpu,
    /// The processor, with the plain loops that define every operation.
    Reference,
    /// A GPU, by number.
    Cuda(usize),
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceName::Auto => write!(f, "auto"),
            DeviceName::Cpu => write!(f, "cpu"),
            DeviceName::Reference => write!(f, "reference"),
            DeviceName::Cuda(0) => write!(f, "cuda"),
            DeviceName::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl DeviceName {
    pub(super) fn parse(text: &str) -> Result<DeviceName, String> {
        let number = |n: &str| n.parse().map_err(|_| format!("`{n}` is no number of a GPU; they are counted from 0"));
        match text {
            "auto" => Ok(DeviceName::Auto),
            "cpu" => Ok(DeviceName::Cpu),
            "reference" => Ok(DeviceName::Reference),
            "cuda" => Ok(DeviceName::Cuda(0)),
            _ => match text.strip_prefix("cuda:") {
                Some(n) => number(n).map(DeviceName::Cuda),
                None => Err("it is none of auto, cpu, cuda, cuda:N and reference".into()),
            },
        }
    }
}

/// Precision of the arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    // 32 bits
    F32,
    // 64 bits, to check results
    F64,
}

/// What the backward pass computes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Recompute {
    // On a GPU the first of those below that fits in its memory, otherwise nothing
    Auto,
    // Nothing
    None,
    // The inner loops of TTT layers
    Inner,
    // Every block, from its input
    Block,
}

impl From<Recompute> for ttt::train::Recompute {
    fn from(recompute: Recompute) -> Self {
        match recompute {
            Recompute::Auto => Self::Auto,
            Recompute::None => Self::None,
            Recompute::Inner => Self::Inner,
            Recompute::Block => Self::Block,
        }
    }
}
