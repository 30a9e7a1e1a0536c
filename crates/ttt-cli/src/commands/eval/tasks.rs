//! Tasks made up for the purpose.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use ttt::data::{Pieces, Sources, Tokenizer, default_corpus};
use ttt::eval::grid_svg;
use ttt::eval::tasks::{Alphabet, Copy, Haystack, Needle, Recall, Score, Task, score};
use ttt::lm::Lm;

use super::{save, save_result};
use crate::Usage;
use crate::args::{Eval, TaskName};
use crate::keep::Keep;
use crate::progress::Bar;

/// One setting of a task, what was asked, and how it went.
struct Row {
    settings: Value,
    task: Task,
    score: Score,
}

/// Judges the task with all its settings.
pub fn run(args: &Eval, lm: &Lm, tokenizer: Option<Tokenizer>, kept: Option<&Keep>, out: &mut dyn Write) -> Result<()> {
    let alphabet = Alphabet::of(tokenizer.as_ref(), lm.config().vocab_size);
    let name = args.task.task.expect("a task was named");
    refuse(args, name)?;
    let settings = match name {
        TaskName::Recall => recall(args),
        TaskName::Copy => copy(args),
        TaskName::Needle => needle(args, tokenizer)?,
    };
    settings.iter().try_for_each(|(_, task)| task.validate(&alphabet))?;
    let bar = Bar::steps(settings.len() as u64);
    let mut rows = Vec::with_capacity(settings.len());
    for (i, (settings, task)) in settings.into_iter().enumerate() {
        bar.set(i as u64, "");
        let score = score(lm, &task, &alphabet, args.task.seed, args.task.sequences)?;
        rows.push(Row { settings, task, score });
    }
    bar.finish();
    if let (Some(path), TaskName::Needle) = (&args.report.plot, name) {
        save(path, &grid(args, &rows, &alphabet)?)?;
    }
    let results: Vec<Value> = rows.iter().map(|row| row.object(&alphabet)).collect();
    let name = format!("{name:?}").to_lowercase();
    let object = json!({"task": name, "seed": args.task.seed, "sequences": args.task.sequences, "results": results});
    match args.json {
        true => writeln!(out, "{object}")?,
        false => print(&rows, &alphabet, out)?,
    }
    save_result(kept, &object, lm, args.json, out)
}

/// Arguments that this task does not have.
fn refuse(args: &Eval, name: TaskName) -> Result<(), Usage> {
    let given = [
        ("--pairs", !args.task.pairs.is_empty(), TaskName::Recall),
        ("--depths", !args.task.depths.is_empty(), TaskName::Needle),
        ("--haystack", args.task.haystack.is_some(), TaskName::Needle),
        ("--plot", args.report.plot.is_some(), TaskName::Needle),
    ];
    match given.iter().find(|(_, given, of)| *given && *of != name) {
        Some((flag, _, of)) => Err(Usage(format!("{flag} belongs to --task {of:?}").to_lowercase())),
        None => Ok(()),
    }
}

fn or<T: Clone>(given: &[T], default: &[T]) -> Vec<T> {
    if given.is_empty() { default.to_vec() } else { given.to_vec() }
}

fn recall(args: &Eval) -> Vec<(Value, Task)> {
    let mut all = Vec::new();
    for pairs in or(&args.task.pairs, &[8]) {
        for length in or(&args.task.lengths, &[pairs.saturating_mul(4)]) {
            all.push((json!({"pairs": pairs, "length": length}), Task::Recall(Recall { pairs, length, mixed: false })));
        }
    }
    all
}

fn copy(args: &Eval) -> Vec<(Value, Task)> {
    let task = |length: usize| (json!({"length": length}), Task::Copy(Copy { length }));
    or(&args.task.lengths, &[64]).into_iter().map(task).collect()
}

/// Lengths of the grid.
fn lengths(args: &Eval) -> Vec<usize> {
    or(&args.task.lengths, &[256, 512, 1024, 2048])
}

/// Depths of the grid.
fn depths(args: &Eval) -> Vec<f64> {
    or(&args.task.depths, &[0.0, 0.25, 0.5, 0.75, 1.0])
}

fn needle(args: &Eval, tokenizer: Option<Tokenizer>) -> Result<Vec<(Value, Task)>> {
    let longest = lengths(args).into_iter().max().unwrap_or(0);
    let haystack = match &args.task.haystack {
        None => Haystack::Symbols,
        Some(name) => {
            let tokenizer = Arc::new(tokenizer.context("a haystack of text needs a tokenizer; name one with --tokenizer")?);
            let sources = if name == "corpus" { default_corpus()?.sources } else { Sources::resolve(std::slice::from_ref(name))? };
            // Enough that samples differ; more would only take memory.
            let ids = Arc::new(beginning(&sources, &tokenizer, longest.saturating_mul(8))?);
            Haystack::Text { ids, tokenizer }
        }
    };
    let mut all = Vec::new();
    for length in lengths(args) {
        for depth in depths(args) {
            let task = Needle { length, depth: Some(depth), haystack: haystack.clone() };
            all.push((json!({"length": length, "depth": depth}), Task::Needle(task)));
        }
    }
    Ok(all)
}

/// The first ids of some texts.
fn beginning(sources: &Sources, tokenizer: &Tokenizer, wanted: usize) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for file in &sources.files {
        for piece in Pieces::open(file, None, tokenizer)? {
            ids.extend(piece?.ids);
            if ids.len() >= wanted {
                ids.truncate(wanted);
                return Ok(ids);
            }
        }
    }
    Ok(ids)
}

fn grid(args: &Eval, rows: &[Row], alphabet: &Alphabet) -> Result<String> {
    let (lengths, depths) = (lengths(args), depths(args));
    let accuracy: Vec<f64> = rows.iter().map(|row| row.score.accuracy.mean()).collect();
    let values: Vec<Vec<f64>> = accuracy.chunks(depths.len().max(1)).map(<[f64]>::to_vec).collect();
    let title = format!("{}: tokens of the answer that are right", args.model.display());
    let chance = rows.first().map_or(0.0, |row| row.task.chance(alphabet));
    Ok(grid_svg(&title, &lengths, &depths, &values, chance)?)
}

impl Row {
    fn object(&self, alphabet: &Alphabet) -> Value {
        let mut object = self.settings.clone();
        let Score { accuracy, loss, exact } = &self.score;
        object["accuracy"] = json!(accuracy.mean());
        object["margin"] = json!(accuracy.margin());
        object["chance"] = json!(self.task.chance(alphabet));
        object["exact"] = json!(exact.mean());
        object["loss"] = json!(loss.mean());
        object["judged"] = json!(accuracy.count() as u64);
        object
    }
}

fn print(rows: &[Row], alphabet: &Alphabet, out: &mut dyn Write) -> Result<()> {
    let names = rows[0].settings.as_object().expect("settings are an object").keys();
    let head: String = names.map(|name| format!("{name:>8}")).collect();
    writeln!(out, "{head}{:>10}{:>9}{:>9}{:>10}{:>9}", "accuracy", "± 95 %", "chance", "all right", "loss")?;
    for row in rows {
        let settings: String =
            row.settings.as_object().expect("likewise").values().map(|v| format!("{:>8}", v.to_string())).collect();
        let Score { accuracy, loss, exact } = &row.score;
        let percent = |x: f64| format!("{:.1} %", 100.0 * x);
        let margin = accuracy.margin().map_or("-".into(), percent);
        let [mean, chance, exact] = [accuracy.mean(), row.task.chance(alphabet), exact.mean()].map(percent);
        writeln!(out, "{settings}{mean:>10}{margin:>9}{chance:>9}{exact:>10}{:>9.4}", loss.mean())?;
    }
    Ok(())
}
