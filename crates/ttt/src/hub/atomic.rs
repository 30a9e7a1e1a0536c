//! Files and folders that are either the old ones or the new ones, whatever happens in between.
//!
//! New contents go to a temporary name in the same folder, are synced to the disk and renamed over the old ones. After an error
//! the temporary name is gone; only a killed process can leave one (`.ttt-<process>-<number>.tmp`, safe to delete), which
//! [`remove_leftovers`] clears away.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{AtPath, Error, Result};

/// Bytes gathered before they are handed to the system.
const BUFFER: usize = 1 << 20;

/// Writes a file so that `path` holds the old contents or all of the new ones, never a part.
///
/// A symbolic link is replaced, not followed: links of download caches point to files that other folders share. What is neither
/// a file nor a folder (`/dev/stdout`, a pipe) cannot be replaced and is written directly.
///
/// # Errors
/// [`Error::Io`] that names `path`; nothing is left behind and the old contents stay.
pub fn write_atomic(path: impl AsRef<Path>, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let path = path.as_ref();
    if let Ok(existing) = fs::metadata(path) {
        if existing.is_dir() {
            return Err(Error::io(path, io::Error::new(io::ErrorKind::IsADirectory, "this is a folder, not a file to write")));
        }
        if !existing.is_file() {
            let mut out = BufWriter::new(OpenOptions::new().write(true).open(path).at(path)?);
            return write(&mut out).and_then(|()| out.flush()).at(path);
        }
    }
    let folder = parent(path);
    let (temporary, file) = Temporary::file(folder).at(path)?;
    let mut out = BufWriter::with_capacity(BUFFER, file);
    write(&mut out)
        .and_then(|()| out.flush())
        .and_then(|()| out.get_ref().sync_all())
        .and_then(|()| fs::rename(&temporary.path, path))
        .at(path)?;
    sync_folder(folder).at(folder)
}

/// Builds a whole folder beside `path` and puts it in the place of `path`; an existing folder there is deleted afterwards.
///
/// `build` gets the temporary folder. Two renames replace an existing folder: a crash exactly between them leaves the old one
/// under its temporary name, complete.
///
/// # Errors
/// What `build` returns, with paths as they would have been in the end, or [`Error::Io`]. The old folder then stays as it was.
pub fn write_folder(path: impl AsRef<Path>, build: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    // Follows links and resolves `.` and `..`, none of which can be renamed.
    let path = match fs::canonicalize(path.as_ref()) {
        Ok(existing) => existing,
        Err(_) => path.as_ref().to_owned(),
    };
    let exists = path.exists();
    if exists && !path.is_dir() {
        return Err(Error::io(&path, io::Error::new(io::ErrorKind::NotADirectory, "this is a file, not a folder to write")));
    }
    let folder = parent(&path);
    let temporary = Temporary::folder(folder).at(&path)?;
    build(&temporary.path).map_err(|e| rebase(e, &temporary.path, &path))?;
    sync_tree(&temporary.path).at(&path)?;
    if exists {
        let old = Temporary::free_name(folder);
        fs::rename(&path, &old).at(&path)?;
        if let Err(e) = fs::rename(&temporary.path, &path) {
            fs::rename(&old, &path).at(&path)?;
            return Err(Error::io(&path, e));
        }
        sync_folder(folder).at(folder)?;
        fs::remove_dir_all(&old).at(&old)
    } else {
        fs::rename(&temporary.path, &path).at(&path)?;
        sync_folder(folder).at(folder)
    }
}

/// Deletes what killed processes left in `folder`: names that this module makes and that `which` agrees to. Only for a folder
/// that no other process writes to.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_leftovers(folder: &Path, which: impl Fn(&Path) -> bool) -> Result<()> {
    for entry in fs::read_dir(folder).at(folder)? {
        let path = entry.at(folder)?.path();
        if !path.file_name().is_some_and(|name| is_temporary(&name.to_string_lossy())) || !which(&path) {
            continue;
        }
        match fs::symlink_metadata(&path).at(&path)?.is_dir() {
            true => fs::remove_dir_all(&path).at(&path)?,
            false => fs::remove_file(&path).at(&path)?,
        }
    }
    Ok(())
}

/// Whether a name is one of [`Temporary::free_name`]'s.
fn is_temporary(name: &str) -> bool {
    let numbers = name.strip_prefix(".ttt-").and_then(|rest| rest.strip_suffix(".tmp")?.split_once('-'));
    numbers.is_some_and(|(process, number)| process.parse::<u32>().is_ok() && number.parse::<u64>().is_ok())
}

/// A temporary file or folder; dropping it removes what is still there under its name.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn file(folder: &Path) -> io::Result<(Temporary, File)> {
        Temporary::create(folder, |path| OpenOptions::new().write(true).create_new(true).open(path))
    }

    fn folder(folder: &Path) -> io::Result<Temporary> {
        Ok(Temporary::create(folder, |path| fs::create_dir(path))?.0)
    }

    fn create<T>(folder: &Path, create: impl Fn(&Path) -> io::Result<T>) -> io::Result<(Temporary, T)> {
        loop {
            let path = Temporary::free_name(folder);
            match create(&path) {
                Ok(created) => return Ok((Temporary { path }, created)),
                // Left by a killed process that had this process's number.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            }
        }
    }

    /// Short, whatever the final name, so that it cannot be too long for the file system.
    fn free_name(folder: &Path) -> PathBuf {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        folder.join(format!(".ttt-{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After the rename there is nothing here any more, and after a failure its cause is what the user must hear about.
        if self.path.is_dir() {
            let _ = fs::remove_dir_all(&self.path);
        } else {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// An error about a path below `from` becomes one about the same path below `to`.
fn rebase(error: Error, from: &Path, to: &Path) -> Error {
    let moved = |path: PathBuf| path.strip_prefix(from).map(|rest| to.join(rest)).unwrap_or(path);
    match error {
        Error::Io { path, source } => Error::Io { path: moved(path), source },
        Error::Format { path, message } => Error::Format { path: moved(path), message },
        other => other,
    }
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            sync_file(&entry.path())?;
        }
    }
    sync_folder(folder)
}

/// Reading rights are enough to sync a file on Unix, but not on Windows.
fn sync_file(path: &Path) -> io::Result<()> {
    OpenOptions::new().read(true).write(cfg!(windows)).open(path)?.sync_all()
}

/// Makes renames and new names in a folder durable. Only Unix has this, and not on every file system.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    // A folder may be one to write to and not to read.
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(e)
            if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) =>
        {
            Ok(())
        }
        result => result,
    }
}
