//! The rounds of the engine's thread.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use ttt::batch::Batch;
use ttt::data::Tokenizer;
use ttt::generate::Decoder;
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::state::{StateFile, States};
use ttt::tensor::{DType, Tensor};

use super::decoded::TokenInfo;
use super::sequence::Sequence;
use super::shared::Shared;
use super::{Command, Event, Failure, Finish, Job, Limits, means};
use crate::commands::serve::snapshots::Snapshots;

/// Pieces are so many times longer while nobody decodes.
const ALONE: usize = 4;
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

    /// Reads one piece of the prompts that are not read.
    fn read(&mut self) {
        let reading: Vec<usize> = (0..self.running.len()).filter(|i| self.running[*i].unread() > 0).collect();
        if reading.is_empty() {
            return;
        }
        let decoding = reading.len() < self.running.len();
        self.turn %= reading.len();
        let alone = |s: &Sequence<'_>| s.job.prompt_logprobs || s.job.progress;
        // Who watches wants to see something often.
        let watched = self.running[reading[self.turn]].job.progress;
        let mut room = if decoding || watched { self.limits.chunk } else { ALONE * self.limits.chunk };
        let mut pieces = Vec::new();
        for i in reading[self.turn..].iter().chain(&reading[..self.turn]) {
            let sequence = &self.running[*i];
            if room == 0 || (alone(sequence) && !pieces.is_empty()) {
                break;
            }
            let piece = self.piece(sequence, room);
            room = room.saturating_sub(piece);
            pieces.push((*i, piece));
            if alone(sequence) {
                break;
            }
        }
        self.turn += pieces.len();
        let read = match &pieces[..] {
            [(i, piece)] if self.running[*i].job.prompt_logprobs => self.read_with_logprobs(*i, *piece),
            [(i, piece)] if self.running[*i].job.progress => self.read_with_progress(*i, *piece),
            _ => self.read_pieces(&pieces),
        };
        match read {
            Ok(()) => {
                for &(i, piece) in &pieces {
                    self.running[i].read += piece;
                    self.shared.prompt_tokens.fetch_add(piece as u64, Relaxed);
                    let position = self.states.position(self.running[i].slot);
                    if self.running[i].unread() > 0 && self.snapshot_due(position) {
                        self.keep(i);
                    }
                }
                for &(i, _) in pieces
                    .iter()
                    .filter(|(i, _)| self.running[*i].unread() == 0)
                    .collect::<std::collections::BTreeSet<_>>()
                    .into_iter()
                    .rev()
                {
                    self.read_to_the_end(i);
                }
            }
            Err(e) => self.fail_all(pieces.iter().map(|(i, _)| *i).collect(), &e),
        }
    }

    /// Tokens that a sequence may read now: to the end of a mini-batch, so that pieces cost the arithmetic of the whole, and not
    /// past a place for a snapshot.
    fn piece(&self, sequence: &Sequence<'_>, room: usize) -> usize {
        let (position, mini_batch) = (self.states.position(sequence.slot), self.mini_batch());
        let end = ((position + room as u64) / mini_batch * mini_batch).max((position / mini_batch + 1) * mini_batch);
        let snapshot = (position / self.limits.snapshot_every + 1) * self.limits.snapshot_every;
        let piece = ((end.min(snapshot) - position) as usize).min(sequence.unread());
        // Errors are measured on whole mini-batches; what is left over comes by itself.
        match piece as u64 / mini_batch * mini_batch {
            whole if sequence.job.progress && position.is_multiple_of(mini_batch) && whole > 0 => whole as usize,
            _ => piece,
        }
    }

    fn read_pieces(&mut self, pieces: &[(usize, usize)]) -> ttt::Result<()> {
        let mut batch = Batch::default();
        for (i, piece) in pieces {
            let sequence = &self.running[*i];
            batch.push(&sequence.tokens[sequence.read..][..*piece], sequence.slot);
        }
        // No prediction is wanted; one row is the least that can be asked for.
        self.lm.forward_rows(&batch, self.states, &[batch.tokens.len() - 1]).map(drop)
    }

    fn read_with_logprobs(&mut self, i: usize, piece: usize) -> ttt::Result<()> {
        let sequence = &mut self.running[i];
        let mut batch = Batch::default();
        batch.push(&sequence.tokens[sequence.read..][..piece], sequence.slot);
        let (hidden, _) = self.lm.forward(&batch, Some(self.states), Keep::Nothing, 1.0)?;
        let logits = self.lm.logits(&hidden, &(0..piece).collect::<Vec<_>>())?;
        let rows = rows(&logits);
        sequence.report_prompt(sequence.read + 1, rows.chunks(rows.len() / piece).map(Some));
        Ok(())
    }

    fn read_with_progress(&mut self, i: usize, piece: usize) -> ttt::Result<()> {
        let sequence = &self.running[i];
        let mut batch = Batch::default();
        batch.push(&sequence.tokens[sequence.read..][..piece], sequence.slot);
        let mini_batch = self.mini_batch();
        let whole = self.states.position(sequence.slot).is_multiple_of(mini_batch) && (piece as u64).is_multiple_of(mini_batch);
        // Other models have no inner loop to look at.
        let inner = match whole && self.lm.config().mini_batch().is_some() {
            true => means(&self.lm.forward_measured(&batch, self.states)?.1),
            false => {
                self.lm.forward_rows(&batch, self.states, &[piece - 1])?;
                Vec::new()
            }
        };
        sequence.send(Event::Read { tokens: sequence.read + piece, of: sequence.prompt - 1, inner });
        Ok(())
    }

    /// The prompt but for its last token is read: its choices part here.
    fn read_to_the_end(&mut self, i: usize) {
        if self.running[i].job.snapshots {
            self.keep(i);
        }
        for (k, slot) in std::mem::take(&mut self.running[i].reserved).into_iter().enumerate() {
            self.states.copy_slot(self.running[i].slot, slot);
            self.running.push(self.running[i].fork(k + 1, slot, self.tokenizer));
        }
        if self.running[i].job.max_tokens == 0 {
            let job = self.running[i].job.clone();
            for i in (0..self.running.len()).rev().filter(|i| Arc::ptr_eq(&self.running[*i].job, &job)).collect::<Vec<_>>() {
                self.finish(i, Finish::Length);
            }
        }
    }

    /// Decodes a token for everyone whose prompt is read.
    fn decode(&mut self) {
        let ready: Vec<usize> = (0..self.running.len()).filter(|i| self.running[*i].unread() == 0).collect();
        if ready.is_empty() {
            return;
        }
        // Who wants to know what else was likely needs the logits themselves.
        let chosen = match ready.iter().any(|i| self.running[*i].job.top.is_some()) {
            true => self.choose(&ready),
            false => self.step(&ready),
        };
        let chosen = match chosen {
            Ok(chosen) => chosen,
            Err(e) => return self.fail_all(ready, &e),
        };
        let ends = [self.tokenizer.eos(), self.lm.config().eos_token_id];
        let mut finished = Vec::new();
        for (&i, info) in ready.iter().zip(chosen) {
            let sequence = &mut self.running[i];
            let first = sequence.read < sequence.prompt;
            sequence.read += 1;
            if first {
                self.shared.prompt_tokens.fetch_add(1, Relaxed);
            }
            if let Some(reason) = sequence.accept(info, ends, self.shared) {
                finished.push((i, reason));
            }
        }
        self.shared.generated_tokens.fetch_add(ready.len() as u64, Relaxed);
        for (i, reason) in finished.into_iter().rev() {
            self.finish(i, reason);
        }
    }

    /// Reads a token of each sequence and chooses the next where the model is: on a GPU by a recorded step.
    fn step(&mut self, ready: &[usize]) -> ttt::Result<Vec<TokenInfo>> {
        self.reserve_next(ready)?;
        let (sequences, tokens): (Vec<_>, Vec<_>) = ready.iter().map(|i| self.running[*i].next()).unzip();
        let chosen = self.decoder.step(self.states, &sequences, &tokens)?;
        Ok(ready.iter().zip(chosen).map(|(i, choice)| self.running[*i].take(choice)).collect())
    }

    /// Reads a token of each sequence and chooses the next here.
    fn choose(&mut self, ready: &[usize]) -> ttt::Result<Vec<TokenInfo>> {
        self.reserve_next(ready)?;
        let mut batch = Batch::default();
        for &i in ready {
            let sequence = &self.running[i];
            batch.push(&sequence.tokens[sequence.read..], sequence.slot);
        }
        let (hidden, _) = self.lm.forward(&batch, Some(self.states), Keep::Nothing, 1.0)?;
        let logits = self.lm.logits(&hidden, &(0..ready.len()).collect::<Vec<_>>())?;
        let rows = rows(&logits);
        let each = rows.chunks(rows.len() / ready.len());
        Ok(ready.iter().zip(each).map(|(i, row)| self.running[*i].choose(row)).collect())
    }

    /// Tokens of a mini-batch; where there are none, a token.
    fn mini_batch(&self) -> u64 {
        self.lm.config().mini_batch().unwrap_or(1) as u64
    }

    /// Whether a state at this position of a prompt is to be kept. Of states that grow only at doubled positions, or snapshots of a
    /// prompt would take space by its square.
    fn snapshot_due(&self, position: u64) -> bool {
        let every = self.limits.snapshot_every;
        position.is_multiple_of(every) && (self.limits.context.is_none() || (position / every).is_power_of_two())
    }

    /// Room for one more token of each sequence.
    fn reserve_next(&mut self, ready: &[usize]) -> ttt::Result<()> {
        let longest = ready.iter().map(|i| self.states.position(self.running[*i].slot)).max().unwrap_or(0);
        self.reserve(longest + 1)
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
        match state {
            Ok(state) => {
                let tokens = sequence.tokens.len() - sequence.prompt;
                sequence.send(Event::Finished { choice: sequence.choice(), reason, tokens, state });
            }
            Err(e) => sequence.send(Event::Failed(Failure::Model(e))),
        }
        self.shared.job_done(sequence.job.arrived.elapsed());
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
