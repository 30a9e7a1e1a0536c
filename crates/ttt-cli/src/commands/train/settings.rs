//! The settings of a run: flag over `key=value` over file over default; and its folder.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ttt::data::Tokenizer;
use ttt::train::Settings;

use crate::args::Train;
use crate::{Usage, model};

/// Where runs go that have no `--out`.
const RUNS: &str = "runs";

/// Settings and folder that the arguments ask for.
pub fn resolve(args: &Train) -> Result<(Settings, PathBuf)> {
    let typed = Typed::of(args)?;
    let (mut settings, folder) = match (&args.resume, &typed.config) {
        (Some(run), Some(config)) => {
            let message = format!("--resume {} goes on with that run's own settings; leave out {config}", run.display());
            return Err(Usage(message).into());
        }
        (Some(run), None) => {
            let file = run.join("settings.toml");
            if !file.exists() {
                bail!("{} is no run folder: there is no settings.toml in it", run.display());
            }
            (Settings::of_run(run)?, run.clone())
        }
        (None, Some(config)) => {
            let name = Path::new(config).file_stem().unwrap_or_default().to_string_lossy().into_owned();
            (Settings::load(config)?, new_folder(args, &name))
        }
        (None, None) => (Settings::default(), new_folder(args, if args.only_initial_state { "skill" } else { "tiny" })),
    };
    for assignment in &typed.overrides {
        settings.apply_override(assignment)?;
    }
    apply_flags(args, &typed.data, &mut settings)?;
    Ok((settings, folder))
}

/// The arguments without a flag, told apart, and all of `--data`.
#[derive(Debug, Default, PartialEq)]
struct Typed {
    config: Option<String>,
    overrides: Vec<String>,
    data: Vec<String>,
}

impl Typed {
    fn of(args: &Train) -> Result<Typed, Usage> {
        let mut typed = Typed { data: args.data.clone(), ..Typed::default() };
        for text in &args.settings {
            if is_assignment(text) {
                typed.overrides.push(text.clone());
            } else if Path::new(text).extension().is_some_and(|e| e == "toml") {
                if let Some(first) = typed.config.replace(text.clone()) {
                    return Err(Usage(format!("there are two settings files, {first} and {text}; one is enough")));
                }
            } else if !args.data.is_empty() {
                // What a shell made of `--data *.txt`.
                typed.data.push(text.clone());
            } else {
                return Err(Usage(format!(
                    "`{text}` is neither a settings file (.toml) nor key=value; texts are named with --data {text}"
                )));
            }
        }
        Ok(typed)
    }
}

/// Whether an argument is `key=value`; a path may have a `=` in it too, but not behind a plain word.
pub fn is_assignment(text: &str) -> bool {
    let key = |key: &str| !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | ' '));
    text.split_once('=').is_some_and(|(name, _)| key(name))
}

fn apply_flags(args: &Train, data: &[String], settings: &mut Settings) -> Result<()> {
    let Train { tokenizer, init_from, only_initial_state, recompute, seed, tokens, device, .. } = args;
    let mut set = |key: &str, value: toml::Value, flag: &str| settings.set(key, value, flag);
    if !data.is_empty() {
        set("data.paths", data.to_vec().into(), "--data")?;
    }
    if let Some(tokenizer) = tokenizer {
        set("data.tokenizer", tokenizer.clone().into(), "--tokenizer")?;
    }
    if let Some(path) = init_from {
        let folder = model::resolve(path)?;
        if tokenizer.is_some() && Tokenizer::from_folder(&folder)?.is_some() {
            let message = format!("{} has its own tokenizer; leave out --tokenizer", folder.display());
            return Err(Usage(message).into());
        }
        let text = folder.to_str().with_context(|| format!("{} is not UTF-8", folder.display()))?;
        set("model.folder", text.into(), "--init-from")?;
    }
    if *only_initial_state {
        set("train.only_initial_state", true.into(), "--only-initial-state")?;
    }
    if let Some(recompute) = recompute {
        set("train.recompute", ttt::train::Recompute::from(*recompute).name().into(), "--recompute")?;
    }
    if let Some(seed) = seed {
        let seed = i64::try_from(*seed).map_err(|_| Usage(format!("--seed {seed} is more than {}", i64::MAX)))?;
        set("train.seed", seed.into(), "--seed")?;
    }
    if let Some(tokens) = tokens {
        set("train.tokens", tokens.clone().into(), "--tokens")?;
    }
    if let Some(threads) = device.threads {
        set("train.threads", (threads as i64).into(), "--threads")?;
    }
    Ok(())
}

/// `--out`, or the first of `runs/NAME`, `runs/NAME-2`, ... that is not in use.
fn new_folder(args: &Train, name: &str) -> PathBuf {
    if let Some(out) = &args.out {
        return out.clone();
    }
    let free = |path: &PathBuf| match std::fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_none(),
        Err(_) => !path.exists(),
    };
    let numbered = |n: u64| Path::new(RUNS).join(if n == 1 { name.to_owned() } else { format!("{name}-{n}") });
    (1..).map(numbered).find(free).expect("numbers do not end")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(settings: &[&str], data: &[&str]) -> Result<Typed, String> {
        use clap::Parser;
        let data = data.iter().flat_map(|d| ["--data", d]);
        let line = ["ttt", "train"].into_iter().chain(settings.iter().copied()).chain(data);
        let crate::args::Command::Train(args) = crate::Args::parse_from(line).command else { unreachable!("train was typed") };
        Typed::of(&args).map_err(|e| e.0)
    }

    #[test]
    fn arguments_without_a_flag() {
        let own = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let all = typed(&["a=b.toml", "b.txt", "x/c.toml", "train.seed=3", "d/e=f.txt"], &["a.txt"]).unwrap();
        assert_eq!(all.config.as_deref(), Some("x/c.toml"));
        assert_eq!(all.overrides, own(&["a=b.toml", "train.seed=3"]));
        assert_eq!(all.data, own(&["a.txt", "b.txt", "d/e=f.txt"]));
        assert!(typed(&["b.txt"], &[]).unwrap_err().contains("--data b.txt"));
        assert!(typed(&["a.toml", "b.toml"], &[]).unwrap_err().contains("two settings files"));
    }
}
