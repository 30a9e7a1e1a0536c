//! Errors as OpenAI's clients expect them, and the one place where errors become status codes.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::commands::serve::engine::Failure;
use crate::commands::serve::store;

/// An answer that is an error.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    retry_after: Option<u64>,
}

impl ApiError {
    /// An error of a kind.
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), retry_after: None }
    }

    /// The request cannot be understood or done.
    pub fn bad(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    /// There is no such thing.
    pub fn not_found(message: &str) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, message)
    }

    /// What clients get.
    pub fn json(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 | 403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": null, "code": self.status.as_u16()}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<ttt::Error> for ApiError {
    fn from(error: ttt::Error) -> ApiError {
        let status = match &error {
            ttt::Error::Invalid(_) | ttt::Error::Format { .. } | ttt::Error::Tokenizer(_) | ttt::Error::Data(_) => {
                StatusCode::BAD_REQUEST
            }
            ttt::Error::OutOfMemory { .. } | ttt::Error::OutOfGpuMemory { .. } => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        ApiError::new(status, error.to_string())
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        match failure {
            Failure::Busy { retry_after } => ApiError {
                status: StatusCode::TOO_MANY_REQUESTS,
                message: format!("too many requests are waiting; try again in {retry_after} s"),
                retry_after: Some(retry_after),
            },
            Failure::Stopping => {
                ApiError { status: StatusCode::SERVICE_UNAVAILABLE, message: "the server is stopping".into(), retry_after: Some(5) }
            }
            Failure::TimedOut => {
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, "the request took longer than this server allows (--timeout)")
            }
            Failure::Model(error) => error.into(),
        }
    }
}

impl From<store::Error> for ApiError {
    fn from(error: store::Error) -> ApiError {
        match error {
            store::Error::Unknown => ApiError::not_found("there is no state of this id"),
            store::Error::Full(most) => {
                ApiError::new(StatusCode::CONFLICT, format!("{most} states are kept already; delete one first (--max-states)"))
            }
            store::Error::Storage(message) => {
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the store of states: {message}"))
            }
        }
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> ApiError {
        // OpenAI's servers answer 400 where the types are wrong, too.
        let status = match rejection.status() {
            StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
            other => other,
        };
        ApiError::new(status, rejection.body_text())
    }
}
