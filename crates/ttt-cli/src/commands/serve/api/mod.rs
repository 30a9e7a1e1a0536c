//! What clients see: routes, and what every request goes through before it reaches one.

mod chat;
mod completions;
mod error;
mod metrics;
mod reply;
mod request;
mod states;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use serde_json::json;
use ttt::data::Tokenizer;

use super::auth::{Keys, foreign};
use super::engine::Handle;
use super::page;
use super::store::Store;
use crate::commands::chat::template::Template;
pub use error::ApiError;

/// A client has so long for the body of a request.
const BODY: Duration = Duration::from_secs(60);

/// What the API says of the model.
#[derive(Clone, Debug)]
pub struct Model {
    pub name: String,
    pub hash: String,
    /// Seconds since 1970.
    pub created: u64,
    pub vocab_size: usize,
    pub layers: usize,
    pub parameters: usize,
    pub state_bytes: usize,
    /// Bytes that a state grows by with every token.
    pub state_bytes_per_token: usize,
}

/// What a request may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Choices, with all prompts together.
    pub choices: usize,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of a choice.
    pub tokens: usize,
    /// Bytes of a body.
    pub body: usize,
    /// From arrival to answer.
    pub time: Duration,
    /// Tokens of a sequence in all, where its state grows with them.
    pub context: Option<u64>,
}

/// What all requests share.
pub struct App {
    pub engine: Handle,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<Template>,
    pub model: Model,
    pub store: Store,
    pub keys: Keys,
    pub limits: Limits,
    pub read_only: bool,
    pub loopback: bool,
    pub cors: Vec<String>,
    /// Answers by route and status.
    pub requests: Mutex<BTreeMap<(String, u16), u64>>,
}

type Shared = Arc<App>;

/// Every route, and whether it needs a key.
fn routes() -> Vec<(&'static str, bool, MethodRouter<Shared>)> {
    vec![
        ("/", false, get(page::html)),
        ("/page.css", false, get(page::css)),
        ("/page.js", false, get(page::js)),
        ("/health", false, get(health)),
        ("/openapi.json", false, get(openapi)),
        ("/metrics", true, get(metrics::metrics)),
        ("/v1/models", true, get(models)),
        ("/v1/models/{model}", true, get(model)),
        ("/v1/completions", true, post(completions::create)),
        ("/v1/chat/completions", true, post(chat::create)),
        ("/v1/states", true, get(states::list).post(states::learn)),
        ("/v1/states/upload", true, post(states::upload)),
        ("/v1/states/{id}", true, get(states::inspect).patch(states::rename).delete(states::delete)),
        ("/v1/states/{id}/content", true, get(states::content)),
        ("/v1/states/{id}/fork", true, post(states::fork)),
    ]
}

/// The service.
pub fn router(app: Shared) -> Router {
    let mut router = Router::new();
    for (path, keyed, methods) in routes() {
        let methods = if keyed { methods.layer(from_fn_with_state(app.clone(), authorize)) } else { methods };
        router = router.route(path, methods);
    }
    router
        .fallback(|| async { ApiError::not_found("there is no such address; /openapi.json lists what there is") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this address does not take this method; /openapi.json lists what it takes",
            )
        })
        .layer(from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

/// Counts, bounds the body, answers browsers.
async fn guard(State(app): State<Shared>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("other", |path| path.as_str()).to_owned();
    let origin = request.headers().get(header::ORIGIN).cloned();
    let mut response = answer(&app, request, next).await;
    if let Some(origin) = origin.filter(|_| !app.cors.is_empty()) {
        let headers = response.headers_mut();
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
        if app.cors.iter().any(|allowed| allowed == "*" || allowed.as_bytes() == origin.as_bytes()) {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        }
    }
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let count = (path, response.status().as_u16());
    *app.requests.lock().expect("no panic while it is held").entry(count).or_default() += 1;
    response
}

async fn answer(app: &App, request: Request, next: Next) -> Response {
    if let Some(why) = foreign(request.headers(), &app.cors, app.loopback && app.keys.is_empty()) {
        return ApiError::new(StatusCode::FORBIDDEN, why).into_response();
    }
    if request.method() == Method::OPTIONS && !app.cors.is_empty() {
        let allow = [
            (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, PATCH, DELETE"),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, "authorization, content-type"),
            (header::ACCESS_CONTROL_MAX_AGE, "600"),
        ];
        return (StatusCode::NO_CONTENT, allow).into_response();
    }
    let (parts, body) = request.into_parts();
    let most = app.limits.body;
    let length = parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    let too_large =
        || ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, format!("a body may have at most {most} bytes")).into_response();
    if length.is_some_and(|length| length > most) {
        return too_large();
    }
    match tokio::time::timeout(BODY, axum::body::to_bytes(body, most)).await {
        Ok(Ok(bytes)) => next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Ok(Err(e)) if std::error::Error::source(&e).is_some_and(|e| e.to_string().contains("length limit")) => too_large(),
        Ok(Err(_)) => ApiError::bad("the body was cut off").into_response(),
        Err(_) => ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive").into_response(),
    }
}

/// Lets those with a key pass, and notes who they are.
async fn authorize(State(app): State<Shared>, mut request: Request, next: Next) -> Response {
    match app.keys.owner(request.headers()) {
        Some(owner) => {
            request.extensions_mut().insert(owner);
            next.run(request).await
        }
        None => {
            let error = ApiError::new(StatusCode::UNAUTHORIZED, "this server needs an API key: send `Authorization: Bearer KEY`");
            ([(header::WWW_AUTHENTICATE, "Bearer")], error).into_response()
        }
    }
}

/// A step that takes longer than this is none.
const STALLED: Duration = Duration::from_secs(120);

async fn health(State(app): State<Shared>) -> Response {
    if app.engine.shared.stalled().is_some_and(|time| time > STALLED) {
        return ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the model has not finished a step for two minutes").into_response();
    }
    Json(json!({"status": "ok"})).into_response()
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], include_str!("openapi.json")).into_response()
}

fn describe(app: &App) -> serde_json::Value {
    let m = &app.model;
    json!({
        "id": m.name, "object": "model", "created": m.created, "owned_by": "ttt", "hash": m.hash, "parameters": m.parameters,
        "layers": m.layers, "vocab_size": m.vocab_size, "state_bytes": m.state_bytes,
        "state_bytes_per_token": m.state_bytes_per_token, "context": app.limits.context, "chat": app.template.is_some(),
        "read_only": app.read_only,
    })
}

async fn models(State(app): State<Shared>) -> Response {
    Json(json!({"object": "list", "data": [describe(&app)]})).into_response()
}

async fn model(State(app): State<Shared>, axum::extract::Path(name): axum::extract::Path<String>) -> Result<Response, ApiError> {
    check_model(&app, Some(&name))?;
    Ok(Json(describe(&app)).into_response())
}

/// Refuses the name of another model.
fn check_model(app: &App, name: Option<&str>) -> Result<(), ApiError> {
    match name {
        Some(name) if name != app.model.name => {
            Err(ApiError::not_found(&format!("there is no model `{name}` here; this server has `{}`", app.model.name)))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every route is described, and nothing else is.
    #[test]
    fn openapi_describes_the_routes() {
        let document: serde_json::Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
        let described = document["paths"].as_object().unwrap();
        let methods =
            |path: &str| described.get(path).map(|methods| methods.as_object().unwrap().keys().cloned().collect::<Vec<_>>());
        let mut known = 0;
        for (path, keyed, router) in routes() {
            let found = methods(path).unwrap_or_else(|| panic!("{path} is not described"));
            let debug = format!("{router:?}");
            for method in ["get", "post", "patch", "delete", "put"] {
                let routed = !debug.contains(&format!("{method}: None"));
                assert_eq!(found.iter().any(|m| m == method), routed, "{method} {path}");
                if routed {
                    let open = described[path][method]["security"] == json!([]);
                    assert_eq!(open, !keyed, "{method} {path}: whether it needs a key");
                }
            }
            known += 1;
        }
        assert_eq!(known, described.len());
    }
}
