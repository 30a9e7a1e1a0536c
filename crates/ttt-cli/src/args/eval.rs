//! What `ttt eval` and `ttt task` are told.

use std::path::PathBuf;

use clap::ValueEnum;

use super::DeviceArgs;

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

/// What an evaluation reports beside its totals.
#[derive(Debug, clap::Args)]
pub struct Report {
    /// Draw the loss by position and the inner models' losses, or the grid of --task needle
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Buckets of position from each power of two to the next
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub buckets: u64,
    /// Do not measure the inner models' losses
    #[arg(long)]
    pub no_inner: bool,
    /// Of a run: keep the result there as results/NAME.json, for `ttt compare` and `ttt report` [default name: eval, or the task's]
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub keep: Option<String>,
}

/// A task instead of texts.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Tasks made up for the purpose, instead of --data")]
pub struct TaskArgs {
    /// Recall values by their keys, find a needle in a haystack, or copy a sequence
    #[arg(long, value_name = "NAME", conflicts_with_all = ["data", "separator", "per_document", "context", "state_in", "state_out"])]
    pub task: Option<TaskName>,
    /// Recall: numbers of key-value pairs [default: 8]
    #[arg(long, value_name = "N,...", value_delimiter = ',', requires = "task")]
    pub pairs: Vec<usize>,
    /// Tokens of a sequence [default: recall: 4 for each pair, copy: 64, needle: 256,512,1024,2048]
    #[arg(long, value_name = "N,...", value_delimiter = ',', requires = "task")]
    pub lengths: Vec<usize>,
    /// Needle: where it is hidden, from 0 (the beginning) to 1 (the end) [default: 0,0.25,0.5,0.75,1]
    #[arg(long, value_name = "X,...", value_delimiter = ',', requires = "task")]
    pub depths: Vec<f64>,
    /// Needle: hide a sentence in these texts (`corpus`: the sources that `ttt train` reads by default) [default: symbols in random symbols]
    #[arg(long, value_name = "corpus|PATH", requires = "task")]
    pub haystack: Option<String>,
    /// Sequences for each setting
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub sequences: u64,
    /// Seed of the sequences; `ttt task` writes those of other seeds
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// A task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TaskName {
    // Multi-query associative recall
    Recall,
    // A needle in a haystack
    Needle,
    // Copying a random sequence
    Copy,
}

const TASK_HELP: &str = "\
Writes train.jsonl, validation.jsonl and run.toml, the settings of a small run that learns the task in about a minute on two \
cores. Each training window is one sequence, and only what can be known from it is learned.

Example:
  ttt task recall --pairs 8 --out recall
  ttt train recall/run.toml --out runs/recall
  ttt eval runs/recall --task recall --pairs 4,8,16";

/// Arguments of `ttt task`.
#[derive(Debug, clap::Args)]
#[command(after_help = TASK_HELP)]
pub struct Task {
    /// Recall values by their keys, find a needle among random symbols, or copy a sequence
    #[arg(value_name = "NAME")]
    pub task: TaskName,
    /// Folder to write, new or empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Recall: key-value pairs, at most: the sequences to learn have any number up to this, so that the easy ones come first
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub pairs: usize,
    /// Recall: exactly that many pairs in every sequence
    #[arg(long)]
    pub exact: bool,
    /// Tokens of a sequence, a multiple of 16 [default: recall: 4 for each pair or a little more, otherwise 64]
    #[arg(long, value_name = "N")]
    pub length: Option<usize>,
    /// Sequences to learn
    #[arg(long, value_name = "N", default_value_t = 25_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub sequences: u64,
    /// Seed of the sequences to learn, from 1 up; `ttt eval --task` judges those of seed 0
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub seed: u64,
}
