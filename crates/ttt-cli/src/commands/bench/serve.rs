//! `ttt bench serve`: many streams from a server that runs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::args::Load;
use crate::units;

/// A server that says nothing for so long counts as an error.
const PATIENCE: Duration = Duration::from_secs(120);

/// What one client saw.
#[derive(Default)]
struct Seen {
    tokens: u64,
    answers: u64,
    /// Seconds from the request to the first piece, and from each piece to the next.
    first: Vec<f64>,
    next: Vec<f64>,
    errors: Vec<String>,
}

/// Runs the command.
pub fn run(load: &Load, json_wanted: bool, out: &mut dyn Write) -> Result<()> {
    let Some(address) = load.url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/')) else {
        bail!("{} is no http:// address", load.url);
    };
    let client = Client { address, key: std::env::var("TTT_API_KEY").ok() };
    let model = client.get("/v1/models").with_context(|| format!("no server answers at {}", load.url))?;
    let model = model.parse::<Value>().context("the server is none of `ttt serve`")?["data"][0]["id"].clone();
    let begin = Instant::now();
    let end = begin + Duration::from_secs(load.seconds);
    let over = AtomicBool::new(false);
    let mut memory = Vec::new();
    let (streams, long) = std::thread::scope(|scope| {
        let streams: Vec<_> = (0..load.streams)
            .map(|who| {
                scope.spawn({
                    let client = &client;
                    move || stream(client, load, u64::from(who), end)
                })
            })
            .collect();
        let long = (load.long_prompts > 0).then(|| {
            let (client, over) = (&client, &over);
            scope.spawn(move || read_prompts(client, load.long_prompts, over))
        });
        while Instant::now() < end {
            std::thread::sleep(Duration::from_secs(1).min(end.saturating_duration_since(Instant::now())));
            memory.extend(client.metric("process_resident_memory_bytes").map(|m| (begin.elapsed().as_secs_f64(), m)));
        }
        let streams: Vec<Seen> = streams.into_iter().map(|s| s.join().expect("a client does not panic")).collect();
        over.store(true, Ordering::Relaxed);
        (streams, long.map(|l| l.join().expect("a client does not panic")))
    });
    let seconds = begin.elapsed().as_secs_f64();
    let mut all = Seen::default();
    for seen in streams.into_iter().chain(long.map(|long| Seen { errors: long.errors, ..Seen::default() })) {
        all.tokens += seen.tokens;
        all.answers += seen.answers;
        all.first.extend(seen.first);
        all.next.extend(seen.next);
        all.errors.extend(seen.errors);
    }
    let [first, next] = [&mut all.first, &mut all.next].map(|times| quantiles(times));
    let rate = all.tokens as f64 / seconds;
    // Memory after a fifth of the time, when everything has been in use, and at the end.
    let at = |t: f64| memory.iter().find(|(time, _)| *time >= t).or(memory.last()).map(|(_, bytes)| *bytes);
    let resident = [at(load.seconds as f64 / 5.0), memory.last().map(|(_, bytes)| *bytes)];
    if json_wanted {
        let named = |q: [f64; 3]| json!({"p50": q[0], "p95": q[1], "p99": q[2]});
        let object = json!({
            "model": model, "streams": load.streams, "seconds": seconds, "answers": all.answers, "tokens": all.tokens,
            "tokens_per_second": rate, "first_token_seconds": named(first), "next_token_seconds": named(next),
            "resident_bytes": resident, "errors": all.errors.len(), "first_errors": &all.errors[..all.errors.len().min(5)],
        });
        return Ok(writeln!(out, "{object}")?);
    }
    let times = |q: [f64; 3]| q.map(|s| format!("{:>9.1} ms", 1000.0 * s)).concat();
    writeln!(
        out,
        "{} streams from {model} for {}: {} answers",
        load.streams,
        units::seconds(seconds),
        units::grouped(all.answers)
    )?;
    writeln!(out, "tokens/s     {}", units::count(rate.round()))?;
    writeln!(out, "{:13}{:>12}{:>12}{:>12}", "", "median", "95 %", "99 %")?;
    writeln!(out, "first token  {}\nnext token   {}", times(first), times(next))?;
    if let [Some(early), Some(late)] = resident {
        writeln!(
            out,
            "memory       {} after a fifth of the time, {} at the end",
            units::bytes(early as u64),
            units::bytes(late as u64)
        )?;
    }
    writeln!(out, "errors       {}", all.errors.len())?;
    for error in all.errors.iter().take(5) {
        writeln!(out, "  {error}")?;
    }
    Ok(())
}

/// One answer after the other until `end`.
fn stream(client: &Client<'_>, load: &Load, who: u64, end: Instant) -> Seen {
    let mut seen = Seen::default();
    let mut seed = who;
    while Instant::now() < end {
        seed = seed.wrapping_add(1 << 20);
        let body = json!({
            "prompt": words(load.prompt_tokens, seed), "max_tokens": load.max_tokens, "seed": seed & 0xffff_ffff,
            "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        });
        match answer(client, &body, end, &mut seen) {
            Ok(()) => seen.answers += 1,
            Err(e) => {
                seen.errors.push(format!("{e:#}"));
                // A server that refuses is not to be asked a thousand times a second.
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
    seen
}

/// Reads a streamed answer; one that goes on at `end` is left.
fn answer(client: &Client<'_>, body: &Value, end: Instant, seen: &mut Seen) -> Result<()> {
    let mut last = Instant::now();
    let mut reader = client.send("POST", "/v1/completions", &body.to_string())?;
    let (mut line, mut first, mut pieces) = (String::new(), true, 0);
    loop {
        line.clear();
        if reader.read_line(&mut line).context("the answer stopped")? == 0 {
            bail!("the answer was cut off");
        }
        // Pieces come in chunks of their own, so a line is never divided.
        let Some(data) = line.strip_prefix("data: ") else { continue };
        let now = Instant::now();
        if data.starts_with("[DONE]") {
            return Ok(());
        }
        if data.starts_with("{\"error\"") {
            bail!("{}", data.trim());
        }
        if data.contains("\"usage\":{") {
            let usage: Value = serde_json::from_str(data)?;
            seen.tokens += usage["usage"]["completion_tokens"].as_u64().unwrap_or(0);
            continue;
        }
        if now >= end {
            seen.tokens += pieces;
            return Ok(());
        }
        if data.contains("\"finish_reason\":null") {
            pieces += 1;
            let times = if std::mem::take(&mut first) { &mut seen.first } else { &mut seen.next };
            times.push((now - last).as_secs_f64());
            last = now;
        }
    }
}

/// Has long prompts read, each another, until `over`.
fn read_prompts(client: &Client<'_>, tokens: u32, over: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let mut seed = 1 << 60;
    while !over.load(Ordering::Relaxed) {
        seed += 1;
        let body = json!({"prompt": words(tokens, seed), "max_tokens": 1});
        let read = || -> Result<()> {
            let mut text = String::new();
            client.send("POST", "/v1/completions", &body.to_string())?.read_to_string(&mut text)?;
            Ok(())
        };
        match read() {
            Ok(()) => seen.answers += 1,
            Err(e) => seen.errors.push(format!("a long prompt: {e:#}")),
        }
    }
    seen
}

/// About so many tokens of text, another for each seed.
fn words(tokens: u32, seed: u64) -> String {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let n = (x >> 33) % 27;
        if n == 26 { ' ' } else { char::from(b'a' + n as u8) }
    };
    (0..tokens).map(|_| next()).collect()
}

/// Median, 95th and 99th percentile.
fn quantiles(times: &mut [f64]) -> [f64; 3] {
    times.sort_by(f64::total_cmp);
    [0.5, 0.95, 0.99].map(|q| times.get(((times.len() as f64 - 1.0).max(0.0) * q).round() as usize).copied().unwrap_or(f64::NAN))
}

struct Client<'a> {
    address: &'a str,
    key: Option<String>,
}

impl Client<'_> {
    /// Sends a request; what comes behind the head of a good answer.
    fn send(&self, method: &str, path: &str, body: &str) -> Result<BufReader<TcpStream>> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let key = self.key.as_ref().map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n{key}content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        let mut reader = BufReader::new(stream);
        let (mut status, mut line) = (String::new(), String::new());
        reader.read_line(&mut status)?;
        while line != "\r\n" {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                bail!("the connection was closed");
            }
        }
        if !status.contains(" 200 ") {
            let mut rest = String::new();
            let _ = reader.read_to_string(&mut rest);
            bail!("{} {}", status.trim(), rest.trim());
        }
        Ok(reader)
    }

    fn get(&self, path: &str) -> Result<String> {
        let mut text = String::new();
        self.send("GET", path, "")?.read_to_string(&mut text)?;
        Ok(text)
    }

    fn metric(&self, name: &str) -> Option<f64> {
        self.get("/metrics").ok()?.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted() {
        let mut times: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(quantiles(&mut times), [50.0, 95.0, 99.0]);
        assert!(quantiles(&mut [])[0].is_nan());
    }

    #[test]
    fn every_seed_has_its_words() {
        assert_eq!(words(50, 7), words(50, 7));
        assert_ne!(words(50, 7), words(50, 8));
        assert_eq!(words(50, 7).len(), 50);
    }
}
