//! Counters that the engine writes and everybody may read.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Upper bounds of the buckets of times, in seconds; the last is open.
pub const BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// How many times lie below each bound of [`BUCKETS`].
#[derive(Default)]
pub struct Histogram {
    counts: [AtomicU64; BUCKETS.len() + 1],
    microseconds: AtomicU64,
}

impl Histogram {
    /// Adds a time.
    pub fn add(&self, time: Duration) {
        let bucket = BUCKETS.iter().position(|b| time.as_secs_f64() <= *b).unwrap_or(BUCKETS.len());
        self.counts[bucket].fetch_add(1, Relaxed);
        self.microseconds.fetch_add(time.as_micros() as u64, Relaxed);
    }

    /// Counts up to each bound and in all, and the sum of the times in seconds.
    pub fn cumulative(&self) -> (Vec<u64>, f64) {
        let counts = self.counts.iter().scan(0, |sum, count| {
            *sum += count.load(Relaxed);
            Some(*sum)
        });
        (counts.collect(), self.microseconds.load(Relaxed) as f64 / 1e6)
    }
}

/// What the engine has done and is doing.
pub struct Shared {
    /// Slots in all.
    pub slots: usize,
    /// Jobs that wait.
    pub waiting: AtomicUsize,
    /// Slots in use.
    pub running: AtomicUsize,
    /// Jobs that ended, and those of them that failed or whose client went.
    pub finished: AtomicU64,
    pub failed: AtomicU64,
    pub cancelled: AtomicU64,
    pub rejected: AtomicU64,
    /// Tokens of prompts that were read, that snapshots saved reading, and that were chosen.
    pub prompt_tokens: AtomicU64,
    pub cached_tokens: AtomicU64,
    pub generated_tokens: AtomicU64,
    /// Lookups of snapshots.
    pub hits: AtomicU64,
    pub misses: AtomicU64,
    pub snapshots_memory: AtomicU64,
    pub snapshots_memory_bytes: AtomicU64,
    pub snapshots_disk: AtomicU64,
    pub snapshots_disk_bytes: AtomicU64,
    /// Time from a job's arrival to its first token, and from one token of a choice to the next.
    pub first_token: Histogram,
    pub next_token: Histogram,
    /// Seconds that recent jobs took, smoothed, in microseconds.
    job_time: AtomicU64,
    /// When the engine last finished a step.
    beat: Mutex<Instant>,
}

impl Shared {
    /// An idle engine.
    pub fn new(slots: usize) -> Shared {
        let (n, u) = (|| AtomicU64::new(0), || AtomicUsize::new(0));
        Shared {
            slots,
            waiting: u(),
            running: u(),
            finished: n(),
            failed: n(),
            cancelled: n(),
            rejected: n(),
            prompt_tokens: n(),
            cached_tokens: n(),
            generated_tokens: n(),
            hits: n(),
            misses: n(),
            snapshots_memory: n(),
            snapshots_memory_bytes: n(),
            snapshots_disk: n(),
            snapshots_disk_bytes: n(),
            first_token: Histogram::default(),
            next_token: Histogram::default(),
            job_time: n(),
            beat: Mutex::new(Instant::now()),
        }
    }

    /// Counts waiting jobs, unless there would be more than `most`.
    pub fn enqueue(&self, jobs: usize, most: usize) -> bool {
        let room = |waiting: usize| (waiting + jobs <= most).then_some(waiting + jobs);
        let taken = self.waiting.fetch_update(Relaxed, Relaxed, room).is_ok();
        if !taken {
            self.rejected.fetch_add(1, Relaxed);
        }
        taken
    }

    /// A job ended after so long.
    pub fn job_done(&self, time: Duration) {
        self.finished.fetch_add(1, Relaxed);
        let smooth = |old: u64| Some(if old == 0 { time.as_micros() as u64 } else { (7 * old + time.as_micros() as u64) / 8 });
        let _ = self.job_time.fetch_update(Relaxed, Relaxed, smooth);
    }

    /// Seconds after which a place in the queue is likely, from 1 to 60.
    pub fn retry_after(&self) -> u64 {
        let job = self.job_time.load(Relaxed) as f64 / 1e6;
        let ahead = self.waiting.load(Relaxed) as f64 / self.slots as f64;
        (job * ahead).ceil().clamp(1.0, 60.0) as u64
    }

    /// The engine has done a step.
    pub fn beat(&self) {
        *self.beat.lock().expect("no panic while it is held") = Instant::now();
    }

    /// Time since the engine's last step, when it has something to do.
    pub fn stalled(&self) -> Option<Duration> {
        (self.running.load(Relaxed) > 0).then(|| self.beat.lock().expect("no panic while it is held").elapsed())
    }
}
