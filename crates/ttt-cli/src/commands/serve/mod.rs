//! `ttt serve`: a model behind HTTP.
//!
//! [`engine`] owns the model in a thread of its own, [`snapshots`] keeps states of prefixes that were read, [`store`] the states
//! that clients keep, [`api`] is what clients see, [`auth`] who may see it, [`page`] what people see, [`listen`] connections and
//! their end.

mod api;
mod auth;
mod engine;
mod listen;
mod page;
mod snapshots;
mod store;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use tokio::net::TcpListener;
use ttt::state::States;

use super::chat::template::Template;
use crate::args::Serve;
use crate::progress::warn;
use crate::{Usage, model, units};
use api::App;
use auth::Keys;
use engine::{Handle, Limits};
use snapshots::Snapshots;
use store::Store;

/// Sequences of fewer tokens are of no use.
const LEAST_CONTEXT: u64 = 64;

/// Runs the command.
pub fn run(args: &Serve, out: &mut dyn Write) -> Result<()> {
    let keys = Keys::read(args.api_keys.as_deref())?;
    if !args.host.is_loopback() && keys.is_empty() && !args.no_api_key {
        let message = "other machines can reach this address: set TTT_API_KEY or give --api-keys, or say --no-api-key";
        return Err(Usage(message.into()).into());
    }
    let folder = model::resolve(&args.model)?;
    let mut lm = model::load(&folder, &args.device, args.dtype)?;
    let Some(tokenizer) = model::tokenizer(args.tokenizer.as_deref(), &folder, lm.config().vocab_size)? else {
        bail!("{} has no tokenizer; name one with --tokenizer", folder.display());
    };
    model::load_skill(&mut lm, args.skill.as_deref(), Some(&tokenizer))?;
    if let Some(warning) = tokenizer.unused_ids(lm.config().vocab_size) {
        warn(&warning);
    }
    let template = Template::of_folder(&folder)?;
    let store = match &args.store {
        Some(place) => Store::open(place, args.max_states)?,
        None => Store::open(&home("XDG_DATA_HOME", ".local/share")?.join("states").display().to_string(), args.max_states)?,
    };
    let snapshot_folder = match &args.snapshot_dir {
        Some(folder) => folder.clone(),
        None => home("XDG_CACHE_HOME", ".cache")?.join("snapshots"),
    };
    let snapshots = Snapshots::open(args.snapshot_memory as usize, args.snapshot_disk as usize, &snapshot_folder)?;
    let mini_batch = lm.config().mini_batch().unwrap_or(1) as u64;
    let states = lm.states(1)?;
    let context = context(&states, args)?;
    let limits = Limits {
        slots: args.slots as usize,
        queue: args.queue as usize,
        chunk: args.prefill_chunk as usize,
        snapshot_every: args.snapshot_every.next_multiple_of(mini_batch),
        context,
    };
    let about = api::Model {
        name: args.name.clone().unwrap_or_else(|| name(&args.model)),
        hash: lm.hash().to_owned(),
        created: std::fs::metadata(folder.join("config.json")).and_then(|m| m.modified()).map_or(0, seconds),
        vocab_size: lm.config().vocab_size,
        layers: lm.config().num_hidden_layers,
        parameters: lm.weights().table().len(),
        state_bytes: states.bytes(),
        state_bytes_per_token: states.bytes_per_token(),
    };
    drop(states);
    let tokenizer = Arc::new(tokenizer);
    let (engine, thread) = Handle::start(lm, tokenizer.clone(), limits, snapshots)?;
    let app = Arc::new(App {
        engine: engine.clone(),
        tokenizer,
        template,
        model: about,
        store,
        keys,
        limits: api::Limits {
            choices: limits.slots,
            prompt: args.max_prompt as usize,
            tokens: args.max_tokens as usize,
            body: args.max_body as usize,
            time: Duration::from_secs(args.timeout),
            context,
        },
        read_only: args.read_only,
        loopback: args.host.is_loopback(),
        cors: args.cors.clone(),
        requests: Default::default(),
    });

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("cannot start")?;
    let grace = Duration::from_secs(args.grace);
    runtime.block_on(async {
        let address = (args.host, args.port);
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {}:{}", args.host, args.port))?;
        let info = &app.model;
        let slots = match context {
            None => format!("{} slots of {} each", limits.slots, units::bytes(info.state_bytes as u64)),
            Some(tokens) => format!(
                "{} slots of up to {} tokens each, {} a token",
                limits.slots,
                units::grouped(tokens),
                units::bytes(info.state_bytes_per_token as u64)
            ),
        };
        let parameters = units::count(info.parameters as f64);
        writeln!(out, "{}: {parameters} parameters, {slots}\nlistening on http://{}", info.name, listener.local_addr()?)?;
        out.flush()?;
        if !args.read_only {
            let app = app.clone();
            tokio::spawn(async move { sweep(&app.store).await });
        }
        let stop = |deadline: Instant| engine.stop(deadline);
        listen::serve(listener, api::router(app), args.max_connections as usize, grace, stop).await
    })?;
    // The engine writes its snapshots before it ends.
    if thread.join().is_err() {
        bail!("the engine ended with a bug; what it printed above says where");
    }
    Ok(writeln!(out, "stopped")?)
}

/// Deletes what a server left in the store that was killed while it wrote; the work goes on when that fails.
async fn sweep(store: &Store) {
    match store.sweep(store::AGE).await {
        Ok(swept) if swept.objects == 0 => {}
        Ok(swept) => warn(&format!(
            "deleted {} files ({}) that no state names: a server was killed while it wrote them",
            swept.objects,
            units::bytes(swept.bytes)
        )),
        Err(error) => warn(&format!("the store was not searched for what belongs to no state: {error:?}")),
    }
}

/// Tokens that a sequence may have, where its state grows with them.
fn context(states: &States, args: &Serve) -> Result<Option<u64>> {
    let a_token = args.slots as u64 * states.bytes_per_token() as u64;
    if a_token == 0 {
        return Ok(None);
    }
    let tokens = args.cache_memory / a_token;
    if tokens < LEAST_CONTEXT {
        bail!(
            "--cache-memory {} has room for {tokens} tokens in each of {} slots; give more, or fewer --slots",
            units::bytes(args.cache_memory),
            args.slots
        );
    }
    Ok(Some(tokens))
}

/// What a model is called: its folder, or that of the run.
fn name(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    whole.file_name().map_or_else(|| "ttt".into(), |name| name.to_string_lossy().into_owned())
}

/// The folder `ttt` in one of the user's folders.
fn home(variable: &str, otherwise: &str) -> Result<PathBuf> {
    let named = std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = named
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME").or_else(|| std::env::var_os("USERPROFILE"))?).join(otherwise)));
    Ok(folder.context("no HOME folder; name folders with --store and --snapshot-dir")?.join("ttt"))
}

/// Seconds since 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Random bytes from the system.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the system has random numbers");
    bytes
}
