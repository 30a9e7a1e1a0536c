//! Data for those who have none: the Rust sources that building this program has downloaded.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    AtPath, Error, Result,
    data::{
        source::{SourceFile, Sources, name_in},
        store::StoreOptions,
    },
};

/// The packages that this program is built from.
const CARGO_LOCK: &str = include_str!("../../../../Cargo.lock");
/// Files above this are mostly tables.
const LARGEST_FILE: u64 = 200_000;
/// Enough for a small model, and ready in seconds.
const TOTAL: u64 = 32_000_000;

/// What [`default_corpus`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefaultCorpus {
    /// The folder with the packages' folders.
    pub folder: PathBuf,
    /// The `.rs` files. Names are `package/path`, without the version and so the same everywhere.
    pub sources: Sources,
    /// Bytes of the files.
    pub bytes: u64,
}

impl DefaultCorpus {
    /// The files that a run keeps for validation when about `fraction` of the documents are.
    pub fn held_out(&self, fraction: f64) -> Sources {
        let options = StoreOptions { validation_fraction: fraction, ..StoreOptions::new(Sources::default(), "") };
        let chosen =
            |file: &&SourceFile| options.modulus().is_some_and(|m| crc32fast::hash(file.name.as_bytes()).is_multiple_of(m));
        Sources { files: self.sources.files.iter().filter(chosen).cloned().collect(), skipped: Vec::new() }
    }
}

/// The `.rs` files of the packages in this program's `Cargo.lock`, as Cargo has unpacked them under `$CARGO_HOME` (or `~/.cargo`):
/// sorted by package and path, without files of more than 200 kB or not in UTF-8, the first 32 MB.
///
/// # Errors
/// No such folder, or none of the packages in it.
pub fn default_corpus() -> Result<DefaultCorpus> {
    let home = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    match home.or_else(|| Some(std::env::home_dir()?.join(".cargo"))) {
        Some(home) => default_corpus_in(&home),
        None => Err(nothing("$CARGO_HOME is not set and there is no home folder")),
    }
}

/// [`default_corpus`] of another Cargo home.
///
/// # Errors
/// As [`default_corpus`].
pub fn default_corpus_in(cargo_home: &Path) -> Result<DefaultCorpus> {
    let src = cargo_home.join("registry").join("src");
    if !src.is_dir() {
        return Err(nothing(&format!("{} does not exist", src.display())));
    }
    let registries = sorted(&src)?;
    let mut corpus = DefaultCorpus { folder: src.clone(), sources: Sources::default(), bytes: 0 };
    for (name, version) in packages(CARGO_LOCK) {
        let Some(folder) = registries.iter().map(|r| r.join(format!("{name}-{version}"))).find(|f| f.is_dir()) else {
            continue; // of another system, or never needed
        };
        if corpus.sources.files.is_empty() {
            corpus.folder = folder.parent().unwrap_or(&src).to_owned();
        }
        if !add(&folder, &folder, &name, &mut corpus)? {
            break;
        }
    }
    if corpus.sources.files.is_empty() {
        return Err(nothing(&format!("{} holds none of the packages that this program is built from", src.display())));
    }
    Ok(corpus)
}

fn nothing(why: &str) -> Error {
    Error::Data(format!("no data is named, and there are no Rust sources to read instead: {why}; pass `--data PATH`"))
}

/// Name and version of the packages that come from a registry, sorted.
fn packages(lock: &str) -> Vec<(String, String)> {
    let lock: toml::Table = toml::from_str(lock).expect("Cargo.lock is TOML");
    let packages = lock.get("package").and_then(toml::Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let field = |package: &toml::Value, name: &str| package.get(name).and_then(toml::Value::as_str).map(str::to_owned);
    let from_registry = |package: &&toml::Value| field(package, "source").is_some_and(|s| s.starts_with("registry+"));
    let mut all: Vec<_> =
        packages.iter().filter(from_registry).filter_map(|p| Some((field(p, "name")?, field(p, "version")?))).collect();
    all.sort();
    all
}

fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).at(folder)? {
        paths.push(entry.at(folder)?.path());
    }
    paths.sort();
    Ok(paths)
}

/// Adds the sources in `folder`; false when the corpus is full.
fn add(folder: &Path, package: &Path, name: &str, corpus: &mut DefaultCorpus) -> Result<bool> {
    for path in sorted(folder)? {
        let meta = fs::symlink_metadata(&path).at(&path)?;
        if meta.is_dir() {
            if !add(&path, package, name, corpus)? {
                return Ok(false);
            }
        } else if meta.is_file() && path.extension().is_some_and(|e| e == "rs") && meta.len() <= LARGEST_FILE {
            if corpus.bytes + meta.len() > TOTAL {
                return Ok(false);
            }
            if std::str::from_utf8(&fs::read(&path).at(&path)?).is_ok() {
                corpus.bytes += meta.len();
                corpus.sources.files.push(SourceFile { name: format!("{name}/{}", name_in(&path, package)), path });
            }
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_packages_are_known() {
        let all = packages(CARGO_LOCK);
        assert!(all.is_sorted());
        assert!(all.iter().any(|(name, _)| name == "tokenizers") && all.iter().all(|(name, _)| name != "ttt"));
    }

    #[test]
    fn sources_are_sorted_and_limited() {
        let home = tempfile::tempdir().unwrap();
        let (name, version) = packages(CARGO_LOCK).into_iter().find(|(name, _)| name == "glob").unwrap();
        let package = home.path().join(format!("registry/src/registry-1/{name}-{version}"));
        fs::create_dir_all(package.join("src/a")).unwrap();
        for (path, contents) in [
            ("src/lib.rs", b"fn a() {}".to_vec()),
            ("src/a/b.rs", b"fn b() {}".to_vec()),
            ("src/latin.rs", vec![0xE9]),
            ("src/large.rs", vec![b' '; 200_001]),
            ("README.md", b"no".to_vec()),
        ] {
            fs::write(package.join(path), contents).unwrap();
        }
        let corpus = default_corpus_in(home.path()).unwrap();
        let names: Vec<_> = corpus.sources.files.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["glob/src/a/b.rs", "glob/src/lib.rs"]);
        assert_eq!((corpus.bytes, corpus.folder.as_path()), (18, package.parent().unwrap()));
    }

    #[test]
    fn without_sources_the_error_says_what_to_do() {
        let home = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let error = default_corpus_in(home.path()).unwrap_err().to_string();
            assert!(error.contains("--data PATH"), "{error}");
            fs::create_dir_all(home.path().join("registry/src/x")).unwrap();
        }
    }
}
