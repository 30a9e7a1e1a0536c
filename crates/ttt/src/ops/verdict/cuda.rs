//! On a GPU.

use super::Found;
use crate::Result;
use crate::device::cuda::context::{Mark, Pinned};
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args};
use crate::device::memory::Buffer;
use crate::ops::adamw;
use crate::ops::cross_entropy::cuda::Counted;
use crate::tensor::{DType, Tensor};

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "verdict",
    file: "ops/verdict/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32],
    kernels: &[Entry { name: "add_loss", registers: 64 }, Entry { name: "judge", registers: 64 }],
};

/// Threads of both kernels' one block.
const THREADS: usize = 1024;

/// `Verdict` of kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Fields {
    loss: f64,
    nll: f64,
    scale: f32,
    bad: u32,
}

/// Numbers of a report.
const REPORT: usize = 4;

/// What the steps of one optimizer find.
pub(crate) struct Verdict {
    fields: Buffer,
    /// A report for each step that is queued and not read, at most [`Verdict::RING`].
    reports: Pinned,
    marks: [Mark; Verdict::RING],
}

impl std::fmt::Debug for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verdict")
    }
}

impl Verdict {
    /// Steps that may be queued before a report is read.
    pub(crate) const RING: usize = 2;

    /// Nothing found so far.
    ///
    /// # Errors
    /// [`crate::Error::OutOfGpuMemory`].
    pub(crate) fn new(cuda: &Cuda) -> Result<Verdict> {
        let context = cuda.shared_context();
        Ok(Verdict {
            fields: cuda.upload(&[Fields { loss: 0.0, nll: 0.0, scale: 1.0, bad: 0 }])?,
            reports: Pinned::new(context, Verdict::RING * REPORT * size_of::<f64>())?,
            marks: [Mark::new(context)?, Mark::new(context)?],
        })
    }

    /// Where the update finds scale and flag.
    pub(crate) fn address(&self) -> u64 {
        self.fields.address()
    }

    /// Forgets what was found.
    pub(crate) fn clear(&self, cuda: &Cuda) {
        cuda.context().upload(self.fields.address(), &[Fields { loss: 0.0, nll: 0.0, scale: 1.0, bad: 0 }]);
    }

    /// Adds the likelihoods of the rows that count.
    pub(crate) fn add_loss(&self, cuda: &Cuda, counted: &Counted) {
        let list = args![self.fields.address(), counted.nll.address(), counted.weights.address(), counted.nll.len()];
        // SAFETY: as many likelihoods as weights, both f32.
        unsafe { cuda.launch(&SOURCE, (DType::F32, "add_loss"), [1, 1, 1], THREADS, 0, list) };
    }

    /// Queues the verdict of step number `step`, whose gradient is `grads`.
    ///
    /// # Errors
    /// [`crate::Error::OutOfGpuMemory`].
    pub(crate) fn judge(&self, cuda: &Cuda, step: u64, grads: &Tensor, clip: f64) -> Result<()> {
        let (squares, count) = adamw::cuda::squares(cuda, grads)?;
        let slot = step as usize % Verdict::RING;
        let report = self.reports.address() + (slot * REPORT * size_of::<f64>()) as u64;
        let list = args![self.fields.address(), squares.address(), count, clip as f32, report];
        // SAFETY: `squares` holds `count` sums; the report of this slot was read before (`Verdict::read`).
        unsafe { cuda.launch(&SOURCE, (DType::F32, "judge"), [1, 1, 1], THREADS, 0, list) };
        self.marks[slot].set();
        Ok(())
    }

    /// What step number `step` found; `None` when it, or one before it, found a number that is not finite. Waits for it, not for
    /// what is queued behind it.
    pub(crate) fn read(&self, step: u64) -> Option<Found> {
        let slot = step as usize % Verdict::RING;
        self.marks[slot].wait();
        let mut report = [0f64; REPORT];
        self.reports.read(slot * REPORT, &mut report);
        let [loss, nll, norm, bad] = report;
        (bad == 0.0).then_some(Found { loss, nll, norm })
    }
}
