//! What `ttt bench` is told.

use clap::ValueEnum;

use super::{DeviceArgs, Load, Recompute};

const BENCH_EXAMPLES: &str = "\
Weights are random (seed 0). Beside each speed stand the parts of what this machine reaches, measured in the same run: of the \
arithmetic of matrix products, and of the speed of reading main memory (above 100 % where data stays in caches).

Examples:
  ttt bench                                              everything, with the 125M model
  ttt bench prefill --preset 125m --inner mlp --length 512
  ttt bench decode --mixer attention                     the Transformer of the same size
  ttt bench train --preset small --batch 8 --length 256  whole steps with clip and AdamW
  ttt bench train --no-optimizer                         forward and backward only
  ttt bench decode runs/mine --after 64,4096,65536 --keep  latency and memory against length, for `ttt compare`
  ttt bench ops                                          every operation on its own
  ttt bench state                                        saving and restoring a state
  ttt bench serve --streams 64 --seconds 60              a server that runs: throughput, latencies, errors";

/// Arguments of `ttt bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = BENCH_EXAMPLES)]
pub struct Bench {
    /// What to measure [default: train, prefill and decode]
    #[arg(value_name = "WHAT")]
    pub what: Option<BenchWhat>,
    /// Settings file (.toml), and settings as key=value, whose model is measured instead of a preset
    #[arg(value_name = "CONFIG.toml | key=value")]
    pub settings: Vec<String>,
    /// Size: tiny, small (hidden 256, 4 layers, 256 ids), 125m, 350m, 760m or 1.3b; of ttt with the Mamba backbone and convolutions; of mamba also 130m, 370m, 790m or 1.4b [default: 125m]
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// What mixes tokens: ttt, attention (a Transformer) or mamba [default: ttt]
    #[arg(long, value_name = "NAME")]
    pub mixer: Option<MixerName>,
    /// Inner model of ttt [default: linear]
    #[arg(long, value_name = "NAME")]
    pub inner: Option<InnerName>,
    /// Sequences at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive())]
    pub batch: u64,
    /// Tokens of each
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive())]
    pub length: u64,
    /// Measurements, after one that does not count
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive())]
    pub repeat: u64,
    /// prefill and decode: type that the large matrices are held in, f32, bf16 or int8 [default: f32]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<ttt::Storage>,
    /// train: only forward and backward, without clip and AdamW
    #[arg(long)]
    pub no_optimizer: bool,
    /// train: learn the initial fast weights alone
    #[arg(long, conflicts_with = "no_optimizer")]
    pub only_initial_state: bool,
    /// decode: tokens that have been read before, as many measurements [default: 64]
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..1 << 32))]
    pub after: Vec<u64>,
    /// decode, of a run: keep the result there as results/NAME.json, for `ttt compare` [default name: decode]
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "decode")]
    pub keep: Option<String>,
    /// prefill: logits of every position, not of the last one only
    #[arg(long)]
    pub all_logits: bool,
    /// decode on a GPU: temperature that tokens are chosen at; 0 takes the likeliest
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    /// decode on a GPU: choose among the k likeliest tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// decode on a GPU: choose among the likeliest tokens whose probabilities reach this sum
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f64,
    /// train: what to compute again in the backward pass; auto is as little as fits [default: none]
    #[arg(long, value_name = "WHAT")]
    pub recompute: Option<Recompute>,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub load: Load,
    #[command(flatten)]
    pub device: DeviceArgs,
}

fn positive() -> impl clap::builder::TypedValueParser<Value = u64> {
    clap::value_parser!(u64).range(1..1 << 24)
}

/// What `ttt bench` measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchWhat {
    // Steps of training
    Train,
    // Reading a prompt
    Prefill,
    // Generating token by token, after 64 tokens or those of --after
    Decode,
    // Every operation on its own
    Ops,
    // Saving and restoring a state
    State,
    // A server that runs
    Serve,
}

/// What mixes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MixerName {
    // TTT layers
    Ttt,
    // Attention: a Transformer
    Attention,
    // Mamba
    Mamba,
}

impl MixerName {
    /// As settings spell it.
    pub fn name(self) -> &'static str {
        match self {
            MixerName::Ttt => "ttt",
            MixerName::Attention => "attention",
            MixerName::Mamba => "mamba",
        }
    }
}

/// An inner model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InnerName {
    // TTT-Linear
    Linear,
    // TTT-MLP
    Mlp,
}
