//! What a request asks for, checked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc::UnboundedSender;
use ttt::generate::Sampling;

use super::{ApiError, App};
use crate::commands::serve::auth::Owner;
use crate::commands::serve::engine::{Event, Job};
use crate::commands::serve::random;
use crate::commands::serve::snapshots::root;

/// One thing or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// As a list.
    pub fn into_vec(self) -> Vec<T> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    #[serde(default)]
    pub include_usage: bool,
}

/// Whether to keep a state, and under what name.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Keep {
    Whether(bool),
    Name(String),
}

/// A request with the fields that all kinds have beside its own.
macro_rules! request {
    ($(#[$doc:meta])* $name:ident { $($(#[$meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$meta])* $field: $type,)*
            model: Option<String>,
            temperature: Option<f64>,
            top_p: Option<f64>,
            top_k: Option<usize>,
            seed: Option<i64>,
            n: Option<usize>,
            stop: Option<crate::commands::serve::api::request::OneOrMany<String>>,
            stream: Option<bool>,
            stream_options: Option<crate::commands::serve::api::request::StreamOptions>,
            /// Whose request it is; OpenAI's field, which changes nothing here.
            #[allow(dead_code)]
            user: Option<String>,
            presence_penalty: Option<f64>,
            frequency_penalty: Option<f64>,
            logit_bias: Option<std::collections::BTreeMap<String, f64>>,
            ignore_eos: Option<bool>,
            state_id: Option<String>,
            state: Option<String>,
            save_state: Option<crate::commands::serve::api::request::Keep>,
            return_state: Option<bool>,
        }

        impl $name {
            /// The fields that all kinds have.
            pub fn common(&mut self, app: &App) -> Result<crate::commands::serve::api::request::Common, ApiError> {
                crate::commands::serve::api::check_model(app, self.model.as_deref())?;
                crate::commands::serve::api::request::unsupported(
                    self.presence_penalty, self.frequency_penalty, self.logit_bias.as_ref())?;
                crate::commands::serve::api::request::Common::new(
                    app,
                    [self.temperature, self.top_p],
                    self.top_k,
                    self.seed,
                    self.n,
                    self.stop.take(),
                    self.stream.unwrap_or(false),
                    self.stream_options.unwrap_or_default(),
                    self.ignore_eos.unwrap_or(false),
                    self.save_state.take(),
                    self.return_state.unwrap_or(false),
                )
            }
        }
    };
}
pub(super) use request;

/// Refuses what would be ignored otherwise.
pub fn unsupported(presence: Option<f64>, frequency: Option<f64>, bias: Option<&BTreeMap<String, f64>>) -> Result<(), ApiError> {
    if presence.is_some_and(|p| p != 0.0) || frequency.is_some_and(|p| p != 0.0) {
        return Err(ApiError::bad("presence_penalty and frequency_penalty are not supported; leave them out or at 0"));
    }
    if bias.is_some_and(|bias| !bias.is_empty()) {
        return Err(ApiError::bad("logit_bias is not supported; leave it out"));
    }
    Ok(())
}

/// Refuses a field that has any value.
pub fn refuse(field: &str, value: Option<&Value>) -> Result<(), ApiError> {
    match value {
        None | Some(Value::Null) => Ok(()),
        Some(_) => Err(ApiError::bad(format!("`{field}` is not supported; leave it out"))),
    }
}

/// What all kinds of requests say.
#[derive(Debug)]
pub struct Common {
    pub sampling: Sampling,
    pub choices: usize,
    pub stop: Vec<String>,
    pub stream: bool,
    pub include_usage: bool,
    pub ignore_eos: bool,
    /// Keep the state, under a name or none.
    pub save: Option<Option<String>>,
    pub return_state: bool,
}

/// Stop texts at most, and bytes of one: each is looked for with every token.
const STOPS: usize = 16;
const STOP_BYTES: usize = 1024;

impl Common {
    #[allow(clippy::fn_params_excessive_bools)]
    pub fn new(
        app: &App,
        [temperature, top_p]: [Option<f64>; 2],
        top_k: Option<usize>,
        seed: Option<i64>,
        n: Option<usize>,
        stop: Option<OneOrMany<String>>,
        stream: bool,
        options: StreamOptions,
        ignore_eos: bool,
        save: Option<Keep>,
        return_state: bool,
    ) -> Result<Common, ApiError> {
        let seed = seed.map_or_else(|| u64::from_le_bytes(random()), |seed| seed as u64);
        let sampling =
            Sampling { temperature: temperature.unwrap_or(1.0), top_k: top_k.unwrap_or(0), top_p: top_p.unwrap_or(1.0), seed };
        sampling.validate()?;
        let choices = n.unwrap_or(1);
        if !(1..=app.limits.choices).contains(&choices) {
            return Err(ApiError::bad(format!("n is {choices}; it must be from 1 to {}", app.limits.choices)));
        }
        let stop = stop.map_or_else(Vec::new, OneOrMany::into_vec);
        if stop.len() > STOPS || stop.iter().any(|s| s.is_empty() || s.len() > STOP_BYTES) {
            return Err(ApiError::bad(format!("stop may have up to {STOPS} texts of 1 to {STOP_BYTES} bytes")));
        }
        let save = match save {
            None | Some(Keep::Whether(false)) => None,
            Some(Keep::Whether(true)) => Some(None),
            Some(Keep::Name(name)) => Some(Some(checked_name(name)?)),
        };
        if save.is_some() {
            writable(app)?;
        }
        let include_usage = options.include_usage;
        Ok(Common { sampling, choices, stop, stream, include_usage, ignore_eos, save, return_state })
    }
}

/// Refuses to write where that is switched off.
pub fn writable(app: &App) -> Result<(), ApiError> {
    match app.read_only {
        true => Err(ApiError::new(axum::http::StatusCode::FORBIDDEN, "this server keeps no states for clients (--read-only)")),
        false => Ok(()),
    }
}

/// A name for a state.
pub fn checked_name(name: String) -> Result<String, ApiError> {
    if name.is_empty() || name.len() > 200 || name.chars().any(char::is_control) {
        return Err(ApiError::bad("the name of a state has 1 to 200 bytes and no control characters"));
    }
    Ok(name)
}

/// How many tokens to choose behind a start and a prompt of so many tokens, where the request does not say `otherwise`.
pub fn max_tokens(app: &App, start: &Start, prompt: usize, asked: Option<usize>, otherwise: usize) -> Result<usize, ApiError> {
    let room = app.limits.context.map(|context| context.checked_sub(start.tokens + prompt as u64));
    let most = match room {
        None => app.limits.tokens,
        Some(room) => app.limits.tokens.min(room.unwrap_or(0) as usize),
    };
    let tokens = asked.unwrap_or(otherwise.min(most));
    if tokens > app.limits.tokens {
        return Err(ApiError::bad(format!("max_tokens is {tokens}; this server allows {}", app.limits.tokens)));
    }
    if room == Some(None) || tokens > most || (asked.is_none() && most == 0) {
        return Err(ApiError::bad(format!(
            "this model's state grows with every token, and this server has room for {} of a sequence (--cache-memory, --slots): \
             the state has read {}, the prompt has {prompt}, and max_tokens is {tokens}",
            app.limits.context.unwrap_or(0),
            start.tokens
        )));
    }
    Ok(tokens)
}

/// Where a sequence begins.
#[derive(Clone)]
pub struct Start {
    /// A state file.
    pub state: Option<Arc<[u8]>>,
    /// Its id, where it has one.
    pub id: Option<String>,
    /// Tokens that it has accepted.
    pub tokens: u64,
    /// Key of the snapshots behind it.
    pub root: [u8; 32],
}

impl Start {
    /// The state that a request names or carries, if any.
    pub async fn new(app: &App, owner: &Owner, id: Option<&str>, inline: Option<&str>) -> Result<Start, ApiError> {
        let state = match (id, inline) {
            (None, None) => None,
            (Some(_), Some(_)) => return Err(ApiError::bad("give state_id or state, not both")),
            (Some(id), None) => {
                let description = app.store.get(owner, id).await?;
                Some(app.store.read(owner, &description).await?)
            }
            (None, Some(text)) => {
                Some(BASE64_STANDARD.decode(text).map_err(|e| ApiError::bad(format!("state is not base64: {e}")))?)
            }
        };
        let mut tokens = 0;
        if let Some(state) = &state {
            // The engine would find the same, after the request had waited for a slot.
            let header = app.engine.verify(state.clone()).await?;
            check_tokenizer(app, &header)?;
            tokens = header.tokens + header.pending.len() as u64;
        }
        let begin = state.as_ref().map_or(Vec::new(), |state| Sha256::digest(state).to_vec());
        let root = root(&app.model.hash, app.tokenizer.fingerprint(), &owner.0, &begin);
        Ok(Start { state: state.map(Into::into), id: id.map(str::to_owned), tokens, root })
    }
}

/// Refuses a state whose tokens mean something else here.
pub fn check_tokenizer(app: &App, header: &ttt::state::StateHeader) -> Result<(), ApiError> {
    match &header.tokenizer {
        Some(theirs) if theirs != app.tokenizer.id() => {
            Err(ApiError::bad(format!("the state was made with another tokenizer ({theirs}) than this server's")))
        }
        _ => Ok(()),
    }
}

/// Ids of a text, behind the id that begins one where nothing comes before.
pub async fn encode(app: &Arc<App>, text: String, begin: bool) -> Result<Vec<u32>, ApiError> {
    let theirs = app.clone();
    let work = move || -> ttt::Result<Vec<u32>> {
        let mut tokens: Vec<u32> = theirs.tokenizer.bos().filter(|_| begin).into_iter().collect();
        tokens.extend(theirs.tokenizer.encode(&text)?);
        Ok(tokens)
    };
    // A long text takes a while.
    let tokens =
        tokio::task::spawn_blocking(work).await.map_err(|e| ApiError::bad(format!("the text cannot be encoded: {e}")))??;
    check_length(app, tokens.len())?;
    Ok(tokens)
}

fn check_length(app: &App, tokens: usize) -> Result<(), ApiError> {
    match tokens > app.limits.prompt {
        true => Err(ApiError::bad(format!("the prompt has {tokens} tokens; this server allows {}", app.limits.prompt))),
        false => Ok(()),
    }
}

/// Ids that were given as such.
pub fn check_ids(app: &App, ids: Vec<u32>) -> Result<Vec<u32>, ApiError> {
    check_length(app, ids.len())?;
    match ids.iter().find(|id| **id as usize >= app.model.vocab_size) {
        Some(id) => Err(ApiError::bad(format!("token id {id} is outside the vocabulary of {} ids", app.model.vocab_size))),
        None => Ok(ids),
    }
}

/// A job for one prompt.
pub fn job(app: &App, common: &Common, start: &Start, tokens: Vec<u32>, max_tokens: usize, events: UnboundedSender<Event>) -> Job {
    let arrived = Instant::now();
    Job {
        tokens,
        start: start.state.clone(),
        root: start.root,
        snapshots: true,
        sampling: common.sampling,
        choices: common.choices,
        first_choice: 0,
        max_tokens,
        stop: common.stop.clone(),
        ignore_eos: common.ignore_eos,
        top: None,
        prompt_logprobs: false,
        progress: false,
        keep_state: common.save.is_some() || common.return_state,
        arrived,
        deadline: arrived + app.limits.time,
        events,
    }
}
