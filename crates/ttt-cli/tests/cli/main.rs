//! The real binary in temporary folders: what a user types, what they read, and what is on the disk afterwards.
#![allow(missing_docs)]

mod bad_input;
#[cfg(unix)]
mod chat;
mod commands;
mod compare;
mod evaluate;
mod flow;
mod ladder;
mod mamba;
mod quantize;
mod serve;
mod skills;
mod state;
#[cfg(unix)]
mod stop;
#[cfg(unix)]
mod terminal;
mod transformer;
mod verify;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A temporary folder that the program runs in, with a text to learn.
struct Place(tempfile::TempDir);

/// A model that learns a few words in a second.
const TINY: [&str; 13] = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "train.sequence_length=32",
    "train.batch_tokens=128",
    "train.tokens=2560",
    "eval.every=5",
    "eval.tokens=256",
    "checkpoint.every=5",
    "sample.every=10",
    "sample.tokens=8",
    "log.every=1",
];

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let text: String = (0..400).map(|i| format!("{i} green bottles hanging on the wall\n")).collect();
        place.write("text.txt", text);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, contents).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ttt"));
        command.current_dir(self.0.path()).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        Ran::from(self.command(args).output().unwrap())
    }

    /// Trains on `text.txt`; later arguments win.
    fn train(&self, more: &[&str]) -> Ran {
        self.run(&train_line(more))
    }

    /// A trained model in `m`.
    fn with_model() -> Place {
        let place = Place::new();
        place.train(&["--out", "m", "-q"]).ok();
        place
    }

    /// Every file below the folder, sorted.
    fn files(&self) -> Vec<String> {
        fn walk(folder: &Path, root: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => walk(&path, root, found),
                    false => found.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned()),
                }
            }
        }
        let mut found = Vec::new();
        walk(self.0.path(), self.0.path(), &mut found);
        found.sort();
        found
    }

    #[track_caller]
    fn no_temporary_files(&self) {
        let left: Vec<String> = self.files().into_iter().filter(|f| f.contains(".tmp")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn train_line<'a>(more: &[&'a str]) -> Vec<&'a str> {
    ["train", "--data", "text.txt", "--threads", "2"].iter().chain(&TINY).chain(more).copied().collect()
}

/// What a finished command left.
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ran { code: output.status.code(), out, err }
    }
}

impl Ran {
    #[track_caller]
    fn ok(self) -> Ran {
        assert_eq!(self.code, Some(0), "{}{}", self.out, self.err);
        self
    }

    /// The command failed with this code and one readable message that holds all of `parts`.
    #[track_caller]
    fn fails(self, code: i32, parts: &[&str]) -> Ran {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        let message = self.err.lines().filter(|line| line.starts_with("error: ")).collect::<Vec<_>>();
        assert_eq!(message.len(), 1, "{}", self.err);
        for part in parts {
            assert!(self.err.contains(part), "no `{part}` in: {}", self.err);
        }
        assert!(!self.err.contains("panicked"), "{}", self.err);
        self
    }

    #[track_caller]
    fn says(self, parts: &[&str]) -> Ran {
        for part in parts {
            assert!(self.out.contains(part), "no `{part}` in: {}", self.out);
        }
        self
    }

    #[track_caller]
    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {}", self.out))
    }
}
