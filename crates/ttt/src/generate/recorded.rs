//! A decoding step on a GPU, recorded and repeated.

use std::sync::Arc;

use super::Choice;
use super::decoder::Sequence;
use crate::Result;
use crate::batch::Segment;
use crate::device::cuda::context::Mark;
use crate::device::cuda::graph::Graph;
use crate::device::cuda::{Cuda, Uploaded};
use crate::lm::Lm;
use crate::ops::sample::cuda::{NO_END, Sampler, Sequence as OnGpu};
use crate::state::States;
use crate::tensor::Tensor;

/// Steps that are kept, of as many numbers of sequences.
const MOST: usize = 32;

/// A step for a number of sequences of some states: what it works in, and its launches once they were recorded.
pub(super) struct Recorded {
    /// Before what it works in, which is given back behind it.
    graph: Option<Graph>,
    /// Where the states lie: with other states the step is another one.
    addresses: Vec<u64>,
    /// The sequences' segments, as the host knows them, and as the GPU moves them on.
    segments: Vec<Segment>,
    live: Arc<Uploaded>,
    sampler: Sampler,
    marks: Vec<Mark>,
    /// Whether a step has run that was not recorded: the first one finds algorithms and memory.
    warm: bool,
}

impl Recorded {
    /// The step for these segments: one that was recorded for as many of the same states, or a new one.
    pub(super) fn find<'a>(
        all: &'a mut Vec<Recorded>,
        gpu: &Cuda,
        states: &States,
        segments: Vec<Segment>,
        [rows, vocab]: [usize; 2],
    ) -> Result<&'a mut Recorded> {
        let addresses: Vec<u64> = states.layers.iter().flat_map(|layer| layer.tensors()).map(|(_, t)| t.address()).collect();
        // Of states that were dropped nothing is left to repeat.
        all.retain(|r| r.addresses == addresses);
        let found = match all.iter().position(|r| r.segments.len() == rows) {
            Some(index) => all.remove(index),
            None => {
                // Each holds the memory that it works in; the one that was not used for longest goes.
                all.drain(..(all.len() + 1).saturating_sub(MOST));
                let marks = (0..Sampler::RING).map(|_| Mark::new(gpu.shared_context())).collect::<Result<_>>()?;
                let live = Arc::new(gpu.upload_segments(&segments)?);
                let sampler = Sampler::new(gpu, rows, vocab)?;
                Recorded { graph: None, addresses, segments: segments.clone(), live, sampler, marks, warm: false }
            }
        };
        all.push(found);
        let found = all.last_mut().expect("was pushed");
        gpu.rewrite_segments(&found.live, &segments);
        found.segments = segments;
        Ok(found)
    }

    /// Queues the first choices.
    pub(super) fn begin(&mut self, model: &Lm, gpu: &Cuda, sequences: &[Sequence], logits: &Tensor) -> Running<'_> {
        self.upload(gpu, sequences);
        self.sampler.choose(gpu, logits.view(), &self.live, model.config().mini_batch_size, false);
        self.marks[0].set();
        Running { recorded: self, steps: 0 }
    }

    /// Runs a step that reads `tokens` and waits for its choices.
    pub(super) fn once(
        &mut self,
        model: &Lm,
        gpu: &Cuda,
        states: &mut States,
        sequences: &[Sequence],
        tokens: &[u32],
    ) -> Result<Vec<Choice>> {
        self.upload(gpu, sequences);
        gpu.context().upload(self.sampler.tokens().address(), tokens);
        self.run(model, gpu, states)?;
        self.marks[0].set();
        self.marks[0].wait();
        Ok(self.sampler.chosen(0))
    }

    fn upload(&self, gpu: &Cuda, sequences: &[Sequence]) {
        let on_gpu = |s: &Sequence| OnGpu::new(&s.draw, s.ends.map(|end| end.unwrap_or(NO_END)));
        self.sampler.begin(gpu, &sequences.iter().map(on_gpu).collect::<Vec<_>>());
    }

    /// Queues a step: as it was recorded, or, the second time, recording it.
    fn run(&mut self, model: &Lm, gpu: &Cuda, states: &mut States) -> Result<()> {
        if self.graph.is_none() && self.warm {
            self.graph = Some(gpu.record(|| self.launch(model, gpu, states))?.1);
        }
        match &self.graph {
            Some(graph) => graph.launch(),
            None => self.launch(model, gpu, states)?,
        }
        self.warm = true;
        Ok(())
    }

    /// Launches a step.
    fn launch(&self, model: &Lm, gpu: &Cuda, states: &mut States) -> Result<()> {
        gpu.with_segments((&self.segments, &self.live), || {
            let logits = model.step(self.sampler.tokens(), &self.segments, states)?;
            self.sampler.choose(gpu, logits.view(), &self.live, model.config().mini_batch_size, true);
            Ok(())
        })
    }
}

/// A step that is being repeated.
pub(super) struct Running<'a> {
    recorded: &'a mut Recorded,
    steps: usize,
}

impl Running<'_> {
    /// Queues a step.
    pub(super) fn step(&mut self, model: &Lm, states: &mut States) -> Result<()> {
        let gpu = model.device().as_cuda().expect("recorded on a GPU");
        self.recorded.run(model, gpu, states)?;
        self.steps += 1;
        self.recorded.marks[self.steps % Sampler::RING].set();
        Ok(())
    }

    /// Waits for choices number `index`, the first being 0.
    pub(super) fn chosen(&mut self, index: usize) -> Vec<Choice> {
        self.recorded.marks[index % Sampler::RING].wait();
        self.recorded.sampler.chosen(index)
    }
}
