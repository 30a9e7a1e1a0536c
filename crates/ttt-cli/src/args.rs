//! What can be typed. What it means is in [`crate::commands`].

mod compare;
mod eval;
mod serve;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

pub use compare::{Compare, ReportPage};
pub use eval::{Report, Task, TaskArgs, TaskName};
pub use serve::{Load, Serve};

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
    /// Measure how well a model predicts texts that are new to it, or does a task
    Eval(Eval),
    /// Compare runs: pictures, a table and JSON of what their folders hold
    Compare(Compare),
    /// Show runs on one page of HTML that needs no network
    Report(ReportPage),
    /// Write training files of a task: recall, a needle in a haystack, copying
    Task(Task),
    /// Continue a text
    Generate(Generate),
    /// Learn texts of any length into a state file, in constant memory
    Read(Read),
    /// Describe, compare and copy state files
    #[command(subcommand)]
    State(State),
    /// Talk with a model whose state goes on learning
    Chat(Chat),
    /// Serve a model over HTTP: OpenAI's API, states as resources, a page
    Serve(Serve),
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
    /// Compile the GPU kernels for machines without a compiler
    #[command(subcommand)]
    Kernels(Kernels),
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
    /// What to compute again in the backward pass instead of keeping it: slower, needs less memory [default: auto, as little as fits]
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

const EVAL_HELP: &str = "\
Every token is predicted before anything is learned from it. A position is the number of tokens that the state had read before; \
its loss comes with a 95 % interval over documents, or, of fewer than 8, over sixteenths of a bucket in a document. The inner losses \
are the mean squared errors of each layer's inner models on the last token of every mini-batch: under the initial weights W0, \
before its update, and after it.

Examples:
  ttt eval runs/tiny --data book.txt --plot book.svg
  ttt eval runs/tiny --data texts/ --per-document --context 2048
  ttt eval runs/recall --task recall --pairs 4,8,16
  ttt eval runs/tiny --task needle --haystack corpus --lengths 1000,4000 --plot needle.svg";

/// Arguments of `ttt eval`.
#[derive(Debug, clap::Args)]
#[command(after_help = EVAL_HELP)]
pub struct Eval {
    /// Folder of a model or a run
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Start from a skill, the initial fast weights that `ttt train --only-initial-state` learned for this model
    #[arg(long, value_name = "FILE")]
    pub skill: Option<PathBuf>,
    /// Files, folders or 'globs' of texts, as for `ttt train`; each document is read from its beginning; of a prompt and its completion only the completion is judged
    #[arg(long, value_name = "PATH", required_unless_present = "task", num_args = 1..)]
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
    /// Judge every document as the continuation of what this state file has read
    #[arg(long, value_name = "STATE", conflicts_with = "context")]
    pub state_in: Option<PathBuf>,
    /// Write the state after the document, of which there may be only one, to this file
    #[arg(long, value_name = "STATE")]
    pub state_out: Option<PathBuf>,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
    /// Type that the large matrices are held in: f32, bf16 or int8 (the rest stays f32); f64 runs the plain reference loops; on a GPU f32, or bf16 for activations too [default: as stored, on a GPU bf16]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<ttt::Storage>,
    #[command(flatten)]
    pub report: Report,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub task: TaskArgs,
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
    /// Go on after what this state file has read; no token that begins a text is added, and the prompt may be empty
    #[arg(long, value_name = "STATE")]
    pub state_in: Option<PathBuf>,
    /// Write the state at the end to this file; --state-in continues from it as if there had been no end
    #[arg(long, value_name = "STATE")]
    pub state_out: Option<PathBuf>,
    /// How text becomes tokens: `bytes`, or a tokenizer.json or its folder [default: the model's]
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: Option<String>,
    /// Print one JSON object with the new `tokens`, their `text` (null without a tokenizer) and `logprobs`, when all is done
    #[arg(long)]
    pub json: bool,
    /// Type that the large matrices are held in: f32, bf16 or int8 (the rest stays f32); f64 runs the plain reference loops; on a GPU f32, or bf16 for activations too [default: as stored, on a GPU bf16]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<ttt::Storage>,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Say how fast it was, on the standard error
    #[arg(long, short)]
    pub verbose: bool,
}

const READ_EXAMPLES: &str = "\
Between documents stand the tokens that end and begin one, as in training. A text file is one document, read piece by piece; a \
line of a .jsonl file is one.

Examples:
  ttt read runs/tiny book.txt --state-out book.state                       read a book once
  ttt generate runs/tiny --state-in book.state -p ' And then'              ask it many times
  ttt read runs/tiny more.txt --state-in book.state --state-out both.state";

/// Arguments of `ttt read`.
#[derive(Debug, clap::Args)]
#[command(after_help = READ_EXAMPLES)]
pub struct Read {
    /// Folder of a model or a run
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Files, folders or 'globs' of texts, as for `ttt train`, read one after the other into one state
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<String>,
    /// Start from a skill, the initial fast weights that `ttt train --only-initial-state` learned for this model
    #[arg(long, value_name = "FILE")]
    pub skill: Option<PathBuf>,
    /// File to write the state to
    #[arg(long, value_name = "STATE")]
    pub state_out: PathBuf,
    /// Go on after what this state file has read; no token that begins a text is added
    #[arg(long, value_name = "STATE")]
    pub state_in: Option<PathBuf>,
    /// How text becomes tokens: `bytes`, or a tokenizer.json or its folder [default: the model's]
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: Option<String>,
    /// Print a JSON object, with speed and resident memory for every 100,000 tokens
    #[arg(long)]
    pub json: bool,
    /// Type that the large matrices are held in: f32, bf16 or int8 (the rest stays f32); f64 runs the plain reference loops [default: as stored]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<ttt::Storage>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// The commands of `ttt state`.
#[derive(Debug, Subcommand)]
pub enum State {
    /// Describe a state: what made it, how much it has read, its size
    Info(StateInfo),
    /// Say how far apart two states of one model are
    Diff(StateDiff),
    /// Copy a state, so that both can go on from it
    Fork(StateFork),
}

/// Arguments of `ttt state info`.
#[derive(Debug, clap::Args)]
pub struct StateInfo {
    /// The state file
    #[arg(value_name = "STATE")]
    pub file: PathBuf,
    /// Also say how far the fast weights of each layer have moved from this model's initial ones
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `ttt state diff`.
#[derive(Debug, clap::Args)]
pub struct StateDiff {
    /// A state file
    #[arg(value_name = "A")]
    pub a: PathBuf,
    /// Another of the same model
    #[arg(value_name = "B")]
    pub b: PathBuf,
    /// Print a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `ttt state fork`.
#[derive(Debug, clap::Args)]
pub struct StateFork {
    /// The state file to copy
    #[arg(value_name = "STATE")]
    pub file: PathBuf,
    /// Files to write; every copy is read again and compared
    #[arg(value_name = "NEW", required = true)]
    pub new: Vec<PathBuf>,
    /// Overwrite files that exist
    #[arg(long)]
    pub force: bool,
}

const VERIFY_HELP: &str = "\
The reference holds `input_ids [b, t]` and `logits [b, t, v]`; also, if wanted, `loss` (with `targets` and `loss_mask`, both \
[b, t]; without targets the next inputs, of which a sequence's last position has none) and `grad.NAME` tensors. A quantity exceeds the tolerance when its largest error is more than that part of its largest \
magnitude, or is not a number; the exit code is then 1.";

/// Arguments of `ttt chat`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  ttt read runs/tiny book.txt --state-out book.state\n  ttt chat runs/tiny --state book.state\n\nIn the conversation /help lists what can be done: /save /load /undo /fork /switch /stats /quit."
)]
pub struct Chat {
    /// Folder of a model or a run
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Go on from this state file [default: from the beginning]
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Start from a skill, the initial fast weights that `ttt train --only-initial-state` learned for this model
    #[arg(long, value_name = "FILE")]
    pub skill: Option<PathBuf>,
    /// Plain text that the model continues, even where it has a chat template
    #[arg(long)]
    pub plain: bool,
    /// The system's message, for models with a chat template
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// End an answer once it contains this text; can be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Tokens of an answer at most
    #[arg(long, short = 'n', value_name = "N", default_value_t = 200)]
    pub max_new_tokens: usize,
    /// Divides the logits: below 1 is more careful, 0 always takes the likeliest token
    #[arg(long, short, value_name = "T", default_value_t = 0.8)]
    pub temperature: f64,
    /// Choose among the K likeliest tokens; 0 means all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f64,
    /// Seed of the choice; the same seed and lines give the same conversation
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// How text becomes tokens: `bytes`, or a tokenizer.json or its folder [default: the model's]
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: Option<String>,
    /// Type that the large matrices are held in: f32, bf16 or int8 (the rest stays f32); f64 runs the plain reference loops [default: as stored]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<ttt::Storage>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

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

/// The commands of `ttt kernels`.
#[derive(Debug, Subcommand)]
pub enum Kernels {
    /// Compile all kernels into a folder; set TTT_KERNEL_CUBINS to it where there is no NVRTC
    Build(KernelsBuild),
}

/// Arguments of `ttt kernels build`.
#[derive(Debug, clap::Args)]
pub struct KernelsBuild {
    /// Folder for the machine code and manifest.json
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Architectures: sm_80 is Ampere, sm_89 Ada, sm_90a Hopper
    #[arg(long, value_name = "SM", value_delimiter = ',', default_value = "sm_80,sm_89,sm_90a")]
    pub arch: Vec<String>,
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
    /// Where to compute: auto, cpu, cuda (an NVIDIA GPU; cuda:1 is the second), or reference (the slow loops that define every
    /// operation)
    #[arg(long, value_name = "NAME", default_value = "auto", value_parser = DeviceName::parse)]
    pub device: DeviceName,
}

// In the enums below the comments on values are no documentation comments: those would turn the table of flags into paragraphs.

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
    fn parse(text: &str) -> Result<DeviceName, String> {
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
