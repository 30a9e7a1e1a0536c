//! Where tensors live and operations run.
//!
//! [`Device`] is carried by every tensor. Its memory comes from a [`memory::Pool`] that keeps what is returned to it, so that a
//! warmed-up training step asks the system for nothing. [`view`] has the borrowed matrices that operations read and write,
//! [`par`] the deterministic fork-join that they share, [`cuda`] NVIDIA's GPUs, [`probe`] how fast all that is.

mod awake;
pub mod cuda;
pub mod memory;
pub mod par;
pub mod probe;
pub mod view;
mod weight_view;

use std::sync::Arc;

use crate::{Error, Result};
use cuda::Cuda;
use memory::Pool;

pub use weight_view::WeightView;

/// Which implementation of an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// The fast one of the device.
    Fast,
    /// The plain loops that define the operation.
    Reference,
    /// The same, with the roundings of a GPU's inner models in mixed precision: what their kernels are tested against.
    Rounded,
}

/// A place where tensors live and operations run. Cloning it clones a handle.
#[derive(Clone)]
pub enum Device {
    /// The processor's cores and main memory.
    Cpu(Arc<Cpu>),
    /// An NVIDIA GPU.
    Cuda(Arc<Cuda>),
}

/// Cores and main memory.
pub struct Cpu {
    workers: rayon::ThreadPool,
    memory: Arc<Pool>,
    kernels: Kernels,
}

impl Device {
    /// All cores of this machine, fast kernels.
    ///
    /// # Errors
    /// When the system refuses the threads.
    pub fn cpu() -> Result<Device> {
        Device::cpu_with(0, Kernels::Fast)
    }

    /// `threads` cores (0: all of them).
    ///
    /// # Errors
    /// When the system refuses the threads.
    pub fn cpu_with(threads: usize, kernels: Kernels) -> Result<Device> {
        let workers = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("ttt-{i}"))
            .build()
            .map_err(|e| Error::Config(format!("cannot start {threads} threads: {e}")))?;
        Ok(Device::Cpu(Arc::new(Cpu { workers, memory: Arc::new(Pool::default()), kernels })))
    }

    /// GPU number `ordinal`, counted from 0.
    ///
    /// # Errors
    /// When driver, libraries or the GPU are missing: what was looked for.
    pub fn cuda(ordinal: usize) -> Result<Device> {
        Ok(Device::Cuda(Arc::new(Cuda::open(cuda::Options { ordinal, ..cuda::Options::default() })?)))
    }

    /// Number of the CPU's threads that work on an operation.
    pub fn threads(&self) -> usize {
        self.host().workers.current_num_threads()
    }

    /// Which implementation of each operation runs for `f32`; `f64` always runs the reference.
    pub fn kernels(&self) -> Kernels {
        self.host().kernels
    }

    /// The memory that tensors of this device come from.
    pub fn memory(&self) -> &Arc<Pool> {
        match self {
            Device::Cpu(cpu) => &cpu.memory,
            Device::Cuda(cuda) => cuda.memory(),
        }
    }

    /// The GPU, if it is one.
    pub fn as_cuda(&self) -> Option<&Cuda> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => Some(cuda),
        }
    }

    fn host(&self) -> &Cpu {
        match self {
            Device::Cpu(cpu) => cpu,
            Device::Cuda(cuda) => match cuda.host() {
                Device::Cpu(cpu) => cpu,
                Device::Cuda(_) => unreachable!("a GPU's host is a CPU"),
            },
        }
    }

    /// The CPU beside a GPU, or this CPU: where files are read to and written from.
    pub fn cpu_beside(&self) -> Device {
        match self {
            Device::Cpu(_) => self.clone(),
            Device::Cuda(cuda) => cuda.host().clone(),
        }
    }

    /// Waits until all work queued on a GPU is done; on a CPU there is nothing to wait for.
    pub fn synchronize(&self) {
        if let Some(cuda) = self.as_cuda() {
            cuda.context().synchronize();
        }
    }

    /// Runs `work` on this device's threads. Every public entry point of the model does this once; operations split their work
    /// over the threads of the pool they find themselves in.
    pub fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match self {
            Device::Cpu(cpu) => cpu.workers.install(|| awake::with_workers(work)),
            // The calling thread only queues work.
            Device::Cuda(_) => work(),
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu(cpu) => write!(f, "Cpu({} threads, {:?})", self.threads(), cpu.kernels),
            Device::Cuda(cuda) => write!(f, "Cuda({}, {})", cuda.context().ordinal(), cuda.info().name),
        }
    }
}
