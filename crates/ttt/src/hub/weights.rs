//! Between tensors in files and [`Params`].

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use super::safetensors::{Dtype, File, Source, TensorRef};
use crate::device::Device;
use crate::params::{ParamId, ParamTable, Params};
use crate::tensor::{DType, with_dtype};
use crate::{Error, Result};

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Type that weights have in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileDType {
    /// 32-bit floating point: exact.
    #[default]
    F32,
    /// The upper half of an f32, rounded to nearest even.
    Bf16,
    /// IEEE half precision, rounded to nearest even; values beyond 65,504 are refused.
    F16,
}

impl FileDType {
    /// Its name in the safetensors format.
    pub fn dtype(self) -> Dtype {
        match self {
            FileDType::F32 => Dtype::F32,
            FileDType::Bf16 => Dtype::BF16,
            FileDType::F16 => Dtype::F16,
        }
    }

    /// Its name in PyTorch.
    pub fn torch_name(self) -> &'static str {
        match self {
            FileDType::F32 => "float32",
            FileDType::Bf16 => "bfloat16",
            FileDType::F16 => "float16",
        }
    }
}

impl FromStr for FileDType {
    type Err = Error;

    fn from_str(name: &str) -> Result<FileDType> {
        match name {
            "f32" | "float32" => Ok(FileDType::F32),
            "bf16" | "bfloat16" => Ok(FileDType::Bf16),
            "f16" | "float16" => Ok(FileDType::F16),
            _ => Err(Error::Config(format!("weights cannot be stored as `{name}`; there are f32, bf16 and f16"))),
        }
    }
}

impl fmt::Display for FileDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileDType::F32 => "f32",
            FileDType::Bf16 => "bf16",
            FileDType::F16 => "f16",
        })
    }
}

/// Every parameter as a tensor to write, in the order of the table, its name behind `prefix`.
pub fn sources<'a>(params: &'a Params, prefix: &str, dtype: Dtype) -> Vec<Source<'a>> {
    let entries = params.table().entries().iter().enumerate();
    entries
        .map(|(index, entry)| {
            let name = format!("{prefix}{}", entry.name);
            with_dtype!(params.data().dtype(), E => Source::floats::<E>(name, dtype, &entry.shape, params.values(ParamId(index))))
        })
        .collect()
}

/// Fills `params` with the tensors of a file that [`sources`] wrote with the same prefix. Other tensors are left alone.
///
/// # Errors
/// [`Error::Format`] for a tensor that is missing or has another shape or type.
pub fn read_into(params: &mut Params, file: &File, prefix: &str) -> Result<()> {
    let table = params.table().clone();
    for (index, entry) in table.entries().iter().enumerate() {
        let tensor = file.tensor(&format!("{prefix}{}", entry.name))?;
        tensor.check_shape(&entry.shape)?;
        with_dtype!(params.data().dtype(), E => tensor.read(params.values_mut::<E>(ParamId(index))))?;
    }
    Ok(())
}

/// The parameters of a model from its files; `path` is the file that errors about all of them name.
///
/// Names may lack the prefix `model.` (a `TTTModel` alone). Buffers that the official code can compute are skipped.
/// Everything is checked before memory for the parameters is asked for.
///
/// # Errors
/// [`Error::Format`] for missing, unexpected, doubled or misshapen tensors; [`Error::OutOfMemory`].
pub fn load(files: &[File], path: &Path, table: &Arc<ParamTable>, device: &Device, dtype: DType) -> Result<Params> {
    let mut found = by_official_name(files, path)?;
    if table.find(HEAD).is_none() {
        resolve_tied_head(&mut found, path)?;
    }
    check_names(&found, path, table)?;
    let mut wrong = Vec::new();
    for entry in table.entries() {
        let tensor = &found[&entry.name];
        tensor.check_float()?;
        if tensor.shape != entry.shape {
            wrong.push(format!("`{}` has shape {:?}, config.json makes it {:?}", entry.name, tensor.shape, entry.shape));
        }
    }
    if !wrong.is_empty() {
        return Err(Error::format(path, some(&wrong, "; ")));
    }
    let mut params = Params::zeros(table, device, dtype)?;
    device.install(|| {
        for (index, entry) in table.entries().iter().enumerate() {
            with_dtype!(dtype, E => found[&entry.name].read(params.values_mut::<E>(ParamId(index))))?;
        }
        Ok(params)
    })
}

fn by_official_name<'a>(files: &'a [File], path: &Path) -> Result<BTreeMap<String, TensorRef<'a>>> {
    let mut found = BTreeMap::new();
    for file in files {
        for name in file.names() {
            // Non-persistent buffers of the official code; some versions of PyTorch's tools save them all the same.
            if name.ends_with("rotary_emb.inv_freq") || name.ends_with(".token_idx") {
                continue;
            }
            let official =
                if name.starts_with("model.") || name.starts_with("lm_head.") { name.to_owned() } else { format!("model.{name}") };
            if found.insert(official, file.tensor(name)?).is_some() {
                return Err(Error::format(
                    path,
                    format!("there are two tensors `{name}`, with and without `model.` or in two files"),
                ));
            }
        }
    }
    Ok(found)
}

/// With a tied head the output matrix is the embedding: a file may hold both (then equal) or either.
fn resolve_tied_head(found: &mut BTreeMap<String, TensorRef<'_>>, path: &Path) -> Result<()> {
    let Some(head) = found.remove(HEAD) else { return Ok(()) };
    let Some(embed) = found.get(EMBED) else {
        // Tools that store shared memory once keep the name that comes first.
        found.insert(EMBED.to_owned(), head);
        return Ok(());
    };
    let equal = head.shape == embed.shape
        && if head.dtype == embed.dtype { head.bytes == embed.bytes } else { head.to_vec::<f32>()? == embed.to_vec::<f32>()? };
    if equal {
        return Ok(());
    }
    let message =
        format!("`{HEAD}` differs from `{EMBED}`, but config.json ties them; set \"tie_word_embeddings\": false there to use both");
    Err(Error::format(path, message))
}

fn check_names(found: &BTreeMap<String, TensorRef<'_>>, path: &Path, table: &ParamTable) -> Result<()> {
    let quoted = |name: &String| format!("`{name}`");
    let missing: Vec<String> = table.entries().iter().map(|e| &e.name).filter(|n| !found.contains_key(*n)).map(quoted).collect();
    let unexpected: Vec<String> = found.keys().filter(|n| table.find(n).is_none()).map(quoted).collect();
    if missing.is_empty() && unexpected.is_empty() {
        return Ok(());
    }
    let mut message = String::from("the tensors are not those of the model in config.json");
    if !missing.is_empty() {
        message += &format!("; missing: {}", some(&missing, ", "));
    }
    if !unexpected.is_empty() {
        message += &format!("; unexpected: {}", some(&unexpected, ", "));
    }
    if missing == [quoted(&HEAD.to_owned())] {
        message += "; set \"tie_word_embeddings\": true there if the output matrix is the embedding";
    }
    Err(Error::format(path, message))
}

/// The first few of a list, and how many more there are.
pub(crate) fn some(items: &[String], separator: &str) -> String {
    const SHOWN: usize = 6;
    let mut text = items[..items.len().min(SHOWN)].join(separator);
    if items.len() > SHOWN {
        text += &format!("{separator}and {} more", items.len() - SHOWN);
    }
    text
}
