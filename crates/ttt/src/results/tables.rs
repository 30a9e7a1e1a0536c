//! The tables of a comparison.

use super::run::RunResults;
use super::seeds;
use crate::chart::Unit;

/// A table with its heading.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// What it is about.
    pub title: String,
    /// What must be known to read it; may be empty.
    pub note: String,
    /// Names of the columns.
    pub head: Vec<String>,
    /// How many of them, from the first, hold words; the others hold numbers.
    pub words: usize,
    /// A cell for each column.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    fn new(title: &str, note: impl Into<String>, words: usize, head: &[&str], rows: Vec<Vec<String>>) -> Table {
        Table { title: title.into(), note: note.into(), head: head.iter().map(|h| (*h).into()).collect(), words, rows }
    }

    /// As Markdown, with its title as a heading.
    pub fn markdown(&self) -> String {
        let escaped = |cell: &String| cell.replace('\\', "\\\\").replace('|', "\\|").replace('\n', " ");
        let line = |cells: &[String]| format!("| {} |\n", cells.iter().map(escaped).collect::<Vec<_>>().join(" | "));
        let rule = format!("|{}{}\n", " --- |".repeat(self.words), " ---: |".repeat(self.head.len() - self.words));
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        let note = if self.note.is_empty() { String::new() } else { format!("\n{}\n", self.note) };
        format!("## {}\n\n{}{rule}{rows}{note}", self.title, line(&self.head))
    }
}

/// All tables that have rows.
pub(super) fn all(runs: &[RunResults]) -> Vec<Table> {
    let mut tables = vec![losses(runs), cost(runs)];
    tables.extend([seeds(runs), evaluations(runs), tasks(runs), decoding(runs)]);
    tables.retain(|table| !table.rows.is_empty());
    tables
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".into())
}

fn loss(x: f64) -> String {
    format!("{x:.4}")
}

fn losses(runs: &[RunResults]) -> Table {
    let row = |run: &RunResults| {
        let last = run.validation();
        vec![
            run.name.clone(),
            run.model(),
            Unit::Count.write(run.parameters() as f64),
            Unit::Count.write(run.tokens() as f64),
            or_dash(last.map(|r| loss(r.loss))),
            or_dash(last.map(|r| format!("{:.2}", r.loss.exp()))),
            or_dash(last.and_then(|r| r.bits_per_byte).map(loss)),
            or_dash(run.best().map(|r| loss(r.loss))),
        ]
    };
    let head = ["run", "model", "parameters", "tokens", "validation loss", "perplexity", "bits per byte", "best loss"];
    let note = "Losses are nats a token, on the validation part of each run's own data. Losses of different tokenizers compare in bits per byte alone.";
    Table::new("Losses", note, 2, &head, runs.iter().map(row).collect())
}

fn cost(runs: &[RunResults]) -> Table {
    let row = |run: &RunResults| {
        vec![
            run.name.clone(),
            Unit::Power.write(run.flops_per_token() * run.tokens() as f64),
            or_dash(run.seconds().map(|s| Unit::Seconds.write(s))),
            or_dash(run.speed().map(|s| Unit::Count.write(s.round()))),
            or_dash(run.memory().map(|m| Unit::Bytes.write(m as f64))),
        ]
    };
    let runs: Vec<_> = runs.iter().filter(|run| !run.records.is_empty()).map(row).collect();
    let note = "FLOPs are those of the model, forward and backward, nothing recomputed. Time is that of training, validation and saving included; tokens a second are the median of what was logged.";
    Table::new("Cost of training", note, 1, &["run", "FLOPs", "time", "tokens/s", "memory"], runs)
}

fn seeds(runs: &[RunResults]) -> Table {
    let groups = seeds::groups(runs);
    let several = groups.iter().any(|group| group.losses.len() > 1);
    let rows = groups.iter().filter(|_| several).map(|group| {
        let spread = or_dash(group.spread().map(loss));
        vec![group.name.clone(), group.losses.len().to_string(), loss(group.mean()), spread]
    });
    let rows: Vec<_> = rows.collect();
    let pairs = seeds::indistinct(&groups);
    let said: Vec<String> = pairs.iter().map(|(a, b)| format!("{} and {}", a.name, b.name)).collect();
    let mut note = "Runs that differ in their seed alone; the spread is from the lowest to the highest validation loss.".to_owned();
    if !said.is_empty() {
        note += &format!(" Not told apart, because their means differ by no more than that: {}.", said.join("; "));
    }
    Table::new("Seeds", note, 1, &["runs like", "seeds", "mean loss", "spread"], rows)
}

fn evaluations(runs: &[RunResults]) -> Table {
    let mut rows = Vec::new();
    for run in runs {
        for e in &run.evaluations {
            let margin = e.margin.map_or(String::new(), |m| format!(" ± {m:.4}"));
            rows.push(vec![
                run.name.clone(),
                e.name.clone(),
                format!("{}{margin}", loss(e.loss)),
                format!("{:.2}", e.loss.exp()),
                loss(e.bits_per_byte),
                Unit::Count.write(e.tokens as f64),
                e.context.map_or_else(|| "all".into(), |n| Unit::Binary.write(n as f64)),
            ]);
        }
    }
    let head = ["run", "evaluation", "loss (± 95 %)", "perplexity", "bits per byte", "tokens", "context"];
    Table::new("Evaluations", "", 2, &head, rows)
}

fn tasks(runs: &[RunResults]) -> Table {
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    let mut rows = Vec::new();
    for run in runs {
        for result in &run.tasks {
            for row in &result.results {
                let shown =
                    ["pairs", "length", "depth"].iter().filter_map(|key| Some(format!("{key} {}", row.settings.get(*key)?)));
                let margin = row.margin.map_or(String::new(), |m| format!(" ± {}", percent(m)));
                let settings = shown.collect::<Vec<_>>().join(", ");
                rows.push(vec![
                    run.name.clone(),
                    format!("{}, {settings}", result.task),
                    format!("{}{margin}", percent(row.accuracy)),
                    percent(row.chance),
                ]);
            }
        }
    }
    Table::new("Tasks", "", 2, &["run", "task", "accuracy (± 95 %)", "chance"], rows)
}

fn decoding(runs: &[RunResults]) -> Table {
    let mut rows = Vec::new();
    for run in runs {
        for d in &run.decoding {
            for row in &d.results {
                rows.push(vec![
                    run.name.clone(),
                    d.device.clone(),
                    d.batch.to_string(),
                    Unit::Binary.write(row.after as f64),
                    format!("{:.3}", d.latency(row)),
                    Unit::Count.write(row.tokens_per_second.median.round()),
                    Unit::Bytes.write(row.state_bytes as f64 / d.batch as f64),
                    Unit::Bytes.write(row.peak_memory_bytes as f64),
                ]);
            }
        }
    }
    let head = ["run", "device", "sequences", "after", "ms a token", "tokens/s", "state a sequence", "memory"];
    let note = "Tokens a second are those of all sequences together; the memory is the most that tensors held, weights included.";
    Table::new("Decoding", note, 2, &head, rows)
}
