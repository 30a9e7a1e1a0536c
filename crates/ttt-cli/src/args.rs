//! What can be typed. What it means is in [`crate::commands`].

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

/// Language models whose hidden state is itself a model that learns while it reads (TTT-Linear and TTT-MLP, arXiv 2407.04620).
#[derive(Debug, Parser)]
#[command(name = "ttt", version, max_term_width = 120, after_help = EXAMPLES)]
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
    /// Compare a model with reference results, to see that its weights were read right
    Verify(Verify),
    /// Say what a model costs: parameters, memory by part, arithmetic
    Plan(Plan),
    /// Describe a model folder, a run or a skill file
    Info(Info),
    /// Write a model in another number type, or in several files
    Convert(Convert),
    /// Make a model folder of a checkpoint of the official JAX code
    #[command(after_help = IMPORT_EXAMPLES)]
    Import(Import),
    /// Write a model with bf16 or int8 matrices, and say what that changes
    Quantize(Quantize),
    /// Train a tokenizer, or try one
    #[command(subcommand)]
    Tokenizer(Tokenizer),
    /// Measure speed on this machine
    Bench(Bench),
    /// Check this machine and this program
    Doctor(Doctor),
    /// Print a shell's completion script
    #[command(after_help = "Example:\n  ttt completions bash > ~/.local/share/bash-completion/completions/ttt")]
    Completions(Completions),
}

const TRAIN_EXAMPLES: &str = "\
Every setting can be given as key=value; configs/tiny.toml lists them with their meaning and default. \
A flag wins over key=value, that over CONFIG, that over the model folder and the default.

Examples:
  ttt train                                            2 million parameters, minutes on a laptop
  ttt train model.inner=mlp optimizer.learning_rate=2e-3
  ttt train --data 'texts/*.txt' --data more.jsonl.gz --tokens 10M --out runs/mine
  ttt train --resume runs/mine                         go on; exactly as if it had not stopped
  ttt train --init-from runs/mine --data letters.txt   a new run that starts from a trained model
  ttt train --only-initial-state --init-from runs/mine --data letters.txt --out runs/letters";

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
    /// Learn a skill: the initial fast weights of the model of --init-from, and nothing else; written to skill.safetensors
    #[arg(long)]
    pub only_initial_state: bool,
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
    /// Start from a skill, the initial fast weights that `ttt train --only-initial-state` learned for this model
    #[arg(long, value_name = "FILE")]
    pub skill: Option<PathBuf>,
    /// Files, folders or 'globs' of texts, as for `ttt train`; each document is read from its beginning; of a prompt and its completion only the completion is judged
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
    /// Type that the large matrices are held in: f32, bf16 or int8 (the rest stays f32); f64 runs the plain reference loops [default: as stored]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<ttt::Storage>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `ttt generate`.
#[derive(Debug, clap::Args)]
pub struct Generate {
    /// Folder of a model or a run
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Start from a skill, the initial fast weights that `ttt train --only-initial-state` learned for this model
    #[arg(long, value_name = "FILE")]
    pub skill: Option<PathBuf>,
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
    /// Type that the large matrices are held in: f32, bf16 or int8 (the rest stays f32); f64 runs the plain reference loops [default: as stored]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<ttt::Storage>,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Say how fast it was, on the standard error
    #[arg(long, short)]
    pub verbose: bool,
}

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

const IMPORT_EXAMPLES: &str = "\
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

/// The commands of `ttt tokenizer`.
#[derive(Debug, Subcommand)]
pub enum Tokenizer {
    /// Train a byte-level BPE tokenizer
    Train(TokenizerTrain),
    /// Print the ids of a text
    Encode(TokenizerEncode),
    /// Print the text of ids
    Decode(TokenizerDecode),
    /// Describe a tokenizer
    Info(TokenizerName),
}

/// Arguments of `ttt tokenizer train`.
#[derive(Debug, clap::Args)]
pub struct TokenizerTrain {
    /// Files, folders or 'globs' of texts, as for `ttt train`
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    pub data: Vec<String>,
    /// Number of ids, at least 258: every byte, <s> and </s>
    #[arg(long, value_name = "N")]
    pub vocab_size: usize,
    /// Folder to write tokenizer.json to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// What stands on a line of its own between the documents of a plain text
    #[arg(long, value_name = "LINE")]
    pub separator: Option<String>,
}

/// A tokenizer.
#[derive(Debug, clap::Args)]
pub struct TokenizerName {
    /// `bytes`, a tokenizer.json, or the folder of one or of a model
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: String,
}

/// Arguments of `ttt tokenizer encode`.
#[derive(Debug, clap::Args)]
pub struct TokenizerEncode {
    /// The text
    #[arg(value_name = "TEXT", required_unless_present = "file", conflicts_with = "file")]
    pub text: Option<String>,
    /// File with the text; - reads the standard input
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub name: TokenizerName,
}

/// Arguments of `ttt tokenizer decode`.
#[derive(Debug, clap::Args)]
pub struct TokenizerDecode {
    /// The ids, such as 72,105 or 72 105
    #[arg(value_name = "IDS", required = true, value_delimiter = ',')]
    pub ids: Vec<u32>,
    #[command(flatten)]
    pub name: TokenizerName,
}

const BENCH_EXAMPLES: &str = "\
Weights are random (seed 0). Beside each speed stand the parts of what this machine reaches, measured in the same run: of the \
arithmetic of matrix products, and of the speed of reading main memory (above 100 % where data stays in caches).

Examples:
  ttt bench                                              everything, with the 125M model
  ttt bench prefill --preset 125m --inner mlp --length 512
  ttt bench train --preset small --batch 8 --length 256  whole steps with clip and AdamW
  ttt bench train --no-optimizer                         forward and backward only
  ttt bench ops                                          every operation on its own";

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
    /// Size: tiny, small (hidden 256, 4 layers, 256 ids), 125m, 350m, 760m or 1.3b; Mamba backbone with convolutions [default: 125m]
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// Inner model [default: linear]
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
    /// prefill: logits of every position, not of the last one only
    #[arg(long)]
    pub all_logits: bool,
    /// train: compute blocks again in the backward pass
    #[arg(long, value_name = "WHAT")]
    pub recompute: Option<Recompute>,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
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
    // Generating token by token, after 64 tokens
    Decode,
    // Every operation on its own
    Ops,
}

/// An inner model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InnerName {
    // TTT-Linear
    Linear,
    // TTT-MLP
    Mlp,
}

/// Arguments of `ttt doctor`.
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `ttt completions`.
#[derive(Debug, clap::Args)]
pub struct Completions {
    /// bash, elvish, fish, powershell or zsh
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
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

// In the enums below the comments on values are no documentation comments: those would turn the table of flags into paragraphs.

/// A device by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    // The fastest that there is
    Auto,
    // The processor
    Cpu,
    // The processor, with the plain loops that define every operation
    Reference,
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
    // Nothing
    None,
    // Every block, from its input
    Block,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// Every command and every argument says what it is for.
    #[test]
    fn everything_is_explained() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {argument}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        Args::command().debug_assert();
        check(&Args::command());
    }
}
