//! The `ttt` program.

fn main() {}
