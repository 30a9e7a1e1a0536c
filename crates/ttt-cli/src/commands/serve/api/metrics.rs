//! `/metrics`, in Prometheus' text format.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::App;
use crate::commands::read::resident;
use crate::commands::serve::engine::{BUCKETS, Histogram};

/// All metrics.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text(&app)).into_response()
}

fn text(app: &App) -> String {
    let s = &app.engine.shared;
    let mut out = String::new();
    let get = |n: &AtomicU64| n.load(Relaxed) as f64;
    let size = |n: &AtomicUsize| n.load(Relaxed) as f64;
    let counters = [
        ("ttt_jobs_finished_total", "Choices that were completed", get(&s.finished)),
        ("ttt_jobs_failed_total", "Prompts that ended with an error", get(&s.failed)),
        ("ttt_jobs_cancelled_total", "Prompts whose client went away", get(&s.cancelled)),
        ("ttt_requests_rejected_total", "Requests that found the queue full", get(&s.rejected)),
        ("ttt_prompt_tokens_total", "Tokens of prompts that were read", get(&s.prompt_tokens)),
        ("ttt_cached_tokens_total", "Tokens of prompts that a snapshot had read already", get(&s.cached_tokens)),
        ("ttt_generated_tokens_total", "Tokens that were chosen", get(&s.generated_tokens)),
        ("ttt_snapshot_hits_total", "Prompts that began with a snapshot", get(&s.hits)),
        ("ttt_snapshot_misses_total", "Prompts that found no snapshot", get(&s.misses)),
    ];
    let gauges = [
        ("ttt_slots", "Choices that can run at once", s.slots as f64),
        ("ttt_slots_in_use", "Choices that run", size(&s.running)),
        ("ttt_queue_length", "Prompts that wait for a slot", size(&s.waiting)),
        ("ttt_snapshots_in_memory", "Snapshots in memory", get(&s.snapshots_memory)),
        ("ttt_snapshots_in_memory_bytes", "Their size", get(&s.snapshots_memory_bytes)),
        ("ttt_snapshots_on_disk", "Snapshots in files", get(&s.snapshots_disk)),
        ("ttt_snapshots_on_disk_bytes", "Their size", get(&s.snapshots_disk_bytes)),
        ("process_resident_memory_bytes", "Main memory of this process", resident().unwrap_or(0) as f64),
    ];
    for (kind, all) in [("counter", &counters[..]), ("gauge", &gauges[..])] {
        for (name, help, value) in all {
            let _ = writeln!(out, "# HELP {name} {help}.\n# TYPE {name} {kind}\n{name} {value}");
        }
    }
    histogram(&mut out, "ttt_first_token_seconds", "Time from a prompt's arrival to its first token", &s.first_token);
    histogram(&mut out, "ttt_next_token_seconds", "Time from one token of a choice to the next", &s.next_token);
    let _ = writeln!(out, "# HELP ttt_http_requests_total Answers by route and status.\n# TYPE ttt_http_requests_total counter");
    for ((path, status), count) in app.requests.lock().expect("no panic while it is held").iter() {
        let _ = writeln!(out, "ttt_http_requests_total{{path=\"{path}\",status=\"{status}\"}} {count}");
    }
    out
}

fn histogram(out: &mut String, name: &str, help: &str, histogram: &Histogram) {
    let (counts, sum) = histogram.cumulative();
    let _ = writeln!(out, "# HELP {name} {help}.\n# TYPE {name} histogram");
    for (i, count) in counts.iter().enumerate() {
        let bound = BUCKETS.get(i).map_or("+Inf".to_owned(), f64::to_string);
        let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {count}");
    }
    let _ = writeln!(out, "{name}_sum {sum}\n{name}_count {}", counts.last().copied().unwrap_or(0));
}
