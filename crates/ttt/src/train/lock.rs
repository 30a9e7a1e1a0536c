//! One process a run: two that train one run folder would overwrite each other's checkpoints.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::hub::atomic::remove_leftovers;
use crate::{AtPath, Error, Result};

/// Name of the locked file. It stays when the run ends: removing it could pull it from under a process that has just opened it.
pub(super) const NAME: &str = ".lock";

/// The right to write a run folder, until it is dropped; the operating system takes it back from a process that dies.
#[derive(Debug)]
pub(super) struct RunLock {
    /// `None` where the file system has no locks.
    _file: Option<File>,
}

impl RunLock {
    /// Locks the run folder `run`, and clears away what a killed process left half written in it.
    ///
    /// # Errors
    /// Another process has the lock; a folder that cannot be written.
    pub fn take(run: &Path) -> Result<RunLock> {
        let path = run.join(NAME);
        let file = File::options().create(true).truncate(false).write(true).open(&path).at(&path)?;
        let file = match file.try_lock() {
            Ok(()) => Some(file),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Config(format!(
                    "another process is training the run in {}; wait for its end, or stop it with Ctrl-C, which saves",
                    run.display()
                )));
            }
            Err(TryLockError::Error(_)) => None,
        };
        // Without a lock, what looks left over may be in the making.
        if file.is_some() {
            let checkpoints = run.join("checkpoints");
            if checkpoints.is_dir() {
                remove_leftovers(&checkpoints, |_| true)?;
            }
            // While `best` was being replaced, both its old and its new contents may be under a temporary name.
            let best = run.join("best").is_dir();
            remove_leftovers(run, |path| best || !path.is_dir())?;
        }
        Ok(RunLock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_leftovers_go() {
        let run = tempfile::tempdir().unwrap();
        let make = |name: &str| std::fs::create_dir_all(run.path().join(name)).unwrap();
        let ours = ["checkpoints/.ttt-12-3.tmp", ".ttt-7-0.tmp"];
        let others =
            ["checkpoints/step-00000001", "checkpoints/.ttt-x-3.tmp", "checkpoints/.ttt-12-3.tmp.gz", "checkpoints/mine.tmp"];
        ours.iter().chain(&others).for_each(|name| make(name));
        std::fs::write(run.path().join(".ttt-7-1.tmp"), "half").unwrap();
        let first = RunLock::take(run.path()).unwrap();
        // Without `best`, a folder may be all that is left of it.
        assert!(!run.path().join(ours[0]).exists() && run.path().join(ours[1]).exists());
        assert!(!run.path().join(".ttt-7-1.tmp").exists());
        assert!(others.iter().all(|name| run.path().join(name).is_dir()));

        make("best");
        make(ours[0]);
        let error = RunLock::take(run.path()).unwrap_err().to_string();
        assert!(error.contains("another process is training the run in"), "{error}");
        assert!(run.path().join(ours[0]).exists(), "only the holder of the lock clears away");
        drop(first);
        RunLock::take(run.path()).unwrap();
        assert!(ours.iter().all(|name| !run.path().join(name).exists()));
    }
}
