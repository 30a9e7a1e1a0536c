//! Pooled, aligned memory.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use crate::device::cuda::context::Context;
use crate::tensor::Element;
use crate::{Error, Result};

/// Alignment of every buffer in bytes: four cache lines, what vector loads and later GPU copies like.
pub const ALIGNMENT: usize = 256;

/// Keeps memory that was returned to it and hands it out again for requests of the same size class.
///
/// Size classes are an eighth of a power of two apart, so at most an eighth of a buffer is unused.
#[derive(Default)]
pub struct Pool {
    source: Source,
    state: Mutex<PoolState>,
}

/// Where a pool's memory comes from.
#[derive(Default)]
enum Source {
    /// Main memory.
    #[default]
    Host,
    /// A GPU. Its one stream orders all work, so memory may be handed out again while a kernel still uses it.
    Gpu(Arc<Context>),
}

/// Memory that nobody uses, by size class.
type Free = BTreeMap<usize, Vec<NonNull<u8>>>;

#[derive(Default)]
struct PoolState {
    free: Free,
    /// While a thread sets memory aside: the thread, and what it has returned since.
    aside: Option<(ThreadId, Free)>,
    in_use: usize,
    peak: usize,
    system_allocations: usize,
}

// SAFETY: the pointers in the free lists own their memory and nobody else holds them.
unsafe impl Send for PoolState {}

/// What a [`Pool`] holds, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Held by live tensors now.
    pub in_use: usize,
    /// The most that was held at once since the pool was made or [`Pool::reset_peak`] was called.
    pub peak: usize,
    /// How often the system was asked for memory.
    pub system_allocations: usize,
}

/// Bytes of the size class that `bytes` falls into.
pub fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(ALIGNMENT);
    let step = (bytes.next_power_of_two() / 16).max(ALIGNMENT);
    bytes.div_ceil(step) * step
}

impl Pool {
    /// A pool of a GPU's memory.
    pub(crate) fn of_gpu(context: &Arc<Context>) -> Pool {
        Pool { source: Source::Gpu(context.clone()), state: Mutex::default() }
    }

    /// Memory of at least `bytes` bytes, initialised but with arbitrary contents.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let capacity = size_class(bytes);
        let mut state = self.state.lock().expect("memory pool");
        let aside = state.aside.as_mut().filter(|(thread, _)| *thread == std::thread::current().id());
        let own = aside.and_then(|(_, free)| free.get_mut(&capacity)?.pop());
        let reused = own.or_else(|| state.free.get_mut(&capacity)?.pop());
        let ptr = match reused {
            Some(ptr) => ptr,
            None => {
                state.system_allocations += 1;
                let ptr = self.source.allocate(capacity).or_else(|| {
                    // What lies unused in other size classes may be enough.
                    self.source.give_back(&mut state);
                    self.source.allocate(capacity)
                });
                ptr.ok_or_else(|| self.source.out_of_memory(bytes, state.in_use))?
            }
        };
        state.in_use += capacity;
        state.peak = state.peak.max(state.in_use);
        Ok(Buffer { ptr, capacity, pool: self.clone() })
    }

    /// Runs `work` and keeps the memory that this thread returns meanwhile for its repetition: nobody else gets it before the
    /// second result is dropped. Within `work` it is handed out again as always.
    ///
    /// # Panics
    /// When another thread is doing the same.
    pub(crate) fn set_aside<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> (T, Aside) {
        let begin = |aside| std::mem::replace(&mut self.state.lock().expect("memory pool").aside, aside);
        assert!(begin(Some((std::thread::current().id(), Free::new()))).is_none(), "two threads set memory aside");
        let done = work();
        let (_, free) = begin(None).expect("memory was set aside above");
        (done, Aside { free, pool: self.clone() })
    }

    /// What is held now and what was held at most.
    pub fn usage(&self) -> Usage {
        let state = self.state.lock().expect("memory pool");
        Usage { in_use: state.in_use, peak: state.peak, system_allocations: state.system_allocations }
    }

    /// Bytes that tensors can have in all, those that they hold included: what is free now, where the system tells.
    pub fn room(&self) -> Option<usize> {
        let Source::Gpu(context) = &self.source else { return None };
        let state = self.state.lock().expect("memory pool");
        let unused: usize = state.free.iter().map(|(capacity, buffers)| capacity * buffers.len()).sum();
        Some(state.in_use + unused + context.memory().0)
    }

    /// Starts a new measurement of the peak.
    pub fn reset_peak(&self) {
        let mut state = self.state.lock().expect("memory pool");
        state.peak = state.in_use;
    }

    /// Gives unused memory back to the system.
    pub fn trim(&self) {
        self.source.give_back(&mut self.state.lock().expect("memory pool"));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.trim();
    }
}

impl Source {
    fn allocate(&self, capacity: usize) -> Option<NonNull<u8>> {
        let ptr = match self {
            Source::Host => {
                let layout = Layout::from_size_align(capacity, ALIGNMENT).ok()?;
                // SAFETY: the layout's size is at least ALIGNMENT, so not zero. Zeroing makes every later read of stale contents defined.
                unsafe { std::alloc::alloc_zeroed(layout) }
            }
            Source::Gpu(context) => context.allocate(capacity)? as *mut u8,
        };
        NonNull::new(ptr)
    }

    /// Gives the memory in the free lists back to the system.
    fn give_back(&self, state: &mut PoolState) {
        for (capacity, buffers) in std::mem::take(&mut state.free) {
            for ptr in buffers {
                match self {
                    // SAFETY: `ptr` came from `alloc_zeroed` with this layout (`allocate`) and was in the free list, so nobody has it.
                    Source::Host => unsafe {
                        std::alloc::dealloc(ptr.as_ptr(), Layout::from_size_align_unchecked(capacity, ALIGNMENT))
                    },
                    Source::Gpu(context) => context.free(ptr.as_ptr() as u64),
                }
            }
        }
    }

    fn out_of_memory(&self, wanted: usize, in_use: usize) -> Error {
        match self {
            Source::Host => Error::OutOfMemory { wanted, in_use },
            Source::Gpu(context) => {
                let (free, total) = context.memory();
                Error::out_of_gpu_memory(wanted, in_use, free, total)
            }
        }
    }
}

/// A piece of pooled memory; dropping it returns it to its pool.
pub(crate) struct Buffer {
    ptr: NonNull<u8>,
    capacity: usize,
    pool: Arc<Pool>,
}

// SAFETY: a buffer owns its memory; shared access is read-only (`Tensor` hands out `&mut` only while it has the only handle).
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Address of a buffer in a GPU's memory.
    ///
    /// # Panics
    /// When it lies in main memory.
    pub(crate) fn address(&self) -> u64 {
        assert!(matches!(self.pool.source, Source::Gpu(_)), "memory of the CPU where a GPU's was expected");
        self.ptr.as_ptr() as u64
    }

    #[track_caller]
    fn expect_host(&self) {
        assert!(matches!(self.pool.source, Source::Host), "memory of a GPU where the CPU's was expected");
    }

    /// The first `len` elements.
    ///
    /// # Panics
    /// When the buffer is too small for them, or in a GPU's memory.
    pub(crate) fn slice<E: Element>(&self, len: usize) -> &[E] {
        self.expect_host();
        assert!(len * size_of::<E>() <= self.capacity, "{len} elements in a buffer of {} bytes", self.capacity);
        // SAFETY: the memory is initialised (zeroed when it came from the system), large enough, aligned to ALIGNMENT, and any
        // bit pattern is an `E` (`Pod`).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), len) }
    }

    /// The first `len` elements, to write.
    ///
    /// # Panics
    /// When the buffer is too small for them, or in a GPU's memory.
    pub(crate) fn slice_mut<E: Element>(&mut self, len: usize) -> &mut [E] {
        self.expect_host();
        assert!(len * size_of::<E>() <= self.capacity, "{len} elements in a buffer of {} bytes", self.capacity);
        // SAFETY: as in `slice`, and the buffer is mutably borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast(), len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock().expect("memory pool");
        state.in_use -= self.capacity;
        let free = match &mut state.aside {
            Some((thread, free)) if *thread == std::thread::current().id() => free,
            _ => &mut state.free,
        };
        free.entry(self.capacity).or_default().push(self.ptr);
    }
}

/// Memory that a piece of work used and returned, kept for its repetition. Dropping it returns it to its pool.
pub(crate) struct Aside {
    free: Free,
    pool: Arc<Pool>,
}

// SAFETY: the pointers own their memory and nobody else holds them.
unsafe impl Send for Aside {}

impl Drop for Aside {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock().expect("memory pool");
        for (capacity, buffers) in std::mem::take(&mut self.free) {
            state.free.entry(capacity).or_default().extend(buffers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returned_memory_is_used_again() {
        let pool = Arc::new(Pool::default());
        let first = pool.take(1000).unwrap();
        let address = first.ptr;
        drop(first);
        let second = pool.take(1020).unwrap();
        assert_eq!(second.ptr, address);
        assert_eq!(pool.usage(), Usage { in_use: 1024, peak: 1024, system_allocations: 1 });
    }

    #[test]
    fn memory_set_aside_is_not_handed_out() {
        let pool = Arc::new(Pool::default());
        let (addresses, aside) = pool.set_aside(|| {
            let first = pool.take(1000).unwrap().ptr;
            (first, pool.take(1000).unwrap().ptr)
        });
        assert_eq!(addresses.0, addresses.1, "within the work it is used again");
        let other = pool.take(1000).unwrap();
        assert_ne!(other.ptr, addresses.0);
        drop(aside);
        assert_eq!(pool.take(1000).unwrap().ptr, addresses.0);
    }

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for bytes in [1, 255, 256, 257, 4097, 1_000_000, 123_456_789] {
            let class = size_class(bytes);
            assert!(class >= bytes && class.is_multiple_of(ALIGNMENT));
            assert!(class - bytes <= bytes / 8 + ALIGNMENT, "{bytes} -> {class}");
        }
    }
}
