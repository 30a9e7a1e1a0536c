//! The rounds of the engine's thread.

mod decode;
mod read;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use ttt::data::Tokenizer;
use ttt::generate::Decoder;
use ttt::lm::Lm;
use ttt::state::{StateFile, States};
use ttt::tensor::{DType, Tensor};

use super::sequence::Sequence;
use super::shared::Shared;
use super::{Command, Event, Failure, Finish, Job, Limits, means};
use crate::commands::serve::snapshots::Snapshots;

/// A state is worth keeping when so many tokens were read for it.
const WORTH: usize = 32;

/// What the thread works with.
struct Engine<'t> {
    lm: &'t Lm,
    tokenizer: &'t Tokenizer,
    states: &'t mut States,
    spare: States,
    decoder: Decoder<'t>,
    /// Tokens that there is room for in every slot, where states grow.
    room: u64,
    limits: Limits,
    snapshots: Snapshots,
    shared: &'t Shared,
    free: Vec<usize>,
    queue: VecDeque<Box<Job>>,
    running: Vec<Sequence<'t>>,
    /// Whose turn it is to have its prompt read.
    turn: usize,
    stopping: Option<Instant>,
}

/// Runs until it is told to stop, or all handles are gone.
pub fn run(
    lm: &Lm,
    tokenizer: &Tokenizer,
    states: &mut States,
    spare: States,
    limits: Limits,
    snapshots: Snapshots,
    inbox: &Receiver<Command>,
    shared: &Shared,
) {
    let free = (0..states.slots()).rev().collect();
    let (queue, running, decoder) = (VecDeque::new(), Vec::new(), Decoder::new(lm));
    let mut engine = Engine {
        lm,
        tokenizer,
        states,
        spare,
        decoder,
        room: 0,
        limits,
        snapshots,
        shared,
        free,
        queue,
        running,
        turn: 0,
        stopping: None,
    };
    while engine.receive(inbox) {
        // A bug that one request found should not end all others that will come; slots are filled anew before they are used.
        if std::panic::catch_unwind(AssertUnwindSafe(|| engine.round())).is_err() {
            let all = (0..engine.running.len()).collect();
            engine.fail_all(all, &ttt::Error::Invalid("this is a bug; the server's standard error says where".into()));
            engine.free = (0..engine.states.slots()).rev().collect();
        }
    }
    engine.snapshots.close();
}

impl<'t> Engine<'t> {
    /// Takes commands, waiting for one when there is nothing to do; whether to go on.
    fn receive(&mut self, inbox: &Receiver<Command>) -> bool {
        loop {
            let idle = self.running.is_empty() && self.queue.is_empty();
            if idle && self.stopping.is_some() {
                return false;
            }
            let command = match idle {
                true => inbox.recv().map_err(|_| TryRecvError::Disconnected),
                false => inbox.try_recv(),
            };
            match command {
                Ok(Command::Run(job)) if self.stopping.is_some() => self.refuse(&job, Failure::Stopping),
                Ok(Command::Run(job)) => self.queue.push_back(job),
                Ok(Command::Verify(state, answer)) => {
                    // Whoever asked may be gone.
                    let _ = answer.send(self.spare.restore_bytes(0, self.lm, state));
                }
                Ok(Command::Stop(deadline)) => {
                    self.stopping = Some(deadline);
                    for job in std::mem::take(&mut self.queue) {
                        self.refuse(&job, Failure::Stopping);
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return !idle,
            }
        }
    }

    /// Ends a job that waited.
    fn refuse(&self, job: &Job, why: Failure) {
        self.shared.waiting.fetch_sub(1, Relaxed);
        self.shared.failed.fetch_add(1, Relaxed);
        let _ = job.events.send(Event::Failed(why));
    }

    fn round(&mut self) {
        self.dismiss();
        self.admit();
        self.read();
        self.decode();
        self.shared.running.store(self.states.slots() - self.free.len(), Relaxed);
        self.shared.beat();
    }

    /// Frees the slots of those whose client is gone or whose time is over.
    fn dismiss(&mut self) {
        let now = Instant::now();
        let over = self.stopping.is_some_and(|deadline| now >= deadline);
        for i in (0..self.running.len()).rev() {
            let sequence = &mut self.running[i];
            if !sequence.wanted() {
                self.shared.cancelled.fetch_add(1, Relaxed);
                self.free(i);
            } else if over && (sequence.job.keep_state || sequence.unread() == 0) {
                sequence.flush();
                self.finish(i, Finish::Length);
            } else if over {
                self.fail(i, Failure::Stopping);
            } else if now >= sequence.job.deadline {
                self.fail(i, Failure::TimedOut);
            }
        }
    }

    /// Gives free slots to those who wait, first come first served.
    fn admit(&mut self) {
        let now = Instant::now();
        // Time passes for those behind the first, too.
        let (gone, waiting) =
            std::mem::take(&mut self.queue).into_iter().partition(|job| job.events.is_closed() || now >= job.deadline);
        self.queue = waiting;
        for job in gone {
            if job.events.is_closed() {
                self.shared.waiting.fetch_sub(1, Relaxed);
                self.shared.cancelled.fetch_add(1, Relaxed);
            } else {
                self.refuse(&job, Failure::TimedOut);
            }
        }
        while self.queue.front().is_some_and(|job| job.choices <= self.free.len()) {
            let job = Arc::new(*self.queue.pop_front().expect("there is one"));
            self.shared.waiting.fetch_sub(1, Relaxed);
            let slots = self.free.split_off(self.free.len() - job.choices);
            match self.start(&job, slots[0]) {
                Ok((tokens, read)) => {
                    let prompt = tokens.len();
                    let mut sequence = Sequence::new(job, slots, tokens, read, self.tokenizer);
                    sequence.send(Event::Started { cached: read, prompt });
                    sequence.report_prompt(0, std::iter::once(None));
                    self.shared.cached_tokens.fetch_add(read as u64, Relaxed);
                    self.running.push(sequence);
                    if self.running.last().expect("was pushed").unread() == 0 {
                        self.read_to_the_end(self.running.len() - 1);
                    }
                }
                Err(e) => {
                    self.free.extend(slots);
                    self.shared.failed.fetch_add(1, Relaxed);
                    let _ = job.events.send(Event::Failed(Failure::Model(e)));
                }
            }
        }
    }

    /// Puts a job's start, or a snapshot behind it, into a slot; the ids to read, and how many of them have been.
    fn start(&mut self, job: &Job, slot: usize) -> ttt::Result<(Vec<u32>, usize)> {
        let start = job.start.as_ref().map(|bytes| StateFile::from_bytes(bytes.to_vec())).transpose()?;
        let mut tokens = start.as_ref().map_or(Vec::new(), |start| start.header().pending.clone());
        tokens.extend(&job.tokens);
        let Some(last) = tokens.len().checked_sub(1) else {
            return Err(ttt::Error::Invalid("there is nothing to continue from: give a prompt of at least one token".into()));
        };
        // A state may bring more than there is room for.
        let begun = start.as_ref().map_or(0, |start| start.header().tokens);
        self.reserve(begun + last as u64)?;
        if job.snapshots && !job.prompt_logprobs && !job.progress {
            let found = self.snapshots.find(job.root, &tokens[..last]);
            let restored = found.and_then(|(read, state)| {
                // A damaged file in the cache costs reading, no more.
                self.states.restore_bytes(slot, self.lm, state.to_vec()).ok().map(|_| read)
            });
            let count = if restored.is_some() { &self.shared.hits } else { &self.shared.misses };
            count.fetch_add(1, Relaxed);
            if let Some(read) = restored {
                return Ok((tokens, read));
            }
        }
        match start {
            Some(start) => drop(self.states.restore_file(slot, self.lm, start)?),
            None => self.states.reset(self.lm, slot),
        }
        Ok((tokens, 0))
    }

    /// Makes room for sequences of so many tokens where states grow: half as much again, and never more than the limit, which
    /// requests were checked against.
    fn reserve(&mut self, tokens: u64) -> ttt::Result<()> {
        let Some(context) = self.limits.context.filter(|_| tokens > self.room) else { return Ok(()) };
        if tokens > context {
            return Err(ttt::Error::Invalid(format!(
                "a sequence of {tokens} tokens; there is room for {context} (--cache-memory)"
            )));
        }
        let room = tokens.max(self.room + self.room / 2).next_multiple_of(64).min(context);
        self.states.reserve(room as usize)?;
        self.room = room;
        Ok(())
    }

    /// Keeps a snapshot of a sequence, unless it is too near to the last one.
    fn keep(&mut self, i: usize) {
        let sequence = &mut self.running[i];
        if !sequence.job.snapshots || sequence.read < sequence.hash.tokens() + WORTH {
            return;
        }
        let key = sequence.hash.extend(&sequence.tokens[..sequence.read]);
        if self.snapshots.touch(&key) {
            return;
        }
        let grown = self.states.bytes_per_token() * self.states.position(sequence.slot) as usize;
        if !self.snapshots.may_hold(grown) {
            return;
        }
        // A state that cannot be saved is no snapshot; whoever wants the state itself is told why.
        if let Ok(state) = self.states.to_bytes(sequence.slot, self.lm, &[], Some(self.tokenizer.id())) {
            self.snapshots.insert(key, state.into());
        }
        self.snapshots.report(self.shared);
    }

    /// Completes a choice.
    fn finish(&mut self, i: usize, reason: Finish) {
        self.keep(i);
        let sequence = &self.running[i];
        let pending = &sequence.tokens[sequence.read..];
        let state = sequence
            .job
            .keep_state
            .then(|| self.states.to_bytes(sequence.slot, self.lm, pending, Some(self.tokenizer.id())))
            .transpose();
        // Counted before it is said: who has the answer finds it in the metrics.
        match state {
            Ok(state) => {
                self.shared.job_done(sequence.job.arrived.elapsed());
                let tokens = sequence.tokens.len() - sequence.prompt;
                sequence.send(Event::Finished { choice: sequence.choice(), reason, tokens, state });
            }
            Err(e) => {
                self.shared.failed.fetch_add(1, Relaxed);
                sequence.send(Event::Failed(Failure::Model(e)));
            }
        }
        self.free(i);
    }

    fn fail(&mut self, i: usize, why: Failure) {
        self.shared.failed.fetch_add(1, Relaxed);
        self.running[i].send(Event::Failed(why));
        self.free(i);
    }

    /// Ends sequences after an error of a pass that all of them were in.
    fn fail_all(&mut self, mut which: Vec<usize>, error: &ttt::Error) {
        which.sort_unstable();
        for i in which.into_iter().rev() {
            self.fail(i, Failure::Model(ttt::Error::Invalid(format!("the model cannot go on: {error}"))));
        }
    }

    fn free(&mut self, i: usize) {
        let sequence = self.running.swap_remove(i);
        self.free.push(sequence.slot);
        self.free.extend(sequence.reserved);
    }
}

/// All numbers of some logits.
fn rows(logits: &Tensor) -> Cow<'_, [f32]> {
    match logits.dtype() {
        DType::F32 if logits.device().as_cuda().is_none() => Cow::Borrowed(logits.as_slice::<f32>()),
        _ => Cow::Owned(logits.to_f64_vec().into_iter().map(|x| x as f32).collect()),
    }
}
