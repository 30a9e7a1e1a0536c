//! `ttt plan`: what a model costs, before anything is allocated.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};
use ttt::Storage;
use ttt::config::{Config, Mixer};
use ttt::layer::Keep;
use ttt::params::ParamTable;
use ttt::plan::{Memory, Segments, flops, inference_memory, segmented_memory, training_memory, weight_bytes};
use ttt::train::Settings;

use crate::args::Plan;
use crate::commands::train::settings::is_assignment;
use crate::{Usage, model, units};

/// Runs the command.
pub fn run(args: &Plan, out: &mut dyn Write) -> Result<()> {
    let settings = settings(&args.settings)?;
    settings.validate()?;
    let config = settings.model_config()?;
    let batch = args.batch.map_or(settings.micro_batch(), |n| n as usize);
    let length = args.length.map_or(settings.segment_length(), |n| n as usize);
    let group = settings.train.checkpoint_group.max(1);
    let lens = vec![length; batch];
    let training = |keep| match settings.planned_segments() {
        // All sequences of a step carry states, those of other micro-batches too.
        Some(segments) => segmented_memory(&config, &lens, keep, Segments { slots: segments.slots.max(batch), ..segments }),
        None => training_memory(&config, &lens, keep),
    };
    let memory = [
        ("training", training(Keep::Saved { group })),
        ("training_recompute_block", training(Keep::Input { group })),
        ("inference", inference_memory(&config, batch, length)),
    ];
    let parameters = ParamTable::new(&config).0.parameters();
    let flops = flops(&config, length);
    let stored = [Storage::F32, Storage::Bf16, Storage::Int8].map(|storage| (storage.to_string(), weight_bytes(&config, storage)));
    if args.json {
        let mut object = json!({
            "parameters": parameters, "batch": batch, "length": length,
            "flops_per_token": {
                "forward": flops.forward(), "forward_matmul": flops.matmul, "forward_mixing": flops.mixing,
                "training": flops.training,
            },
        });
        object["inference_weight_bytes"] =
            stored.iter().map(|(storage, bytes)| (storage.clone(), json!(bytes))).collect::<serde_json::Map<_, _>>().into();
        object["memory_bytes"] = Value::Object(memory.iter().map(|(name, m)| ((*name).to_owned(), parts(m))).collect());
        writeln!(out, "{object}")?;
        return Ok(());
    }
    writeln!(out, "{}", describe(&config))?;
    writeln!(out, "parameters  {}", units::grouped(parameters as u64))?;
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
    writeln!(out, "\nmemory in f32 for {batch} x {length} tokens at once")?;
    writeln!(out, "{:16}{:>14}{:>20}{:>14}", "", "training", "--recompute block", "inference")?;
    let rows: [(&str, Part); 8] = [
        ("weights", |m| m.weights),
        ("gradients", |m| m.gradients),
        ("moments", |m| m.optimizer),
        ("activations", |m| m.activations),
        ("fast weights", |m| m.fast_weights),
        ("states", |m| m.states),
        ("transient", |m| m.transient),
        ("all", Memory::total),
    ];
    for (name, part) in rows {
        let [a, b, c] = memory.each_ref().map(|(_, m)| match part(m) {
            0 => "-".into(),
            bytes => units::bytes(bytes as u64),
        });
        writeln!(out, "  {name:14}{a:>14}{b:>20}{c:>14}")?;
    }
    let stored = stored.map(|(storage, bytes)| format!("{} as {storage}", units::bytes(bytes as u64)));
    writeln!(out, "\nweights for inference: {}", stored.join(", "))?;
    Ok(())
}

/// One row of the table.
type Part = fn(&Memory) -> usize;

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
        "weights": m.weights, "gradients": m.gradients, "moments": m.optimizer, "activations": m.activations,
        "fast_weights": m.fast_weights, "states": m.states, "transient": m.transient, "total": m.total(),
    })
}
