//! `ttt state`: describes, compares and copies state files.

use std::io::Write;

use anyhow::{Context, Result, bail};
use serde_json::json;
use ttt::hub::write_atomic;
use ttt::state::{Learner, StateFile};

use crate::args::{State, StateDiff, StateFork, StateInfo};
use crate::{model, units};

/// Runs the command.
pub fn run(command: &State, out: &mut dyn Write) -> Result<()> {
    match command {
        State::Info(args) => info(args, out),
        State::Diff(args) => diff(args, out),
        State::Fork(args) => fork(args, out),
    }
}

fn info(args: &StateInfo, out: &mut dyn Write) -> Result<()> {
    let state = StateFile::open(&args.file)?;
    state.check_finite()?;
    let header = state.header();
    // Layers that keep nothing beyond a mini-batch, and so do not move.
    let mut still = Vec::new();
    let moved = match &args.model {
        Some(path) => {
            let lm = model::load(path, &args.device, Some(header.dtype.into()))?;
            let mut states = lm.states(1)?;
            let initial = StateFile::from_bytes(states.to_bytes(0, &lm, &[], None)?)?;
            // Only a restored state is one of this model for sure.
            states.restore(0, &lm, &args.file)?;
            for (layer, block) in lm.blocks().iter().enumerate() {
                let scale = block.mixer().ttt().map(|ttt| ttt.last_token_scale(lm.weights())).transpose()?;
                still.extend((scale.flatten() == Some(0.0)).then_some(layer));
            }
            // What starts at zero has not moved by a part of where it was.
            lm.config().inner().map(|_| initial.distances(&state)).transpose()?
        }
        None => None,
    };
    let bytes = state.bytes().len() as u64;
    let dtype = format!("{:?}", header.dtype).to_lowercase();
    if args.json {
        let object = json!({
            "bytes": bytes, "tokens": header.tokens, "pending": header.pending, "phase": header.phase(),
            "mini_batch_size": header.mini_batch, "learner": header.learner, "layers": header.layers, "dtype": dtype,
            "model": header.model, "tokenizer": header.tokenizer, "moved": moved,
            "mini_batch_only": still,
        });
        return Ok(writeln!(out, "{object}")?);
    }
    let learner = match header.learner {
        Learner::Linear => "TTT-Linear",
        Learner::Mlp => "TTT-MLP",
        Learner::Batch => "TTT-Linear in one mini-batch",
        Learner::LinearAttention => "linear attention",
        Learner::Attention => "attention",
        Learner::Mamba => "Mamba",
    };
    writeln!(out, "size       {}", units::bytes(bytes))?;
    writeln!(out, "tokens     {} read, {} pending", units::grouped(header.tokens), header.pending.len())?;
    if matches!(header.learner, Learner::Linear | Learner::Mlp) {
        writeln!(out, "phase      {} of {}", header.phase(), header.mini_batch)?;
    }
    writeln!(out, "learner    {learner}, {} layers, {dtype}", header.layers)?;
    writeln!(out, "model      {}", units::printable(&header.model))?;
    writeln!(out, "tokenizer  {}", units::printable(header.tokenizer.as_deref().unwrap_or("unknown")))?;
    if let Some(moved) = moved {
        writeln!(out, "\nlayer  fast weights moved, relative to their start")?;
        write_layers(&moved, out)?;
    }
    if !still.is_empty() {
        let layers = still.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        writeln!(
            out,
            "\nlayers {layers} keep nothing beyond a mini-batch: the learned scale of its last token is 0, where training has left it"
        )?;
    }
    Ok(())
}

fn diff(args: &StateDiff, out: &mut dyn Write) -> Result<()> {
    let (a, b) = (StateFile::open(&args.a)?, StateFile::open(&args.b)?);
    // Lists of keys and values have no distance.
    let distances = match a.header().learner {
        Learner::Attention => Vec::new(),
        _ => a.distances(&b)?,
    };
    let (equal, tokens) = (a.same_state(&b), [a.header().tokens, b.header().tokens]);
    if args.json {
        let object = json!({
            "equal": equal, "tokens": tokens, "pending": [a.header().pending, b.header().pending], "distance": distances,
        });
        return Ok(writeln!(out, "{object}")?);
    }
    writeln!(out, "{}", if equal { "the states are equal" } else { "the states differ" })?;
    writeln!(out, "tokens read: {} and {}", units::grouped(tokens[0]), units::grouped(tokens[1]))?;
    match a.header().learner {
        Learner::Attention => writeln!(out, "no distances: keys and values are a list that grows, not a vector of fixed size")?,
        Learner::Mamba => writeln!(out, "\nlayer  distance of the recurrent state, relative to the first state's")?,
        Learner::LinearAttention => writeln!(out, "\nlayer  distance of the sums, relative to the first state's")?,
        _ => writeln!(out, "\nlayer  distance of the fast weights, relative to the first state's")?,
    }
    write_layers(&distances, out)
}

fn write_layers(values: &[f64], out: &mut dyn Write) -> Result<()> {
    for (layer, value) in values.iter().enumerate() {
        writeln!(out, "{layer:5}  {value:.6}")?;
    }
    Ok(())
}

fn fork(args: &StateFork, out: &mut dyn Write) -> Result<()> {
    let state = StateFile::open(&args.file)?;
    state.check_finite()?;
    if let Some(there) = args.new.iter().find(|new| new.exists() && !args.force) {
        bail!("{} exists; name another file, or overwrite it with --force", there.display());
    }
    for new in &args.new {
        write_atomic(new, |w| w.write_all(state.bytes()))?;
        let copy = StateFile::open(new).with_context(|| format!("the copy {} cannot be read", new.display()))?;
        if copy.bytes() != state.bytes() {
            bail!("the copy {} is not what was written; check the disk", new.display());
        }
        writeln!(out, "{}, {}", new.display(), units::bytes(copy.bytes().len() as u64))?;
    }
    Ok(())
}
