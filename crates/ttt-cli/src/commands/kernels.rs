//! `ttt kernels`: machine code of the GPU kernels for machines without NVRTC.

use std::io::Write;

use anyhow::Result;
use ttt::device::cuda::kernels;

use crate::args::Kernels;

/// Runs the command.
pub fn run(command: &Kernels, out: &mut dyn Write) -> Result<()> {
    let Kernels::Build(args) = command;
    let files = kernels::build(&args.folder, &args.arch)?;
    writeln!(out, "{files} files for {} in {}", args.arch.join(", "), args.folder.display())?;
    writeln!(out, "use them with TTT_KERNEL_CUBINS={}", args.folder.display())?;
    Ok(())
}
