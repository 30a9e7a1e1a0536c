//! One thread owns the model; everybody else sends it jobs and gets events back.
//!
//! Every running choice has a slot of the states. A round of the thread reads one piece of waiting prompts and then decodes one
//! token for every choice whose prompt has been read ([`scheduler`]), so a long prompt delays running choices by one piece, never
//! by all of it. The engine speaks token ids and text; of HTTP it knows nothing.

mod decoded;
mod sampler;
mod scheduler;
mod sequence;
mod shared;

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result};
use tokio::sync::{mpsc::UnboundedSender, oneshot};
use ttt::data::Tokenizer;
use ttt::generate::Sampling;
use ttt::lm::{InnerErrors, Lm};

use super::snapshots::Snapshots;
pub use decoded::TokenInfo;
pub use shared::{BUCKETS, Histogram, Shared};

/// How much the engine does at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Choices that run at once.
    pub slots: usize,
    /// Jobs that wait for a slot.
    pub queue: usize,
    /// Tokens of prompts that are read between two decoding steps.
    pub chunk: usize,
    /// Tokens between two snapshots of a prompt that is read.
    pub snapshot_every: u64,
    /// Tokens that a sequence may have, where its state grows with them.
    pub context: Option<u64>,
}

/// A prompt, and what is wanted of it.
pub struct Job {
    /// Ids to read; with a start, those after its pending ones.
    pub tokens: Vec<u32>,
    /// The state to go on from, a state file.
    pub start: Option<Arc<[u8]>>,
    /// Whose snapshots may be used, and under what name this job's are kept: see [`super::snapshots::root`].
    pub root: [u8; 32],
    /// Whether snapshots are used and kept.
    pub snapshots: bool,
    /// How tokens are chosen; choice i has the seed plus i.
    pub sampling: Sampling,
    /// Number of choices.
    pub choices: usize,
    /// Number of this job's first choice in the events.
    pub first_choice: usize,
    /// Tokens of a choice at most.
    pub max_tokens: usize,
    /// Texts that end a choice; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after the token that ends a text.
    pub ignore_eos: bool,
    /// Likeliest tokens that are reported with every token.
    pub top: Option<usize>,
    /// Report the prompt's log-probabilities too.
    pub prompt_logprobs: bool,
    /// Report progress while reading, with the inner models' errors.
    pub progress: bool,
    /// Return the state at the end.
    pub keep_state: bool,
    /// When it came.
    pub arrived: Instant,
    /// When it fails with [`Failure::TimedOut`].
    pub deadline: Instant,
    /// Where events go. When nobody receives them any more the job ends within one step.
    pub events: UnboundedSender<Event>,
}

/// What happens to a job.
#[derive(Debug)]
pub enum Event {
    /// It has a slot; so many tokens of its prompt, the start's pending ones included, need not be read, of this many.
    Started {
        /// Tokens of the prompt that a snapshot had read.
        cached: usize,
        /// Tokens of the prompt.
        prompt: usize,
    },
    /// Its prompt is being read.
    Read {
        /// Tokens read.
        tokens: usize,
        /// Tokens to read.
        of: usize,
        /// Mean squared errors of every layer's inner models in this piece: under the initial weights, before each update, after it.
        inner: Vec<[f64; 3]>,
    },
    /// Tokens of the prompt; the first has no log-probability.
    Prompt {
        /// First choice of the job.
        choice: usize,
        /// The next tokens.
        tokens: Vec<TokenInfo>,
    },
    /// A choice goes on.
    Text {
        /// The choice.
        choice: usize,
        /// What is now certain of its text.
        text: String,
        /// The tokens that end in it.
        tokens: Vec<TokenInfo>,
    },
    /// A choice is complete.
    Finished {
        /// The choice.
        choice: usize,
        /// Why it ended.
        reason: Finish,
        /// Tokens that were chosen.
        tokens: usize,
        /// The state file, when it was asked for.
        state: Option<Vec<u8>>,
    },
    /// The job ended otherwise.
    Failed(Failure),
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its text, or a stop text came.
    Stop,
    /// The limit on tokens, or the server stops.
    Length,
}

/// Why a job could not be done.
#[derive(Debug)]
pub enum Failure {
    /// Too many jobs are waiting.
    Busy {
        /// Seconds after which to try again.
        retry_after: u64,
    },
    /// The server stops.
    Stopping,
    /// The deadline passed.
    TimedOut,
    /// What the model said.
    Model(ttt::Error),
}

enum Command {
    Run(Box<Job>),
    /// Check a state file against the model.
    Verify(Vec<u8>, oneshot::Sender<ttt::Result<ttt::state::StateHeader>>),
    /// Take no more jobs, finish what runs until then, write snapshots, end.
    Stop(Instant),
}

/// The way to the engine. Cloning it clones a handle.
#[derive(Clone)]
pub struct Handle {
    commands: Sender<Command>,
    /// Counters, which anybody may read.
    pub shared: Arc<Shared>,
    queue: usize,
}

impl Handle {
    /// Starts the engine.
    ///
    /// # Errors
    /// Memory for the slots.
    pub fn start(lm: Lm, tokenizer: Arc<Tokenizer>, limits: Limits, snapshots: Snapshots) -> Result<(Handle, JoinHandle<()>)> {
        let (commands, inbox) = channel();
        let shared = Arc::new(Shared::new(limits.slots));
        let mut states = lm.states(limits.slots).context("memory for the slots; fewer --slots need less")?;
        // One slot to check uploads in, which nothing else needs.
        let spare = lm.states(1)?;
        let theirs = shared.clone();
        let work = move || scheduler::run(&lm, &tokenizer, &mut states, spare, limits, snapshots, &inbox, &theirs);
        let thread = std::thread::Builder::new().name("engine".into()).spawn(work).context("cannot start the engine's thread")?;
        Ok((Handle { commands, shared, queue: limits.queue }, thread))
    }

    /// Queues jobs, all or none.
    ///
    /// # Errors
    /// [`Failure::Busy`] when so many do not fit into the queue, [`Failure::Stopping`].
    pub fn submit(&self, jobs: Vec<Job>) -> Result<(), Failure> {
        if !self.shared.enqueue(jobs.len(), self.queue) {
            return Err(Failure::Busy { retry_after: self.shared.retry_after() });
        }
        for job in jobs {
            self.commands.send(Command::Run(Box::new(job))).map_err(|_| Failure::Stopping)?;
        }
        Ok(())
    }

    /// Checks a state file against the model.
    ///
    /// # Errors
    /// Why it is none of this model's.
    pub async fn verify(&self, state: Vec<u8>) -> Result<ttt::state::StateHeader, Failure> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command::Verify(state, answer)).map_err(|_| Failure::Stopping)?;
        answered.await.map_err(|_| Failure::Stopping)?.map_err(Failure::Model)
    }

    /// Tells the engine to end: what runs may go on until `deadline`, and is then ended with what there is.
    pub fn stop(&self, deadline: Instant) {
        // An engine that is gone has stopped.
        let _ = self.commands.send(Command::Stop(deadline));
    }
}

/// Means over the mini-batches of a piece.
fn means(errors: &[InnerErrors]) -> Vec<[f64; 3]> {
    let mean = |rows: &InnerErrors| std::array::from_fn(|i| rows.iter().map(|row| row[i]).sum::<f64>() / rows.len() as f64);
    errors.iter().map(mean).collect()
}
