//! Micro-batches out of a token stream.

use std::ops::Range;

use crate::batch::Batch;
use crate::data::{Examples, Sampler, Stretch, Tokens};
use crate::train::step::MicroBatch;

/// Windows of the token stream, each of which starts afresh.
pub(super) fn windows(tokens: &Tokens, sampler: &Sampler, windows: &[usize]) -> MicroBatch {
    let mut examples = Examples::default();
    sampler.fill(tokens, windows, &mut examples);
    let sequences: Vec<&[u32]> = examples.inputs.chunks(sampler.seq_len()).collect();
    let mask = examples.weights.iter().map(|m| f64::from(u8::from(*m))).collect();
    MicroBatch { batch: Batch::packed(&sequences), targets: examples.targets, mask }
}

/// Stretches of the token stream: those of stream i are in slot i.
pub(super) fn segments(tokens: &Tokens, stretches: &[Stretch]) -> MicroBatch {
    let mut micro = MicroBatch::default();
    let (mut inputs, mut mask) = (Vec::new(), Vec::new());
    for Stretch { stream, tokens: Range { start, end }, fresh } in stretches.iter().cloned() {
        inputs.clear();
        tokens.read(start..end, &mut inputs);
        match fresh {
            true => micro.batch.push_fresh(&inputs, stream),
            false => micro.batch.push(&inputs, stream),
        }
        tokens.read(start + 1..end + 1, &mut micro.targets);
        tokens.mask(start + 1..end + 1, &mut mask);
    }
    micro.mask = mask.into_iter().map(|counts| f64::from(u8::from(counts))).collect();
    micro
}
