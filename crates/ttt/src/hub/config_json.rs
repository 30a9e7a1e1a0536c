//! `config.json`: the fields of [`Config`] under their official names, beside those that only Hugging Face's code looks at.

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::FileDType;
use super::atomic::write_atomic;
use super::open_file;
use crate::config::Config;
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

/// Reads `config.json`: the model's hyperparameters, checked, and the fields that are none.
///
/// A field that is absent, or null where that means nothing, has its default.
///
/// # Errors
/// [`Error::Io`], or [`Error::Format`] for a model of another type and for the first field that is wrong.
pub fn read(path: &Path) -> Result<(Config, Map<String, Value>)> {
    let mut extra = read_object(path)?;
    match extra.get("model_type") {
        Some(Value::String(kind)) if kind == "ttt" => {}
        Some(kind) => return Err(Error::format(path, format!("model_type is {kind}; this program reads models of type \"ttt\""))),
        None => return Err(Error::format(path, "there is no model_type; a TTT model has \"model_type\": \"ttt\"")),
    }
    let mut known = Map::new();
    for name in fields(&Config::default()).keys() {
        match extra.shift_remove(name) {
            Some(Value::Null) if !MAY_BE_NULL.contains(&name.as_str()) => {}
            Some(value) => {
                // One field at a time, because serde does not say which one it stumbled over.
                let alone = Value::Object(Map::from_iter([(name.clone(), value.clone())]));
                if let Err(e) = serde_json::from_value::<Config>(alone) {
                    return Err(Error::format(path, format!("{name} is {value}: {e}")));
                }
                known.insert(name.clone(), value);
            }
            None => {}
        }
    }
    let config: Config = serde_json::from_value(Value::Object(known)).map_err(|e| Error::format(path, e.to_string()))?;
    match config.validate() {
        Err(Error::Config(message)) => Err(Error::format(path, message)),
        result => result.map(|()| (config, extra)),
    }
}

/// Writes `config.json` for weights stored as `dtype`; `extra` are fields that [`read`] did not know.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, config: &Config, extra: &Map<String, Value>, dtype: FileDType) -> Result<()> {
    let mut object = Map::from_iter([("architectures".to_owned(), json!(["TTTForCausalLM"]))]);
    object.extend(fields(config));
    object.insert("torch_dtype".to_owned(), json!(dtype.torch_name()));
    // The official default is false, which makes its `generate` read the whole prefix again for every token.
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

fn fields(config: &Config) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields,
        other => panic!("a Config serialises to an object, not {other:?}"),
    }
}
