//! What can be typed. What it means is in [`crate::commands`].

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

/// Language models whose hidden state is itself a model that learns while it reads (TTT-Linear and TTT-MLP, arXiv 2407.04620).
#[derive(Debug, Parser)]
#[command(name = "ttt", version, max_term_width = 110, after_help = EXAMPLES)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  ttt train                                        a small model on the Rust sources on this machine
  ttt train --data texts/ --tokens 10M             the same model on your own texts
  ttt train configs/125m-ttt-linear.toml --data texts/ --tokenizer tokenizer.json
  ttt generate runs/tiny --prompt 'fn main() {'    continue a text
  ttt eval runs/tiny --data book.txt               bits per byte of a text that is new to the model
  ttt train --resume runs/tiny                     go on after Ctrl-C or a crash

A MODEL is a folder with config.json and model.safetensors, or the folder of a run.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model, or go on with a run
    Train(Train),
    /// Measure how well a model predicts texts that are new to it
    Eval(Eval),
    /// Continue a text
    Generate(Generate),
}

const TRAIN_EXAMPLES: &str = "\
Every setting can be given as key=value; configs/tiny.toml lists them with their meaning and default.
What is said more than once: a flag wins over key=value, that over CONFIG, that over the model folder and the default.

Examples:
  ttt train                                            2 million parameters, minutes on a laptop
  ttt train model.inner=mlp optimizer.learning_rate=2e-3
  ttt train --data 'texts/*.txt' --data more.jsonl.gz --tokens 10M --out runs/mine
  ttt train --resume runs/mine                         go on; exactly as if it had not stopped
  ttt train --init-from runs/mine --data letters.txt   a new run that starts from a trained model";

/// Arguments of `ttt train`.
#[derive(Debug, clap::Args)]
#[command(after_help = TRAIN_EXAMPLES)]
pub struct Train {
    /// Settings file (.toml), and settings as key=value, such as train.tokens=3M
    #[arg(value_name = "CONFIG.toml | key=value")]
    pub settings: Vec<String>,
    /// Train on a file, folder or 'glob': text, or .jsonl with `text` or `prompt` and `completion`; may be .gz or .zst; can be repeated
    #[arg(long, value_name = "PATH")]
    pub data: Vec<String>,
    /// How text becomes tokens: `bytes`, or a tokenizer.json or its folder
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: Option<String>,
    /// Folder of the run [default: runs/ and the name of CONFIG]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Go on with the run in this folder, from its newest checkpoint
    #[arg(long, value_name = "RUN", conflicts_with_all = ["out", "init_from"])]
    pub resume: Option<PathBuf>,
    /// Start from the weights, shape and tokenizer of a trained model
    #[arg(long, value_name = "MODEL")]
    pub init_from: Option<PathBuf>,
    /// Compute activations again in the backward pass instead of keeping them: slower, needs less memory
    #[arg(long, value_name = "WHAT")]
    pub recompute: Option<Recompute>,
    /// Seed of the initial weights and of the order of the data
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Tokens to train on in all, such as 300k or 3M
    #[arg(long, value_name = "N")]
    pub tokens: Option<String>,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Print only validation results and where things are
    #[arg(long, short)]
    pub quiet: bool,
}

/// Arguments of `ttt eval`.
#[derive(Debug, clap::Args)]
pub struct Eval {
    /// Folder of a model or a run
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Files, folders or 'globs' of texts, as for `ttt train`; each document is read from its beginning
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    pub data: Vec<String>,
    /// How text becomes tokens: `bytes`, or a tokenizer.json or its folder [default: the model's]
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: Option<String>,
    /// Forget everything after this many tokens [default: never]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub context: Option<u64>,
    /// What stands on a line of its own between the documents of a plain text [default: a file is one document]
    #[arg(long, value_name = "LINE")]
    pub separator: Option<String>,
    /// Also print the result of each document
    #[arg(long)]
    pub per_document: bool,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
    /// Precision of the arithmetic; f64 runs the plain reference loops
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: Precision,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `ttt generate`.
#[derive(Debug, clap::Args)]
pub struct Generate {
    /// Folder of a model or a run
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Text to continue
    #[arg(long, short, value_name = "TEXT", group = "input")]
    pub prompt: Option<String>,
    /// File with the text to continue; - reads the standard input
    #[arg(long, value_name = "FILE", group = "input")]
    pub prompt_file: Option<PathBuf>,
    /// Token ids to continue, exactly these, such as 1,2,3
    #[arg(long, value_name = "IDS", value_delimiter = ',', num_args = 1, group = "input")]
    pub prompt_tokens: Option<Vec<u32>>,
    /// Stop after so many tokens
    #[arg(long, short = 'n', value_name = "N", default_value_t = 100)]
    pub max_new_tokens: usize,
    /// Divides the logits: below 1 is more careful, 0 always takes the likeliest token
    #[arg(long, short, value_name = "T", default_value_t = 1.0)]
    pub temperature: f64,
    /// Choose among the K likeliest tokens; 0 means all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f64,
    /// Seed of the choice; the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Go on after the token that ends a text
    #[arg(long)]
    pub no_eos: bool,
    /// Print the prompt as well
    #[arg(long)]
    pub echo: bool,
    /// How text becomes tokens: `bytes`, or a tokenizer.json or its folder [default: the model's]
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: Option<String>,
    /// Print one JSON object with the new `tokens`, their `text` (null without a tokenizer) and `logprobs`, when all is done
    #[arg(long)]
    pub json: bool,
    /// Precision of the arithmetic; f64 runs the plain reference loops
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: Precision,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Say how fast it was, on the standard error
    #[arg(long, short)]
    pub verbose: bool,
}

/// Where to compute.
#[derive(Debug, clap::Args)]
pub struct DeviceArgs {
    /// Processor threads; 0 means all [default: 0]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Where to compute: `reference` runs the slow loops that define every operation
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub device: DeviceName,
}

/// A device by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// The fastest that there is
    Auto,
    /// The processor
    Cpu,
    /// The processor, with the plain loops that define every operation
    Reference,
}

/// Precision of the arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// 32 bits
    F32,
    /// 64 bits, to check results
    F64,
}

/// What the backward pass computes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Recompute {
    /// Nothing
    None,
    /// Every block, from its input
    Block,
}
