//! On a GPU.

use super::{Choice, Draw, Sampling};
use crate::Result;
use crate::device::cuda::context::Pinned;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, Uploaded};
use crate::device::memory::Buffer;
use crate::device::view::View;
use crate::tensor::DType;

/// The kernel.
pub(crate) static SOURCE: Source = Source {
    name: "sample",
    file: "ops/sample/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32],
    kernels: &[Entry { name: "sample", registers: 64 }],
};

/// No token ends a sequence.
pub(crate) const NO_END: u32 = u32::MAX;

/// `Draw` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Sequence {
    key: [u32; 8],
    stream: u64,
    drawn: u64,
    top_p: f64,
    scale: f32,
    top_k: u32,
    ends: [u32; 2],
    ended: u32,
    first: u32,
}

impl Sequence {
    /// A sequence that ends behind either of two tokens ([`NO_END`]: none).
    pub(crate) fn new(draw: &Draw, ends: [u32; 2]) -> Sequence {
        let key = draw.sampling.key();
        let word = |i: usize| u32::from_le_bytes([key[4 * i], key[4 * i + 1], key[4 * i + 2], key[4 * i + 3]]);
        Sequence {
            key: [0, 1, 2, 3, 4, 5, 6, 7].map(word),
            stream: draw.stream,
            drawn: draw.drawn,
            top_p: draw.sampling.top_p,
            scale: draw.sampling.scale(),
            top_k: u32::try_from(draw.sampling.top_k).unwrap_or(0),
            ends,
            ended: 0,
            first: draw.drawn as u32,
        }
    }
}

/// `Chosen` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Chosen {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
}

impl From<Chosen> for Choice {
    fn from(chosen: Chosen) -> Choice {
        Choice { token: chosen.token, logprob: f64::from(chosen.logprob) }
    }
}

/// `SampleParams` of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    logits: u64,
    draws: u64,
    chosen: u64,
    tokens: u64,
    segments: u64,
    vocab: u32,
    ring: u32,
    mini_batch: u32,
    read: u32,
}

/// Queues the choice for each row of `logits` where the parameters say.
///
/// # Safety
/// What they point to is as large as the kernel believes.
unsafe fn launch(cuda: &Cuda, logits: View, params: Params) {
    let contiguous = logits.stride() == logits.cols() || logits.rows() == 1;
    assert!(logits.dtype() == DType::F32 && contiguous, "logits {:?} of {:?}", logits.shape(), logits.dtype());
    let params = Params { logits: logits.address(), vocab: logits.cols() as u32, ..params };
    // SAFETY: the caller's promise.
    unsafe { cuda.launch_overlapped(&SOURCE, (DType::F32, "sample"), [logits.rows(), 1, 1], 1024, 0, &params) };
}

/// Ids on a GPU, a row of a step each: of a vocabulary, whoever wrote them.
pub(crate) struct Tokens {
    buffer: Buffer,
    rows: usize,
    vocab: usize,
}

impl Tokens {
    /// Where they lie.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Their number.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Size of the vocabulary.
    pub(crate) fn vocab(&self) -> usize {
        self.vocab
    }
}

/// Choices of a number of sequences, step after step: their draws and last tokens on the GPU, the choices of the last
/// [`Sampler::RING`] steps in the host's memory.
pub(crate) struct Sampler {
    sequences: Buffer,
    tokens: Tokens,
    chosen: Pinned,
}

impl Sampler {
    /// Steps whose choices are kept.
    pub(crate) const RING: usize = 8;

    /// For `rows` sequences, whose tokens are 0 so far.
    ///
    /// # Errors
    /// [`crate::Error::OutOfGpuMemory`].
    pub(crate) fn new(cuda: &Cuda, rows: usize, vocab: usize) -> Result<Sampler> {
        let nothing = Sequence::new(&Draw::new(Sampling::default(), 0), [NO_END; 2]);
        Ok(Sampler {
            sequences: cuda.upload(&vec![nothing; rows])?,
            tokens: Tokens { buffer: cuda.upload(&vec![0u32; rows])?, rows, vocab },
            chosen: Pinned::new(cuda.shared_context(), Sampler::RING * rows * size_of::<Chosen>())?,
        })
    }

    /// Begins with other sequences; the next choice is number 0.
    ///
    /// # Panics
    /// When their number differs.
    pub(crate) fn begin(&self, cuda: &Cuda, sequences: &[Sequence]) {
        assert_eq!(sequences.len(), self.tokens.rows, "sequences");
        cuda.context().upload(self.sequences.address(), sequences);
    }

    /// The tokens chosen last.
    pub(crate) fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Queues a choice for each sequence that has not ended. `read`: whether it read a token before, by which the phases of
    /// `segments` move on; lengths of those that end become 0.
    ///
    /// # Panics
    /// When `logits` has not a row for each.
    pub(crate) fn choose(&self, cuda: &Cuda, logits: View, segments: &Uploaded, mini_batch: usize, read: bool) {
        assert_eq!(logits.shape(), [self.tokens.rows, self.tokens.vocab], "logits");
        assert_eq!(segments.count(), self.tokens.rows, "segments");
        let params = Params {
            logits: 0,
            draws: self.sequences.address(),
            chosen: self.chosen.address(),
            tokens: self.tokens.address(),
            segments: segments.segments(),
            vocab: 0,
            ring: Sampler::RING as u32,
            mini_batch: mini_batch as u32,
            read: u32::from(read),
        };
        // SAFETY: a sequence, a token, a segment and a place in each row of the ring for each row of the logits (checked).
        unsafe { launch(cuda, logits, params) };
    }

    /// Choice number `index`, of all sequences, of those that had ended anything. The caller has waited for it, and at most
    /// [`Sampler::RING`] - 1 later ones are queued.
    pub(crate) fn chosen(&self, index: usize) -> Vec<Choice> {
        let mut all = vec![Chosen::default(); self.tokens.rows];
        self.chosen.read(index % Sampler::RING * all.len(), &mut all);
        all.into_iter().map(Choice::from).collect()
    }
}

/// See [`super::forward`].
pub(crate) fn forward(cuda: &Cuda, logits: View, draws: &[Draw]) -> Result<Vec<Choice>> {
    let sequences: Vec<Sequence> = draws.iter().map(|draw| Sequence::new(draw, [NO_END; 2])).collect();
    let draws = cuda.upload(&sequences)?;
    let chosen = cuda.upload(&vec![Chosen { token: u32::MAX, logprob: f32::NAN }; sequences.len()])?;
    let (draws_at, chosen_at) = (draws.address(), chosen.address());
    let params =
        Params { logits: 0, draws: draws_at, chosen: chosen_at, tokens: 0, segments: 0, vocab: 0, ring: 1, mini_batch: 1, read: 0 };
    // SAFETY: a sequence and a place for the choice for each row; a ring of one.
    unsafe { launch(cuda, logits, params) };
    let mut choices = vec![Chosen::default(); sequences.len()];
    cuda.context().download(&mut choices, chosen.address());
    Ok(choices.into_iter().map(Choice::from).collect())
}
