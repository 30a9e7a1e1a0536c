//! CUDA C++ to machine code with NVRTC, for one exact architecture.

use std::ffi::{CString, c_char};

use cudarc::nvrtc::{result, sys};

use crate::device::cuda::libraries::libraries;
use crate::{Error, Result};

/// Machine code, and what the assembler said about it.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// A CUBIN image.
    pub cubin: Vec<u8>,
    /// The log, with the assembler's report of each kernel's resources.
    pub log: String,
}

/// What one kernel takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Its name.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of a thread's stack.
    pub stack: u32,
    /// Bytes stored and loaded because registers ran out.
    pub spills: u32,
    /// Bytes of statically declared shared memory.
    pub shared: u32,
}

/// Version of the compiler that was found, as `13.0`.
pub fn version() -> Option<String> {
    libraries().nvrtc.as_ref()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there (checked), and both pointers are to integers of this frame.
    let status = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    status.result().ok()?;
    Some(format!("{major}.{minor}"))
}

/// Compiles `text`; `headers` are what `#include "name"` finds.
///
/// # Errors
/// No compiler, or the compiler's messages.
pub fn compile(name: &str, text: &str, headers: &[(&str, String)], options: &[String]) -> Result<Compiled> {
    let failed = |what: String| Error::Device(format!("the kernels of {name} did not compile: {what}"));
    if libraries().nvrtc.is_none() {
        return Err(failed("there is no NVRTC library (see `ttt doctor` for where it was looked for)".into()));
    }
    let c = |text: &str| CString::new(text).map_err(|_| failed("a source holds a zero byte".into()));
    let (source, file) = (c(text)?, c(&format!("{name}.cu"))?);
    let names = headers.iter().map(|(name, _)| c(name)).collect::<Result<Vec<_>>>()?;
    let texts = headers.iter().map(|(_, text)| c(text)).collect::<Result<Vec<_>>>()?;
    let pointers = |all: &[CString]| all.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
    let mut program = std::ptr::null_mut();
    // SAFETY: the strings live until the program is destroyed; the counts are theirs.
    let status = unsafe {
        sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            file.as_ptr(),
            headers.len() as i32,
            pointers(&texts).as_ptr(),
            pointers(&names).as_ptr(),
        )
    };
    status.result().map_err(|e| failed(e.to_string()))?;
    let mut options = options.to_vec();
    // What its own cache answers comes without the assembler's report.
    if version().is_some_and(|version| version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0) >= 13) {
        options.push("--no-cache".into());
    }
    // SAFETY: the program was made above and is not destroyed yet.
    let (status, log) = unsafe { (result::compile_program(program, &options), result::get_program_log(program)) };
    let log = String::from_utf8_lossy(&log.unwrap_or_default().iter().map(|c| *c as u8).collect::<Vec<u8>>())
        .trim_end_matches('\0')
        .to_owned();
    let cubin = status.and_then(|()| {
        let mut size = 0;
        // SAFETY: as above; the buffer has the size that the library asked for.
        unsafe {
            sys::nvrtcGetCUBINSize(program, &mut size).result()?;
            let mut cubin = vec![0u8; size];
            sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()).result()?;
            Ok(cubin)
        }
    });
    // SAFETY: as above; it is not used again.
    let _ = unsafe { result::destroy_program(program) };
    match cubin {
        Ok(cubin) => Ok(Compiled { cubin, log }),
        Err(e) => Err(failed(format!("{e}\n{log}"))),
    }
}

/// Reads the assembler's report.
pub fn resources(log: &str) -> Vec<Resources> {
    let mut all: Vec<Resources> = Vec::new();
    for line in log.lines() {
        let number_before = |what: &str| -> Option<u32> { line.split(what).next()?.split_whitespace().last()?.parse().ok() };
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            all.push(Resources { kernel, registers: 0, stack: 0, spills: 0, shared: 0 });
        }
        let Some(last) = all.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            last.stack = number_before(" bytes stack frame").unwrap_or(0);
            let spills = [" bytes spill stores", " bytes spill loads"].map(|what| number_before(what).unwrap_or(0));
            last.spills = spills.iter().sum();
        }
        if line.contains("Used ") && line.contains(" registers") {
            last.registers = number_before(" registers").unwrap_or(0);
            last.shared = if line.contains(" bytes smem") { number_before(" bytes smem").unwrap_or(0) } else { 0 };
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assemblers_report_is_read() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'k' for 'sm_90a'\n\
            ptxas info    : Function properties for k\n\
            ptxas         .     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
            ptxas info    : Used 10 registers, used 1 barriers, 128 bytes smem\n\
            ptxas info    : Compiling entry function 'l' for 'sm_90a'\n\
            ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 8 registers, used 0 barriers\n";
        let k = Resources { kernel: "k".into(), registers: 10, stack: 16, spills: 12, shared: 128 };
        let l = Resources { kernel: "l".into(), registers: 8, stack: 0, spills: 0, shared: 0 };
        assert_eq!(resources(log), [k, l]);
    }
}
