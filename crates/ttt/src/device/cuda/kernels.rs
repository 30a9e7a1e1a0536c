//! The kernels: which there are, and how their machine code is found.
//!
//! Sources are part of the program. For each the loader takes, in this order: the disk cache
//! (`TTT_KERNEL_CACHE`, otherwise `ttt/kernels` in the user's cache folder), the folder named by `TTT_KERNEL_CUBINS` (written by
//! `ttt kernels build`), and NVRTC. `TTT_KERNEL_DIR` names a copy of this library's `src` whose kernels and headers replace those in
//! the program, so that a kernel can be changed without building the program again.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::device::cuda::compile::{self, Compiled};
use crate::hub::write_atomic;
use crate::tensor::DType;
use crate::{AtPath, Error, Result};

/// A file of kernels.
#[derive(Debug)]
pub struct Source {
    /// Its name.
    pub name: &'static str,
    /// The file, in this library's `src`.
    pub file: &'static str,
    /// CUDA C++ that includes no header but those of [`HEADERS`].
    pub text: &'static str,
    /// Macros that are defined, such as `HEAD_DIM=64`.
    pub defines: &'static [&'static str],
    /// Macros that are defined for architectures other than Hopper's, for which a kernel's registers were not tuned; any number
    /// of registers is allowed there.
    pub untuned: &'static [&'static str],
    /// Types of activations that it is compiled for, as `T`; `[F32]` for a source that does not mention `T`.
    pub types: &'static [DType],
    /// Its kernels.
    pub kernels: &'static [Entry],
}

/// A kernel of a [`Source`].
#[derive(Debug)]
pub struct Entry {
    /// Name of the function.
    pub name: &'static str,
    /// The most registers that a thread may take, on any architecture.
    pub registers: u32,
}

/// What sources may include: name, file in this library's `src`, text. None includes one behind it.
pub const HEADERS: &[(&str, &str, &str)] = &[
    ("rows.cuh", "device/cuda/rows.cuh", include_str!("rows.cuh")),
    ("prelude.cuh", "device/cuda/prelude.cuh", include_str!("prelude.cuh")),
    ("element.cuh", "ops/element.cuh", include_str!("../../ops/element.cuh")),
    ("chunks.cuh", "ops/linear_attention/chunks.cuh", include_str!("../../ops/linear_attention/chunks.cuh")),
    ("scan.cuh", "ops/selective_scan/scan.cuh", include_str!("../../ops/selective_scan/scan.cuh")),
    ("attention_params.cuh", "ops/attention/attention_params.cuh", include_str!("../../ops/attention/attention_params.cuh")),
    ("attention.cuh", "ops/attention/attention.cuh", include_str!("../../ops/attention/attention.cuh")),
    ("step.cuh", "ops/step/step.cuh", include_str!("../../ops/step/step.cuh")),
    ("loops.cuh", "ops/ttt_linear/loops.cuh", include_str!("../../ops/ttt_linear/loops.cuh")),
    ("params.cuh", "ops/ttt_linear/params.cuh", include_str!("../../ops/ttt_linear/params.cuh")),
    ("tiles.cuh", "ops/ttt_linear/tiles.cuh", include_str!("../../ops/ttt_linear/tiles.cuh")),
    ("chain.cuh", "ops/ttt_linear/chain.cuh", include_str!("../../ops/ttt_linear/chain.cuh")),
    ("mlp_params.cuh", "ops/ttt_mlp/mlp_params.cuh", include_str!("../../ops/ttt_mlp/mlp_params.cuh")),
    ("mlp_tiles.cuh", "ops/ttt_mlp/mlp_tiles.cuh", include_str!("../../ops/ttt_mlp/mlp_tiles.cuh")),
];

/// A source for one type of activations and one architecture, `sm_90a` say.
#[derive(Clone, Debug)]
pub struct Unit {
    /// The source.
    pub source: &'static Source,
    /// Type of activations.
    pub dtype: DType,
    /// The architecture.
    pub arch: String,
}

/// Hopper, with the instructions that are its own.
pub const HOPPER: &str = "sm_90a";

/// The architecture's name of a GPU of this compute capability. On Hopper the one with its own instructions.
pub fn architecture((major, minor): (i32, i32)) -> String {
    let suffix = if (major, minor) == (9, 0) { "a" } else { "" };
    format!("sm_{major}{minor}{suffix}")
}

/// Every unit that a GPU of an architecture needs.
pub fn units(arch: &str) -> Vec<Unit> {
    let of = |source: &&'static Source| {
        let source = *source;
        source.types.iter().map(move |dtype| Unit { source, dtype: *dtype, arch: arch.to_owned() })
    };
    let own = if arch == HOPPER { crate::ops::HOPPER_KERNELS } else { &[] };
    crate::ops::KERNELS.iter().chain(own).flat_map(of).collect()
}

impl Unit {
    /// Its name in caches and messages.
    pub fn name(&self) -> String {
        format!("{}-{}-{}", self.source.name, format!("{:?}", self.dtype).to_lowercase(), self.arch)
    }

    /// Whether its kernels were tuned for the architecture.
    fn tuned(&self) -> bool {
        self.arch == HOPPER || self.source.untuned.is_empty()
    }

    /// The most registers that a kernel of it may take.
    pub fn register_limit(&self, entry: &Entry) -> u32 {
        if self.tuned() { entry.registers } else { 255 }
    }

    fn options(&self) -> Vec<String> {
        let mut options = vec![format!("--gpu-architecture={}", self.arch), "--std=c++17".into(), "-Xptxas=-v".into()];
        if self.dtype == DType::Bf16 {
            options.push("-DTTT_BF16".into());
        }
        let untuned = if self.tuned() { &[][..] } else { self.source.untuned };
        options.extend(self.source.defines.iter().chain(untuned).map(|define| format!("-D{define}")));
        options
    }

    /// The text to compile and the headers, from `TTT_KERNEL_DIR` where it has them.
    fn texts(&self) -> Result<(String, Vec<(&'static str, String)>)> {
        let folder = std::env::var_os("TTT_KERNEL_DIR").map(PathBuf::from);
        let text = |file: &str, embedded: &str| -> Result<String> {
            match folder.as_ref().map(|folder| folder.join(file)).filter(|path| path.exists()) {
                Some(path) => std::fs::read_to_string(&path).at(&path),
                None => Ok(embedded.to_owned()),
            }
        };
        let main = text(self.source.file, self.source.text)?;
        // The headers that it includes, and those that they include.
        let mut headers: Vec<(&'static str, String)> = Vec::new();
        for (name, file, embedded) in HEADERS.iter().rev() {
            let include = format!("#include \"{name}\"");
            if main.contains(&include) || headers.iter().any(|(_, text)| text.contains(&include)) {
                headers.push((name, text(file, embedded)?));
            }
        }
        Ok((main, headers))
    }

    /// Hash of everything that decides the machine code but the compiler.
    fn hash(&self) -> Result<String> {
        let (text, headers) = self.texts()?;
        let mut hash = Sha256::new();
        let parts = self.options().into_iter().chain([text]).chain(headers.into_iter().flat_map(|(n, t)| [n.to_owned(), t]));
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        Ok(hash.finalize()[..12].iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Compiles it.
    ///
    /// # Errors
    /// No compiler, or its messages.
    pub fn compile(&self) -> Result<Compiled> {
        let (text, headers) = self.texts()?;
        compile::compile(&self.name(), &text, &headers, &self.options())
    }

    /// Machine code from the cache, from a folder of built kernels, or from the compiler.
    ///
    /// # Errors
    /// When none of them has it.
    fn find(&self) -> Result<Vec<u8>> {
        let (hash, version) = (self.hash()?, compile::version());
        let file = format!("{}-{hash}-{}.cubin", self.name(), version.as_deref().unwrap_or("*"));
        let cached = cache().and_then(|cache| last(&cache, &file));
        let built = || last(Path::new(&std::env::var_os("TTT_KERNEL_CUBINS")?), &format!("{}-{hash}-*.cubin", self.name()));
        if let Some(path) = cached.or_else(built) {
            return std::fs::read(&path).at(&path);
        }
        if version.is_none() {
            return Err(Error::Device(format!(
                "there is no machine code for the kernels {}: NVRTC was not found, nor a file in the cache or in TTT_KERNEL_CUBINS; \
                 install NVRTC (`pip install nvidia-cuda-nvrtc`), or run `ttt kernels build DIR` with this program where NVRTC is \
                 and set TTT_KERNEL_CUBINS=DIR",
                self.name()
            )));
        }
        let cubin = self.compile()?.cubin;
        if let Some(cache) = cache() {
            // A cache that cannot be written costs time, not the run.
            let _ =
                std::fs::create_dir_all(&cache).at(&cache).and_then(|()| write_atomic(cache.join(&file), |w| w.write_all(&cubin)));
        }
        Ok(cubin)
    }
}

/// Machine code of all units, compiled side by side where it must be.
///
/// # Errors
/// When one is nowhere to be had.
pub(crate) fn find_all(units: &[Unit]) -> Result<Vec<Vec<u8>>> {
    units.par_iter().map(Unit::find).collect()
}

/// Compiles all kernels for some architectures into `folder`, with a manifest; returns the number of files.
///
/// # Errors
/// No compiler, its messages, or a folder that cannot be written.
pub fn build(folder: &Path, architectures: &[String]) -> Result<usize> {
    let version = compile::version().ok_or_else(|| Error::Device("NVRTC was not found (see `ttt doctor`)".into()))?;
    std::fs::create_dir_all(folder).at(folder)?;
    let units: Vec<Unit> = architectures.iter().flat_map(|arch| units(arch)).collect();
    let write = |unit: &Unit| -> Result<serde_json::Value> {
        let file = format!("{}-{}-{version}.cubin", unit.name(), unit.hash()?);
        let compiled = unit.compile()?;
        write_atomic(folder.join(&file), |w| w.write_all(&compiled.cubin))?;
        let kernels: Vec<serde_json::Value> = compile::resources(&compiled.log)
            .iter()
            .map(|r| serde_json::json!({"name": r.kernel, "registers": r.registers, "shared_bytes": r.shared, "spill_bytes": r.spills}))
            .collect();
        Ok(serde_json::json!({"file": file, "architecture": unit.arch, "kernels": kernels}))
    };
    let files = units.par_iter().map(write).collect::<Result<Vec<_>>>()?;
    let manifest = serde_json::json!({"version": env!("CARGO_PKG_VERSION"), "compiler": version, "files": files});
    write_atomic(folder.join("manifest.json"), |w| serde_json::to_writer_pretty(w, &manifest).map_err(std::io::Error::other))?;
    Ok(files.len())
}

/// The disk cache's folder.
pub fn cache() -> Option<PathBuf> {
    let named = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = || named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache"))).map(|cache| cache.join("ttt/kernels"));
    named("TTT_KERNEL_CACHE").or_else(user)
}

/// The last file of a folder, by name, that a pattern describes.
fn last(folder: &Path, pattern: &str) -> Option<PathBuf> {
    let folder = glob::Pattern::escape(&folder.to_string_lossy());
    glob::glob(&format!("{folder}/{pattern}")).ok()?.flatten().last()
}
