//! Everything on a GPU against the CPU. Looks for a GPU at run time and says so when there is none, which is a failure if
//! `TTT_TEST_DEVICE=cuda` is set. Tests take turns: on the one device steps are recorded and peaks of memory measured.

#[path = "../ops/attention_cases.rs"]
mod attention_cases;
#[path = "../ops/case.rs"]
#[allow(dead_code)]
mod case;
#[path = "../ops/cases.rs"]
mod cases;
#[path = "../support/mod.rs"]
mod support;
#[path = "../ttt_case/mod.rs"]
mod ttt_case;

mod attention;
mod decode;
mod learners;
mod mixers;
mod models;
mod training;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ttt::device::Device;
use ttt::device::cuda::{Cuda, Options};

thread_local! {
    /// Held by the thread of a test from when it asks for a GPU until it ends.
    static TURN: MutexGuard<'static, ()> = {
        static GPU: Mutex<()> = Mutex::new(());
        GPU.lock().unwrap_or_else(PoisonError::into_inner)
    };
}

/// The GPU, opened once. New tensors are NaN, so that an element nobody writes is noticed.
fn gpu() -> Option<&'static Device> {
    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    TURN.with(|_| ());
    GPU.get_or_init(|| open(true)).as_ref()
}

/// A GPU whose new tensors are NaN, or as they come.
fn open(poison: bool) -> Option<Device> {
    match Cuda::open(Options { ordinal: 0, poison }) {
        Ok(cuda) => Some(Device::Cuda(Arc::new(cuda))),
        Err(e) => {
            assert!(std::env::var("TTT_TEST_DEVICE").as_deref() != Ok("cuda"), "TTT_TEST_DEVICE=cuda, but {e}");
            eprintln!("no GPU: nothing was tested ({e})");
            None
        }
    }
}
