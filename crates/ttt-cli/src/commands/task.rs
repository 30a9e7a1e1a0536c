//! `ttt task`: training files of a task, and the settings of a run that learns it.

use std::io::Write;

use anyhow::{Result, bail};
use ttt::eval::tasks::{self, Alphabet, Copy, Haystack, Needle, Recall};
use ttt::hub::{write_atomic, write_folder};
use ttt::train::Settings;

use crate::args::{Task, TaskName};
use crate::{model, units};

/// Sequences to validate with.
const VALIDATION: u64 = 512;
/// Mini-batches of the run's model: a sequence holds whole ones.
const MINI_BATCH: usize = 16;

/// Runs the command.
pub fn run(args: &Task, out: &mut dyn Write) -> Result<()> {
    let (task, length) = match args.task {
        TaskName::Recall => {
            let length = args.length.unwrap_or(args.pairs.saturating_mul(4).next_multiple_of(MINI_BATCH));
            (tasks::Task::Recall(Recall { pairs: args.pairs, length, mixed: !args.exact }), length)
        }
        TaskName::Copy => {
            let length = args.length.unwrap_or(64);
            (tasks::Task::Copy(Copy { length }), length)
        }
        TaskName::Needle => {
            let length = args.length.unwrap_or(64);
            (tasks::Task::Needle(Needle { length, depth: None, haystack: Haystack::Symbols }), length)
        }
    };
    let alphabet = Alphabet::bytes();
    task.validate(&alphabet)?;
    if std::fs::read_dir(&args.out).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("the folder {} exists and is not empty; name another one", args.out.display());
    }
    let settings = settings(args, length)?;
    write_folder(&args.out, |folder| {
        let write = |name: &str, task: &tasks::Task, seed: u64, sequences: u64| {
            write_atomic(folder.join(name), |w| {
                tasks::write_lines(w, task, &alphabet, seed, sequences).map_err(std::io::Error::other)
            })
        };
        write("train.jsonl", &task, args.seed, args.sequences)?;
        // A seed that no one types.
        write("validation.jsonl", &judged(task), args.seed ^ 1 << 63, VALIDATION)?;
        write_atomic(folder.join("run.toml"), |w| w.write_all(settings.as_bytes()))
    })?;
    let folder = units::quoted(&args.out);
    let tokens = units::grouped(args.sequences * length as u64);
    writeln!(out, "{} sequences of {length} tokens, {tokens} in all, in {folder}", units::grouped(args.sequences))?;
    let name = format!("{:?}", args.task).to_lowercase();
    Ok(writeln!(out, "learn it:\n  {} train {folder}/run.toml --out runs/{name}", model::program())?)
}

/// The task as it is judged.
fn judged(task: tasks::Task) -> tasks::Task {
    match task {
        tasks::Task::Recall(recall) => tasks::Task::Recall(Recall { mixed: false, ..recall }),
        other => other,
    }
}

/// Settings of a run that learns the files.
fn settings(args: &Task, length: usize) -> Result<String> {
    let path = |name: &str| toml::Value::String(args.out.join(name).display().to_string());
    // Few tokens a step: the task is learned in steps, not in tokens.
    let batch = length.max(256 / length.max(1) * length);
    let text = format!(
        "# A small model that learns a task; see `ttt task --help`. What is not here is as in configs/tiny.toml.

[model]
vocab_size = 256             # bytes alone, so that lines join to sequences
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 2

[data]
paths = [{train}]
validation_paths = [{validation}]

[optimizer]
learning_rate = 5e-3
weight_decay = 0.01

[train]
tokens = {tokens}
sequence_length = {length}         # one sequence of the task
batch_tokens = {batch}
micro_batch = 64

[eval]
every = 400
tokens = {eval}

[checkpoint]
every = 0

[sample]
every = 0
",
        train = path("train.jsonl"),
        validation = path("validation.jsonl"),
        tokens = (args.sequences * length as u64).max(batch as u64),
        // The last sequence's last target would be the next sequence's first token.
        eval = (VALIDATION - 1) * length as u64,
    );
    Settings::from_toml(&text, "the settings of the task")?.validate()?;
    Ok(text)
}
