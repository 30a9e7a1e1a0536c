//! Tokens that come in pieces, learned in chunks, and what is measured on the way.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};
use ttt::Batch;
use ttt::eval::{Judged, Report};
use ttt::generate::{PREFILL_CHUNK, learn};
use ttt::lm::Lm;

use crate::interrupt::Interrupt;
use crate::state::Start;

/// Tokens at the beginning of every chunk on which the inner models are measured: a sixteenth of all. A measured token takes
/// longer than another, and keeps the fast weights of its mini-batch meanwhile.
pub const MEASURED: usize = PREFILL_CHUNK / 16;
/// Tokens of a measurement of speed.
const WINDOW: u64 = 100_000;

/// Reads the tokens that wait in `start.pending`.
///
/// Chunks are counted from the first token that is read, so a reader that goes on behind whole chunks makes the same passes, and
/// gets the same numbers, as one that was not stopped.
pub struct Reader<'m> {
    lm: &'m Lm,
    start: Start,
    /// Tokens of the texts that are still to be left out: they were read before.
    skip: u64,
    /// Tokens of the texts that have come, and how many of them were not left out.
    come: u64,
    taken: usize,
    /// Tokens that were read.
    pub tokens: u64,
    /// Errors of the inner models.
    pub inner: Report,
    recent: Option<[f64; 3]>,
    pub speed: Speed,
}

impl<'m> Reader<'m> {
    /// A reader that goes on from `start` and leaves out the first `skip` tokens of the texts.
    pub fn new(lm: &'m Lm, start: Start, skip: u64) -> Reader<'m> {
        let inner = Report::new(lm.config().mini_batch().unwrap_or(1), 1);
        Reader { lm, start, skip, come: 0, taken: 0, tokens: 0, inner, recent: None, speed: Speed::new() }
    }

    /// The next tokens of the texts.
    pub fn push(&mut self, ids: &[u32]) {
        let left_out = self.skip.min(ids.len() as u64);
        self.skip -= left_out;
        self.come += ids.len() as u64;
        self.taken += ids.len() - left_out as usize;
        self.start.pending.extend(&ids[left_out as usize..]);
    }

    /// How many more tokens the texts should have had.
    pub fn missing(&self) -> u64 {
        self.skip
    }

    /// Reads whole chunks, or, at the end, all but the last token: whoever goes on wants its prediction. Stops between two chunks
    /// when that is asked for; whether it was not. Progress is the part that is done, and what to say of it.
    pub fn read(&mut self, end: bool, interrupt: &Interrupt, mut progress: impl FnMut(f64, &Progress)) -> Result<bool> {
        let most = self.start.pending.len().saturating_sub(1);
        let count = if end { most } else { most / PREFILL_CHUNK * PREFILL_CHUNK };
        let pending = std::mem::take(&mut self.start.pending);
        let mut done = 0;
        let mut read = || -> Result<()> {
            for chunk in pending[..count].chunks(PREFILL_CHUNK) {
                if interrupt.asked() {
                    break;
                }
                self.chunk(chunk)?;
                done += chunk.len();
                self.tokens += chunk.len() as u64;
                let rate = self.speed.count(chunk.len() as u64);
                progress(done as f64 / count as f64, &Progress { rate, inner: self.recent });
            }
            Ok(())
        };
        let result = read();
        self.start.pending = pending;
        self.start.pending.drain(..done);
        result.map(|()| !interrupt.asked())
    }

    /// Reads a chunk, and measures the first whole mini-batches of it where there are any.
    fn chunk(&mut self, chunk: &[u32]) -> Result<()> {
        let Some(k) = self.lm.config().mini_batch() else { return Ok(learn(self.lm, &mut self.start.states, 0, chunk)?) };
        let states = &mut self.start.states;
        let to_boundary = (k - (states.position(0) % k as u64) as usize) % k;
        let (before, rest) = chunk.split_at(to_boundary.min(chunk.len()));
        let (measured, after) = rest.split_at((MEASURED.max(k) / k * k).min(rest.len() / k * k));
        if !before.is_empty() {
            learn(self.lm, states, 0, before)?;
        }
        if !measured.is_empty() {
            let position = states.position(0);
            let (_, inner) = self.lm.forward_measured(&Batch::one(measured), states)?;
            self.inner.add(&Judged { position: position + 1, nll: &[], inner: &inner, inner_position: position });
            let rows = inner.iter().flatten();
            let count = rows.clone().count() as f64;
            self.recent = Some(std::array::from_fn(|i| rows.clone().map(|row| row[i]).sum::<f64>() / count));
        }
        if !after.is_empty() {
            learn(self.lm, states, 0, after)?;
        }
        Ok(())
    }

    /// The state behind what was read, with the token that comes next pending, and how many tokens of the texts it has taken.
    pub fn into_state(self) -> (Start, u64) {
        let Reader { start: Start { states, mut pending }, come, taken, .. } = self;
        // What was pending before the texts came is in none of them, and stays.
        let others = pending.len().saturating_sub(taken);
        let kept = others.max(1).min(pending.len());
        let left = (pending.len() - kept) as u64;
        pending.truncate(kept);
        (Start { states, pending }, come - left)
    }
}

/// What to say while reading.
pub struct Progress {
    /// Tokens a second.
    pub rate: f64,
    /// Errors of the inner models where they were measured last, means over all layers: under W0, before each update, after it.
    pub inner: Option<[f64; 3]>,
}

/// Speed and memory, window by window.
pub struct Speed {
    pub begin: Instant,
    pub windows: Vec<Value>,
    since: Instant,
    tokens: u64,
    resident: Option<u64>,
}

impl Speed {
    fn new() -> Speed {
        Speed { begin: Instant::now(), windows: Vec::new(), since: Instant::now(), tokens: 0, resident: None }
    }

    /// Counts tokens; returns tokens a second in this window.
    fn count(&mut self, tokens: u64) -> f64 {
        self.tokens += tokens;
        self.resident = self.resident.max(resident());
        let rate = self.tokens as f64 / self.since.elapsed().as_secs_f64();
        if self.tokens >= WINDOW {
            self.windows.push(json!({"tokens": self.tokens, "tokens_per_second": rate, "resident_bytes": self.resident}));
            (self.since, self.tokens, self.resident) = (Instant::now(), 0, None);
        }
        rate
    }
}

/// Main memory that this process holds, in bytes, where the system says so (Linux).
pub fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
