//! `ttt info`: what a model folder holds.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::Result;
use serde_json::json;
use ttt::Storage;
use ttt::config::Mixer;
use ttt::data::Tokenizer;
use ttt::hub::{ModelFolder, Skill, SkillInfo, base_hash, config_json, model_hash};
use ttt::params::Entry;
use ttt::plan;
use ttt::train::checkpoint::{STATE, TrainerState};

use crate::args::Info;
use crate::commands::plan::describe;
use crate::{model, units};

/// Runs the command.
pub fn run(args: &Info, out: &mut dyn Write) -> Result<()> {
    if args.model.is_file() {
        return skill(args, out);
    }
    let path = model::resolve(&args.model)?;
    let folder = ModelFolder::open(&path)?;
    let config = folder.config();
    let lm = model::load_as(&path, &model::cpu()?, None)?;
    let table = lm.weights().table();
    let mut by_part: BTreeMap<usize, (&str, usize)> = BTreeMap::new();
    for entry in table.entries() {
        let (order, part) = part(entry);
        by_part.entry(order).or_insert((part, 0)).1 += entry.elements();
    }
    let dtype = match lm.weights().storage() {
        Storage::Int8 => "int8",
        _ => ["torch_dtype", "dtype"].iter().find_map(|key| folder.extra().get(*key)?.as_str()).unwrap_or("unknown"),
    };
    let tokenizer = Tokenizer::from_folder(&path)?;
    let state = plan::inference_memory(config, 1, 1, plan::Place::Cpu).states;
    // What a token adds to the state of attention, in f32.
    let per_token = (config.mixer == Mixer::Attention).then(|| 8 * config.num_hidden_layers * config.key_value_size());
    let (hash, base) = (model_hash(lm.weights()), base_hash(lm.weights()));
    let trainer = path.join(STATE).exists().then(|| TrainerState::read(&path)).transpose()?;
    if args.json {
        let tokenizer = tokenizer.as_ref().map(|t| {
            json!({"kind": kind(t), "vocab_size": t.vocab_size(), "bos": t.bos(), "eos": t.eos(), "fingerprint": t.fingerprint()})
        });
        let parts: serde_json::Map<_, _> = by_part.values().map(|(name, n)| ((*name).to_owned(), json!(n))).collect();
        let mut object = json!({
            "folder": path, "config": config_json::fields(config), "parameters": table.parameters(), "parameters_by_part": parts, "stored_as": dtype, "weight_bytes": lm.weights().bytes(),
            "hash": hash, "base": base, "tokenizer": tokenizer, "state_bytes_per_sequence": state, "state_bytes_per_token": per_token, "training": trainer,
        });
        if args.tensors {
            object["tensors"] = table.entries().iter().map(|e| json!({"name": e.name, "shape": e.shape})).collect();
        }
        writeln!(out, "{object}")?;
        return Ok(());
    }
    writeln!(out, "folder      {}", path.display())?;
    writeln!(out, "model       {}", describe(config))?;
    writeln!(out, "parameters  {}", units::grouped(table.parameters() as u64))?;
    for (name, n) in by_part.values() {
        writeln!(out, "  {:>13}  {name}", units::grouped(*n as u64))?;
    }
    writeln!(out, "stored as   {dtype}; {} in memory", units::bytes(lm.weights().bytes() as u64))?;
    writeln!(out, "hash        {hash}")?;
    if config.inner().is_some() {
        writeln!(out, "base        {base}, the same with every skill")?;
    }
    match &tokenizer {
        Some(t) => writeln!(out, "tokenizer   {}, {} ids, BOS {}, EOS {}", kind(t), t.vocab_size(), id(t.bos()), id(t.eos()))?,
        None => writeln!(out, "tokenizer   none; name one with --tokenizer")?,
    }
    match per_token {
        Some(bytes) => writeln!(out, "state       {} a token in f32", units::bytes(bytes as u64))?,
        None => writeln!(out, "state       {} a sequence in f32, however long it is", units::bytes(state as u64))?,
    }
    if let Some(t) = trainer {
        let best = t.best_loss.map_or_else(|| "none yet".into(), |loss| format!("{loss:.4}"));
        writeln!(
            out,
            "training    step {}, {} tokens, {}, lowest validation loss {best}; a checkpoint that `ttt train --resume` goes on from",
            t.step,
            units::grouped(t.tokens),
            units::seconds(t.elapsed_seconds)
        )?;
    }
    if args.tensors {
        writeln!(out, "tensors")?;
        for entry in table.entries() {
            writeln!(out, "  {:?} {}", entry.shape, entry.name)?;
        }
    }
    Ok(())
}

/// What a skill file says.
fn skill(args: &Info, out: &mut dyn Write) -> Result<()> {
    let skill = Skill::open(&args.model)?;
    let SkillInfo { name, tokens, tokenizer } = skill.info();
    let bytes = std::fs::metadata(&args.model)?.len();
    if args.json {
        let object = json!({
            "skill": name, "tokens": tokens, "tokenizer": tokenizer, "base": skill.base(), "parameters": skill.elements(),
            "bytes": bytes,
        });
        writeln!(out, "{object}")?;
        return Ok(());
    }
    // Escaped: a file that came from elsewhere may say anything.
    writeln!(out, "skill       {name:?}")?;
    writeln!(out, "learned     from {} tokens", units::grouped(*tokens))?;
    writeln!(out, "parameters  {}, {}", units::grouped(skill.elements() as u64), units::bytes(bytes))?;
    writeln!(out, "base        {}; `ttt info MODEL` shows a model's", skill.base())?;
    writeln!(out, "tokenizer   {tokenizer}")?;
    Ok(())
}

/// Position in the list and name of the part of the model that a parameter belongs to.
fn part(entry: &Entry) -> (usize, &'static str) {
    let name = entry.name.as_str();
    if entry.initial_state {
        (2, "initial fast weights")
    } else if name.contains(".seq_modeling_block.") {
        (1, "TTT layers")
    } else if name.contains(".self_attn.") {
        (1, "attention")
    } else if name.contains(".mixer.") {
        (1, "Mamba layers")
    } else if name.contains(".mlp.") {
        (3, "feed-forward")
    } else if name.contains(".conv.") {
        (4, "convolutions before TTT layers")
    } else if name.contains("norm") {
        (5, "norms")
    } else {
        (0, "embedding and output")
    }
}

/// What a tokenizer is.
pub fn kind(tokenizer: &Tokenizer) -> &'static str {
    if tokenizer.is_bytes() { "bytes" } else { "tokenizer.json" }
}

/// An id, or that there is none.
pub fn id(id: Option<u32>) -> String {
    id.map_or_else(|| "none".into(), |id| id.to_string())
}
