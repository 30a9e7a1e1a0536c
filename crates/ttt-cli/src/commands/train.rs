//! `ttt train`: settings from all their sources, a run folder, and a run that is watched.

pub mod settings;
mod watch;

use std::io::Write;

use anyhow::Result;
use clap::ValueEnum;
use ttt::train::checkpoint::Checkpoints;
use ttt::train::run::{Job, Outcome};

use crate::args::{DeviceName, Train};
use crate::{model, units};
use watch::Watch;

/// Runs the command.
pub fn run(args: &Train, out: &mut dyn Write) -> Result<()> {
    let (settings, folder) = settings::resolve(args)?;
    let device = model::device(args.device.device, settings.train.threads)?;
    let job = Job { settings, folder, resume: args.resume.is_some(), device };
    let watch = Watch::new(&job, args.quiet)?;
    let outcome = ttt::train::run::run(&job, &watch);
    watch.finish();
    let resume = format!("  {} train --resume {}{}", model::program(), units::quoted(&job.folder), unsaved_flags(args));
    match outcome {
        Ok(outcome) => Ok(summary(&job, &outcome, out)?),
        Err(ttt::Error::Interrupted) => {
            writeln!(out, "\ninterrupted; go on with\n{resume}")?;
            Err(ttt::Error::Interrupted.into())
        }
        Err(error) => {
            // A run that had saved something is not lost.
            if let (true, Ok(Some(checkpoint))) = (watch.started(), Checkpoints::new(&job.folder, 1, 0).latest()) {
                writeln!(out, "\nnothing before {} is lost; go on with\n{resume}", checkpoint.display())?;
            }
            Err(error.into())
        }
    }
}

/// The flags that are not among a run's settings.
fn unsaved_flags(args: &Train) -> String {
    let device = args.device.device.to_possible_value().filter(|_| args.device.device != DeviceName::Auto);
    let device = device.map(|name| format!(" --device {}", name.get_name()));
    let quiet = args.quiet.then(|| " --quiet".to_owned());
    [device, quiet].into_iter().flatten().collect()
}

fn summary(job: &Job, outcome: &Outcome, out: &mut dyn Write) -> std::io::Result<()> {
    let folder = job.folder.display();
    let bits = outcome.validation.bits_per_byte.unwrap_or(f64::NAN);
    writeln!(out)?;
    writeln!(
        out,
        "done in {}: validation loss {:.4}, {bits:.4} bits per byte",
        units::seconds(outcome.seconds),
        outcome.validation.loss
    )?;
    writeln!(out, "  run    {folder}  (settings.toml, metrics.jsonl, checkpoints)")?;
    writeln!(out, "  curve  {folder}/loss.svg")?;
    writeln!(out, "  model  {}", outcome.model.display())?;
    if let Some(skill) = &outcome.skill {
        let size = std::fs::metadata(skill)?.len();
        writeln!(
            out,
            "  skill  {}  ({}; --skill loads it over the model it was learned for)",
            skill.display(),
            units::bytes(size)
        )?;
    }
    writeln!(out, "try it:")?;
    let (program, run) = (model::program(), units::quoted(&job.folder));
    writeln!(out, "  {program} generate {run} --prompt {}", units::quoted(&job.settings.sample.prompt))
}
