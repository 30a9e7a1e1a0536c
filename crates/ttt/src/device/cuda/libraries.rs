//! Where the CUDA libraries are. The one place that looks for them: what it did not find is never touched, because the bindings
//! panic on a missing library.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;

/// One of the libraries that this program uses when a machine has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Short name, as in `libNAME.so`.
    pub name: &'static str,
    /// The file, or `None` when the system's loader knows it by name.
    pub path: Option<PathBuf>,
}

/// What was found, and where was looked.
#[derive(Clone, Debug, Default)]
pub struct Libraries {
    /// The driver.
    pub driver: Option<Found>,
    /// The run-time compiler.
    pub nvrtc: Option<Found>,
    /// Matrix products.
    pub cublaslt: Option<Found>,
    /// Folders that were looked into, in order, after the names that the system's loader knows.
    pub searched: Vec<PathBuf>,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}", path.display()),
            None => write!(f, "{} (known to the system's loader)", self.name),
        }
    }
}

/// Looks for the libraries once for the whole process and loads what it finds.
pub fn libraries() -> &'static Libraries {
    static FOUND: OnceLock<Libraries> = OnceLock::new();
    FOUND.get_or_init(|| {
        let searched = folders();
        // SAFETY: the probes only load the libraries, whose initialisers NVIDIA makes safe to run at any time.
        let known = |name, present: unsafe fn() -> bool| unsafe { present() }.then_some(Found { name, path: None });
        // A folder that the user names wins over what the loader knows.
        let named: Vec<PathBuf> = std::env::var_os("TTT_CUDA_LIBS").iter().flat_map(std::env::split_paths).collect();
        let find = |name, before: &[&str], present: unsafe fn() -> bool| {
            let loaded = |folders: &[PathBuf]| {
                let path = folders.iter().find_map(|folder| load(folder, name, before))?;
                // SAFETY: as above.
                unsafe { present() }.then_some(Found { name, path: Some(path) })
            };
            loaded(&named).or_else(|| known(name, present)).or_else(|| loaded(&searched))
        };
        Libraries {
            driver: known("cuda", cudarc::driver::sys::is_culib_present),
            nvrtc: find("nvrtc", &["nvrtc-builtins"], cudarc::nvrtc::sys::is_culib_present),
            cublaslt: find("cublasLt", &[], cudarc::cublaslt::sys::is_culib_present),
            searched: named.iter().chain(&searched).cloned().collect(),
        }
    })
}

/// Folders that hold CUDA libraries where CUDA is installed: toolkits, then the `nvidia-*` packages of a Python.
fn folders() -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut add = |pattern: &str| all.extend(glob::glob(pattern).into_iter().flatten().flatten().filter(|p| p.is_dir()));
    add("/usr/local/cuda*/lib64");
    add("/usr/lib/x86_64-linux-gnu");
    let mut pythons: Vec<PathBuf> = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter().collect();
    let on_path = |folder: PathBuf| {
        let python = folder.join("python3");
        python.exists().then(|| folder.parent().map(Path::to_owned)).flatten()
    };
    pythons.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths).filter_map(on_path));
    for python in pythons.iter().map(|p| p.display().to_string()).chain(["/opt/*/.venv".into(), "/opt/*".into()]) {
        add(&format!("{python}/lib/python3*/site-packages/nvidia/*/lib"));
        add(&format!("{python}/lib/python3*/dist-packages/nvidia/*/lib"));
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|folder| seen.insert(folder.clone()));
    all
}

/// Loads `lib<name>.so*` of a folder for good, after the libraries that it opens by name itself.
fn load(folder: &Path, name: &str, before: &[&str]) -> Option<PathBuf> {
    let path = newest(folder, name)?;
    for other in before {
        keep(&newest(folder, other)?)?;
    }
    keep(&path)?;
    Some(path)
}

/// The file of a library in a folder: the one with the largest version.
fn newest(folder: &Path, name: &str) -> Option<PathBuf> {
    let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let pattern = format!("{}/{prefix}{name}{suffix}*", glob::Pattern::escape(&folder.to_string_lossy()));
    let version = |path: &PathBuf| -> Vec<u32> {
        let file = path.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
        file.rsplit(suffix).next().unwrap_or_default().split('.').filter_map(|part| part.parse().ok()).collect()
    };
    glob::glob(&pattern).ok()?.flatten().max_by_key(version)
}

/// Loads a library and never unloads it; a later request for its name then finds it.
fn keep(path: &Path) -> Option<()> {
    // SAFETY: as for the probes above.
    let library = unsafe { Library::new(path) }.ok()?;
    std::mem::forget(library);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_version_of_a_library_is_taken() {
        let folder = std::env::temp_dir().join(format!("ttt-libraries-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for file in ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc.alt.so.13"] {
            std::fs::write(folder.join(file), "").unwrap();
        }
        let found = newest(&folder, "nvrtc").unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found.file_name().unwrap(), "libnvrtc.so.13");
    }
}
