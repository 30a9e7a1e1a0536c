//! What `ttt serve` is told.

use std::net::IpAddr;
use std::path::PathBuf;

use super::DeviceArgs;
use crate::units::parse_bytes;

const SERVE_HELP: &str = "\
The API is OpenAI's (/v1/completions, /v1/chat/completions, /v1/models) and, beside it, states as resources (/v1/states); \
/openapi.json describes all of it, / is a page to try it.

Examples:
  ttt serve runs/tiny
  curl localhost:8080/v1/completions -H 'content-type: application/json' -d '{\"prompt\": \"fn main\", \"max_tokens\": 50}'
  TTT_API_KEY=secret ttt serve runs/tiny --host 0.0.0.0 --slots 64
  AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... ttt serve runs/tiny --store s3://bucket/states";

/// Arguments of `ttt serve`.
#[derive(Debug, clap::Args)]
#[command(after_help = SERVE_HELP)]
pub struct Serve {
    /// Folder of a model or a run
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Start from a skill, the initial fast weights that `ttt train --only-initial-state` learned for this model
    #[arg(long, value_name = "FILE")]
    pub skill: Option<PathBuf>,
    /// How text becomes tokens: `bytes`, or a tokenizer.json or its folder [default: the model's]
    #[arg(long, value_name = "bytes|FILE")]
    pub tokenizer: Option<String>,
    /// Name of the model in the API [default: the name of its folder]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Type that the large matrices are held in: f32, bf16 or int8 (the rest stays f32); f64 runs the plain reference loops; on a GPU f32, or bf16 for activations too [default: as stored, on a GPU bf16]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<ttt::Storage>,
    #[command(flatten)]
    pub device: DeviceArgs,

    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", help_heading = "Network")]
    pub host: IpAddr,
    /// Port; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8080, help_heading = "Network")]
    pub port: u16,
    /// File with one API key a line; requests must then bear one of them. A single key may be given in TTT_API_KEY
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    pub api_keys: Option<PathBuf>,
    /// Serve other machines without asking for a key
    #[arg(long, help_heading = "Network")]
    pub no_api_key: bool,
    /// Let pages of this origin use the API, such as https://example.org, or * for all; can be repeated
    #[arg(long, value_name = "ORIGIN", help_heading = "Network")]
    pub cors: Vec<String>,
    /// Switch off all that writes: making, changing and deleting states
    #[arg(long, help_heading = "Network")]
    pub read_only: bool,

    /// Choices that run at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = "Limits")]
    pub slots: u32,
    /// Prompts that wait for a slot; more are told to try again later
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 20), help_heading = "Limits")]
    pub queue: u32,
    /// Tokens of waiting prompts that are read between two steps of running choices; four times as many while none runs
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = "Limits")]
    pub prefill_chunk: u32,
    /// Seconds that a request may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=604_800), help_heading = "Limits")]
    pub timeout: u64,
    /// Seconds that running requests get to finish when the server is told to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=604_800), help_heading = "Limits")]
    pub grace: u64,
    /// Size of a request's body at most
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_bytes, help_heading = "Limits")]
    pub max_body: u64,
    /// Tokens of a prompt at most
    #[arg(long, value_name = "N", default_value_t = 16 << 20, help_heading = "Limits")]
    pub max_prompt: u64,
    /// Tokens of a choice at most
    #[arg(long, value_name = "N", default_value_t = 65_536, help_heading = "Limits")]
    pub max_tokens: u64,
    /// Connections at once
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1 << 20), help_heading = "Limits")]
    pub max_connections: u32,
    /// States that a key may keep
    #[arg(long, value_name = "N", default_value_t = 1000, help_heading = "Limits")]
    pub max_states: u64,

    /// Transformers: memory for the keys and values of all slots; it bounds the tokens of a sequence, prompt and answer together
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = parse_bytes, help_heading = "States")]
    pub cache_memory: u64,
    /// Where states are kept: a folder, or s3://BUCKET/PREFIX with credentials, region and endpoint in the AWS_ variables [default: ~/.local/share/ttt/states]
    #[arg(long, value_name = "DIR|URL", help_heading = "States")]
    pub store: Option<String>,
    /// Memory for states of prompts that were read, for prompts that begin alike
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = parse_size, help_heading = "States")]
    pub snapshot_memory: u64,
    /// Disk space for those that do not fit in memory; 0 keeps none on disk
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = parse_size, help_heading = "States")]
    pub snapshot_disk: u64,
    /// Folder for those [default: ~/.cache/ttt/snapshots]
    #[arg(long, value_name = "DIR", help_heading = "States")]
    pub snapshot_dir: Option<PathBuf>,
    /// Tokens between two states that are kept while a prompt is read
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..=1 << 30), help_heading = "States")]
    pub snapshot_every: u64,
}

/// A size, or nothing.
fn parse_size(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { parse_bytes(text) }
}

/// The load of `ttt bench serve`.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "serve: load on a running server; the key is taken from TTT_API_KEY")]
pub struct Load {
    /// The server
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// Streams at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub streams: u32,
    /// How long
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub seconds: u64,
    /// Tokens of a prompt, about
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: u32,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// Beside the streams, have one prompt after the other read of so many tokens; 0: none
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub long_prompts: u32,
}
