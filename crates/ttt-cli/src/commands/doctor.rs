//! `ttt doctor`: what this machine and this program are, and whether they compute the same as the definition.

use std::io::Write;

use anyhow::{Result, bail};
use serde_json::json;
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::data::default_corpus;
use ttt::device::cuda::libraries::{Found, Libraries, libraries};
use ttt::device::cuda::{self, compile, kernels};
use ttt::device::{Device, Kernels, probe};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::params::Params;
use ttt::tensor::DType;

use crate::args::Doctor;
use crate::{model, units};

/// Largest error, relative to the largest number, that rounding in another order explains.
const TOLERANCE: f64 = 1e-3;

/// Runs the command.
pub fn run(args: &Doctor, out: &mut dyn Write) -> Result<()> {
    // The device for a model that a GPU runs, too.
    let device = model::device(args.device.device, args.device.threads.unwrap_or(0), &ttt(Inner::Linear)?)?;
    let features = features();
    let [total, available] = memory();
    let corpus = default_corpus();
    let (flops, bandwidth) = (probe::matmul_flops(&device)?, probe::read_bandwidth(&device)?);
    device.memory().trim();
    let errors = [
        ("TTT-Linear", self_test(&device, &ttt(Inner::Linear)?)?),
        ("TTT-MLP", self_test(&device, &ttt(Inner::Mlp)?)?),
        ("Transformer", self_test(&device, &small(Config::transformer("tiny")?))?),
        ("Mamba", self_test(&device, &small(Config::mamba("tiny")?))?),
    ];
    let gpu = Gpu::of(&device);
    // Written so that an error that is not a number fails.
    let failed = errors.iter().find(|(_, e)| !(e[0] <= TOLERANCE && e[1] <= TOLERANCE));
    if args.json {
        let test: serde_json::Map<_, _> = errors
            .iter()
            .map(|(name, [logits, gradient])| ((*name).to_owned(), json!({"logits": logits, "gradient": gradient})))
            .collect();
        let object = json!({
            "version": env!("CARGO_PKG_VERSION"), "system": std::env::consts::OS, "processor": std::env::consts::ARCH,
            "features": features, "threads": device.threads(), "memory_bytes": total, "memory_available_bytes": available,
            "gpu": gpu.json(), "matmul_flops": flops, "read_bandwidth": bandwidth, "self_test": test, "passed": failed.is_none(),
        });
        writeln!(out, "{object}")?;
    } else {
        let size = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".into(), units::bytes);
        writeln!(out, "version    ttt {}", env!("CARGO_PKG_VERSION"))?;
        writeln!(out, "system     {}, {}", std::env::consts::OS, std::env::consts::ARCH)?;
        writeln!(
            out,
            "vectors    {}",
            if features.is_empty() { "none that this program uses".into() } else { features.join(", ") }
        )?;
        writeln!(out, "threads    {}", device.threads())?;
        writeln!(out, "memory     {}, of which {} free", size(total), size(available))?;
        gpu.print(out)?;
        writeln!(out, "tokens     kept in `tokens` beside the run's folder (runs/tokens), or where data.cache says")?;
        match &corpus {
            Ok(c) => writeln!(out, "no --data  {} of Rust sources in {}", units::bytes(c.bytes), c.folder.display())?,
            Err(e) => writeln!(out, "no --data  {e}")?,
        }
        writeln!(out, "products   {:.0} GFLOP/s", flops / 1e9)?;
        writeln!(out, "reading    {:.1} GB/s", bandwidth / 1e9)?;
        for (name, [logits, gradient]) in &errors {
            writeln!(
                out,
                "self test  {name}: fast and plain kernels differ by {logits:.1e} in logits, {gradient:.1e} in gradients"
            )?;
        }
    }
    match failed {
        Some((name, _)) => {
            let advice = if device.as_cuda().is_some() { "--device cpu" } else { "--device reference" };
            bail!("the self test of {name} failed: the fast kernels are wrong on this machine; use {advice}")
        }
        None => Ok(()),
    }
}

/// Vector instructions that this program uses and this processor has.
fn features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let all = [
            ("avx2", std::arch::is_x86_feature_detected!("avx2")),
            ("fma", std::arch::is_x86_feature_detected!("fma")),
            ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ];
        found.extend(all.iter().filter(|(_, there)| *there).map(|(name, _)| *name));
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("neon") {
        found.push("neon");
    }
    found
}

/// Bytes of main memory in all and free, where the system says so in /proc/meminfo.
fn memory() -> [Option<u64>; 2] {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    ["MemTotal:", "MemAvailable:"].map(|name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    })
}

/// A small model.
fn ttt(inner: Inner) -> Result<Config> {
    Ok(small(Config::preset("tiny", inner)?))
}

fn small(config: Config) -> Config {
    Config { vocab_size: 64, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2, ..config }
}

/// What there is of CUDA.
struct Gpu<'d> {
    device: &'d Device,
    libraries: &'static Libraries,
}

impl<'d> Gpu<'d> {
    fn of(device: &'d Device) -> Gpu<'d> {
        Gpu { device, libraries: libraries() }
    }

    /// Name, file or `None`, and version of each library.
    fn found(&self) -> [(&'static str, Option<String>, Option<String>); 3] {
        let file = |found: &Option<Found>| found.as_ref().map(ToString::to_string);
        let driver = self.device.as_cuda().map(|cuda| cuda.info().driver.clone());
        [
            ("driver", file(&self.libraries.driver), driver),
            ("NVRTC", file(&self.libraries.nvrtc), compile::version()),
            ("cuBLASLt", file(&self.libraries.cublaslt), cuda::cublaslt_version()),
        ]
    }

    fn json(&self) -> serde_json::Value {
        let libraries: serde_json::Map<_, _> = self
            .found()
            .into_iter()
            .map(|(name, file, version)| (name.to_owned(), json!({"file": file, "version": version})))
            .collect();
        let gpu = self.device.as_cuda().map(|cuda| {
            let info = cuda.info();
            json!({
                "name": info.name, "compute": [info.compute.0, info.compute.1], "multiprocessors": info.multiprocessors,
                "memory_bytes": info.memory, "free_bytes": info.free,
            })
        });
        json!({"in_use": gpu, "libraries": libraries, "searched": self.libraries.searched, "kernel_cache": kernels::cache()})
    }

    fn print(&self, out: &mut dyn Write) -> Result<()> {
        for (name, file, version) in self.found() {
            let version = version.map_or_else(String::new, |v| format!("{v}, "));
            let file = file.unwrap_or_else(|| "not found".into());
            writeln!(out, "{:11}{version}{file}", name.to_lowercase())?;
        }
        let searched: Vec<String> = self.libraries.searched.iter().map(|p| p.display().to_string()).collect();
        writeln!(out, "searched   the system's loader{}{}", if searched.is_empty() { "" } else { ", " }, searched.join(", "))?;
        if let Some(cache) = kernels::cache() {
            writeln!(out, "kernels    kept in {}", cache.display())?;
        }
        match self.device.as_cuda() {
            Some(cuda) => {
                let info = cuda.info();
                writeln!(
                    out,
                    "device     {}, compute capability {}.{}, {} multiprocessors, {} of which {} free",
                    info.name,
                    info.compute.0,
                    info.compute.1,
                    info.multiprocessors,
                    units::bytes(info.memory as u64),
                    units::bytes(info.free as u64)
                )?;
            }
            None => writeln!(out, "device     the processor")?,
        }
        Ok(())
    }
}

/// Relative errors of logits and gradients of a small model against the plain loops.
fn self_test(device: &Device, config: &Config) -> Result<[f64; 2]> {
    let plain = Device::cpu_with(device.threads(), Kernels::Reference)?;
    let [ours, reference] = [logits_and_gradient(config, device)?, logits_and_gradient(config, &plain)?];
    Ok([0, 1].map(|i| relative(&ours[i], &reference[i])))
}

fn logits_and_gradient(config: &Config, device: &Device) -> Result<[Vec<f64>; 2]> {
    let lm = Lm::new(config, device, DType::F32, 0)?;
    // Two sequences, one with a short last mini-batch.
    let ids: Vec<u32> = (0..104u32).map(|i| i * i % 61).collect();
    let batch = Batch::packed(&[&ids[..64], &ids[64..]]);
    let n = ids.len();
    let (hidden, saved) = lm.forward(&batch, None, Keep::Saved { group: 2 }, 1.0)?;
    let logits = lm.logits(&hidden, &(0..n).collect::<Vec<_>>())?.to_f64_vec();
    let mut grads = Params::zeros(lm.params().table(), device, DType::F32)?;
    let (_, dhidden) = lm.loss(&hidden, &ids, &vec![1.0 / n as f64; n], &mut grads)?;
    lm.backward(&batch, saved.expect("the pass keeps something"), dhidden, None, &mut grads)?;
    Ok([logits, grads.data().to_f64_vec()])
}

fn relative(ours: &[f64], reference: &[f64]) -> f64 {
    let scale = reference.iter().map(|x| x.abs()).fold(f64::MIN_POSITIVE, f64::max);
    let larger = |a: f64, b: f64| if b.is_nan() || b > a { b } else { a };
    ours.iter().zip(reference).map(|(a, b)| (a - b).abs()).fold(0.0, larger) / scale
}
