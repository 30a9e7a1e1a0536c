//! `ttt plan`: what a model costs, before anything is allocated.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};
use ttt::Storage;
use ttt::config::{Config, Mixer};
use ttt::device::cuda;
use ttt::params::ParamTable;
use ttt::plan::{Fit, Memory, Place, Segments, Step, flops, inference_memory, weight_bytes};
use ttt::tensor::DType;
use ttt::train::settings::recompute::{Recompute, advice, filled};
use ttt::train::settings::{Precision, Settings};

use crate::args::{DeviceName, Plan};
use crate::commands::train::settings::is_assignment;
use crate::{Usage, model, units};

/// Runs the command.
pub fn run(args: &Plan, out: &mut dyn Write) -> Result<()> {
    let settings = settings(&args.settings)?;
    settings.validate()?;
    let config = settings.model_config()?;
    let batch = args.batch.map_or(settings.micro_batch(), |n| n as usize);
    let length = args.length.map_or(settings.segment_length(), |n| n as usize);
    let (place, room) = place(args, &settings, &config)?;
    let step = {
        let planned = settings.planned_step(&config, place);
        // All sequences of a step carry states, those of other micro-batches too.
        let segments = planned.segments.map(|segments| Segments { slots: segments.slots.max(batch), ..segments });
        Step { lens: vec![length; batch], segments, ..planned }
    };
    let mut memory: Vec<(Recompute, Memory)> =
        step.ways().map(|keep| (Recompute::of(keep), Step { keep, ..step.clone() }.memory())).collect();
    let inference = inference_memory(&config, batch, length, place);
    if args.json {
        return Ok(writeln!(out, "{}", json(&config, &step, &memory, inference, room))?);
    }
    writeln!(out, "{}", describe(&config))?;
    writeln!(out, "parameters  {}", units::grouped(ParamTable::new(&config).0.parameters() as u64))?;
    let flops = flops(&config, length);
    writeln!(out, "\narithmetic per token (a multiply-add is two operations)")?;
    writeln!(
        out,
        "  forward   {}FLOP, of which {} {}FLOP",
        units::count(flops.forward()),
        match config.mixer {
            Mixer::Ttt => "the inner loop",
            Mixer::Attention => "the attention, a mean over this length,",
            Mixer::Mamba => "the scan",
        },
        units::count(flops.mixing)
    )?;
    writeln!(out, "  training  {}FLOP", units::count(flops.training))?;
    let of = match place {
        Place::Cpu | Place::Gpu(DType::F32) => "in f32",
        Place::Gpu(_) => "in mixed precision",
    };
    let on = if place == Place::Cpu { "" } else { " on a GPU" };
    writeln!(out, "\nmemory {of}{on} for {batch} x {length} tokens at once")?;
    write!(out, "{:18}", "")?;
    for (recompute, _) in &memory {
        let title = if *recompute == Recompute::None { "training".into() } else { format!("--recompute {}", recompute.name()) };
        write!(out, "{title:>18}")?;
    }
    writeln!(out, "{:>18}", "inference")?;
    memory.push((Recompute::None, inference));
    for (name, part) in PARTS {
        if memory.iter().all(|(_, m)| part(m) == 0) {
            continue;
        }
        write!(out, "  {name:16}")?;
        for (_, m) in &memory {
            let bytes = part(m);
            write!(out, "{:>18}", if bytes == 0 { "-".into() } else { units::bytes(bytes as u64) })?;
        }
        writeln!(out)?;
    }
    if let Some(room) = room {
        let needs = memory[0].1.total();
        writeln!(out, "\nof {} there", units::bytes(room as u64))?;
        match needs <= filled(room) {
            true => writeln!(out, "  training fits")?,
            false => writeln!(out, "  training does not fit: {}", advice(&step, room, "train.micro_batch="))?,
        }
    }
    let stored = stored(&config).map(|(storage, bytes)| format!("{} as {storage}", units::bytes(bytes as u64)));
    writeln!(out, "\nweights for inference: {}", stored.join(", "))?;
    Ok(())
}

/// What the plan is for, and how much memory there is, where that is known.
fn place(args: &Plan, settings: &Settings, config: &Config) -> Result<(Place, Option<usize>)> {
    let ordinal = match args.device {
        DeviceName::Cuda(ordinal) => {
            cuda::supports(config)?;
            Some(ordinal)
        }
        DeviceName::Auto if cuda::libraries::libraries().driver.is_some() && cuda::supports(config).is_ok() => Some(0),
        DeviceName::Auto | DeviceName::Cpu | DeviceName::Reference => None,
    };
    let Some(ordinal) = ordinal else { return Ok((Place::Cpu, None)) };
    let dtype = if settings.train.precision == Precision::F32 { DType::F32 } else { DType::Bf16 };
    let free = || cuda::context::Context::open(ordinal).and_then(|context| context.info()).ok().map(|info| info.free);
    Ok((Place::Gpu(dtype), args.memory.map(|gib| (gib as usize) << 30).or_else(free)))
}

/// Bytes of the weights for inference, by how they are stored.
fn stored(config: &Config) -> [(String, usize); 3] {
    [Storage::F32, Storage::Bf16, Storage::Int8].map(|storage| (storage.to_string(), weight_bytes(config, storage)))
}

fn json(config: &Config, step: &Step<'_>, memory: &[(Recompute, Memory)], inference: Memory, room: Option<usize>) -> Value {
    let length = step.lens[0];
    let flops = flops(config, length);
    let mut object = json!({
        "parameters": ParamTable::new(config).0.parameters(), "batch": step.lens.len(), "length": length,
        "device": if step.place == Place::Cpu { "cpu" } else { "cuda" },
        "flops_per_token": {
            "forward": flops.forward(), "forward_matmul": flops.matmul, "forward_mixing": flops.mixing,
            "training": flops.training,
        },
    });
    object["inference_weight_bytes"] =
        stored(config).into_iter().map(|(storage, bytes)| (storage, json!(bytes))).collect::<serde_json::Map<_, _>>().into();
    let training = memory.iter().map(|(recompute, m)| match recompute {
        Recompute::None => ("training".to_owned(), parts(m)),
        other => (format!("training_recompute_{}", other.name()), parts(m)),
    });
    object["memory_bytes"] = Value::Object(training.chain([("inference".to_owned(), parts(&inference))]).collect());
    if let Some(room) = room {
        object["room_bytes"] = json!(room);
        object["fits"] = match step.fit(filled(room)) {
            Some(Fit { sequences, keep, bytes }) => {
                json!({"batch": sequences, "recompute": Recompute::of(keep).name(), "bytes": bytes})
            }
            None => Value::Null,
        };
    }
    object
}

/// One row of the table.
type Part = fn(&Memory) -> usize;

/// Its rows.
const PARTS: [(&str, Part); 11] = [
    ("weights", |m| m.weights),
    ("bf16 copies", |m| m.copies),
    ("gradients", |m| m.gradients),
    ("moments", |m| m.optimizer),
    ("activations", |m| m.activations),
    ("fast weights", |m| m.fast_weights),
    ("inner gradients", |m| m.inner_gradients),
    ("states", |m| m.states),
    ("transient", |m| m.transient),
    ("cuBLASLt", |m| m.libraries),
    ("all", Memory::total),
];

/// A model in a line.
pub fn describe(config: &Config) -> String {
    let what = match config.mixer {
        Mixer::Ttt => {
            let backbone = if config.use_gate && config.share_qk { "Mamba" } else { "Transformer" };
            let convolutions = if config.pre_conv { " with convolutions" } else { "" };
            format!("{}, {backbone} backbone{convolutions}", config.kind())
        }
        Mixer::Attention | Mixer::Mamba => config.kind().to_owned(),
    };
    let ffn = config.intermediate_size;
    let heads = format!("{} heads", config.num_attention_heads);
    let (before, after) = match config.mixer {
        Mixer::Ttt => {
            let mini_batch = match config.mini_batch() {
                Some(k) => format!(", mini-batch {k}"),
                None if config.linear_attention.is_some() => String::new(),
                None => ", mini-batch the sequence".into(),
            };
            (format!("{heads}, feed-forward {ffn}"), mini_batch)
        }
        Mixer::Attention if config.key_value_heads() < config.num_attention_heads => {
            (format!("{heads}, {} of keys and values, feed-forward {ffn}", config.key_value_heads()), String::new())
        }
        Mixer::Attention => (format!("{heads}, feed-forward {ffn}"), String::new()),
        Mixer::Mamba => (format!("{} channels with {} states", config.inner_size(), config.state_size), String::new()),
    };
    format!(
        "{what}: {} layers of {}, {before}, {} token ids{after}",
        config.num_hidden_layers, config.hidden_size, config.vocab_size
    )
}

/// Settings of a file or a model folder with overrides.
pub fn settings(typed: &[String]) -> Result<Settings> {
    let (overrides, named): (Vec<&String>, Vec<&String>) = typed.iter().partition(|text| is_assignment(text));
    let mut settings = match named.as_slice() {
        [] => Settings::default(),
        [file] if Path::new(file).extension().is_some_and(|e| e == "toml") => Settings::load(file)?,
        [folder] => {
            let mut settings = Settings::default();
            let folder = model::resolve(Path::new(folder))?;
            settings.set("model.folder", folder.to_string_lossy().into_owned().into(), folder.to_string_lossy().as_ref())?;
            settings
        }
        [first, second, ..] => return Err(Usage(format!("{first} and {second} are two models; one is enough")).into()),
    };
    for assignment in overrides {
        settings.apply_override(assignment)?;
    }
    Ok(settings)
}

fn parts(m: &Memory) -> Value {
    json!({
        "weights": m.weights, "bf16_copies": m.copies, "gradients": m.gradients, "moments": m.optimizer, "activations": m.activations,
        "fast_weights": m.fast_weights, "inner_gradients": m.inner_gradients, "states": m.states, "transient": m.transient,
        "cublaslt": m.libraries, "total": m.total(),
    })
}
