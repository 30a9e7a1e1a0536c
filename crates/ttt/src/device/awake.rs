//! Keeps the threads of a pool awake while work is handed out to them in small pieces.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Threads that are kept awake beside the one that hands out work: more of them looking for work in one queue cost more than they
/// bring.
const MOST: usize = 15;

/// Looks for work in vain so often before the processor is offered to other programs.
const PATIENCE: usize = 64;

/// Work does not wait longer than this for threads to wake up.
const PUNCTUAL: Duration = Duration::from_micros(100);

/// A thread that found no work for so long goes to sleep after all: the pass does something that does not split, or other programs
/// need the processor.
const IDLE: Duration = Duration::from_micros(300);

thread_local! {
    /// Whether this thread is inside [`with_workers`].
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body`, which must already run in a pool, while the pool's other threads wait for its pieces without going to sleep.
///
/// A thread that sleeps is woken by the system, which takes tens of microseconds, more on virtual machines: as long as one piece of
/// a decoding step, and a step has dozens of them.
///
/// Who waits here must not have taken up a piece of `body` before, or that piece would wait for the end of a body that waits for
/// the piece. So the body begins when the others have come; those that come later are sent away.
pub(super) fn with_workers<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    let threads = rayon::current_num_threads();
    let Some(me) = rayon::current_thread_index().filter(|_| threads > 1) else { return body() };
    if INSIDE.replace(true) {
        return body();
    }
    let others = MOST.min(threads - 1);
    let watch = Arc::new(Watch { came: AtomicUsize::new(0) });
    let _end = End(watch.clone());
    // Not in a scope, which would wait for threads that the system has not woken yet: on a busy machine milliseconds.
    let theirs = watch.clone();
    rayon::spawn_broadcast(move |worker| {
        if (1..=others).contains(&((worker.index() + threads - me) % threads)) {
            theirs.stand();
        }
    });
    watch.begin(others);
    body()
}

/// How many threads have come, and whether it is too late to come ([`Watch::CLOSED`]) or all is over ([`Watch::OVER`]).
struct Watch {
    came: AtomicUsize,
}

impl Watch {
    const CLOSED: usize = 1 << 14;
    const OVER: usize = 1 << 15;

    /// Waits for the others, but not long.
    fn begin(&self, others: usize) {
        let start = Instant::now();
        while self.came.load(Ordering::Acquire) < others && start.elapsed() < PUNCTUAL {
            std::hint::spin_loop();
        }
        self.came.fetch_or(Watch::CLOSED, Ordering::AcqRel);
    }

    /// Works on what there is until all is over, or there is nothing for too long.
    fn stand(&self) {
        if self.came.fetch_add(1, Ordering::AcqRel) >= Watch::CLOSED {
            return;
        }
        let (mut idle, mut since) = (0, Instant::now());
        while self.came.load(Ordering::Acquire) < Watch::OVER {
            if rayon::yield_now() == Some(rayon::Yield::Executed) {
                (idle, since) = (0, Instant::now());
                continue;
            }
            idle += 1;
            if idle % PATIENCE > 0 {
                std::hint::spin_loop();
            } else if since.elapsed() < IDLE {
                std::thread::yield_now();
            } else {
                return;
            }
        }
    }
}

/// Ends the watch, also when the body panics.
struct End(Arc<Watch>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.came.fetch_or(Watch::OVER, Ordering::AcqRel);
        INSIDE.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn sum(from: u64, to: u64) -> u64 {
        match to - from {
            1 => from,
            n => {
                let (a, b) = rayon::join(|| sum(from, from + n / 2), || sum(from + n / 2, to));
                a + b
            }
        }
    }

    #[test]
    fn work_is_done_once_whatever_the_threads_and_however_often() {
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for _ in 0..200 {
                assert_eq!(pool.install(|| with_workers(|| with_workers(|| sum(0, 500)))), 499 * 250);
            }
        }
    }

    #[test]
    fn several_callers_share_a_pool() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..50).for_each(|_| assert_eq!(pool.install(|| with_workers(|| sum(0, 300))), 299 * 150)));
            }
        });
    }

    #[test]
    fn a_panic_ends_the_waiting() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let panics = || pool.install(|| with_workers(|| -> u64 { panic!("a piece that fails") }));
        assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
        assert_eq!(pool.install(|| with_workers(|| sum(0, 100))), 99 * 50, "and the pool goes on");
    }
}
