//! `/v1/states`: states as resources.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Extension, Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use ttt::generate::Sampling;
use ttt::state::StateFile;

use super::request::{Common, Start, check_tokenizer, checked_name, encode, job, max_tokens, writable};
use super::{ApiError, App};
use crate::commands::serve::auth::Owner;
use crate::commands::serve::engine::{Event, Failure};
use crate::commands::serve::store::Description;

type Answer = Result<Response, ApiError>;

/// What to learn, in JSON.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Learn {
    text: String,
    name: Option<String>,
    state_id: Option<String>,
    #[serde(default)]
    stream: bool,
}

/// What to learn a text into; beside a text that is the whole body, in the query.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct How {
    name: Option<String>,
    state_id: Option<String>,
    #[serde(default)]
    stream: bool,
}

/// A state's new name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    name: Option<String>,
}

/// Lists the states of a key.
pub async fn list(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>) -> Answer {
    let all = app.store.list(&owner).await?;
    Ok(Json(json!({"object": "list", "data": all.iter().map(Description::json).collect::<Vec<_>>()})).into_response())
}

/// Learns a text, given in JSON or as the body itself, into a new state.
pub async fn learn(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    Query(query): Query<How>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    writable(&app)?;
    let (text, how) = match content_type(&headers) {
        "application/json" => {
            let Learn { text, name, state_id, stream } = from_json(&body)?;
            (text, How { name, state_id, stream })
        }
        "text/plain" | "application/octet-stream" => (utf8(&body)?, query),
        other => return Err(unsupported_type(other, "application/json, text/plain or application/octet-stream")),
    };
    let name = how.name.map(checked_name).transpose()?;
    let start = Start::new(&app, &owner, how.state_id.as_deref(), None).await?;
    let tokens = encode(&app, text, start.state.is_none()).await?;
    max_tokens(&app, &start, tokens.len(), Some(0), 0)?;
    let (sender, events) = unbounded_channel();
    let common = Common {
        sampling: Sampling::default(),
        choices: 1,
        stop: Vec::new(),
        stream: how.stream,
        include_usage: false,
        ignore_eos: false,
        save: Some(name.clone()),
        return_state: false,
    };
    let mut job = job(&app, &common, &start, tokens, 0, sender);
    // Watching costs a little; what is known already need not be read where nobody watches.
    job.progress = how.stream;
    app.engine.submit(vec![job])?;
    let mut learning = Learning { app, owner, name, parent: start.id, events, begun: Instant::now() };
    if !how.stream {
        loop {
            if let Step::Done(description) = learning.next().await? {
                return Ok((StatusCode::CREATED, Json(description.json())).into_response());
            }
        }
    }
    let first = learning.next().await?;
    let stream = unfold((Some(learning), Some(first)), move |(learning, ready): (Option<Learning>, Option<Step>)| async move {
        let mut learning = learning?;
        let step = match ready {
            Some(step) => Ok(step),
            None => learning.next().await,
        };
        Some(match step {
            Ok(Step::Progress(progress)) => (sent("progress", progress), (Some(learning), None)),
            Ok(Step::Done(description)) => (sent("state", description.json()), (None, None)),
            Err(error) => (sent("error", error.json()), (None, None)),
        })
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()).into_response())
}

/// An event of one kind.
fn sent(kind: &str, data: Value) -> Result<Sent, Infallible> {
    Ok(Sent::default().event(kind).data(data.to_string()))
}

/// A text that is being learned.
struct Learning {
    app: Arc<App>,
    owner: Owner,
    name: Option<String>,
    parent: Option<String>,
    events: UnboundedReceiver<Event>,
    begun: Instant,
}

enum Step {
    Progress(Value),
    Done(Box<Description>),
}

impl Learning {
    async fn next(&mut self) -> Result<Step, ApiError> {
        loop {
            match self.events.recv().await {
                Some(Event::Started { prompt, .. }) => {
                    return Ok(Step::Progress(json!({"tokens": 0, "of": prompt - 1, "inner": []})));
                }
                Some(Event::Read { tokens, of, inner }) => {
                    let speed = tokens as f64 / self.begun.elapsed().as_secs_f64();
                    return Ok(Step::Progress(json!({"tokens": tokens, "of": of, "tokens_per_second": speed, "inner": inner})));
                }
                Some(Event::Finished { state, .. }) => {
                    let state = state.expect("was asked for");
                    let about = StateFile::from_bytes(state.clone())?.header().into();
                    let (name, parent) = (self.name.take(), self.parent.take());
                    let description = self.app.store.put(&self.owner, name, parent, about, state).await?;
                    return Ok(Step::Done(Box::new(description)));
                }
                Some(Event::Failed(why)) => return Err(why.into()),
                Some(Event::Prompt { .. } | Event::Text { .. }) => {}
                None => return Err(Failure::Stopping.into()),
            }
        }
    }
}

/// Takes a state file in, after checking that it is one of this model.
pub async fn upload(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    Query(named): Query<How>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    writable(&app)?;
    if named.stream || named.state_id.is_some() {
        return Err(ApiError::bad("an upload takes a name and nothing else"));
    }
    if content_type(&headers) != "application/octet-stream" {
        return Err(unsupported_type(content_type(&headers), "application/octet-stream"));
    }
    let name = named.name.map(checked_name).transpose()?;
    let header = app.engine.verify(body.to_vec()).await?;
    check_tokenizer(&app, &header)?;
    let description = app.store.put(&owner, name, None, (&header).into(), body.to_vec()).await?;
    Ok((StatusCode::CREATED, Json(description.json())).into_response())
}

/// Describes a state.
pub async fn inspect(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>, Path(id): Path<String>) -> Answer {
    Ok(Json(app.store.get(&owner, &id).await?.json()).into_response())
}

/// The state file.
pub async fn content(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>, Path(id): Path<String>) -> Answer {
    let description = app.store.get(&owner, &id).await?;
    let bytes = app.store.read(&owner, &description).await?;
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        // The id is ours: letters, digits and a hyphen.
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{}.state\"", description.id)),
    ];
    Ok((headers, bytes).into_response())
}

/// Gives a state a name, or none.
pub async fn rename(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    writable(&app)?;
    if content_type(&headers) != "application/json" {
        return Err(unsupported_type(content_type(&headers), "application/json"));
    }
    let named: Named = from_json(&body)?;
    let name = named.name.map(checked_name).transpose()?;
    Ok(Json(app.store.rename(&owner, &id, name).await?.json()).into_response())
}

/// Copies a state under a new id.
pub async fn fork(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    writable(&app)?;
    let named = match body.is_empty() {
        true => Named { name: None },
        false if content_type(&headers) == "application/json" => from_json(&body)?,
        false => return Err(unsupported_type(content_type(&headers), "application/json")),
    };
    let description = app.store.get(&owner, &id).await?;
    let bytes = app.store.read(&owner, &description).await?;
    let name = named.name.map(checked_name).transpose()?.or(description.name);
    let about = StateFile::from_bytes(bytes.clone())?.header().into();
    let copy = app.store.put(&owner, name, Some(description.id), about, bytes).await?;
    Ok((StatusCode::CREATED, Json(copy.json())).into_response())
}

/// Deletes a state.
pub async fn delete(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>, Path(id): Path<String>) -> Answer {
    writable(&app)?;
    app.store.delete(&owner, &id).await?;
    Ok(Json(json!({"id": id, "object": "state", "deleted": true})).into_response())
}

/// The type of a body, without parameters.
fn content_type(headers: &HeaderMap) -> &str {
    let value = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim()
}

fn unsupported_type(found: &str, wanted: &str) -> ApiError {
    ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("the content type is `{found}`; it must be {wanted}"))
}

fn from_json<'b, T: Deserialize<'b>>(body: &'b [u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|e| ApiError::bad(format!("the body is not what it should be: {e}")))
}

fn utf8(body: &[u8]) -> Result<String, ApiError> {
    let text = std::str::from_utf8(body);
    text.map(str::to_owned).map_err(|e| ApiError::bad(format!("the text is not UTF-8 from byte {} on", e.valid_up_to())))
}
