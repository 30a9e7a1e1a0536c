//! Runs side by side: what their folders hold, as pictures, tables, JSON and a page.
//!
//! A run folder is read as training leaves it (`settings.toml`, `metrics.jsonl`), with what was measured afterwards in its folder
//! `results/`: files `NAME.json`, each the object that `ttt eval --json` or `ttt bench decode --json` prints (with `--keep` these
//! commands write it there). Results of one name are compared with each other. Weights are not needed.

mod figures;
mod report;
mod run;
mod seeds;
mod tables;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

pub use run::{Decoding, Evaluated, RunResults, TaskResult};
pub use tables::Table;

use crate::chart::Picture;
use crate::{Error, Result};

/// Folder in a run folder for what was measured after training.
pub const FOLDER: &str = "results";

/// Runs to compare, in the order that they were named in.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The runs, each under a name of its own.
    pub runs: Vec<RunResults>,
}

impl Comparison {
    /// Reads run folders, each with the name that it is to have or else its folder's. Where these are the same, so much of the
    /// paths is added that they differ.
    ///
    /// # Errors
    /// No run; a folder without `settings.toml` or with a file that is not what it should be; two runs of one name.
    pub fn read(folders: &[(Option<String>, PathBuf)]) -> Result<Comparison> {
        if folders.is_empty() {
            return Err(Error::Invalid("there is no run to compare; name the folders of runs".into()));
        }
        let mut names: Vec<String> = Vec::new();
        let unnamed: Vec<&Path> = folders.iter().filter(|(name, _)| name.is_none()).map(|(_, folder)| &**folder).collect();
        for (name, folder) in folders {
            let name = name.clone().unwrap_or_else(|| own_name(folder, &unnamed));
            if names.contains(&name) {
                let message = format!("two runs are called `{name}`; give one of them another name, as in OTHER=RUN");
                return Err(Error::Invalid(message));
            }
            names.push(name);
        }
        let runs = names.into_iter().zip(folders).map(|(name, (_, folder))| RunResults::read(folder, name));
        Ok(Comparison { runs: runs.collect::<Result<_>>()? })
    }

    /// All pictures that there are numbers for, each with the name of its file.
    pub fn pictures(&self) -> Vec<(String, Picture)> {
        figures::all(&self.runs)
    }

    /// All tables that have rows.
    pub fn tables(&self) -> Vec<Table> {
        tables::all(&self.runs)
    }

    /// The tables as Markdown.
    pub fn markdown(&self) -> String {
        self.tables().iter().map(Table::markdown).collect::<Vec<_>>().join("\n")
    }

    /// Every number, and the points of all pictures.
    pub fn json(&self) -> Value {
        let pictures: serde_json::Map<String, Value> = self.pictures().into_iter().map(|(name, p)| (name, json!(p))).collect();
        json!({"runs": self.runs.iter().map(RunResults::json).collect::<Vec<_>>(), "seeds": seeds::json(&self.runs), "pictures": pictures})
    }

    /// One page of HTML that holds everything and asks for nothing from elsewhere.
    pub fn html(&self, title: &str) -> String {
        report::page(self, title)
    }
}

/// The shortest end of the path that no other path has.
fn own_name(folder: &Path, all: &[&Path]) -> String {
    let parts = |path: &Path| -> Vec<String> {
        let normal = path.components().filter_map(|c| match c {
            std::path::Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
            _ => None,
        });
        normal.collect()
    };
    let own = parts(folder);
    let end = |parts: &[String], n: usize| parts[parts.len().saturating_sub(n)..].join("/");
    let unique = |n: &usize| all.iter().filter(|other| end(&parts(other), *n) == end(&own, *n)).count() == 1;
    match (1..=own.len()).find(unique) {
        Some(n) => end(&own, n),
        None => folder.display().to_string(),
    }
}
