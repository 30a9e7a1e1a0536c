//! Where tensors live and operations run.
//!
//! [`Device`] is carried by every tensor. Its memory comes from a [`memory::Pool`] that keeps what is returned to it, so that a
//! warmed-up training step asks the system for nothing. [`view`] has the borrowed matrices that operations read and write,
//! [`par`] the deterministic fork-join that they share, [`probe`] how fast all that is.

pub mod memory;
pub mod par;
pub mod probe;
pub mod view;
mod weight_view;

use std::sync::Arc;

use crate::{Error, Result};
use memory::Pool;

pub use weight_view::WeightView;

/// Which implementation of an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// The fast one of the device.
    Fast,
    /// The plain loops that define the operation.
    Reference,
}

/// A place where tensors live and operations run. Cloning it clones a handle.
#[derive(Clone)]
pub enum Device {
    /// The processor's cores and main memory.
    Cpu(Arc<Cpu>),
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

    /// Number of threads that work on an operation.
    pub fn threads(&self) -> usize {
        let Device::Cpu(cpu) = self;
        cpu.workers.current_num_threads()
    }

    /// Which implementation of each operation runs for `f32`; `f64` always runs the reference.
    pub fn kernels(&self) -> Kernels {
        let Device::Cpu(cpu) = self;
        cpu.kernels
    }

    /// The memory that tensors of this device come from.
    pub fn memory(&self) -> &Arc<Pool> {
        let Device::Cpu(cpu) = self;
        &cpu.memory
    }

    /// Runs `work` on this device's threads. Every public entry point of the model does this once; operations split their work
    /// over the threads of the pool they find themselves in.
    pub fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let Device::Cpu(cpu) = self;
        cpu.workers.install(work)
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Device::Cpu(cpu) = self;
        write!(f, "Cpu({} threads, {:?})", self.threads(), cpu.kernels)
    }
}
