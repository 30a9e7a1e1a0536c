//! The driver's context of one GPU: one stream that orders everything, memory, copies, launches.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use crate::device::cuda::libraries::libraries;
use crate::{Error, Result};

/// A GPU and the one stream that all work on it goes through, so that memory given back may be handed out again at once: whoever
/// gets it runs later. No events are recorded.
pub struct Context {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: the driver's handles may be used from any thread; every call first makes the context current on its thread.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks what it shares.
unsafe impl Sync for Context {}

/// What a GPU is.
#[derive(Clone, Debug, PartialEq)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub compute: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block may have.
    pub shared_bytes: usize,
    /// Bytes of memory in all.
    pub memory: usize,
    /// Bytes of memory free when this program opened the device.
    pub free: usize,
    /// Newest CUDA version that the driver knows, as `13.0`.
    pub driver: String,
    /// Whether a kernel may start before the one ahead of it is done, also in a graph: Hopper or newer, driver 12.3 or newer.
    pub overlaps: bool,
}

/// A driver error as ours.
pub(crate) fn failed(what: &str, e: result::DriverError) -> Error {
    Error::Device(format!("{what}: {e}"))
}

impl Context {
    /// Opens GPU number `ordinal`.
    ///
    /// # Errors
    /// No driver, no such GPU, or what the driver says.
    pub fn open(ordinal: usize) -> Result<Context> {
        if libraries().driver.is_none() {
            return Err(Error::Device(
                "there is no CUDA driver: libcuda.so.1 is not known to the system's loader; install NVIDIA's driver, or use \
                 --device cpu (`ttt doctor` shows what was looked for)"
                    .into(),
            ));
        }
        result::init().map_err(|e| failed("the CUDA driver does not start", e))?;
        let count = result::device::get_count().map_err(|e| failed("counting GPUs", e))? as usize;
        if ordinal >= count {
            return Err(Error::Device(format!("there is no GPU number {ordinal}: the driver shows {count}, counted from 0")));
        }
        let open = || -> std::result::Result<Context, result::DriverError> {
            let device = result::device::get(ordinal as i32)?;
            // SAFETY: the device comes from the driver; the context is released in `drop`.
            let context = unsafe { result::primary_ctx::retain(device)? };
            // SAFETY: the context was just retained.
            unsafe { result::ctx::set_current(context)? };
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
            Ok(Context { ordinal, device, context, stream })
        };
        open().map_err(|e| failed(&format!("opening GPU {ordinal}"), e))
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What the GPU is.
    ///
    /// # Errors
    /// What the driver says.
    pub fn info(&self) -> Result<Info> {
        use sys::CUdevice_attribute as A;
        self.bind();
        let read = || -> std::result::Result<Info, result::DriverError> {
            // SAFETY: the device comes from the driver.
            let attribute = |which| unsafe { result::device::get_attribute(self.device, which) };
            let (free, memory) = result::mem_get_info()?;
            let mut driver = 0;
            // SAFETY: the pointer is to an integer of this frame.
            unsafe { sys::cuDriverGetVersion(&mut driver).result()? };
            let compute = (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            );
            Ok(Info {
                name: result::device::get_name(self.device)?,
                compute,
                multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
                shared_bytes: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
                memory,
                free,
                driver: format!("{}.{}", driver / 1000, driver % 1000 / 10),
                overlaps: compute >= (9, 0) && driver >= 12_030,
            })
        };
        read().map_err(|e| failed("asking the driver about the GPU", e))
    }

    /// Makes the context current on this thread.
    ///
    /// # Panics
    /// When the driver refuses, which it only does to a context that is gone.
    pub(crate) fn bind(&self) {
        // SAFETY: the context is held until `drop`.
        unsafe { result::ctx::set_current(self.context) }.expect("the GPU's context");
    }

    /// The stream.
    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Bytes free and in all.
    pub(crate) fn memory(&self) -> (usize, usize) {
        self.bind();
        result::mem_get_info().unwrap_or((0, 0))
    }

    /// Memory of the GPU, or `None` when there is not enough.
    pub(crate) fn allocate(&self, bytes: usize) -> Option<u64> {
        self.bind();
        // SAFETY: a plain allocation; it is freed by `free`.
        unsafe { result::malloc_sync(bytes) }.ok()
    }

    /// Gives memory of [`Context::allocate`] back, after everything that may use it.
    pub(crate) fn free(&self, pointer: u64) {
        self.bind();
        // SAFETY: the caller owns the memory. The driver waits for work that uses it.
        let _ = unsafe { result::free_sync(pointer) };
    }

    /// Sets `bytes` bytes to one value.
    ///
    /// # Panics
    /// When the driver refuses.
    pub(crate) fn fill(&self, pointer: u64, value: u8, bytes: usize) {
        if bytes > 0 {
            self.bind();
            // SAFETY: the caller owns `bytes` bytes at `pointer`.
            expect("filling memory", unsafe { result::memset_d8_async(pointer, value, bytes, self.stream) });
        }
    }

    /// Copies to the GPU; the host's memory may be used again at once.
    ///
    /// # Panics
    /// When the driver refuses.
    pub(crate) fn upload<T: bytemuck::Pod>(&self, pointer: u64, from: &[T]) {
        if !from.is_empty() {
            self.bind();
            // SAFETY: the caller owns that much at `pointer`. From pageable memory the driver stages the copy before it returns.
            expect("copying to the GPU", unsafe { result::memcpy_htod_async(pointer, from, self.stream) });
        }
    }

    /// Copies from the GPU, after everything queued before.
    ///
    /// # Panics
    /// When the driver refuses, or a kernel before has failed.
    pub(crate) fn download<T: bytemuck::Pod>(&self, to: &mut [T], pointer: u64) {
        if !to.is_empty() {
            self.bind();
            // SAFETY: the caller owns that much at `pointer`; the host's memory is not touched before the stream is done.
            expect("copying from the GPU", unsafe { result::memcpy_dtoh_async(to, pointer, self.stream) });
            self.synchronize();
        }
    }

    /// Copies inside the GPU's memory.
    ///
    /// # Panics
    /// When the driver refuses.
    pub(crate) fn copy(&self, to: u64, from: u64, bytes: usize) {
        if bytes > 0 {
            self.bind();
            // SAFETY: the caller owns both ranges, which do not overlap.
            expect("copying on the GPU", unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) });
        }
    }

    /// Waits until everything queued is done.
    ///
    /// # Panics
    /// When a kernel has failed.
    pub fn synchronize(&self) {
        self.bind();
        // SAFETY: the stream lives until `drop`.
        expect("waiting for the GPU", unsafe { result::stream::synchronize(self.stream) });
    }

    /// Queues a kernel.
    ///
    /// # Panics
    /// When the driver refuses: a grid that is too large, or a kernel before has failed.
    ///
    /// # Safety
    /// `args` point to arguments of the kernel's types, and what those point to is as large as it believes.
    pub(crate) unsafe fn launch(
        &self,
        function: sys::CUfunction,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        args: &mut [*mut c_void],
    ) {
        self.bind();
        let grid = grid.map(|n| n as u32);
        // SAFETY: the caller's promise; the arguments are copied before the call returns.
        expect("starting a kernel", unsafe {
            result::launch_kernel(function, (grid[0], grid[1], grid[2]), (block as u32, 1, 1), shared as u32, self.stream, args)
        });
    }

    /// [`Context::launch`] of a kernel that may start before the one ahead of it is done.
    ///
    /// # Panics
    /// As [`Context::launch`].
    ///
    /// # Safety
    /// As [`Context::launch`]; the kernel waits itself for what it needs (`overlap_wait` in prelude.cuh).
    pub(crate) unsafe fn launch_overlapped(
        &self,
        function: sys::CUfunction,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        args: &mut [*mut c_void],
    ) {
        self.bind();
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let grid = grid.map(|n| n as u32);
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.stream,
            attrs: &mut attribute,
            numAttrs: 1,
        };
        // SAFETY: the caller's promise; arguments and attributes are copied before the call returns.
        expect("starting a kernel", unsafe {
            sys::cuLaunchKernelEx(&config, function, args.as_mut_ptr(), std::ptr::null_mut()).result()
        });
    }
}

/// A point among what was queued, to wait for.
pub(crate) struct Mark {
    event: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: as for the context.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Mark {
    /// A point that is reached at once.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Mark> {
        context.bind();
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(|e| failed("making an event", e))?;
        Ok(Mark { event, context: context.clone() })
    }

    /// Moves it behind everything queued.
    ///
    /// # Panics
    /// When the driver refuses.
    pub(crate) fn set(&self) {
        self.context.bind();
        // SAFETY: event and stream live.
        expect("marking a point", unsafe { result::event::record(self.event, self.context.stream) });
    }

    /// Waits until it is reached.
    ///
    /// # Panics
    /// When a kernel before it has failed.
    pub(crate) fn wait(&self) {
        self.context.bind();
        // SAFETY: the event lives.
        expect("waiting for the GPU", unsafe { result::event::synchronize(self.event) });
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.context.bind();
        // SAFETY: nobody uses it any more.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}

/// Main memory that kernels write, or that copies to the GPU read.
pub(crate) struct Pinned {
    pointer: *mut c_void,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: it owns its memory.
unsafe impl Send for Pinned {}
// SAFETY: what is shared is only read.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeros.
    ///
    /// # Errors
    /// When the system has not so much.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Pinned> {
        context.bind();
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: a plain allocation; it is freed in `drop`, and zeroed here.
        let pointer = unsafe {
            let pointer = result::malloc_host(bytes.max(1), flags).map_err(|e| failed("memory that a GPU writes", e))?;
            pointer.cast::<u8>().write_bytes(0, bytes);
            pointer
        };
        Ok(Pinned { pointer, bytes, context: context.clone() })
    }

    /// Its address for kernels: with unified addresses the host's own.
    pub(crate) fn address(&self) -> u64 {
        self.pointer as u64
    }

    /// Copies what lies from element `first` on. The caller has waited for who writes there.
    ///
    /// # Panics
    /// When it does not lie inside.
    pub(crate) fn read<T: bytemuck::Pod>(&self, first: usize, to: &mut [T]) {
        assert!((first + to.len()) * size_of::<T>() <= self.bytes, "elements {first} and {} more", to.len());
        for (i, to) in to.iter_mut().enumerate() {
            // SAFETY: inside (checked), aligned to a page; any bits are a `T`. Volatile: a kernel may write it.
            *to = unsafe { self.pointer.cast::<T>().add(first + i).read_volatile() };
        }
    }
}

impl Pinned {
    /// Puts bytes at `at` and queues their copy to the GPU. The caller has waited for what was read from there before.
    ///
    /// # Panics
    /// When they do not lie inside, or the driver refuses.
    pub(crate) fn upload(&mut self, at: usize, bytes: &[u8], pointer: u64) {
        assert!(at + bytes.len() <= self.bytes, "bytes {at} and {} more of {}", bytes.len(), self.bytes);
        if bytes.is_empty() {
            return;
        }
        self.context.bind();
        // SAFETY: inside (checked) and nobody else's; the caller owns that much at `pointer`.
        expect("copying to the GPU", unsafe {
            let own = std::slice::from_raw_parts_mut(self.pointer.cast::<u8>().add(at), bytes.len());
            own.copy_from_slice(bytes);
            result::memcpy_htod_async(pointer, own, self.context.stream)
        });
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.context.synchronize();
        // SAFETY: nobody uses it any more.
        let _ = unsafe { result::free_host(self.pointer) };
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: nobody uses the stream or the context any more.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// A result of the driver that only a bug or a lost GPU makes an error.
#[track_caller]
fn expect(what: &str, result: std::result::Result<(), result::DriverError>) {
    if let Err(e) = result {
        panic!("{what}: {e}");
    }
}

/// An argument of a kernel: a pointer, an `int` or a `float`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arg(u64);

impl From<u64> for Arg {
    fn from(pointer: u64) -> Arg {
        Arg(pointer)
    }
}

impl From<usize> for Arg {
    fn from(n: usize) -> Arg {
        Arg(u64::from(u32::try_from(n).ok().filter(|n| *n <= i32::MAX as u32).expect("sizes of kernels are below 2^31")))
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Arg {
        Arg(u64::from(x.to_bits()))
    }
}

/// Where the arguments are, as the driver wants to know.
pub(crate) fn pointers(args: &[Arg]) -> Vec<*mut c_void> {
    args.iter().map(|arg| std::ptr::from_ref(&arg.0).cast_mut().cast()).collect()
}

/// A list of kernel arguments.
macro_rules! args {
    ($($x:expr),* $(,)?) => {
        &[$($crate::device::cuda::context::Arg::from($x)),*]
    };
}
pub(crate) use args;
