//! Runs that differ in their seed alone: how much of a difference may be chance.

use serde_json::{Value, json};
use toml::Table;

use super::run::RunResults;

/// Settings beside the seed that change neither the model nor what it learns: how results are measured, kept and computed.
const NO_MATTER: [(&str, &[&str]); 3] = [
    ("train", &["seed", "micro_batch", "recompute", "checkpoint_group", "threads"]),
    ("data", &["cache"]),
    ("model", &["scan_checkpoint_group_size"]),
];
const NO_MATTER_SECTIONS: [&str; 4] = ["eval", "checkpoint", "sample", "log"];

/// Runs of one kind with their last validation losses.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Group {
    /// Name of the first run.
    pub(super) name: String,
    pub(super) losses: Vec<f64>,
}

impl Group {
    pub(super) fn mean(&self) -> f64 {
        self.losses.iter().sum::<f64>() / self.losses.len() as f64
    }

    /// From the lowest to the highest loss; of one run nothing is known.
    pub(super) fn spread(&self) -> Option<f64> {
        let end = |f: fn(f64, f64) -> f64| self.losses.iter().copied().reduce(f);
        (self.losses.len() > 1).then(|| Some(end(f64::max)? - end(f64::min)?))?
    }
}

/// What makes runs the same but for their seed.
fn kind(run: &RunResults) -> String {
    let mut table = Table::try_from(&run.settings).expect("settings are representable in TOML");
    NO_MATTER_SECTIONS.iter().for_each(|section| drop(table.remove(*section)));
    for (section, names) in NO_MATTER {
        let section = table.get_mut(section).and_then(toml::Value::as_table_mut).expect("settings have their sections");
        names.iter().for_each(|name| drop(section.remove(*name)));
    }
    // A preset written out is the same model.
    table.remove("model");
    format!("{table}{:?}", run.config)
}

/// The runs by kind, those that were validated.
pub(super) fn groups(runs: &[RunResults]) -> Vec<Group> {
    let mut groups: Vec<(String, Group)> = Vec::new();
    for run in runs {
        let Some(validation) = run.validation() else { continue };
        let kind = kind(run);
        match groups.iter_mut().find(|(k, _)| *k == kind) {
            Some((_, group)) => group.losses.push(validation.loss),
            None => groups.push((kind, Group { name: run.name.clone(), losses: vec![validation.loss] })),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

/// Pairs of kinds whose means differ by less than the seeds of one of them.
pub(super) fn indistinct(groups: &[Group]) -> Vec<(&Group, &Group)> {
    let mut pairs = Vec::new();
    for (i, a) in groups.iter().enumerate() {
        for b in &groups[i + 1..] {
            let spread = a.spread().into_iter().chain(b.spread()).reduce(f64::max);
            if spread.is_some_and(|spread| (a.mean() - b.mean()).abs() <= spread) {
                pairs.push((a, b));
            }
        }
    }
    pairs
}

pub(super) fn json(runs: &[RunResults]) -> Value {
    let groups = groups(runs);
    let all = groups.iter().map(|g| json!({"name": g.name, "losses": g.losses, "mean": g.mean(), "spread": g.spread()}));
    let pairs: Vec<_> = indistinct(&groups).into_iter().map(|(a, b)| [&a.name, &b.name]).collect();
    json!({"groups": all.collect::<Vec<_>>(), "indistinct": pairs})
}
