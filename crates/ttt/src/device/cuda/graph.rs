//! Launches that are recorded once and repeated without the host's work for each.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::{result, sys};

use crate::device::cuda::Cuda;
use crate::device::cuda::context::{Context, failed};
use crate::device::memory::Aside;
use crate::{Error, Result};

/// Recorded launches, and the memory that they work in.
pub(crate) struct Graph {
    executable: sys::CUgraphExec,
    context: Arc<Context>,
    _memory: Aside,
}

// SAFETY: the handle may be used from any thread that has made the context current.
unsafe impl Send for Graph {}

impl Graph {
    /// Queues what was recorded.
    ///
    /// # Panics
    /// When the driver refuses, or a kernel before has failed.
    pub(crate) fn launch(&self) {
        self.context.bind();
        // SAFETY: the graph was instantiated and its memory is held.
        unsafe { result::graph::launch(self.executable, self.context.stream()) }
            .unwrap_or_else(|e| panic!("repeating a recorded step: {e}"));
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // What was queued uses the memory that is given back behind this.
        self.context.synchronize();
        // SAFETY: nobody uses it any more.
        let _ = unsafe { result::graph::exec_destroy(self.executable) };
    }
}

impl Cuda {
    /// Records what `work` launches instead of running it. What it takes from the pool and returns stays with the graph; what it
    /// keeps must live as long.
    ///
    /// # Errors
    /// Those of `work`, which may not upload anything; what the driver says.
    pub(crate) fn record<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Graph)> {
        self.context.bind();
        let stream = self.context.stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as the context.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(|e| failed("recording a step", e))?;
        self.recording.store(true, Ordering::Relaxed);
        let (done, memory) = self.memory.set_aside(work);
        self.recording.store(false, Ordering::Relaxed);
        // SAFETY: as above; the recording was begun there.
        let graph = unsafe { result::stream::end_capture(stream) }.map_err(|e| failed("recording a step", e));
        let (done, graph) = (done?, graph?);
        if graph.is_null() {
            return Err(Error::Device("recording a step: the driver recorded nothing".into()));
        }
        // SAFETY: the graph is not null; it is not needed once instantiated.
        let executable = unsafe {
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            executable.map_err(|e| failed("recording a step", e))?
        };
        Ok((done, Graph { executable, context: self.context.clone(), _memory: memory }))
    }
}
