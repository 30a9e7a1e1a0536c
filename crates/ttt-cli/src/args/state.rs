//! What `ttt read` and `ttt state` are told.

use std::path::PathBuf;

use clap::Subcommand;

use super::DeviceArgs;

const READ_EXAMPLES: &str = "\
Between documents stand the tokens that end and begin one, as in training. A text file is one document, read piece by piece; a \
line of a .jsonl file is one.

The inner loss is the mean squared error of each layer's inner models: under the initial weights W0, before each update, after it. \
Ctrl-C writes the state so far and prints the command that goes on; the result is then the same as without it.

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
    /// Leave out so many tokens of the files, which the state has read: what is printed when reading was interrupted
    #[arg(long, value_name = "N", default_value_t = 0, requires = "state_in")]
    pub skip_tokens: u64,
    /// How text becomes tokens: `bytes`, or a tokenizer.json or its folder [default: the model's]
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: Option<String>,
    /// Print a JSON object, with speed and resident memory for every 100,000 tokens and the inner losses
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
