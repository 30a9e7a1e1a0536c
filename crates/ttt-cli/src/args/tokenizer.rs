//! What `ttt tokenizer` is told.

use std::path::PathBuf;

use clap::Subcommand;

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
