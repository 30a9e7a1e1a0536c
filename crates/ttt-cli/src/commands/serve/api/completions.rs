//! `/v1/completions`.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, Json, State};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::reply::{Format, Part, Prompt, Reply};
use super::request::{Start, check_ids, encode, max_tokens, refuse, request};
use super::{ApiError, App};
use crate::commands::serve::auth::Owner;

/// One prompt or several, as text or ids.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    Lists(Vec<Vec<u32>>),
}

request! {
    /// A request for completions.
    Completion {
        prompt: Option<Prompts>,
        max_tokens: Option<usize>,
        logprobs: Option<usize>,
        echo: Option<bool>,
        best_of: Option<usize>,
        suffix: Option<Value>,
    }
}

/// Tokens of a completion where the request does not say: OpenAI's number.
const MAX_TOKENS: usize = 16;
/// Most likely tokens that are reported.
const MOST_TOP: usize = 20;

/// Continues prompts.
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    body: Result<Json<Completion>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(mut body) = body?;
    let common = body.common(&app)?;
    refuse("suffix", body.suffix.as_ref())?;
    if body.best_of.is_some_and(|best| best != common.choices) {
        return Err(ApiError::bad("best_of is not supported; leave it out, or give n"));
    }
    if body.logprobs.is_some_and(|top| top > MOST_TOP) {
        return Err(ApiError::bad(format!("logprobs may be 0 to {MOST_TOP}")));
    }
    let start = Start::new(&app, &owner, body.state_id.as_deref(), body.state.as_deref()).await?;
    let echo = body.echo.unwrap_or(false);
    let begin = start.state.is_none();
    let (texts, lists) = match body.prompt {
        None => (vec![String::new()], Vec::new()),
        Some(Prompts::Text(text)) => (vec![text], Vec::new()),
        Some(Prompts::Texts(texts)) => (texts, Vec::new()),
        Some(Prompts::Ids(ids)) => (Vec::new(), vec![ids]),
        Some(Prompts::Lists(lists)) => (Vec::new(), lists),
    };
    let mut prompts = Vec::new();
    for text in texts {
        prompts.push(Prompt { tokens: encode(&app, text.clone(), begin).await?, echo: echo.then_some(text) });
    }
    for ids in lists {
        let ids = check_ids(&app, ids)?;
        prompts.push(Prompt { echo: echo.then(|| app.tokenizer.decode(&ids)), tokens: ids });
    }
    let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max().unwrap_or(0);
    let tokens = max_tokens(&app, &start, longest, body.max_tokens, MAX_TOKENS)?;
    Reply::begin(&app, owner, Text { logprobs: body.logprobs }, common, &start, prompts, tokens, body.logprobs)?.answer().await
}

/// Text, with log-probabilities where they were asked for.
struct Text {
    logprobs: Option<usize>,
}

impl Format for Text {
    const OBJECTS: [&'static str; 2] = ["text_completion"; 2];
    const ID: &'static str = "cmpl";

    fn choice(&self, app: &App, part: &Part, _: bool) -> Map<String, Value> {
        let mut choice = Map::new();
        choice.insert("text".into(), part.text.clone().into());
        choice.insert("logprobs".into(), self.logprobs.map_or(Value::Null, |top| logprobs(app, part, top)));
        choice
    }
}

fn logprobs(app: &App, part: &Part, top: usize) -> Value {
    let name = |id: u32| app.tokenizer.token_name(id);
    let mut offset = part.offset;
    let offsets = part.tokens.iter().map(|token| {
        let at = offset;
        offset += token.text.chars().count();
        at
    });
    let likely = part.tokens.iter().map(|token| match token.logprob {
        Some(_) if top > 0 => token.top.iter().map(|(id, p)| (name(*id), json!(p))).collect::<Map<_, _>>().into(),
        _ => Value::Null,
    });
    json!({
        "tokens": part.tokens.iter().map(|t| name(t.id)).collect::<Vec<_>>(),
        "token_logprobs": part.tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
        "top_logprobs": likely.collect::<Vec<_>>(),
        "text_offset": offsets.collect::<Vec<_>>(),
    })
}
