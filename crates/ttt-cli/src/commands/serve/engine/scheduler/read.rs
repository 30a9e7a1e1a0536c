//! Reading prompts, piece by piece.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use ttt::batch::Batch;
use ttt::layer::Keep;

use super::{Engine, Event, Finish, means, rows};
use crate::commands::serve::engine::sequence::Sequence;

/// Pieces are so many times longer while nobody decodes.
const ALONE: usize = 4;

impl Engine<'_> {
    /// Reads one piece of the prompts that are not read.
    pub(super) fn read(&mut self) {
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
    pub(super) fn read_to_the_end(&mut self, i: usize) {
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
}
