//! A conversation at one moment: a value that can be kept, copied and gone back to.

use std::sync::Arc;

use anyhow::Result;
use ttt::lm::Lm;
use ttt::{Batch, States};

use super::template::Message;

/// Tokens that `/stats` looks back over.
pub const RECENT: usize = 1000;

/// A conversation at one moment.
pub struct Moment {
    /// The state, slot 0.
    pub states: States,
    /// Tokens that were accepted but not read.
    pub pending: Vec<u32>,
    /// What was said, when a template makes the text.
    pub messages: Vec<Message>,
    /// The text that the template made and the model added, as far as it was accepted.
    pub text: String,
    /// Whether the last line has no end yet.
    pub open_line: bool,
    /// Where the conversation began, for templates that change what was said before.
    origin: Arc<(States, Vec<u32>)>,
    recent: Recent,
}

/// The last tokens read, and a state from before them at the start of a mini-batch.
#[derive(Clone, Default)]
struct Recent {
    base: Option<Arc<States>>,
    tokens: Vec<u32>,
    /// A later base, and how many of `tokens` come before it.
    next: Option<(Arc<States>, usize)>,
}

/// Squared errors of one layer's inner models: under W0, before each update, after it.
pub type Errors = [f64; 3];

impl Moment {
    /// A conversation that goes on from a state.
    pub fn new(states: States, pending: Vec<u32>) -> Result<Moment> {
        let origin = Arc::new((states.fork()?, pending.clone()));
        let (messages, text, recent) = (Vec::new(), String::new(), Recent::default());
        Ok(Moment { states, pending, messages, text, open_line: false, origin, recent })
    }

    /// Goes back to where the conversation began, of which only the messages stay.
    pub fn read_again(&mut self) -> Result<()> {
        self.states = self.origin.0.fork()?;
        self.pending = self.origin.1.clone();
        self.text.clear();
        self.recent = Recent::default();
        Ok(())
    }

    /// Tokens accepted so far.
    pub fn tokens(&self) -> u64 {
        self.states.position(0) + self.pending.len() as u64
    }

    /// An independent copy.
    pub fn fork(&self) -> Result<Moment> {
        Ok(Moment {
            states: self.states.fork()?,
            pending: self.pending.clone(),
            messages: self.messages.clone(),
            text: self.text.clone(),
            open_line: self.open_line,
            origin: self.origin.clone(),
            recent: self.recent.clone(),
        })
    }

    /// Notes that the state will read `tokens` next, of which it returns how many it may read before it is asked again.
    pub fn note(&mut self, model: &Lm, tokens: &[u32]) -> Result<usize> {
        let Some(mini_batch) = model.config().mini_batch() else { return Ok(tokens.len()) };
        let phase = (self.states.position(0) % mini_batch as u64) as usize;
        let recent = &mut self.recent;
        let since = recent.tokens.len() - recent.next.as_ref().map_or(0, |(_, before)| *before);
        let mut step = tokens.len().min(RECENT);
        if phase > 0 {
            // Up to the next start of a mini-batch, where a base can be.
            step = step.min(mini_batch - phase);
        } else if recent.base.is_none() {
            recent.base = Some(Arc::new(self.states.fork()?));
        } else if since >= RECENT {
            if let Some((base, before)) = recent.next.take() {
                recent.base = Some(base);
                recent.tokens.drain(..before);
            }
            recent.next = Some((Arc::new(self.states.fork()?), recent.tokens.len()));
        }
        if recent.base.is_some() {
            recent.tokens.extend(&tokens[..step]);
        }
        Ok(step)
    }

    /// Mean errors of every layer over the full mini-batches among the last tokens, and how many tokens those are.
    pub fn inner_errors(&self, model: &Lm) -> Result<Option<(Vec<Errors>, usize)>> {
        let (Some(mini_batch), Some(base)) = (model.config().mini_batch(), &self.recent.base) else { return Ok(None) };
        let whole = self.recent.tokens.len() / mini_batch * mini_batch;
        if whole == 0 {
            return Ok(None);
        }
        let mut states = base.fork()?;
        let (_, layers) = model.forward_measured(&Batch::one(&self.recent.tokens[..whole]), &mut states)?;
        let wanted = (RECENT / mini_batch).max(1).min(whole / mini_batch);
        let mean = |rows: &Vec<Errors>| {
            let last = &rows[rows.len() - wanted..];
            std::array::from_fn(|i| last.iter().map(|row| row[i]).sum::<f64>() / wanted as f64)
        };
        Ok(Some((layers.iter().map(mean).collect(), wanted * mini_batch)))
    }
}
