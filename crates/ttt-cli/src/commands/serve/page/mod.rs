//! The page at `/`: three files in the binary, which load nothing from elsewhere.

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// Only this server is spoken to, and only its own script runs.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers = [(header::CONTENT_TYPE, kind), (header::CONTENT_SECURITY_POLICY, POLICY), (header::CACHE_CONTROL, "no-cache")];
    (headers, text).into_response()
}

/// The page.
pub async fn html() -> Response {
    file("text/html; charset=utf-8", include_str!("page.html"))
}

/// Its style.
pub async fn css() -> Response {
    file("text/css; charset=utf-8", include_str!("page.css"))
}

/// Its script.
pub async fn js() -> Response {
    file("text/javascript; charset=utf-8", include_str!("page.js"))
}
