//! Several sequences at once, token by token.

use std::collections::VecDeque;

use super::recorded::{Recorded, Running};
use super::{Choice, choose, unit};
use crate::Result;
use crate::batch::Batch;
use crate::layer::Keep;
use crate::lm::Lm;
use crate::ops::sample::Draw;
use crate::state::States;
use crate::tensor::{DType, Tensor};

/// A sequence to continue.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sequence {
    /// Its slot of the states.
    pub slot: usize,
    /// What its tokens are chosen by.
    pub draw: Draw,
    /// Tokens that end it: once chosen, the sequence reads and chooses nothing more.
    pub ends: [Option<u32>; 2],
}

/// Continues several slots of some states at once, token by token.
///
/// On a GPU a step, choosing included, is recorded once for each number of sequences and repeated; a token goes from one step to
/// the next without the host, which reads it while the next step runs. Tokens, states and logits are bit for bit those of reading
/// each token with [`Lm::forward`] and choosing with [`crate::ops::sample::forward`]. On a CPU they are those of
/// [`super::Generator`], a sequence at a time.
pub struct Decoder<'m> {
    model: &'m Lm,
    recorded: Vec<Recorded>,
}

impl<'m> Decoder<'m> {
    /// A decoder that has recorded nothing yet.
    pub fn new(model: &'m Lm) -> Decoder<'m> {
        Decoder { model, recorded: Vec::new() }
    }

    /// Chooses the first token of each sequence from `logits` `[sequences, V]`, those of what its slot has read last. The states
    /// are whole again when the session is dropped.
    ///
    /// # Errors
    /// Sampling settings out of range, or memory.
    ///
    /// # Panics
    /// When there are no sequences, two name the same slot or one that does not exist, or there is not a row of logits for each.
    pub fn start<'s>(&'s mut self, states: &'s mut States, sequences: &[Sequence], logits: &Tensor) -> Result<Session<'s>> {
        sequences.iter().try_for_each(|s| s.draw.sampling.validate())?;
        let shape = [sequences.len(), self.model.config().vocab_size];
        assert!(logits.shape() == shape && shape[0] > 0, "logits {:?} for sequences and vocabulary {shape:?}", logits.shape());
        let mut batch = Batch::default();
        sequences.iter().for_each(|s| batch.push(&[0], s.slot));
        let segments = states.segments(&batch);
        let ended = vec![None; sequences.len()];
        let how = match self.model.device().as_cuda() {
            Some(gpu) => {
                let recorded = Recorded::find(&mut self.recorded, gpu, states, segments, shape)?;
                How::Recorded(recorded.begin(self.model, gpu, sequences, logits))
            }
            None => How::OneByOne(OneByOne::new(sequences, logits)),
        };
        Ok(Session { model: self.model, states, how, sequences: sequences.to_vec(), ended, steps: 0, taken: 0 })
    }

    /// One step for sequences of which others may come and go: each reads its token, and what it chooses next is waited for and
    /// returned. `ends` end nothing here.
    ///
    /// # Errors
    /// Sampling settings out of range, a token outside the vocabulary, or memory.
    ///
    /// # Panics
    /// When there are no sequences, two name the same slot or one that does not exist, or there is not a token for each.
    pub fn step(&mut self, states: &mut States, sequences: &[Sequence], tokens: &[u32]) -> Result<Vec<Choice>> {
        assert!(!tokens.is_empty() && tokens.len() == sequences.len(), "{} tokens of {} sequences", tokens.len(), sequences.len());
        sequences.iter().try_for_each(|s| s.draw.sampling.validate())?;
        let mut batch = Batch::default();
        sequences.iter().zip(tokens).for_each(|(s, token)| batch.push(&[*token], s.slot));
        let Some(gpu) = self.model.device().as_cuda() else {
            let (hidden, _) = self.model.forward(&batch, Some(states), Keep::Nothing, 1.0)?;
            let logits = self.model.logits(&hidden, &(0..tokens.len()).collect::<Vec<_>>())?;
            return Ok(sequences.iter().zip(rows(&logits)).map(|(s, logits)| { *s }.choose(&logits)).collect());
        };
        self.model.check_tokens(tokens)?;
        let shape = [tokens.len(), self.model.config().vocab_size];
        let recorded = Recorded::find(&mut self.recorded, gpu, states, states.segments(&batch), shape)?;
        let choices = recorded.once(self.model, gpu, states, sequences, tokens)?;
        states.advance(&batch);
        Ok(choices)
    }
}

/// Sequences being continued (see [`Decoder::start`]).
pub struct Session<'s> {
    model: &'s Lm,
    states: &'s mut States,
    how: How<'s>,
    sequences: Vec<Sequence>,
    /// Number of the choice that ended a sequence.
    ended: Vec<Option<usize>>,
    /// Steps begun: choices but the first.
    steps: usize,
    /// Choices that the caller has.
    taken: usize,
}

enum How<'s> {
    Recorded(Running<'s>),
    OneByOne(OneByOne),
}

impl Session<'_> {
    /// Steps that may be under way, their choices not taken.
    pub const AHEAD: usize = 4;

    /// Each sequence that has not ended reads the token chosen for it last, and its next is chosen. On a GPU this is queued.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When more than [`Session::AHEAD`] steps wait for [`Session::take`].
    pub fn step(&mut self) -> Result<()> {
        assert!(self.waiting() <= Session::AHEAD, "{} choices are not taken", self.waiting());
        match &mut self.how {
            How::Recorded(running) => running.step(self.model, self.states)?,
            How::OneByOne(all) => all.step(self.model, self.states)?,
        }
        self.steps += 1;
        Ok(())
    }

    /// The oldest choices not taken yet, one for each sequence that had not ended before; waits for them. None when there are no
    /// more: see [`Session::step`].
    pub fn take(&mut self) -> Option<Vec<Option<Choice>>> {
        if self.taken > self.steps {
            return None;
        }
        let all = match &mut self.how {
            How::Recorded(running) => running.chosen(self.taken),
            How::OneByOne(all) => all.queue.pop_front().expect("choices of each step"),
        };
        let own = all.into_iter().zip(&mut self.ended).zip(&self.sequences).map(|((choice, ended), sequence)| {
            let open = ended.is_none();
            if open && sequence.ends.contains(&Some(choice.token)) {
                *ended = Some(self.taken);
            }
            open.then_some(choice)
        });
        let own = own.collect();
        self.taken += 1;
        Some(own)
    }

    /// Choices that were not taken yet, some of them perhaps still to come.
    pub fn waiting(&self) -> usize {
        self.steps + 1 - self.taken
    }

    /// Whether all sequences have ended, as far as choices were taken.
    pub fn ended(&self) -> bool {
        self.ended.iter().all(Option::is_some)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        while self.take().is_some() {}
        if let How::Recorded(_) = self.how {
            for (sequence, ended) in self.sequences.iter().zip(&self.ended) {
                // What ended a sequence was chosen and not read.
                let read = ended.unwrap_or(self.steps) as u64;
                self.states.set_position(sequence.slot, self.states.position(sequence.slot) + read);
            }
        }
    }
}

/// On a CPU: a step is done when it is asked for.
struct OneByOne {
    sequences: Vec<Sequence>,
    last: Vec<Choice>,
    queue: VecDeque<Vec<Choice>>,
}

impl OneByOne {
    fn new(sequences: &[Sequence], logits: &Tensor) -> OneByOne {
        let mut sequences = sequences.to_vec();
        let last: Vec<Choice> = sequences.iter_mut().zip(rows(logits)).map(|(s, logits)| s.choose(&logits)).collect();
        OneByOne { sequences, queue: VecDeque::from([last.clone()]), last }
    }

    fn step(&mut self, model: &Lm, states: &mut States) -> Result<()> {
        let is_open = |i: &usize| !self.sequences[*i].ends.contains(&Some(self.last[*i].token));
        let open: Vec<usize> = (0..self.sequences.len()).filter(is_open).collect();
        if !open.is_empty() {
            let mut batch = Batch::default();
            open.iter().for_each(|i| batch.push(&[self.last[*i].token], self.sequences[*i].slot));
            let (hidden, _) = model.forward(&batch, Some(states), Keep::Nothing, 1.0)?;
            let logits = model.logits(&hidden, &(0..open.len()).collect::<Vec<_>>())?;
            for (i, logits) in open.iter().zip(rows(&logits)) {
                self.last[*i] = self.sequences[*i].choose(&logits);
            }
        }
        self.queue.push_back(self.last.clone());
        Ok(())
    }
}

impl Sequence {
    fn choose(&mut self, logits: &[f32]) -> Choice {
        let draw = &mut self.draw;
        draw.drawn += 1;
        choose(logits, &draw.sampling, unit(draw.sampling.seed, draw.stream, draw.drawn - 1))
    }
}

/// Logits of each sequence.
fn rows(logits: &Tensor) -> Vec<Vec<f32>> {
    let vocab = logits.shape()[1];
    if logits.dtype() == DType::F32 && logits.device().as_cuda().is_none() {
        return logits.as_slice::<f32>().chunks_exact(vocab).map(<[f32]>::to_vec).collect();
    }
    logits.to_f64_vec().chunks_exact(vocab).map(|row| row.iter().map(|x| *x as f32).collect()).collect()
}
