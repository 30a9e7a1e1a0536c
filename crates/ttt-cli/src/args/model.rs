//! What the commands are told that describe, check and rewrite models.

use std::path::PathBuf;

use super::{DeviceArgs, DeviceName, Precision};

const VERIFY_HELP: &str = "\
The reference holds `input_ids [b, t]` and `logits [b, t, v]`; also, if wanted, `loss` (with `targets` and `loss_mask`, both \
[b, t]; without targets the next inputs, of which a sequence's last position has none) and `grad.NAME` tensors. A quantity exceeds the tolerance when its largest error is more than that part of its largest \
magnitude, or is not a number; the exit code is then 1.";

/// Arguments of `ttt verify`.
#[derive(Debug, clap::Args)]
#[command(after_help = VERIFY_HELP)]
pub struct Verify {
    /// Folder of a model or a run
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// What the model should compute
    #[arg(value_name = "REFERENCE.safetensors")]
    pub reference: PathBuf,
    /// Largest relative error that is accepted
    #[arg(long, value_name = "X", default_value_t = 1e-4)]
    pub tolerance: f64,
    /// Precision of the arithmetic; f64 runs the plain reference loops
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: Precision,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `ttt plan`.
#[derive(Debug, clap::Args)]
pub struct Plan {
    /// Settings file (.toml) or model folder, and settings as key=value [default: the tiny run]
    #[arg(value_name = "CONFIG.toml | MODEL | key=value")]
    pub settings: Vec<String>,
    /// Sequences at once [default: train.micro_batch]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..1 << 20))]
    pub batch: Option<u64>,
    /// Tokens of each [default: train.sequence_length]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..1 << 24))]
    pub length: Option<u64>,
    /// Where it would be computed: auto, cpu, or cuda, for which no GPU need be there
    #[arg(long, value_name = "NAME", default_value = "auto", value_parser = DeviceName::parse)]
    pub device: DeviceName,
    /// GPU: memory to fit into, in GiB [default: what is free on the GPU, where there is one]
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..1 << 20))]
    pub memory: Option<u64>,
    /// Print a JSON object, in bytes and operations
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `ttt info`.
#[derive(Debug, clap::Args)]
pub struct Info {
    /// Folder of a model or a run, or a skill file
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Also list every tensor
    #[arg(long)]
    pub tensors: bool,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `ttt convert`.
#[derive(Debug, clap::Args)]
pub struct Convert {
    /// Folder of a model or a run
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Folder to write, new or empty
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// Number type of the weights: f32, bf16 or f16
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: ttt::hub::FileDType,
    /// Start another file before one is larger than this, such as 500MB or 2GiB [default: one file]
    #[arg(long, value_name = "SIZE", value_parser = crate::units::parse_bytes)]
    pub max_shard_size: Option<u64>,
}

pub(super) const IMPORT_EXAMPLES: &str = "\
Shapes and kinds come from the file. What it does not tell has the value of the official training scripts, \
and can be given as key=value with the names of config.json.

Examples:
  ttt import exp/125m/streaming_train_state models/125m --tokenizer llama/tokenizer.json
  ttt import streaming_params models/1.3b rope_theta=500000 --dtype bf16
  ttt verify models/125m reference.safetensors     whether it computes what the original does";

/// Arguments of `ttt import`.
#[derive(Debug, clap::Args)]
pub struct Import {
    /// The file streaming_params or streaming_train_state, or the folder it is in
    #[arg(value_name = "CHECKPOINT")]
    pub checkpoint: PathBuf,
    /// Folder to write, new or empty
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// Fields of config.json that the file does not tell, such as ttt_base_lr=0.1
    #[arg(value_name = "key=value")]
    pub overrides: Vec<String>,
    /// Tokenizer of the model to put beside it: `bytes`, or a tokenizer.json or its folder [default: none]
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: Option<String>,
    /// Number type of the weights: f32, bf16 or f16
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: ttt::hub::FileDType,
    /// Start another file before one is larger than this, such as 500MB or 2GiB [default: one file]
    #[arg(long, value_name = "SIZE", value_parser = crate::units::parse_bytes)]
    pub max_shard_size: Option<u64>,
}

const QUANTIZE_HELP: &str = "\
The projections, the embedding and the output matrix become narrow; norms, gates, convolutions and the initial fast weights stay \
f32. A bf16 folder has the official names, and other programs read it. An int8 folder has a scale for each row (output) and is for \
this program alone; training does not start from it. How well both models predict is measured on the same text.

Examples:
  ttt quantize runs/tiny small --to int8
  ttt quantize models/125m 125m-bf16 --to bf16 --data book.txt --tokens 50000";

/// Arguments of `ttt quantize`.
#[derive(Debug, clap::Args)]
#[command(after_help = QUANTIZE_HELP)]
pub struct Quantize {
    /// Folder of a model or a run
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Folder to write, new or empty
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// Type of the matrices: bf16 or int8
    #[arg(long, value_name = "TYPE")]
    pub to: ttt::Storage,
    /// Files, folders or 'globs' of texts to measure on [default: the Rust sources that the tiny run keeps for validation]
    #[arg(long, value_name = "PATH", num_args = 1.., conflicts_with = "no_eval")]
    pub data: Vec<String>,
    /// Read at most so many tokens of them
    #[arg(long, value_name = "N", default_value_t = 16_384, value_parser = clap::value_parser!(u64).range(2..1 << 40))]
    pub tokens: u64,
    /// How text becomes tokens: `bytes`, or a tokenizer.json or its folder [default: the model's]
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: Option<String>,
    /// Do not measure
    #[arg(long)]
    pub no_eval: bool,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}
