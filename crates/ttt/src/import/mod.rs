//! Checkpoints of the official JAX code (`streaming_params`, `streaming_train_state`) as models of this crate: both inner models,
//! both backbones, and the Transformer baseline (`self_attention`), float32 or bfloat16, with or without the optimizer's moments.
//!
//! Such a file holds no configuration (that is a Python pickle beside it, which is not read): shapes and names give all of it but a
//! few constants, which have the values of the official training scripts unless told otherwise.

mod names;
mod stream;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use serde_json::{Map, Value};

use crate::config::{Config, Inner, Mixer, PRESETS};
use crate::device::Device;
use crate::hub::{open_file, some};
use crate::params::{ParamId, ParamTable, Params};
use crate::tensor::DType;
use crate::{AtPath, Error, Result};
use names::Layout;
use stream::Array;

/// Names of the files that the official code writes, likeliest first.
const FILES: [&str; 2] = ["streaming_params", "streaming_train_state"];

/// A parameter in a file.
struct Found<'a> {
    array: Array<'a>,
    layout: Layout,
}

impl Found<'_> {
    /// Sizes of the axes in our layout, those of length 1 left out.
    fn shape(&self) -> Vec<usize> {
        let mut shape = self.array.shape.clone();
        if self.layout == Layout::Transposed {
            shape.reverse();
        }
        shape.retain(|n| *n != 1);
        shape
    }

    /// The elements in our layout.
    fn values(&self) -> Vec<f32> {
        let values = self.array.values();
        let rows = match self.array.shape.first() {
            Some(rows) if self.layout == Layout::Transposed => *rows,
            _ => return values,
        };
        let cols = values.len() / rows.max(1);
        let mut turned = vec![0.0; values.len()];
        // In tiles, so that both sides stay in the cache.
        const TILE: usize = 32;
        for i0 in (0..rows).step_by(TILE) {
            for j0 in (0..cols).step_by(TILE) {
                for i in i0..rows.min(i0 + TILE) {
                    for j in j0..cols.min(j0 + TILE) {
                        turned[j * rows + i] = values[i * cols + j];
                    }
                }
            }
        }
        turned
    }
}

/// The file that a path means: the path itself, or the weights of the official code in that folder.
///
/// # Errors
/// [`Error::Io`] when there are none.
pub fn locate(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let found = FILES.map(|name| path.join(name)).into_iter().find(|file| file.is_file());
    found.ok_or_else(|| {
        let message = format!("there is no {} in this folder; name the file", FILES.join(" and no "));
        Error::io(path, std::io::Error::new(std::io::ErrorKind::NotFound, message))
    })
}

/// Reads a checkpoint of the official JAX code. `overrides` are fields of `config.json` that win over what the file tells.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a file that is damaged, holds another model, or numbers that are not finite;
/// [`Error::Config`] for an override that is unknown or does not fit; [`Error::OutOfMemory`].
pub fn read(path: &Path, overrides: &[(String, Value)], device: &Device) -> Result<(Config, Params)> {
    let file = open_file(path)?;
    // SAFETY: the map is only read, and nobody here changes a file in place; another program that cut the file short while it is
    // mapped would stop this one with SIGBUS.
    let map = unsafe { Mmap::map(&file) }.at(path)?;
    let wrong = |message: String| Error::format(path, message);
    let found = parameters(&map).map_err(wrong)?;
    let config = overridden(infer(&found).map_err(wrong)?, overrides)?;
    if config.num_attention_heads == 0 {
        return Err(wrong("a Transformer's file does not say how many heads it has; add num_attention_heads=N".into()));
    }
    config.validate()?;
    let table = Arc::new(ParamTable::new(&config).0);
    check(&found, &table).map_err(wrong)?;

    let mut params = Params::zeros(&table, device, DType::F32)?;
    for (index, entry) in table.entries().iter().enumerate() {
        let mut values = found[&entry.name].values();
        if config.mixer == Mixer::Attention && [".q_proj.weight", ".k_proj.weight"].iter().any(|end| entry.name.ends_with(end)) {
            values = pairs_as_halves(&values, config.head_dim(), config.hidden_size);
        }
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Err(wrong(format!(
                "element {at} of `{}` is {}; this checkpoint is of a run that diverged",
                entry.name, values[at]
            )));
        }
        params.values_mut::<f32>(ParamId(index)).copy_from_slice(&values);
    }
    Ok((config, params))
}

/// Every parameter of a file by its official PyTorch name; step and optimizer are passed over.
fn parameters(file: &[u8]) -> std::result::Result<BTreeMap<String, Found<'_>>, String> {
    let mut found = BTreeMap::new();
    let mut unknown = Vec::new();
    stream::entries(file, |path, array| {
        // A whole training state has `params/params/`, its parameters alone nothing.
        let inside = match path.iter().map(|p| &**p).collect::<Vec<_>>().as_slice() {
            ["params", "params", rest @ ..] => rest.join("/"),
            ["opt_state" | "step", ..] => return Ok(()),
            rest => rest.join("/"),
        };
        let Some((name, layout)) = names::official(&inside) else {
            unknown.push(format!("`{inside}`"));
            return Ok(());
        };
        if found.insert(name, Found { array: array()?, layout }).is_some() {
            return Err(format!("there are two arrays `{inside}`"));
        }
        Ok(())
    })?;
    if !unknown.is_empty() {
        return Err(format!("these arrays are of no TTT model: {}", some(&unknown, ", ")));
    }
    if found.is_empty() {
        return Err("there is no parameter in this file".into());
    }
    if is_transformer(&found) {
        found = found.into_iter().map(|(name, array)| (names::of_transformer(&name), array)).collect();
    }
    Ok(found)
}

/// Whether these are the parameters of the baseline: of what mixes tokens there are the four projections alone.
fn is_transformer(found: &BTreeMap<String, Found<'_>>) -> bool {
    let mut mixer = found.keys().filter_map(|name| name.split_once(".seq_modeling_block.")).map(|(_, name)| name).peekable();
    mixer.peek().is_some()
        && mixer.all(|name| ["q_proj", "k_proj", "v_proj", "o_proj"].map(|p| format!("{p}.weight")).contains(&name.to_owned()))
}

/// The rows of a projection `[heads · d, cols]` to queries or keys whose pairs are neighbours, as those of one whose pairs are the
/// halves of a head: the rotation then turns the same numbers, and scores do not change.
fn pairs_as_halves(rows: &[f32], head_dim: usize, cols: usize) -> Vec<f32> {
    let mut turned = Vec::with_capacity(rows.len());
    for head in rows.chunks(head_dim * cols) {
        let row = |i: usize| &head[i * cols..(i + 1) * cols];
        (0..head_dim).step_by(2).chain((1..head_dim).step_by(2)).for_each(|i| turned.extend_from_slice(row(i)));
    }
    turned
}

/// The axes of an array, of which there are `wanted`.
fn axes<'f>(found: &'f BTreeMap<String, Found<'_>>, name: &str, wanted: usize) -> std::result::Result<&'f [usize], String> {
    let shape = &found.get(name).ok_or_else(|| format!("there is no array for `{name}`; the file is not whole"))?.array.shape;
    if shape.len() == wanted { Ok(shape.as_slice()) } else { Err(format!("the array for `{name}` has shape {shape:?}")) }
}

/// One more than the last layer that has an array.
fn layers(found: &BTreeMap<String, Found<'_>>) -> usize {
    let layer = |name: &String| name.strip_prefix("model.layers.")?.split_once('.')?.0.parse::<usize>().ok();
    found.keys().filter_map(layer).max().map_or(0, |last| last + 1)
}

/// The configuration of a Transformer. Its number of heads leaves no trace in a file: that of the published model of its width, or
/// 0 where there is none.
fn infer_transformer(found: &BTreeMap<String, Found<'_>>) -> std::result::Result<Config, String> {
    let &[vocab_size, hidden_size] = axes(found, "model.embed_tokens.weight", 2)? else { unreachable!("two axes") };
    let published = PRESETS.iter().filter_map(|name| Config::transformer(name).ok()).find(|c| c.hidden_size == hidden_size);
    Ok(Config {
        mixer: Mixer::Attention,
        vocab_size,
        hidden_size,
        intermediate_size: axes(found, "model.layers.0.mlp.gate_proj.weight", 2)?[1],
        num_hidden_layers: layers(found),
        num_attention_heads: published.map_or(0, |c| c.num_attention_heads),
        tie_word_embeddings: !found.contains_key("lm_head.weight"),
        ..Config::default()
    })
}

/// The configuration that names and shapes tell.
fn infer(found: &BTreeMap<String, Found<'_>>) -> std::result::Result<Config, String> {
    if found.keys().any(|name| name.contains(".self_attn.")) {
        return infer_transformer(found);
    }
    let block = "model.layers.0.seq_modeling_block.";
    let axes = |name: &str, wanted: usize| axes(found, name, wanted);
    let in_block = |name: &str, wanted: usize| axes(&format!("{block}{name}"), wanted);
    let has = |name: &str| found.contains_key(&format!("{block}{name}"));
    let embedding = axes("model.embed_tokens.weight", 2)?;
    let inner = if has("W2") { Inner::Mlp } else { Inner::Linear };
    let pre_conv = found.contains_key("model.layers.0.conv.conv.weight");
    let default = Config::default();
    let conv_kernel = match (has("conv_q.weight"), pre_conv) {
        (true, _) => in_block("conv_q.weight", 3)?[0],
        (false, true) => axes("model.layers.0.conv.conv.weight", 3)?[0],
        _ => default.conv_kernel,
    };
    let config = Config {
        vocab_size: embedding[0],
        hidden_size: embedding[1],
        intermediate_size: axes("model.layers.0.mlp.gate_proj.weight", 2)?[1],
        num_hidden_layers: layers(found),
        num_attention_heads: in_block("ttt_norm_weight", 2)?[0],
        mini_batch_size: in_block("learnable_token_idx", 1)?[0],
        use_gate: has("g_proj.weight"),
        share_qk: has("conv_q.weight"),
        pre_conv,
        conv_kernel,
        tie_word_embeddings: !found.contains_key("lm_head.weight"),
        scan_checkpoint_group_size: 4,
        ..default
    };
    Ok(config.with_inner(inner))
}

/// The configuration with some fields replaced.
fn overridden(config: Config, overrides: &[(String, Value)]) -> Result<Config> {
    let Ok(Value::Object(mut fields)) = serde_json::to_value(&config) else { unreachable!("a configuration is an object") };
    let known: Vec<String> = fields.keys().filter(|name| *name != "mixer" && config.mixer.has_field(name)).cloned().collect();
    for (name, value) in overrides {
        if !known.contains(name) {
            let hint = crate::train::keys::nearest(name, &known).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
            return Err(Error::Config(format!("config.json has no field `{name}`{hint}")));
        }
        // Alone, because serde does not say which field it stumbled over.
        let alone = Value::Object(Map::from_iter([(name.clone(), value.clone())]));
        serde_json::from_value::<Config>(alone).map_err(|e| Error::Config(format!("{name} is {value}: {e}")))?;
        fields.insert(name.clone(), value.clone());
    }
    serde_json::from_value(Value::Object(fields)).map_err(|e| Error::Config(e.to_string()))
}

/// Checks that the parameters are those of the table.
fn check(found: &BTreeMap<String, Found<'_>>, table: &ParamTable) -> std::result::Result<(), String> {
    let quoted = |name: &String| format!("`{name}`");
    let missing: Vec<String> = table.entries().iter().map(|e| &e.name).filter(|n| !found.contains_key(*n)).map(quoted).collect();
    if !missing.is_empty() {
        return Err(format!("arrays are missing for {}; the file is not whole", some(&missing, ", ")));
    }
    let extra: Vec<String> = found.keys().filter(|n| table.find(n).is_none()).map(quoted).collect();
    if !extra.is_empty() {
        return Err(format!("arrays of another model are here too: {}", some(&extra, ", ")));
    }
    let mut wrong = Vec::new();
    for entry in table.entries() {
        let array = &found[&entry.name];
        let plain: Vec<usize> = entry.shape.iter().copied().filter(|n| *n != 1).collect();
        if array.shape() != plain {
            wrong.push(format!("`{}` has shape {:?} and should become {:?}", entry.name, array.array.shape, entry.shape));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(some(&wrong, "; ")) }
}
