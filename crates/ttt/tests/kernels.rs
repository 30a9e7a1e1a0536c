//! Every kernel compiles for every architecture within its limits. Needs NVRTC and no GPU; says so when there is none, and fails
//! then if `TTT_TEST_NVRTC` is set.

use rayon::prelude::*;
use ttt::device::cuda::compile::{resources, version};
use ttt::device::cuda::kernels::units;

/// An architecture, and the bytes of shared memory that a block may have there.
const ARCHITECTURES: [(&str, u32); 3] = [("sm_80", 163 << 10), ("sm_89", 99 << 10), ("sm_90a", 227 << 10)];

#[test]
fn every_kernel_compiles_within_its_limits() {
    let Some(version) = version() else {
        assert!(std::env::var_os("TTT_TEST_NVRTC").is_none(), "NVRTC was not found, though TTT_TEST_NVRTC is set");
        eprintln!("NVRTC was not found: no kernel was compiled");
        return;
    };
    eprintln!("NVRTC {version}");
    let all: Vec<_> = ARCHITECTURES.iter().flat_map(|(arch, shared)| units(arch).into_iter().map(move |u| (u, *shared))).collect();
    let wrong: Vec<String> = all
        .par_iter()
        .flat_map_iter(|(unit, shared)| {
            let compiled = match unit.compile() {
                Ok(compiled) => compiled,
                Err(e) => return vec![e.to_string()],
            };
            let found = resources(&compiled.log);
            let mut wrong = Vec::new();
            for entry in unit.source.kernels {
                let Some(r) = found.iter().find(|r| r.kernel == entry.name) else {
                    wrong.push(format!("{}: there is no kernel {}", unit.name(), entry.name));
                    continue;
                };
                eprintln!("{} {}: {} registers, {} bytes shared", unit.name(), r.kernel, r.registers, r.shared);
                let limit = unit.register_limit(entry);
                if r.registers > limit || r.spills > 0 || r.stack > 0 || r.shared > *shared {
                    wrong.push(format!("{}: {r:?}, {limit} registers allowed", unit.name()));
                }
            }
            for r in found.iter().filter(|r| unit.source.kernels.iter().all(|entry| entry.name != r.kernel)) {
                wrong.push(format!("{}: {} is not declared", unit.name(), r.kernel));
            }
            wrong
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
