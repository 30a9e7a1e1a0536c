//! Decoding, a token for everyone at a time.

use std::sync::atomic::Ordering::Relaxed;

use ttt::batch::Batch;
use ttt::layer::Keep;

use super::{Engine, rows};
use crate::commands::serve::engine::decoded::TokenInfo;

impl Engine<'_> {
    /// Decodes a token for everyone whose prompt is read.
    pub(super) fn decode(&mut self) {
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

    /// Room for one more token of each sequence.
    fn reserve_next(&mut self, ready: &[usize]) -> ttt::Result<()> {
        let longest = ready.iter().map(|i| self.states.position(self.running[*i].slot)).max().unwrap_or(0);
        self.reserve(longest + 1)
    }
}
