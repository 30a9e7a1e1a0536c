//! TTT-Linear and TTT-MLP allocate nothing per mini-batch: a long sequence asks for memory as often as a short one.

mod ttt_case;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use ttt::config::Inner;
use ttt::device::{Device, Kernels};
use ttt::tensor::DType;
use ttt_case::Case;

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, with a count.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn allocations_do_not_grow_with_the_sequence() {
    for inner in [Inner::Linear, Inner::Mlp] {
        for (kernels, d, dtype) in [(Kernels::Fast, 64, DType::F32), (Kernels::Reference, 4, DType::F64)] {
            let device = Device::cpu_with(1, kernels).unwrap();
            let counts = [64, 1024].map(|t| {
                let case = Case::new(inner, 1, d, 16, &[t]);
                // All on the one worker thread, so that handing work over does not count; later runs find the pool's lists grown.
                device.install(|| {
                    let runs = [(); 4].map(|()| case.counted(&device, dtype, &ALLOCATIONS));
                    runs.into_iter().reduce(|a, b| [a[0].min(b[0]), a[1].min(b[1])]).unwrap()
                })
            });
            assert_eq!(counts[0], counts[1], "{inner:?} {kernels:?}: (forward, backward) allocations of 64 and 1024 tokens");
            assert!(counts[0].iter().all(|n| (1..200).contains(n)), "{counts:?}");
        }
    }
}
