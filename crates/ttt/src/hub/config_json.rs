//! `config.json`: the fields of [`Config`] under the official names of their mixer, beside those that only Hugging Face's code looks
//! at. `model_type` says the mixer: a Transformer's folder is one of Hugging Face's Llama, a Mamba's one of its Mamba.

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::FileDType;
use super::atomic::write_atomic;
use super::open_file;
use crate::config::{Config, Mixer, ladder};
use crate::{AtPath, Error, Result};

/// Longest JSON file that is read, in bytes; an index of ten thousand tensors has one million.
const MAX_JSON: u64 = 64 << 20;

/// Fields in which null means none rather than the default.
const MAY_BE_NULL: [&str; 3] = ["pad_token_id", "bos_token_id", "eos_token_id"];

/// Reads a file that holds one JSON object.
///
/// # Errors
/// [`Error::Io`], or [`Error::Format`] for what is no JSON object or is longer than 64 MiB.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let mut bytes = Vec::new();
    open_file(path)?.take(MAX_JSON + 1).read_to_end(&mut bytes).at(path)?;
    if bytes.len() as u64 > MAX_JSON {
        return Err(Error::format(path, format!("longer than {MAX_JSON} bytes; this is not the file it is called")));
    }
    serde_json::from_slice(&bytes).map_err(|e| Error::format(path, format!("not a JSON object: {e}")))
}

/// Writes a JSON object, indented, atomically.
///
/// # Errors
/// [`Error::Io`].
pub fn write_object(path: &Path, object: &Map<String, Value>) -> Result<()> {
    write_atomic(path, |out| {
        serde_json::to_writer_pretty(&mut *out, object)?;
        out.write_all(b"\n")
    })
}

/// How the official code of a mixer spells things.
struct Dialect {
    mixer: Mixer,
    /// Its `model_type`.
    model_type: &'static str,
    architecture: &'static str,
    /// Fields that are called otherwise: our name, its name.
    names: &'static [(&'static str, &'static str)],
    /// Fields that change what a model computes and may only have one value, which they also have when they are absent, and that
    /// value.
    fixed: &'static [(&'static str, Fixed)],
}

/// The one value that is computed.
#[derive(Clone, Copy)]
enum Fixed {
    True,
    False,
    /// Not set.
    Null,
}

impl Fixed {
    fn value(self) -> Value {
        match self {
            Fixed::True => json!(true),
            Fixed::False => json!(false),
            Fixed::Null => Value::Null,
        }
    }
}

static DIALECTS: [Dialect; 3] = [
    Dialect { mixer: Mixer::Ttt, model_type: "ttt", architecture: "TTTForCausalLM", names: &[], fixed: &[] },
    Dialect {
        mixer: Mixer::Attention,
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        names: &[],
        fixed: &[("attention_bias", Fixed::False), ("mlp_bias", Fixed::False), ("rope_scaling", Fixed::Null)],
    },
    Dialect {
        mixer: Mixer::Mamba,
        model_type: "mamba",
        architecture: "MambaForCausalLM",
        names: &[("rms_norm_eps", "layer_norm_epsilon")],
        fixed: &[("use_bias", Fixed::False), ("use_conv_bias", Fixed::True)],
    },
];

impl Dialect {
    fn of(mixer: Mixer) -> &'static Dialect {
        DIALECTS.iter().find(|d| d.mixer == mixer).expect("one for every mixer")
    }

    /// Its name of one of our fields.
    fn name<'n>(&self, ours: &'n str) -> &'n str {
        self.names.iter().find(|(name, _)| *name == ours).map_or(ours, |(_, theirs)| theirs)
    }

    /// What a field that is absent means.
    fn defaults(&self) -> Config {
        let default = Config { mixer: self.mixer, ..Config::default() };
        match self.mixer {
            Mixer::Ttt => default,
            Mixer::Attention => Config {
                hidden_size: 4096,
                intermediate_size: 11_008,
                num_hidden_layers: 32,
                tie_word_embeddings: false,
                ..default
            },
            Mixer::Mamba => Config {
                vocab_size: 50_280,
                hidden_size: 768,
                num_hidden_layers: 32,
                rms_norm_eps: 1e-5,
                initializer_range: 0.1,
                pad_token_id: Some(0),
                bos_token_id: Some(0),
                eos_token_id: Some(0),
                ..default
            },
        }
    }
}

/// Reads `config.json`: the model's hyperparameters, checked, and the fields that are none.
///
/// A field that is absent, or null where that means nothing, has its official default.
///
/// # Errors
/// [`Error::Io`], or [`Error::Format`] for a model of another type and for the first field that is wrong.
pub fn read(path: &Path) -> Result<(Config, Map<String, Value>)> {
    let mut extra = read_object(path)?;
    let wrong = |message: String| Error::format(path, message);
    let known = DIALECTS.iter().map(|d| format!("\"{}\"", d.model_type)).collect::<Vec<_>>().join(", ");
    let dialect = match extra.shift_remove("model_type") {
        Some(kind) => DIALECTS
            .iter()
            .find(|d| kind == d.model_type)
            .ok_or_else(|| wrong(format!("model_type is {kind}; this program reads models of type {known}")))?,
        None => return Err(wrong(format!("there is no model_type; this program reads models of type {known}"))),
    };
    if dialect.mixer == Mixer::Attention {
        settle_rope(&mut extra).map_err(wrong)?;
    }
    for (name, fixed) in dialect.fixed {
        let only = fixed.value();
        if extra.shift_remove(*name).is_some_and(|value| value != only && !value.is_null()) {
            return Err(wrong(format!(
                "{name} is set; this program computes {} models with {name} {only} alone",
                dialect.model_type
            )));
        }
    }
    let Ok(Value::Object(mut values)) = serde_json::to_value(dialect.defaults()) else { unreachable!("a Config is an object") };
    for (ours, place) in &mut values {
        let name = dialect.name(ours);
        if ours == "mixer" || !dialect.mixer.has_field(ours) {
            continue;
        }
        match extra.shift_remove(name) {
            Some(Value::Null) if !MAY_BE_NULL.contains(&name) => {}
            Some(Value::String(text)) if ours == "time_step_rank" && text == "auto" => {}
            Some(value) => {
                // One field at a time, because serde does not say which one it stumbled over.
                let alone = Value::Object(Map::from_iter([(ours.clone(), value.clone())]));
                if let Err(e) = serde_json::from_value::<Config>(alone) {
                    return Err(wrong(format!("{name} is {value}: {e}")));
                }
                *place = value;
            }
            None => {}
        }
    }
    let mut config: Config = serde_json::from_value(Value::Object(values)).map_err(|e| wrong(e.to_string()))?;
    check_derived(&config, &mut extra).map_err(wrong)?;
    match config.validate() {
        Err(Error::Config(message)) => return Err(wrong(message)),
        result => result?,
    }
    // What follows from other fields is not a value of its own.
    config.num_key_value_heads = config.num_key_value_heads.filter(|n| *n != config.num_attention_heads);
    config.time_step_rank = config.time_step_rank.filter(|n| *n != config.hidden_size.div_ceil(16));
    Ok((config, extra))
}

/// Newer versions of transformers hold the base of the angles in `rope_parameters`, older ones `rope_scaling` beside it; a plain
/// rotation may be spelled out in either.
fn settle_rope(extra: &mut Map<String, Value>) -> std::result::Result<(), String> {
    if let Some(Value::Object(mut parameters)) = extra.shift_remove("rope_parameters") {
        if let Some(theta) = parameters.shift_remove("rope_theta").filter(|_| extra.get("rope_theta").is_none_or(Value::is_null)) {
            extra.insert("rope_theta".to_owned(), theta);
        }
        extra.insert("rope_scaling".to_owned(), Value::Object(parameters));
    }
    let Some(Value::Object(scaling)) = extra.get("rope_scaling") else { return Ok(()) };
    let kind = ["rope_type", "type"].iter().find_map(|key| scaling.get(*key));
    match kind {
        None if scaling.is_empty() => {}
        Some(kind) if kind == "default" => {}
        _ => {
            return Err(format!("rope_scaling is {}; this program turns by plain positions alone", Value::Object(scaling.clone())));
        }
    }
    extra.shift_remove("rope_scaling");
    Ok(())
}

/// Fields that follow from others and that the official code may hold all the same.
fn check_derived(config: &Config, extra: &mut Map<String, Value>) -> std::result::Result<(), String> {
    let derived = match config.mixer {
        Mixer::Ttt => return Ok(()),
        Mixer::Attention => {
            ("head_dim", config.hidden_size / config.num_attention_heads.max(1), "hidden_size / num_attention_heads")
        }
        Mixer::Mamba => ("intermediate_size", config.expand.saturating_mul(config.hidden_size), "expand times hidden_size"),
    };
    let (name, should, what) = derived;
    match extra.shift_remove(name) {
        Some(value) if !value.is_null() && value != json!(should) => Err(format!("{name} is {value}; it must be {what}, {should}")),
        _ => Ok(()),
    }
}

/// Writes `config.json` for weights stored as `dtype`; `extra` are fields that [`read`] did not know.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, config: &Config, extra: &Map<String, Value>, dtype: FileDType) -> Result<()> {
    let mut object = Map::from_iter([("architectures".to_owned(), json!([Dialect::of(config.mixer).architecture]))]);
    object.extend(fields(config));
    object.insert("torch_dtype".to_owned(), json!(dtype.torch_name()));
    // The official default of TTT is false, which makes its `generate` read the whole prefix again for every token.
    object.insert("use_cache".to_owned(), json!(true));
    for (name, value) in extra {
        // `dtype` is how newer versions of transformers spell torch_dtype, and `_name_or_path` is where another copy of the model
        // was: both would be wrong here.
        if !["dtype", "_name_or_path"].contains(&name.as_str()) && !object.contains_key(name) {
            object.insert(name.clone(), value.clone());
        }
    }
    write_object(path, &object)
}

/// Writes `generation_config.json`: the special tokens, and plain sampling.
///
/// # Errors
/// [`Error::Io`].
pub fn write_generation(path: &Path, config: &Config) -> Result<()> {
    let mut object = Map::new();
    for (name, id) in
        [("bos_token_id", config.bos_token_id), ("eos_token_id", config.eos_token_id), ("pad_token_id", config.pad_token_id)]
    {
        if let Some(id) = id {
            object.insert(name.to_owned(), json!(id));
        }
    }
    object.insert("do_sample".to_owned(), json!(true));
    object.insert("temperature".to_owned(), json!(1.0));
    write_object(path, &object)
}

/// The hyperparameters as `config.json` holds them: those that the mixer has, under its official names, with what follows from
/// others written out. Two configurations with the same fields are the same model.
pub fn fields(config: &Config) -> Map<String, Value> {
    let dialect = Dialect::of(config.mixer);
    let Ok(Value::Object(all)) = serde_json::to_value(config) else { unreachable!("a Config is an object") };
    let Ok(defaults) = serde_json::to_value(Config::default()) else { unreachable!("a Config is an object") };
    let mut fields = Map::new();
    for (ours, value) in all {
        // What no official model has is not written where it says nothing.
        if ladder::FIELDS.contains(&&*ours) && defaults.get(&ours) == Some(&value) {
            continue;
        }
        match ours.as_str() {
            "mixer" => fields.insert("model_type".to_owned(), json!(dialect.model_type)),
            _ if !config.mixer.has_field(&ours) => None,
            "num_key_value_heads" => fields.insert(ours, json!(config.key_value_heads())),
            "time_step_rank" => fields.insert(ours, json!(config.step_rank())),
            _ => fields.insert(dialect.name(&ours).to_owned(), value),
        };
    }
    fields.extend(dialect.fixed.iter().map(|(name, fixed)| ((*name).to_owned(), fixed.value())));
    if config.mixer == Mixer::Mamba {
        fields.insert("intermediate_size".to_owned(), json!(config.inner_size()));
    }
    fields
}
