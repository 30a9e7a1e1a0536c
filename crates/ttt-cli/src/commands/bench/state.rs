//! Saving and restoring the state of one sequence.

use std::io::Write;
use std::time::Instant;

use anyhow::Result;
use serde_json::{Map, Value, json};
use ttt::config::Config;
use ttt::device::Device;
use ttt::generate::learn;

use super::work;
use crate::args::Bench;
use crate::units;

/// Measures with a state inside a mini-batch, so that there are open rows; without an inner loop, with one of `--length` tokens. The file lies in the system's folder for temporary
/// files; saving includes syncing it to the disk.
pub fn run(args: &Bench, config: &Config, device: &Device, out: &mut dyn Write) -> Result<()> {
    let lm = work::model(config, device, None)?;
    let mut states = lm.states(1)?;
    let tokens = config.mini_batch().map_or(args.length as usize, |k| 3 * k - 1);
    learn(&lm, &mut states, 0, &work::ids(tokens, config.vocab_size))?;
    let start = Instant::now();
    lm.hash();
    let hash = start.elapsed().as_secs_f64();

    let path = std::env::temp_dir().join(format!("ttt-bench-{}.state", std::process::id()));
    let mut size = 0;
    let mut bytes = Vec::new();
    let mut results = vec![("hash of the model, once", vec![hash])];
    let mut time = |name: &'static str, work: &mut dyn FnMut() -> ttt::Result<()>| -> Result<()> {
        work()?;
        let mut seconds = Vec::new();
        for _ in 0..args.repeat {
            let start = Instant::now();
            work()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        results.push((name, seconds));
        Ok(())
    };
    let measured = (|| {
        time("save to a file", &mut || {
            size = states.save(0, &lm, &[1], None, &path)?;
            Ok(())
        })?;
        time("restore from a file", &mut || states.restore(0, &lm, &path).map(|_| ()))?;
        time("save to memory", &mut || {
            bytes = states.to_bytes(0, &lm, &[1], None)?;
            Ok(())
        })?;
        time("restore from memory", &mut || states.restore_bytes(0, &lm, &bytes[..]).map(|_| ()))
    })();
    // The file is in the way of nobody, and the result matters more.
    let _ = std::fs::remove_file(&path);
    measured?;

    let median = |seconds: &[f64]| seconds[seconds.len() / 2];
    if args.json {
        let seconds: Map<String, Value> = results.iter().map(|(name, s)| ((*name).to_owned(), json!(median(s)))).collect();
        return Ok(writeln!(out, "{}", json!({"model": config, "state_bytes": size, "seconds": seconds}))?);
    }
    writeln!(out, "{}", super::plan::describe(config))?;
    writeln!(out, "state of {}\n", units::bytes(size))?;
    writeln!(out, "{:28}{:>12}{:>12}{:>12}", "milliseconds", "median", "min", "max")?;
    for (name, seconds) in &results {
        let [median, min, max] = [median(seconds), seconds[0], seconds[seconds.len() - 1]].map(|s| format!("{:.2}", 1e3 * s));
        writeln!(out, "{name:28}{median:>12}{min:>12}{max:>12}")?;
    }
    Ok(())
}
