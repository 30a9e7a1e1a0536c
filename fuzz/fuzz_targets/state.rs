//! State files of any bytes are restored or refused, and nothing else happens.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use state_harness::Harness;
use ttt::config::Inner;

#[path = "../../crates/ttt/tests/support/state_harness.rs"]
mod state_harness;

thread_local! {
    static HARNESS: RefCell<Harness> = RefCell::new(Harness::new(Inner::Linear));
}

fuzz_target!(|bytes: &[u8]| {
    HARNESS.with_borrow_mut(|harness| harness.read(bytes));
});
