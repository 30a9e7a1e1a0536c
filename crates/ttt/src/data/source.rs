//! Which files hold the data: files, folders and globs.

use std::{
    collections::HashSet,
    io::Read,
    path::{Path, PathBuf},
};

use crate::{AtPath, Error, Result, data::read};

/// A file of text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceFile {
    /// Name that does not depend on the machine: the path relative to the folder, or to the fixed part of the glob, that was
    /// named; `/` between its parts. Its hash decides about validation.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

/// The files that hold the data, in the order in which they are read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// Files of text.
    pub files: Vec<SourceFile>,
    /// Files of the named folders and globs that are no text and are left out.
    pub skipped: Vec<PathBuf>,
}

/// So much of a file is looked at to see whether it is text.
const SNIFF: u64 = 8192;

impl Sources {
    /// Finds the files behind `inputs`, in their order.
    ///
    /// An input is an existing file; or an existing folder, of which all files are taken, sorted by name, those in its folders
    /// too; or a glob (`*`, `?`, `[...]`, `**`), of which files and folders are taken. Within folders and globs, hidden names and
    /// links to folders are left out, and so are files with a zero byte in their first 8192 (after unpacking): they are no
    /// text. A file that is named twice is read once.
    ///
    /// # Errors
    /// An input that matches nothing, a folder without text.
    pub fn resolve(inputs: &[String]) -> Result<Sources> {
        if inputs.is_empty() {
            return Err(Error::Data("none is named; name a file, a folder or a glob".into()));
        }
        let mut sources = Sources::default();
        for input in inputs {
            let before = sources.files.len();
            let path = Path::new(input);
            if path.is_file() {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                sources.files.push(SourceFile { name, path: path.to_owned() });
            } else if path.is_dir() {
                sources.add_folder(path, path)?;
                if sources.files.len() == before {
                    return Err(Error::Data(format!("the folder {input} holds no text files")));
                }
            } else if input.contains(['*', '?', '[']) {
                sources.add_glob(input)?;
                if sources.files.len() == before {
                    return Err(Error::Data(format!("the pattern {input} matches no text files")));
                }
            } else {
                return Err(Error::Data(format!("{input} does not exist; name a file, a folder or a glob")));
            }
        }
        let mut seen = HashSet::new();
        sources.files.retain(|file| seen.insert(std::fs::canonicalize(&file.path).unwrap_or_else(|_| file.path.clone())));
        Ok(sources)
    }

    fn add_folder(&mut self, folder: &Path, root: &Path) -> Result<()> {
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(folder).at(folder)? {
            entries.push(entry.at(folder)?);
        }
        entries.sort_by_key(|e| e.file_name());
        for entry in entries {
            let path = entry.path();
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            if entry.file_type().at(&path)?.is_dir() {
                self.add_folder(&path, root)?;
            } else if path.is_file() {
                self.add_file(path, root)?;
            }
        }
        Ok(())
    }

    fn add_glob(&mut self, pattern: &str) -> Result<()> {
        let options =
            glob::MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };
        let paths =
            glob::glob_with(pattern, options).map_err(|e| Error::Data(format!("the pattern {pattern} is not a glob: {e}")))?;
        let root: PathBuf =
            Path::new(pattern).components().take_while(|c| !c.as_os_str().to_string_lossy().contains(['*', '?', '['])).collect();
        for path in paths {
            let path = path.map_err(|e| Error::io(e.path(), std::io::Error::from(e.error().kind())))?;
            if path.is_file() {
                self.add_file(path, &root)?;
            } else if path.is_dir() && !path.is_symlink() {
                self.add_folder(&path, &root)?;
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: PathBuf, root: &Path) -> Result<()> {
        if looks_like_text(&path)? {
            self.files.push(SourceFile { name: name_in(&path, root), path });
        } else {
            self.skipped.push(path);
        }
        Ok(())
    }
}

/// `path` relative to `root`, with `/` between its parts.
pub(super) fn name_in(path: &Path, root: &Path) -> String {
    let relative = path.strip_prefix(root).unwrap_or(path);
    let parts: Vec<_> = relative.components().map(|c| c.as_os_str().to_string_lossy()).collect();
    parts.join("/")
}

fn looks_like_text(path: &Path) -> Result<bool> {
    let mut start = Vec::new();
    // What cannot be unpacked is no text; a named file gives the error instead.
    let unpacked = read::open(path)?.reader.take(SNIFF).read_to_end(&mut start);
    Ok(unpacked.is_ok() && !start.contains(&0))
}
