//! What `ttt generate` and `ttt chat` are told.

use std::path::PathBuf;

use super::DeviceArgs;

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
