//! Reading a text of any length in constant memory, each token predicted before it is learned from.

use crate::Result;
use crate::batch::Batch;
use crate::layer::Keep;
use crate::lm::{InnerErrors, Lm};
use crate::ops::inner::FastWeights;
use crate::state::States;

/// Tokens read at once: long enough for full speed, short enough that memory does not grow with the text.
const CHUNK: usize = 2048;
/// Bytes of fast weights that a measured chunk may hold.
const MEASURED_BYTES: usize = 64 << 20;

/// Reads texts and reports the negative log likelihood of every token of them.
///
/// The last token that was pushed is held back: it has been predicted, but nothing has been learned from it yet. So a prediction
/// depends on the tokens before its token and on nothing else, wherever chunks and mini-batches end.
#[derive(Debug)]
pub struct Judge<'m> {
    model: &'m Lm,
    states: States,
    /// Tokens after which the state starts afresh.
    context: Option<u64>,
    measure: bool,
    chunk: usize,
    /// What is not read yet.
    pending: Vec<u32>,
    /// Index in the text of the first of them, and of the first token to judge.
    at: u64,
    from: u64,
    /// Tokens read since the state last started afresh.
    since_reset: u64,
}

/// What a [`Judge`] found out about some tokens that follow each other.
#[derive(Clone, Debug)]
pub struct Judged<'a> {
    /// Tokens that the state had read when it predicted the first of them: the token's position.
    pub position: u64,
    /// Negative log likelihood of each, in nats.
    pub nll: &'a [f64],
    /// Errors of each layer's inner models, where they were measured: whole mini-batches from token `inner_position` of the state
    /// on.
    pub inner: &'a [InnerErrors],
    /// See `inner`.
    pub inner_position: u64,
}

impl<'m> Judge<'m> {
    /// A judge that has read nothing. With `context` the state starts afresh every so many tokens. With `measure` it also measures
    /// the inner models, if the model has any.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When the context has no tokens.
    pub fn new(model: &'m Lm, context: Option<u64>, measure: bool) -> Result<Judge<'m>> {
        assert_ne!(context, Some(0), "a context of no tokens");
        let config = model.config();
        let k = config.mini_batch().unwrap_or(1);
        // Without an inner loop there is nothing to measure.
        let measure = measure && config.inner().is_some();
        let state = || config.num_attention_heads * FastWeights::state_len(config.ttt_layer_type, config.head_dim()) * 4;
        let mini_batches = if measure { (MEASURED_BYTES / state()).clamp(1, CHUNK.div_ceil(k)) } else { CHUNK.div_ceil(k) };
        let chunk = mini_batches * k;
        let states = States::new(model, 1)?;
        Ok(Judge { model, states, context, measure, chunk, pending: Vec::new(), at: 0, from: 1, since_reset: 0 })
    }

    /// Begins a text with a fresh state; its tokens from index `from` on will be judged. The first token of a text is never
    /// judged: nothing predicts it.
    pub fn start(&mut self, from: usize) {
        self.states.reset(self.model, 0);
        self.begin(from);
    }

    /// Begins a text that continues the one sequence of `states`, which stay as they are. Its first token is not judged: a token
    /// that the states have seen predicted and not read comes first.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When there is another number of slots than 1.
    pub fn start_from(&mut self, states: &States, from: usize) -> Result<()> {
        assert_eq!(states.slots(), 1, "a judge reads one sequence");
        self.states = states.fork()?;
        self.begin(from);
        Ok(())
    }

    /// Tokens of a mini-batch.
    fn k(&self) -> u64 {
        self.model.config().mini_batch().unwrap_or(1) as u64
    }

    fn begin(&mut self, from: usize) {
        self.pending.clear();
        (self.at, self.from, self.since_reset) = (0, from.max(1) as u64, 0);
    }

    /// The next tokens of the text. What could be judged goes to `sink`.
    ///
    /// # Errors
    /// A token outside the vocabulary, or memory.
    pub fn push(&mut self, tokens: &[u32], sink: &mut dyn FnMut(&Judged<'_>)) -> Result<()> {
        self.pending.extend_from_slice(tokens);
        let mut done = 0;
        while let (n, true) = (self.next_len(), self.pending.len() - done > self.next_len()) {
            self.read(done..done + n, sink)?;
            done += n;
        }
        self.pending.drain(..done);
        Ok(())
    }

    /// The text has ended: judges the rest of it. Its last token stays unread.
    ///
    /// # Errors
    /// As [`Judge::push`].
    pub fn finish(&mut self, sink: &mut dyn FnMut(&Judged<'_>)) -> Result<()> {
        let inputs = self.pending.len().saturating_sub(1);
        let mut done = 0;
        while done < inputs {
            let n = self.next_len().min(inputs - done);
            self.read(done..done + n, sink)?;
            done += n;
        }
        self.pending.drain(..done);
        Ok(())
    }

    /// The state after what was read, and the tokens that were not: the last one, after [`Judge::finish`].
    pub fn into_parts(self) -> (States, Vec<u32>) {
        (self.states, self.pending)
    }

    /// Tokens that the next pass may read: up to the end of a mini-batch when this one cannot be measured, of a chunk, of the
    /// context.
    fn next_len(&self) -> usize {
        let k = self.k();
        let left = self.context.map_or(u64::MAX, |context| match context - self.since_reset {
            0 => context,
            left => left,
        });
        let fresh = self.context == Some(self.since_reset);
        let phase = if fresh { 0 } else { self.states.position(0) % k };
        let n = match (phase, self.measure) {
            (0, _) => self.chunk as u64,
            (_, true) => k - phase,
            (_, false) => self.chunk as u64 - phase,
        };
        n.min(left) as usize
    }

    /// Starts afresh where the context is used up.
    fn make_room(&mut self) {
        if self.context == Some(self.since_reset) {
            self.states.reset(self.model, 0);
            self.since_reset = 0;
        }
    }

    /// Reads `pending[range]` and judges the tokens that come one later.
    fn read(&mut self, range: std::ops::Range<usize>, sink: &mut dyn FnMut(&Judged<'_>)) -> Result<()> {
        self.make_room();
        let (n, before) = (range.len(), self.states.position(0));
        let batch = Batch::one(&self.pending[range.clone()]);
        let (hidden, inner) = if self.measure && before.is_multiple_of(self.k()) {
            self.model.forward_measured(&batch, &mut self.states)?
        } else {
            (self.model.forward(&batch, Some(&mut self.states), Keep::Nothing, 1.0)?.0, Vec::new())
        };
        let skipped = self.from.saturating_sub(self.at + 1).min(n as u64) as usize;
        let nll = if skipped < n {
            let targets = &self.pending[range.start + skipped + 1..range.end + 1];
            self.model.nll(hidden.view().row_range(skipped..n), targets)?
        } else {
            Vec::new()
        };
        self.at += n as u64;
        self.since_reset += n as u64;
        sink(&Judged { position: before + 1 + skipped as u64, nll: &nll, inner: &inner, inner_position: before });
        Ok(())
    }
}
