//! Which rows of a packed batch belong to which sequence.

use std::ops::Range;

/// Token ids of one or more sequences, packed without padding, and where each sequence lies.
///
/// A fixed `[b, t]` batch is the case of equal lengths; decoding is many sequences of length 1; a document boundary is a new
/// sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Ids of all sequences, one sequence behind the other.
    pub tokens: Vec<u32>,
    /// The sequences, in the order of their rows.
    pub seqs: Vec<Seq>,
}

/// One sequence of a [`Batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seq {
    /// Row of its first token.
    pub first_row: usize,
    /// Number of tokens.
    pub len: usize,
    /// Slot of the states that it continues (see [`crate::state::States`]).
    pub slot: usize,
    /// Whether it starts the slot afresh, from the learned initial weights, instead of continuing it.
    pub fresh: bool,
}

impl Batch {
    /// One sequence in slot 0.
    pub fn one(tokens: &[u32]) -> Batch {
        Batch { tokens: tokens.to_vec(), seqs: vec![Seq { first_row: 0, len: tokens.len(), slot: 0, fresh: false }] }
    }

    /// Sequences of any lengths in the slots 0, 1, ...
    pub fn packed<T: AsRef<[u32]>>(sequences: &[T]) -> Batch {
        let mut batch = Batch::default();
        for (slot, tokens) in sequences.iter().enumerate() {
            batch.push(tokens.as_ref(), slot);
        }
        batch
    }

    /// Adds a sequence that continues `slot`.
    pub fn push(&mut self, tokens: &[u32], slot: usize) {
        self.add(tokens, slot, false);
    }

    /// Adds a sequence that starts `slot` afresh, as the next document of a stream does. The slot may have other sequences before
    /// it in the batch; what is left in it is the state of the last.
    pub fn push_fresh(&mut self, tokens: &[u32], slot: usize) {
        self.add(tokens, slot, true);
    }

    fn add(&mut self, tokens: &[u32], slot: usize, fresh: bool) {
        self.seqs.push(Seq { first_row: self.tokens.len(), len: tokens.len(), slot, fresh });
        self.tokens.extend_from_slice(tokens);
    }

    /// Number of slots that the sequences name: one more than the largest.
    pub fn slots(&self) -> usize {
        self.seqs.iter().map(|s| s.slot + 1).max().unwrap_or(0)
    }
}

/// A sequence of a batch as operations along time see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Row of its first token.
    pub first_row: usize,
    /// Number of tokens; may be zero.
    pub len: usize,
    /// Slot in the slabs of state.
    pub slot: usize,
    /// Tokens that the slot has already consumed: modulo the mini-batch size of the inner loop, or all of them where the model has
    /// none.
    pub phase: usize,
}

impl Segment {
    /// Rows of the segment.
    pub fn rows(&self) -> Range<usize> {
        self.first_row..self.first_row + self.len
    }
}
