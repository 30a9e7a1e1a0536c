//! Sequences that are read in segments, step after step: which tokens each stream of a batch reads next. A pure function of seed
//! and step, as the windows are.

use std::ops::Range;

use crate::data::{Sampler, Tokens};

/// How sequences are cut into segments, and how many of these a step reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmenting {
    /// Tokens of a segment; divides the sequence.
    pub segment: usize,
    /// Consecutive segments of a sequence in one step; divides the sequence's segments.
    pub per_step: usize,
    /// Tokens of a mini-batch; divides the segment.
    pub mini_batch: usize,
    /// Whether every document starts afresh, not only every sequence.
    pub reset_at_documents: bool,
}

/// Streams that read one sequence (a window of the sampler) after the other, segment by segment.
///
/// The streams are staggered, so that a step sees all parts of sequences, beginnings too: with p steps a sequence, stream i is
/// `i mod p` steps ahead of stream 0. At step 0 such a stream starts in the midst of its sequence.
#[derive(Clone, Copy, Debug)]
pub struct Streams {
    sampler: Sampler,
    streams: usize,
    cut: Segmenting,
}

/// Tokens that a stream reads as one sequence of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The stream.
    pub stream: usize,
    /// Inputs; the targets are one token further on.
    pub tokens: Range<usize>,
    /// Whether it starts afresh instead of continuing what the stream has read.
    pub fresh: bool,
}

impl Streams {
    /// `streams` streams over the windows of `sampler`.
    ///
    /// # Panics
    /// When something does not divide as it should ([`Segmenting`]).
    pub fn new(sampler: Sampler, streams: usize, cut: Segmenting) -> Streams {
        let Segmenting { segment, per_step, mini_batch, .. } = cut;
        assert!(streams > 0, "no streams");
        assert!(segment.is_multiple_of(mini_batch), "segments of {segment} tokens and mini-batches of {mini_batch}");
        assert!(
            sampler.seq_len().is_multiple_of(segment * per_step),
            "sequences of {} tokens and steps of {per_step} segments of {segment}",
            sampler.seq_len()
        );
        Streams { sampler, streams, cut }
    }

    /// Number of streams.
    pub fn streams(&self) -> usize {
        self.streams
    }

    /// Segments of a step.
    pub fn per_step(&self) -> usize {
        self.cut.per_step
    }

    /// Steps that a sequence takes.
    fn steps_per_sequence(&self) -> usize {
        self.sampler.seq_len() / (self.cut.segment * self.cut.per_step)
    }

    /// What some of the streams read in segment `segment` of `step`: each a stretch, or with resets at documents one for every
    /// document that it meets.
    pub fn stretches(&self, tokens: &Tokens, step: u64, streams: Range<usize>, segment: usize) -> Vec<Stretch> {
        let steps = self.steps_per_sequence();
        let mut stretches = Vec::new();
        for stream in streams {
            let ahead = step + (stream % steps) as u64;
            let (round, part) = (ahead / steps as u64, (ahead % steps as u64) as usize);
            let window = self.sampler.range(self.sampler.nth(round * self.streams as u64 + stream as u64));
            let window = window.start..window.end - 1;
            let begin = window.start + (part * self.cut.per_step + segment) * self.cut.segment;
            let range = self.cut_at(tokens, &window, begin)..self.cut_at(tokens, &window, begin + self.cut.segment);
            let starts = segment == 0 && (part == 0 || step == 0);
            let mut at = range.start;
            while at < range.end {
                let document = if self.cut.reset_at_documents { tokens.document_around(at) } else { window.clone() };
                let end = document.end.min(range.end);
                let fresh = (starts && at == range.start) || (self.cut.reset_at_documents && at == document.start);
                stretches.push(Stretch { stream, tokens: at..end, fresh });
                at = end;
            }
        }
        stretches
    }

    /// Where the cut planned at token `at` of a window is made: a document is cut at a multiple of the mini-batch from where it
    /// starts, or from where the window starts in it. The rest of the mini-batch is left to the next segment.
    fn cut_at(&self, tokens: &Tokens, window: &Range<usize>, at: usize) -> usize {
        if !self.cut.reset_at_documents || at == window.end {
            return at;
        }
        let origin = tokens.document_around(at).start.max(window.start);
        at - (at - origin) % self.cut.mini_batch
    }
}
