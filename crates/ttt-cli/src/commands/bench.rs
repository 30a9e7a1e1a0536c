//! `ttt bench`: speed of a model with random weights, beside what the machine reaches.

mod ops;
mod serve;
mod state;
mod work;

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};
use ttt::Storage;
use ttt::config::Config;
use ttt::device::{Device, probe};
use ttt::train::Settings;

use crate::args::{Bench, BenchWhat, InnerName};
use crate::commands::plan;
use crate::commands::train::settings::is_assignment;
use crate::keep::Keep;
use crate::{Usage, model, units};

/// What the machine reaches.
#[derive(Clone, Copy)]
pub struct Ceilings {
    /// Floating-point operations a second in a matrix product.
    pub flops: f64,
    /// Bytes of main memory read a second.
    pub bandwidth: f64,
}

/// One thing that was measured.
pub struct Measured {
    /// What was done.
    name: String,
    /// Units of work (tokens) a second, a number for each repetition.
    rates: Vec<f64>,
    /// Floating-point operations for a unit of work.
    flops: f64,
    /// Bytes that a unit of work must at least read or write.
    bytes: f64,
    /// Most memory that tensors held.
    peak: usize,
    /// Of decoding: tokens read before, and bytes of all states.
    decoded: Option<[u64; 2]>,
}

/// Runs the command.
pub fn run(args: &Bench, out: &mut dyn Write) -> Result<()> {
    if args.what == Some(BenchWhat::Serve) {
        return serve::run(&args.load, args.json, out);
    }
    let config = config(args)?;
    let device = model::device(args.device.device, args.device.threads.unwrap_or(0), &config)?;
    if args.what == Some(BenchWhat::State) {
        return state::run(args, &config, &device, out);
    }
    let kept = keep(args)?;
    if !args.after.is_empty() && !matches!(args.what, None | Some(BenchWhat::Decode)) {
        return Err(Usage("--after is for decode".into()).into());
    }
    let dtype = args.dtype.unwrap_or(Storage::F32);
    if dtype != Storage::F32 && !matches!(args.what, None | Some(BenchWhat::Prefill | BenchWhat::Decode)) {
        return Err(Usage(format!("--dtype {dtype} is for prefill and decode")).into());
    }
    let ceilings = Ceilings { flops: probe::matmul_flops(&device)?, bandwidth: probe::read_bandwidth(&device)? };
    device.memory().trim();
    let all = match args.what {
        None => {
            let mut all = Vec::new();
            if dtype == Storage::F32 {
                all.push(work::train(args, &config, &device)?);
            }
            all.push(work::prefill(args, &config, &device)?);
            all.extend(work::decode(args, &config, &device)?);
            all
        }
        Some(BenchWhat::Train) => vec![work::train(args, &config, &device)?],
        Some(BenchWhat::Prefill) => vec![work::prefill(args, &config, &device)?],
        Some(BenchWhat::Decode) => work::decode(args, &config, &device)?,
        Some(BenchWhat::Ops) => ops::all(args, &config, &device)?,
        Some(BenchWhat::State | BenchWhat::Serve) => unreachable!("they have their own tables"),
    };
    let object = json!({
        "model": config, "batch": args.batch, "length": args.length, "threads": device.threads(), "kernels": format!("{:?}", device.kernels()), "dtype": dtype.to_string(),
        "matmul_flops": ceilings.flops, "read_bandwidth": ceilings.bandwidth,
        "results": all.iter().map(|m| m.json(&ceilings)).collect::<Vec<_>>(),
    });
    if let Some(kept) = &kept {
        kept.write(&object, &device)?;
    }
    if args.json {
        return Ok(writeln!(out, "{object}")?);
    }
    writeln!(out, "{}", plan::describe(&config))?;
    writeln!(
        out,
        "{}; this machine reaches {:.0} GFLOP/s in a matrix product and {:.1} GB/s of memory\n",
        match device.as_cuda() {
            Some(gpu) => gpu.info().name.clone(),
            None => format!("{} threads, {:?} kernels, {dtype} weights", device.threads(), device.kernels()),
        },
        ceilings.flops / 1e9,
        ceilings.bandwidth / 1e9
    )?;
    writeln!(out, "{:34}{:>10}{:>10}{:>10}{:>8}{:>8}{:>11}", "tokens/s", "median", "min", "max", "arith.", "memory", "held")?;
    for m in &all {
        let [median, min, max] = m.summary().map(|x| units::count(x.round()));
        let [arithmetic, memory] = m.utilisation(&ceilings).map(|u| format!("{:.0} %", 100.0 * u));
        writeln!(out, "{:34}{median:>10}{min:>10}{max:>10}{arithmetic:>8}{memory:>8}{:>11}", m.name, units::bytes(m.peak as u64))?;
    }
    match &kept {
        Some(kept) => Ok(writeln!(out, "\nkept in {}", kept.path().display())?),
        None => Ok(()),
    }
}

/// Where the result is to be kept: in the run that is measured.
fn keep(args: &Bench) -> Result<Option<Keep>> {
    let Some(name) = &args.keep else { return Ok(None) };
    if args.what != Some(BenchWhat::Decode) {
        return Err(Usage("--keep is for decode".into()).into());
    }
    match args.settings.iter().find(|text| !is_assignment(text)) {
        Some(model) => Keep::new(Path::new(model), name).map(Some),
        None => Err(Usage("--keep puts the result into a run; name its folder".into()).into()),
    }
}

impl Measured {
    /// Median, least and most units a second.
    fn summary(&self) -> [f64; 3] {
        let mut sorted = self.rates.clone();
        sorted.sort_by(f64::total_cmp);
        [sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1]]
    }

    /// Parts of the machine's arithmetic and of its memory's speed, at the median.
    fn utilisation(&self, ceilings: &Ceilings) -> [f64; 2] {
        let [median, ..] = self.summary();
        [self.flops * median / ceilings.flops, self.bytes * median / ceilings.bandwidth]
    }

    fn json(&self, ceilings: &Ceilings) -> Value {
        let [median, min, max] = self.summary();
        let [arithmetic, memory] = self.utilisation(ceilings);
        let mut object = json!({
            "name": self.name, "tokens_per_second": {"median": median, "min": min, "max": max, "all": self.rates},
            "flops_per_token": self.flops, "bytes_per_token": self.bytes,
            "arithmetic_utilisation": arithmetic, "memory_utilisation": memory, "peak_memory_bytes": self.peak,
        });
        if let Some([after, state]) = self.decoded {
            (object["after"], object["state_bytes"]) = (json!(after), json!(state));
        }
        object
    }
}

/// Repeats `work`, which does `units` of work, after once without counting; the memory that it held at most goes along.
pub fn measure(
    name: impl Into<String>,
    device: &Device,
    repeat: u64,
    units: f64,
    [flops, bytes]: [f64; 2],
    mut work: impl FnMut() -> Result<()>,
) -> Result<Measured> {
    work()?;
    device.synchronize();
    device.memory().reset_peak();
    let mut rates = Vec::new();
    for _ in 0..repeat {
        let start = Instant::now();
        work()?;
        device.synchronize();
        rates.push(units / start.elapsed().as_secs_f64());
    }
    Ok(Measured { name: name.into(), rates, flops, bytes, peak: device.memory().usage().peak, decoded: None })
}

/// The model that the arguments name.
fn config(args: &Bench) -> Result<Config> {
    let (overrides, named): (Vec<String>, Vec<String>) = args.settings.iter().cloned().partition(|text| is_assignment(text));
    let from_folder = named.iter().any(|name| Path::new(name).extension().is_none_or(|e| e != "toml"));
    let mut settings = plan::settings(&named)?;
    if named.is_empty() {
        settings.set("model.preset", "125m".into(), "the default")?;
    }
    for assignment in &overrides {
        settings.apply_override(assignment)?;
    }
    if from_folder && (args.preset.is_some() || args.inner.is_some() || args.mixer.is_some()) {
        let message = "a model folder has its own size, mixer and inner model; leave out --preset, --mixer and --inner";
        return Err(Usage(message.into()).into());
    }
    if let Some(mixer) = args.mixer {
        settings.set("model.mixer", mixer.name().into(), "--mixer")?;
    }
    if let Some(preset) = &args.preset {
        set_preset(&mut settings, preset)?;
    }
    if let Some(inner) = args.inner {
        let name = match inner {
            InnerName::Linear => "linear",
            InnerName::Mlp => "mlp",
        };
        settings.set("model.inner", name.into(), "--inner")?;
    }
    Ok(settings.model_config()?)
}

fn set_preset(settings: &mut Settings, preset: &str) -> Result<()> {
    if preset != "small" {
        return Ok(settings.set("model.preset", preset.into(), "--preset")?);
    }
    // The tiny preset with other sizes.
    settings.set("model.preset", "tiny".into(), "--preset")?;
    let sizes = [
        ("vocab_size", 256),
        ("hidden_size", 256),
        ("intermediate_size", 688),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 4),
    ];
    let mixer = settings.model.mixer;
    for (field, value) in sizes.into_iter().filter(|(field, _)| mixer.has_field(field)) {
        settings.set(&format!("model.{field}"), value.into(), "--preset")?;
    }
    Ok(())
}
