//! Between tensors in files and [`Params`].

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use super::safetensors::{Dtype, File, Source, TensorRef};
use crate::device::{Device, WeightView};
use crate::narrow::{Narrow, Origin};
use crate::params::{Entry, ParamId, ParamTable, Params};
use crate::tensor::{Element, with_dtype};
use crate::weights::{Storage, Weights};
use crate::{Error, Result};

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
    if params.data().device().as_cuda().is_some() {
        let mut read = params.on_cpu()?.into_owned();
        read_into(&mut read, file, prefix)?;
        *params = read.to(params.data().device(), params.dtype())?;
        return Ok(());
    }
    let table = params.table().clone();
    for (index, entry) in table.entries().iter().enumerate() {
        let tensor = file.tensor(&format!("{prefix}{}", entry.name))?;
        tensor.check_shape(&entry.shape)?;
        with_dtype!(params.data().dtype(), E => tensor.read(params.values_mut::<E>(ParamId(index))))?;
    }
    Ok(())
}

/// Ends of the names of a matrix's integers and of their scales, behind the official name.
const INT8: [&str; 2] = ["_int8", "_scale"];

/// The weights of a model from its files; `path` is the file that errors about all of them name, `int8` whether its matrices are
/// stored as integers (`NAME_int8 [rows, cols]`) with scales (`NAME_scale [rows]`).
///
/// Names may lack the prefix `model.` (a `TTTModel` alone), for Mamba `backbone.`. Buffers that the official code can compute are skipped.
/// Everything is checked before memory for the weights is asked for; narrow ones are never held wide, but on a GPU, where `Bf16`
/// means mixed precision.
///
/// # Errors
/// [`Error::Format`] for missing, unexpected, doubled or misshapen tensors, and for numbers that are not finite where they are
/// stored narrow; [`Error::OutOfMemory`].
pub fn load(
    files: &[File],
    path: &Path,
    int8: bool,
    table: &Arc<ParamTable>,
    device: &Device,
    storage: Storage,
) -> Result<Weights> {
    if device.as_cuda().is_some() {
        let read = load(files, path, int8, table, &device.cpu_beside(), Storage::F32)?;
        let dtype = if storage == Storage::Bf16 { crate::tensor::DType::Bf16 } else { storage.dtype() };
        return Ok(read.float().to(device, dtype)?.into());
    }
    let stored = Stored::find(files, path, int8, table)?;
    if storage.is_narrow() {
        return Ok(Weights::Narrow(device.install(|| Narrow::new(table, device, storage, &stored))?));
    }
    let mut params = Params::zeros(table, device, storage.dtype())?;
    device.install(|| {
        for id in (0..table.entries().len()).map(ParamId) {
            with_dtype!(storage.dtype(), E => stored.read_from(id, 0, params.values_mut::<E>(id)))?;
        }
        Ok(params.into())
    })
}

/// The parameters of a model in its files, in the order of the table.
pub(super) struct Stored<'a> {
    all: Vec<Found<'a>>,
}

/// One parameter in a file.
enum Found<'a> {
    Floats(TensorRef<'a>),
    Int8 { integers: TensorRef<'a>, cols: usize, scales: Vec<f32> },
}

impl<'a> Stored<'a> {
    /// Finds and checks all parameters, and that nothing else is there; the arguments are those of [`load`].
    pub(super) fn find(files: &'a [File], path: &Path, int8: bool, table: &ParamTable) -> Result<Stored<'a>> {
        // The embedding comes first.
        let embed = &table.entries()[0].name;
        let mut found = by_official_name(files, path, embed.split('.').next().unwrap_or_default())?;
        if table.find(HEAD).is_none() && !int8 {
            resolve_tied_head(&mut found, embed, path)?;
        }
        let names = |entry: &Entry| match int8 && entry.is_matrix() {
            true => INT8.map(|end| entry.name.clone() + end).to_vec(),
            false => vec![entry.name.clone()],
        };
        check_names(&found, path, &table.entries().iter().flat_map(names).collect::<Vec<_>>())?;
        let mut wrong = Vec::new();
        let mut all = Vec::with_capacity(table.entries().len());
        for entry in table.entries() {
            let names = names(entry);
            let tensor = found[&names[0]];
            if tensor.shape != entry.shape {
                wrong.push(format!("`{}` has shape {:?}, config.json makes it {:?}", names[0], tensor.shape, entry.shape));
            } else if let Some(scale) = names.get(1) {
                let [rows, cols] = entry.matrix_shape();
                all.push(Found::Int8 { integers: integers(tensor)?, cols, scales: scales(found[scale], rows)? });
            } else {
                tensor.check_float()?;
                all.push(Found::Floats(tensor));
            }
        }
        if !wrong.is_empty() {
            return Err(Error::format(path, some(&wrong, "; ")));
        }
        Ok(Stored { all })
    }

    /// The values of a parameter from element `first` on.
    fn read_from<E: Element>(&self, id: ParamId, first: usize, out: &mut [E]) -> Result<()> {
        match &self.all[id.0] {
            Found::Floats(tensor) => tensor.read_from(first, out),
            Found::Int8 { integers, cols, scales } => {
                for (i, out) in out.iter_mut().enumerate() {
                    let at = first + i;
                    *out = E::from_f64((integers.bytes[at] as i8 as f32 * scales[at / cols]) as f64);
                }
                Ok(())
            }
        }
    }
}

impl Origin for Stored<'_> {
    fn read(&self, id: ParamId, first: usize, out: &mut [f32]) -> Result<()> {
        self.read_from(id, first, out)
    }

    fn int8(&self, id: ParamId) -> Option<(&[i8], &[f32])> {
        match &self.all[id.0] {
            Found::Floats(_) => None,
            Found::Int8 { integers, scales, .. } => Some((bytemuck::cast_slice(integers.bytes), scales)),
        }
    }

    fn wrong(&self, id: ParamId, message: String) -> Error {
        match &self.all[id.0] {
            Found::Floats(tensor) | Found::Int8 { integers: tensor, .. } => tensor.wrong(message),
        }
    }
}

/// A tensor checked to hold integers that [`Narrow`] holds: -128 has no place in a symmetric range.
fn integers(tensor: TensorRef<'_>) -> Result<TensorRef<'_>> {
    if tensor.dtype != Dtype::I8 {
        return Err(tensor.wrong(format!("holds {}; I8 is needed", tensor.dtype)));
    }
    if tensor.bytes.contains(&(i8::MIN as u8)) {
        return Err(tensor.wrong("holds -128; integers from -127 to 127 are needed"));
    }
    Ok(tensor)
}

/// A tensor's f32 numbers, checked to be scales of `rows` rows.
fn scales(tensor: TensorRef<'_>, rows: usize) -> Result<Vec<f32>> {
    tensor.check_shape(&[rows])?;
    if tensor.dtype != Dtype::F32 {
        return Err(tensor.wrong(format!("holds {}; F32 is needed", tensor.dtype)));
    }
    let scales = tensor.to_vec::<f32>()?;
    match scales.iter().find(|x| !(**x >= 0.0 && (127.0 * **x).is_finite())) {
        Some(x) => Err(tensor.wrong(format!("holds {x}, which is no scale of integers up to 127"))),
        None => Ok(scales),
    }
}

/// Every parameter of narrow weights as tensors to write, in the order of the table: matrices as BF16 under their official names,
/// or as I8 and F32 under names that [`load`] knows; everything else as F32.
pub fn narrow_sources(weights: &Narrow) -> Vec<Source<'_>> {
    let mut sources = Vec::new();
    for (index, entry) in weights.table().entries().iter().enumerate() {
        let (id, name) = (ParamId(index), &entry.name);
        if !entry.is_matrix() {
            sources.push(Source::floats::<f32>(name, Dtype::F32, &entry.shape, weights.view(id).as_mat().slice()));
            continue;
        }
        match weights.matrices(id, id) {
            WeightView::Int8 { rows, scales, .. } => {
                let [integers, scale] = INT8.map(|end| name.clone() + end);
                let bytes: &[u8] = bytemuck::cast_slice(rows.slice());
                sources.push(Source::new(integers, Dtype::I8, &entry.shape, move |w| w.write_all(bytes)));
                sources.push(Source::floats(scale, Dtype::F32, &[scales.len()], scales));
            }
            WeightView::Bf16 { rows, .. } => sources.push(Source::bf16s(name, &entry.shape, rows.slice())),
            WeightView::Float(_) => unreachable!("matrices are narrow"),
        }
    }
    sources
}

/// Tensors by their names with `prefix`, which the official code gives all of them but the head.
fn by_official_name<'a>(files: &'a [File], path: &Path, prefix: &str) -> Result<BTreeMap<String, TensorRef<'a>>> {
    let mut found = BTreeMap::new();
    for file in files {
        for name in file.names() {
            // Non-persistent buffers of the official code; some versions of PyTorch's tools save them all the same.
            if name.ends_with("rotary_emb.inv_freq") || name.ends_with(".token_idx") {
                continue;
            }
            let whole = name.split('.').next() == Some(prefix) || name.starts_with("lm_head.");
            let official = if whole { name.to_owned() } else { format!("{prefix}.{name}") };
            if found.insert(official, file.tensor(name)?).is_some() {
                return Err(Error::format(
                    path,
                    format!("there are two tensors `{name}`, with and without `{prefix}.` or in two files"),
                ));
            }
        }
    }
    Ok(found)
}

/// With a tied head the output matrix is the embedding: a file may hold both (then equal) or either.
fn resolve_tied_head(found: &mut BTreeMap<String, TensorRef<'_>>, embedding: &str, path: &Path) -> Result<()> {
    let Some(head) = found.remove(HEAD) else { return Ok(()) };
    let Some(embed) = found.get(embedding) else {
        // Tools that store shared memory once keep the name that comes first.
        found.insert(embedding.to_owned(), head);
        return Ok(());
    };
    let equal = head.shape == embed.shape
        && if head.dtype == embed.dtype { head.bytes == embed.bytes } else { head.to_vec::<f32>()? == embed.to_vec::<f32>()? };
    if equal {
        return Ok(());
    }
    let message = format!(
        "`{HEAD}` differs from `{embedding}`, but config.json ties them; set \"tie_word_embeddings\": false there to use both"
    );
    Err(Error::format(path, message))
}

fn check_names(found: &BTreeMap<String, TensorRef<'_>>, path: &Path, names: &[String]) -> Result<()> {
    let quoted = |name: &String| format!("`{name}`");
    let known: HashSet<&String> = names.iter().collect();
    let missing: Vec<String> = names.iter().filter(|n| !found.contains_key(*n)).map(quoted).collect();
    let unexpected: Vec<String> = found.keys().filter(|n| !known.contains(n)).map(quoted).collect();
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
