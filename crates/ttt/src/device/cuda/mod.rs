//! NVIDIA's GPUs: driver, memory, kernels and matrix products, all found at run time.
//!
//! The program is built without CUDA. [`libraries`] looks for the driver, NVRTC and cuBLASLt; [`kernels`] has the sources of all
//! kernels and finds or makes their machine code; one stream ([`context::Context`]) orders everything that is queued.

mod blas;
pub mod compile;
pub mod context;
pub(crate) mod graph;
pub mod kernels;
pub mod libraries;
mod staging;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::driver::{result, sys};

pub use blas::version as cublaslt_version;
pub(crate) use blas::{Operand, WORKSPACE as LIBRARY_SCRATCH};
pub(crate) use context::args;
use context::{Arg, Context, Info, failed};
use kernels::{Source, Unit};

use crate::batch::Segment;
use crate::config::{Config, Mixer};
use crate::device::memory::{Buffer, Pool};
use crate::device::view::{View, ViewMut};
use crate::device::{Device, Kernels};
use crate::tensor::DType;
use crate::{Error, Result};

/// Whether a GPU runs a model.
///
/// # Errors
/// What it does not run, and what to do.
pub fn supports(config: &Config) -> Result<()> {
    let limit = |what: &str, is: usize, most: usize| match is > most {
        true => Err(Error::Config(format!("{what} is {is}; on a GPU it is at most {most}; use --device cpu"))),
        false => Ok(()),
    };
    match config.mixer {
        Mixer::Ttt => {}
        Mixer::Attention => return Err(Error::Config("attention needs --device cpu for now".into())),
        Mixer::Mamba => return Err(Error::Config("Mamba needs --device cpu for now".into())),
    }
    if config.sums() || !config.ttt_layer_norm || !config.ttt_residual {
        let message = "mini-batches as long as the sequence, linear attention, and inner models without LayerNorm or residual do not \
                       run on a GPU yet; use --device cpu";
        return Err(Error::Config(message.into()));
    }
    limit("conv_kernel", config.conv_kernel, crate::ops::conv::cuda::MAX_TAPS)?;
    limit("mini_batch_size", config.mini_batch_size, crate::ops::ttt_linear::cuda::MAX_MINI_BATCH)?;
    limit("num_attention_heads", config.num_attention_heads, crate::ops::inner_lr::cuda::MAX_HEADS)
}

/// How to open a GPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Its number, counted from 0.
    pub ordinal: usize,
    /// Whether new tensors are filled with NaN, so that an element nobody wrote is noticed. For tests.
    pub poison: bool,
}

/// A GPU.
pub struct Cuda {
    // Dropped in this order: what lies in its memory, then the products, then the context.
    segments: Mutex<Option<(Vec<Segment>, Arc<Uploaded>)>>,
    memory: Arc<Pool>,
    staging: Mutex<staging::Staging>,
    blas: blas::Blas,
    functions: HashMap<(&'static str, DType, &'static str), Function>,
    info: Info,
    host: Device,
    poison: bool,
    /// Whether launches are being recorded, not run.
    recording: AtomicBool,
    context: Arc<Context>,
}

/// A kernel of a loaded module. Modules stay loaded as long as the process.
struct Function(sys::CUfunction);

// SAFETY: a function handle may be used from any thread that has made the context current.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// The segments of a batch in the GPU's memory.
pub(crate) struct Uploaded {
    buffer: Buffer,
    count: usize,
    rows: usize,
}

impl Uploaded {
    /// Number of segments.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// For each segment four ints: first row, length, slot, phase.
    pub(crate) fn segments(&self) -> u64 {
        self.buffer.address()
    }

    /// For each row the index of its segment.
    pub(crate) fn of_row(&self) -> u64 {
        self.buffer.address() + 16 * self.count as u64
    }

    /// For each segment five ints: as [`Uploaded::segments`], then 0, as the kernels of the inner models want them where nothing is
    /// kept.
    pub(crate) fn without_checkpoints(&self) -> u64 {
        self.of_row() + 4 * self.rows as u64
    }
}

impl Cuda {
    /// Opens a GPU and loads all kernels; what is not in the cache is compiled.
    ///
    /// # Errors
    /// When driver, libraries, kernels or the GPU are missing: what was looked for.
    pub fn open(options: Options) -> Result<Cuda> {
        let context = Arc::new(Context::open(options.ordinal)?);
        let info = context.info()?;
        if info.compute < (8, 0) {
            return Err(Error::Device(format!(
                "{} has compute capability {}.{}; this program needs 8.0 (Ampere) or newer; use --device cpu",
                info.name, info.compute.0, info.compute.1
            )));
        }
        let blas = blas::Blas::new(&context)?;
        let host = Device::cpu_with(0, Kernels::Fast)?;
        let units = kernels::units(&kernels::architecture(info.compute));
        let images = host.install(|| kernels::find_all(&units))?;
        context.bind();
        let mut functions = HashMap::new();
        for (unit, image) in units.iter().zip(&images) {
            load(unit, image, &mut functions)?;
        }
        let memory = Arc::new(Pool::of_gpu(&context));
        Ok(Cuda {
            segments: Mutex::default(),
            memory,
            staging: Mutex::new(staging::Staging::new(&context)?),
            blas,
            functions,
            info,
            host,
            poison: options.poison,
            recording: AtomicBool::new(false),
            context,
        })
    }

    /// A handle to the context.
    pub(crate) fn shared_context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The context.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// What the GPU is.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The memory that tensors come from.
    pub fn memory(&self) -> &Arc<Pool> {
        &self.memory
    }

    /// The CPU beside it.
    pub(crate) fn host(&self) -> &Device {
        &self.host
    }

    pub(crate) fn poisons(&self) -> bool {
        self.poison
    }

    /// `y = a b`, or `y += a b`.
    pub(crate) fn product(&self, a: Operand, b: Operand, y: Operand, add: bool) {
        self.blas.product(a, b, y, add.then_some(y));
    }

    /// `y = c + a b`.
    pub(crate) fn product_onto(&self, a: Operand, b: Operand, y: Operand, c: Operand) {
        self.blas.product(a, b, y, Some(c));
    }

    /// Queues a kernel of `source`, compiled for activations of `dtype`, unless the grid is empty.
    ///
    /// # Panics
    /// When there is no such kernel, or the driver refuses.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and what they point to is as large as it believes.
    pub(crate) unsafe fn launch(
        &self,
        source: &'static Source,
        (dtype, kernel): (DType, &'static str),
        grid: [usize; 3],
        block: usize,
        shared: usize,
        args: &[Arg],
    ) {
        // SAFETY: the caller's promise.
        unsafe { self.launch_pointers(source, (dtype, kernel), grid, block, shared, &mut context::pointers(args)) };
    }

    /// [`Cuda::launch`] of a kernel whose one argument is a structure.
    ///
    /// # Panics
    /// As [`Cuda::launch`].
    ///
    /// # Safety
    /// As [`Cuda::launch`]; `P` is laid out as the kernel's.
    pub(crate) unsafe fn launch_with<P: Copy>(
        &self,
        source: &'static Source,
        kernel: (DType, &'static str),
        grid: [usize; 3],
        block: usize,
        shared: usize,
        params: &P,
    ) {
        let pointer: *const P = params;
        // SAFETY: the caller's promise.
        unsafe { self.launch_pointers(source, kernel, grid, block, shared, &mut [pointer.cast_mut().cast()]) };
    }

    /// [`Cuda::launch_with`] of a kernel that may start before the one ahead of it is done, where the GPU can do that.
    ///
    /// # Panics
    /// As [`Cuda::launch`].
    ///
    /// # Safety
    /// As [`Cuda::launch_with`]; the kernel waits itself for what it needs (`overlap_wait` in prelude.cuh).
    pub(crate) unsafe fn launch_overlapped<P: Copy>(
        &self,
        source: &'static Source,
        kernel: (DType, &'static str),
        grid: [usize; 3],
        block: usize,
        shared: usize,
        params: &P,
    ) {
        if grid.contains(&0) {
            return;
        }
        if !self.info.overlaps {
            // SAFETY: the caller's promise.
            return unsafe { self.launch_with(source, kernel, grid, block, shared, params) };
        }
        let function = self.function(source, kernel, shared);
        let pointer: *const P = params;
        // SAFETY: the caller's promise.
        unsafe { self.context.launch_overlapped(function, grid, block, shared, &mut [pointer.cast_mut().cast()]) };
    }

    unsafe fn launch_pointers(
        &self,
        source: &'static Source,
        kernel: (DType, &'static str),
        grid: [usize; 3],
        block: usize,
        shared: usize,
        args: &mut [*mut c_void],
    ) {
        if grid.contains(&0) {
            return;
        }
        let function = self.function(source, kernel, shared);
        // SAFETY: the caller's promise.
        unsafe { self.context.launch(function, grid, block, shared, args) };
    }

    /// A kernel that may have `shared` bytes of shared memory.
    ///
    /// # Panics
    /// When there is no such kernel, or not so much memory.
    fn function(&self, source: &'static Source, (dtype, kernel): (DType, &'static str), shared: usize) -> sys::CUfunction {
        let Some(function) = self.functions.get(&(source.name, dtype, kernel)) else {
            panic!("there is no kernel {kernel} of {} for {dtype:?}", source.name);
        };
        if shared > 48 << 10 {
            assert!(
                shared <= self.info.shared_bytes,
                "{kernel} needs {shared} bytes of shared memory of {}",
                self.info.shared_bytes
            );
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            self.context.bind();
            // SAFETY: the function is loaded.
            unsafe { result::function::set_function_attribute(function.0, attribute, shared as i32) }
                .unwrap_or_else(|e| panic!("{kernel}: {shared} bytes of shared memory: {e}"));
        }
        function.0
    }

    /// Numbers in the GPU's memory.
    ///
    /// # Errors
    /// [`Error::OutOfGpuMemory`]; while launches are recorded for a graph, which would upload again what the host's memory then holds.
    pub(crate) fn upload<T: bytemuck::Pod>(&self, data: &[T]) -> Result<Buffer> {
        if self.recording.load(Ordering::Relaxed) {
            return Err(Error::Device("a step that uploads numbers cannot be recorded".into()));
        }
        let buffer = self.memory.take(size_of_val(data))?;
        self.staging.lock().expect("staging").upload(buffer.address(), data);
        Ok(buffer)
    }

    /// Segments in the GPU's memory. Those of the last batch are kept: all layers ask for the same.
    ///
    /// # Errors
    /// As [`Cuda::upload`].
    pub(crate) fn segments(&self, segments: &[Segment]) -> Result<Arc<Uploaded>> {
        let mut kept = self.segments.lock().expect("uploaded segments");
        if let Some((of, uploaded)) = &*kept
            && of == segments
        {
            return Ok(uploaded.clone());
        }
        let uploaded = Arc::new(self.upload_segments(segments)?);
        *kept = Some((segments.to_vec(), uploaded.clone()));
        Ok(uploaded)
    }

    /// A copy of segments in the GPU's memory that nobody else has.
    ///
    /// # Errors
    /// As [`Cuda::upload`].
    pub(crate) fn upload_segments(&self, segments: &[Segment]) -> Result<Uploaded> {
        let data = segment_words(segments);
        let rows = data.len() - 9 * segments.len();
        Ok(Uploaded { buffer: self.upload(&data)?, count: segments.len(), rows })
    }

    /// Puts other segments, of the same number and lengths, into such a copy.
    ///
    /// # Panics
    /// When there is no room.
    pub(crate) fn rewrite_segments(&self, uploaded: &Uploaded, segments: &[Segment]) {
        let data = segment_words(segments);
        assert_eq!(data.len(), 9 * uploaded.count + uploaded.rows, "numbers of segments");
        self.context.upload(uploaded.buffer.address(), &data);
    }

    /// Runs `work`, for which segments equal to `segments` are those of `live`, whatever it holds.
    pub(crate) fn with_segments<T>(&self, (segments, live): (&[Segment], &Arc<Uploaded>), work: impl FnOnce() -> T) -> T {
        let put = |kept| *self.segments.lock().expect("uploaded segments") = kept;
        put(Some((segments.to_vec(), live.clone())));
        let done = work();
        put(None);
        done
    }
}

/// Segments as they lie in the GPU's memory (see [`Uploaded`]).
fn segment_words(segments: &[Segment]) -> Vec<u32> {
    let rows: usize = segments.iter().map(|s| s.len).sum();
    let four = |s: &Segment| [s.first_row, s.len, s.slot, s.phase].map(|n| n as u32);
    let mut data: Vec<u32> = Vec::with_capacity(9 * segments.len() + rows);
    data.extend(segments.iter().flat_map(four));
    for (i, segment) in segments.iter().enumerate() {
        data.resize(data.len() + segment.len, i as u32);
    }
    data.extend(segments.iter().flat_map(|s| four(s).into_iter().chain([0])));
    data
}

/// Loads a module and adds its kernels.
fn load(unit: &Unit, image: &[u8], functions: &mut HashMap<(&'static str, DType, &'static str), Function>) -> Result<()> {
    // SAFETY: the image is machine code that the compiler made, and longer than its header says nothing is read.
    let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
    let module = module.map_err(|e| failed(&format!("loading the kernels {}", unit.name()), e))?;
    for entry in unit.source.kernels {
        let name = CString::new(entry.name).expect("names of kernels have no zero byte");
        // SAFETY: the module was just loaded.
        let function = unsafe { result::module::get_function(module, name) };
        let function = function.map_err(|e| failed(&format!("finding `{}` among the kernels {}", entry.name, unit.name()), e))?;
        functions.insert((unit.source.name, unit.dtype, entry.name), Function(function));
    }
    Ok(())
}

/// A matrix as an operand of a product.
impl From<View<'_>> for Operand {
    fn from(view: View<'_>) -> Operand {
        let [rows, cols] = view.shape();
        Operand { pointer: view.address(), rows, cols, stride: view.stride(), dtype: view.dtype(), transposed: false }
    }
}

impl From<&ViewMut<'_>> for Operand {
    fn from(view: &ViewMut<'_>) -> Operand {
        Operand::from(view.as_view())
    }
}

impl Operand {
    /// The same matrix, read transposed.
    pub(crate) fn transposed(self) -> Operand {
        Operand { transposed: !self.transposed, ..self }
    }
}

/// Threads of a block of a kernel over elements.
pub(crate) const THREADS: usize = 256;

/// 8 when all matrices can be read and written 8 elements at a time (16-byte alignment), else 1.
pub(crate) fn width(views: &[View<'_>]) -> usize {
    let wide = |view: &View<'_>| {
        view.cols().is_multiple_of(8) && (view.stride().is_multiple_of(8) || view.rows() <= 1) && view.address().is_multiple_of(16)
    };
    if views.iter().all(wide) { 8 } else { 1 }
}

/// Blocks of [`THREADS`] threads with one thread for each of `work` pieces.
pub(crate) fn blocks(work: usize) -> [usize; 3] {
    [work.div_ceil(THREADS), 1, 1]
}
