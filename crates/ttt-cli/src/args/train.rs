//! What `ttt train` is told.

use std::path::PathBuf;

use super::{DeviceArgs, Recompute};

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
