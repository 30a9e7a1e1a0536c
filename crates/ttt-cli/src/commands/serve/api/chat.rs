//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, Json, State};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::reply::{Format, Part, Prompt, Reply};
use super::request::{Start, encode, max_tokens, refuse, request};
use super::{ApiError, App};
use crate::commands::chat::template::Message;
use crate::commands::serve::auth::Owner;

/// A message of a conversation.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    role: Role,
    content: Content,
    /// Who speaks; templates here do not look at it.
    #[allow(dead_code)]
    name: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Piece>),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, tag = "type", rename_all = "lowercase")]
enum Piece {
    Text { text: String },
}

request! {
    /// A request for the next message of a conversation.
    Chat {
        messages: Vec<Said>,
        max_tokens: Option<usize>,
        max_completion_tokens: Option<usize>,
        logprobs: Option<bool>,
        top_logprobs: Option<usize>,
        response_format: Option<Value>,
        tools: Option<Value>,
        tool_choice: Option<Value>,
        functions: Option<Value>,
        function_call: Option<Value>,
    }
}

/// Tokens of a message where the request does not say.
const MAX_TOKENS: usize = 1024;
/// Most likely tokens that are reported.
const MOST_TOP: usize = 20;

/// Answers a conversation. Behind a state the messages are what comes after what it has read.
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    body: Result<Json<Chat>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(mut body) = body?;
    let common = body.common(&app)?;
    let others = [&body.tools, &body.tool_choice, &body.functions, &body.function_call];
    for (field, value) in ["tools", "tool_choice", "functions", "function_call"].into_iter().zip(others) {
        refuse(field, value.as_ref())?;
    }
    refuse("response_format", body.response_format.as_ref().filter(|format| format["type"] != "text"))?;
    let logprobs = body.logprobs.unwrap_or(false);
    if body.top_logprobs.is_some_and(|top| top > MOST_TOP || (top > 0 && !logprobs)) {
        return Err(ApiError::bad(format!("top_logprobs may be 0 to {MOST_TOP}, and needs logprobs")));
    }
    let Some(template) = &app.template else {
        return Err(ApiError::bad(
            "this model has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja); \
             use /v1/completions, which continues text",
        ));
    };
    let messages: Vec<Message> = body.messages.into_iter().map(message).collect();
    let text = template.render(&messages).map_err(|e| ApiError::bad(format!("{e:#}")))?;
    let start = Start::new(&app, &owner, body.state_id.as_deref(), body.state.as_deref()).await?;
    // A template writes the token that begins a text itself; a state has it.
    let text = match start.state {
        Some(_) => template.without_bos(&text).to_owned(),
        None => text,
    };
    let tokens = encode(&app, text, false).await?;
    let most = max_tokens(&app, &start, tokens.len(), body.max_completion_tokens.or(body.max_tokens), MAX_TOKENS)?;
    let top = logprobs.then(|| body.top_logprobs.unwrap_or(0));
    let prompts = vec![Prompt { tokens, echo: None }];
    Reply::begin(&app, owner, Messages { logprobs }, common, &start, prompts, most, top)?.answer().await
}

fn message(said: Said) -> Message {
    let role = match said.role {
        Role::System | Role::Developer => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    };
    let content = match said.content {
        Content::Text(text) => text,
        Content::Parts(parts) => parts.into_iter().map(|Piece::Text { text }| text).collect(),
    };
    Message { role, content }
}

/// Messages, with log-probabilities where they were asked for.
struct Messages {
    logprobs: bool,
}

impl Format for Messages {
    const OBJECTS: [&'static str; 2] = ["chat.completion", "chat.completion.chunk"];
    const ID: &'static str = "chatcmpl";

    fn choice(&self, app: &App, part: &Part, piece: bool) -> Map<String, Value> {
        let mut message = Map::new();
        if part.first || !piece {
            message.insert("role".into(), "assistant".into());
        }
        if part.end.is_none() || !part.text.is_empty() || !piece {
            message.insert("content".into(), part.text.clone().into());
        }
        if !piece {
            message.insert("refusal".into(), Value::Null);
        }
        let mut choice = Map::new();
        choice.insert(if piece { "delta" } else { "message" }.into(), message.into());
        choice.insert("logprobs".into(), if self.logprobs { logprobs(app, part) } else { Value::Null });
        choice
    }
}

fn logprobs(app: &App, part: &Part) -> Value {
    let token = |id: u32, logprob: f64| {
        let name = app.tokenizer.token_name(id);
        // Only a part of a character has a name that is not its text.
        let bytes = (!name.starts_with("bytes:")).then(|| name.clone().into_bytes());
        json!({"token": name, "logprob": logprob, "bytes": bytes})
    };
    let content = part.tokens.iter().map(|info| {
        let mut entry = token(info.id, info.logprob.unwrap_or(0.0));
        entry["top_logprobs"] = info.top.iter().map(|(id, p)| token(*id, *p)).collect();
        entry
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}
