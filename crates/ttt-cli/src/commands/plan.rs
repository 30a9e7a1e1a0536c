//! `ttt plan`: what a model costs, before anything is allocated.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};
use ttt::Storage;
use ttt::config::{Config, Inner};
use ttt::layer::Keep;
use ttt::params::ParamTable;
use ttt::plan::{Memory, flops, inference_memory, training_memory, weight_bytes};
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
    let length = args.length.map_or(settings.train.sequence_length, |n| n as usize);
    let group = settings.train.checkpoint_group.max(1);
    let lens = vec![length; batch];
    let memory = [
        ("training", training_memory(&config, &lens, Keep::Saved { group })),
        ("training_recompute_block", training_memory(&config, &lens, Keep::Input { group })),
        ("inference", inference_memory(&config, batch, length)),
    ];
    let parameters = ParamTable::new(&config).0.parameters();
    let flops = flops(&config);
    let stored = [Storage::F32, Storage::Bf16, Storage::Int8].map(|storage| (storage.to_string(), weight_bytes(&config, storage)));
    if args.json {
        let mut object = json!({
            "parameters": parameters, "batch": batch, "length": length,
            "flops_per_token": {
                "forward": flops.forward(), "forward_matmul": flops.matmul, "forward_inner_loop": flops.inner_loop,
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
        "  forward   {}FLOP, of which the inner loop {}FLOP",
        units::count(flops.forward()),
        units::count(flops.inner_loop)
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
    let backbone = if config.use_gate && config.share_qk { "Mamba" } else { "Transformer" };
    let inner = match config.ttt_layer_type {
        Inner::Linear => "TTT-Linear",
        Inner::Mlp => "TTT-MLP",
    };
    format!(
        "{inner}, {backbone} backbone{}: {} layers of {}, {} heads, feed-forward {}, {} token ids, mini-batch {}",
        if config.pre_conv { " with convolutions" } else { "" },
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        config.vocab_size,
        config.mini_batch_size
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
