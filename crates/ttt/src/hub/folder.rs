//! The model folder.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::safetensors::{File, Source, write};
use super::weights::Stored;
use super::{FileDType, config_json, weights, write_atomic, write_folder};
use crate::config::Config;
use crate::device::Device;
use crate::narrow::Narrow;
use crate::params::{ParamTable, Params};
use crate::tensor::DType;
use crate::weights::{Storage, Weights};
use crate::{AtPath, Error, Result};

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Where `config.json` says that weights are quantised, and how.
const QUANTIZATION: &str = "quantization_config";
const METHOD: &str = "quant_method";
/// Our own: rows of integers with a scale each.
const INT8: &str = "ttt-int8";

/// Files beside config and weights that belong to a model, whatever its weights are stored as.
const COMPANIONS: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    GENERATION,
    "README.md",
    "LICENSE",
];

/// A folder with a model in it.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    dir: PathBuf,
    config: Config,
    extra: Map<String, Value>,
}

/// How weights are written.
#[derive(Clone, Copy, Debug, Default)]
pub struct SaveOptions {
    /// Type of the numbers.
    pub dtype: FileDType,
    /// Start another file before one has more bytes of tensors than this; none: one file. A larger tensor has a file of its own.
    pub max_shard_bytes: Option<u64>,
}

impl ModelFolder {
    /// Reads a folder's `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] for a folder or file that cannot be read; [`Error::Format`] for a model of another type or a wrong field.
    pub fn open(dir: impl AsRef<Path>) -> Result<ModelFolder> {
        let dir = dir.as_ref();
        if !fs::metadata(dir).at(dir)?.is_dir() {
            let message = "this is a file; a model is a folder with config.json and model.safetensors";
            return Err(Error::io(dir, io::Error::new(io::ErrorKind::NotADirectory, message)));
        }
        let path = dir.join(CONFIG);
        if !path.exists() {
            let message = "there is no such file; a model is a folder with config.json and model.safetensors";
            return Err(Error::io(path, io::Error::new(io::ErrorKind::NotFound, message)));
        }
        let (config, extra) = config_json::read(&path)?;
        Ok(ModelFolder { dir: dir.to_owned(), config, extra })
    }

    /// Where the folder is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Fields of `config.json` that are no hyperparameters (`architectures`, `torch_dtype`, ...).
    pub fn extra(&self) -> &Map<String, Value> {
        &self.extra
    }

    /// How its weights are stored: [`Storage::Int8`] or [`Storage::Bf16`], or else [`Storage::F32`].
    ///
    /// # Errors
    /// [`Error::Format`] for weights that another program has quantised.
    pub fn storage(&self) -> Result<Storage> {
        match self.extra.get(QUANTIZATION) {
            None | Some(Value::Null) => {}
            Some(Value::Object(how)) if how.get(METHOD).is_some_and(|method| method == INT8) => return Ok(Storage::Int8),
            Some(how) => {
                let method = how.get(METHOD).unwrap_or(how);
                let message = format!(
                    "the weights are quantised by {method}, which this program does not read; use the model that they were made from"
                );
                return Err(Error::format(self.dir.join(CONFIG), message));
            }
        }
        let names = ["torch_dtype", "dtype"].iter().find_map(|key| self.extra.get(*key)?.as_str());
        Ok(if names == Some(FileDType::Bf16.torch_name()) { Storage::Bf16 } else { Storage::F32 })
    }

    /// Checks that training can start from the weights.
    ///
    /// # Errors
    /// [`Error::Format`] for weights stored as integers.
    pub fn check_trainable(&self) -> Result<()> {
        if self.storage()? == Storage::Int8 {
            let message = "the weights are stored as int8, too coarse for the small steps of training; \
                           start from the model that they were made from";
            return Err(Error::format(self.dir.join(CONFIG), message));
        }
        Ok(())
    }

    /// Reads the weights, from one file or from shards, whatever they are stored as, into one flat buffer.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] when the files are damaged or hold other tensors than `table`; [`Error::OutOfMemory`].
    pub fn load_params(&self, table: &Arc<ParamTable>, device: &Device, dtype: DType) -> Result<Params> {
        match self.load_weights(table, device, dtype.into())? {
            Weights::Float(params) => Ok(params),
            Weights::Narrow(narrow) => unreachable!("{:?} is not narrow, {} is", dtype, narrow.storage()),
        }
    }

    /// Reads the weights, from one file or from shards, whatever they are stored as, and holds them as `storage`.
    ///
    /// # Errors
    /// As [`ModelFolder::load_params`]; a number that `storage` cannot hold.
    pub fn load_weights(&self, table: &Arc<ParamTable>, device: &Device, storage: Storage) -> Result<Weights> {
        let (files, path) = self.files()?;
        weights::load(&files, &path, self.storage()? == Storage::Int8, table, device, storage)
    }

    /// The files with the weights, and the one that errors about all of them name.
    fn files(&self) -> Result<(Vec<File>, PathBuf)> {
        let whole = self.dir.join(WEIGHTS);
        let index = self.dir.join(INDEX);
        if whole.exists() {
            Ok((vec![File::open(&whole)?], whole))
        } else if index.exists() {
            Ok((self.shards(&index)?, index))
        } else {
            let message = if self.dir.join("pytorch_model.bin").exists() || self.dir.join("pytorch_model.bin.index.json").exists() {
                "there is no such file, only pytorch_model.bin, which can run code when it is read; \
                 save the model as safetensors: `model.save_pretrained(folder, safe_serialization=True)`"
            } else {
                "there is no such file, nor model.safetensors.index.json with shards"
            };
            Err(Error::io(whole, io::Error::new(io::ErrorKind::NotFound, message)))
        }
    }

    /// The files that an index names, each checked to hold what the index says.
    fn shards(&self, index: &Path) -> Result<Vec<File>> {
        let wrong = |message: String| Error::format(index, message);
        let object = config_json::read_object(index)?;
        let Some(Value::Object(map)) = object.get("weight_map") else {
            return Err(wrong("there is no object `weight_map`".into()));
        };
        let mut names = BTreeSet::new();
        for (tensor, file) in map {
            // A name with folders in it could point anywhere on this machine.
            match file.as_str().filter(|f| Path::new(f).file_name().is_some_and(|plain| plain == *f)) {
                Some(file) => names.insert(file),
                None => {
                    return Err(wrong(format!(
                        "`{tensor}` should lie in {file}, which is not the name of a file beside the index"
                    )));
                }
            };
        }
        let files = names.iter().map(|name| File::open(self.dir.join(name))).collect::<Result<Vec<File>>>()?;
        for (tensor, file) in map {
            let position = names.iter().position(|name| Some(*name) == file.as_str());
            if position.is_none_or(|at| files[at].find(tensor).is_none()) {
                return Err(wrong(format!("`{tensor}` should lie in {file}, but does not")));
            }
        }
        Ok(files)
    }

    /// Writes the model to a new folder with another type or other shards; tokenizer, generation settings and licence go along.
    ///
    /// # Errors
    /// [`Error::Io`], among others when `out` exists and is not empty; what [`ModelFolder::load_params`] returns.
    pub fn convert(&self, out: impl AsRef<Path>, device: &Device, options: SaveOptions) -> Result<()> {
        let out = out.as_ref();
        expect_empty(out)?;
        let (table, _) = ParamTable::new(&self.config);
        let params = self.load_params(&Arc::new(table), device, DType::F32)?;
        let sources = weights::sources(&params, "", options.dtype.dtype());
        self.write_copy(out, &self.plain_extra(), sources, options)
    }

    /// Writes the model to a new folder with its large matrices as bf16 or int8 and everything else as f32; tokenizer, generation
    /// settings and licence go along. Of bf16 the names are official, so that other programs read it.
    ///
    /// # Errors
    /// [`Error::Io`], among others when `out` exists and is not empty; a weight that is not finite; what
    /// [`ModelFolder::load_params`] returns; [`Error::Config`] when `storage` is not narrow.
    pub fn quantize(&self, out: impl AsRef<Path>, device: &Device, storage: Storage) -> Result<Quantized> {
        if !storage.is_narrow() {
            return Err(Error::Config(format!("{storage} is not narrower than f32; there are bf16 and int8")));
        }
        expect_empty(out.as_ref())?;
        let table = Arc::new(ParamTable::new(&self.config).0);
        let (files, path) = self.files()?;
        let stored = Stored::find(&files, &path, self.storage()? == Storage::Int8, &table)?;
        let (narrow, worst) = device.install(|| {
            let narrow = Narrow::new(&table, device, storage, &stored)?;
            let worst = narrow.worst_error(&stored)?;
            Ok((narrow, worst))
        })?;
        let mut extra = self.plain_extra();
        // Programs that know nothing of it refuse a method of this name.
        if storage == Storage::Int8 {
            extra.insert(QUANTIZATION.to_owned(), json!({METHOD: INT8}));
        }
        let dtype = if storage == Storage::Bf16 { FileDType::Bf16 } else { FileDType::F32 };
        let sources = weights::narrow_sources(&narrow);
        let bytes = sources.iter().map(|source| source.bytes() as u64).sum();
        self.write_copy(out.as_ref(), &extra, sources, SaveOptions { dtype, max_shard_bytes: None })?;
        let bytes_before = files
            .iter()
            .flat_map(|file| file.names().map(|name| file.tensor(name)))
            .try_fold(0, |sum, tensor| Ok::<_, Error>(sum + tensor?.bytes.len() as u64))?;
        Ok(Quantized { bytes_before, bytes, worst_matrix: worst.0, worst_error: worst.1 })
    }

    /// What `config.json` says besides, but about how weights are quantised.
    fn plain_extra(&self) -> Map<String, Value> {
        let mut extra = self.extra.clone();
        extra.shift_remove(QUANTIZATION);
        extra
    }

    fn write_copy(&self, out: &Path, extra: &Map<String, Value>, sources: Vec<Source<'_>>, options: SaveOptions) -> Result<()> {
        write_folder(out, |dir| {
            save_with(dir, &self.config, extra, sources, options)?;
            for name in COMPANIONS {
                let from = self.dir.join(name);
                if from.is_file() {
                    write_atomic(dir.join(name), |out| io::copy(&mut fs::File::open(&from)?, out).map(|_| ()))?;
                }
            }
            Ok(())
        })
    }
}

/// What [`ModelFolder::quantize`] did.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// Bytes of the tensors that were read.
    pub bytes_before: u64,
    /// Bytes of the tensors that were written.
    pub bytes: u64,
    /// Name of the matrix that changed most.
    pub worst_matrix: String,
    /// Its `‖stored - read‖ / ‖read‖` (Frobenius norms).
    pub worst_error: f64,
}

fn expect_empty(out: &Path) -> Result<()> {
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        let message = "the folder is not empty; name another one, or empty it first";
        return Err(Error::io(out, io::Error::new(io::ErrorKind::AlreadyExists, message)));
    }
    Ok(())
}

/// Writes `config.json`, `generation_config.json` and the weights into a folder, which is made if it is not there. A tied head is
/// omitted, as the official code does.
///
/// Each file is written atomically; weights that a former model left in the folder are removed last. Use [`write_folder`] around
/// it where the folder as a whole must be the old one or the new one.
///
/// # Errors
/// [`Error::Io`].
pub fn save(dir: impl AsRef<Path>, config: &Config, params: &Params, options: SaveOptions) -> Result<()> {
    save_with(dir.as_ref(), config, &Map::new(), weights::sources(params, "", options.dtype.dtype()), options)
}

fn save_with(
    dir: &Path,
    config: &Config,
    extra: &Map<String, Value>,
    tensors: Vec<Source<'_>>,
    options: SaveOptions,
) -> Result<()> {
    fs::create_dir_all(dir).at(dir)?;
    let shards = split(tensors, options.max_shard_bytes);
    let count = shards.len();
    let mut written = BTreeSet::new();
    let mut weight_map = Map::new();
    let mut total = 0;
    for (i, shard) in shards.into_iter().enumerate() {
        let name = if count == 1 { WEIGHTS.to_owned() } else { format!("model-{:05}-of-{count:05}.safetensors", i + 1) };
        for tensor in &shard {
            weight_map.insert(tensor.name().to_owned(), json!(name));
            total += tensor.bytes();
        }
        write(dir.join(&name), &[], shard)?;
        written.insert(name);
    }
    if count > 1 {
        weight_map.sort_keys();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        config_json::write_object(&dir.join(INDEX), index.as_object().expect("an object"))?;
        written.insert(INDEX.to_owned());
    }
    config_json::write(&dir.join(CONFIG), config, extra, options.dtype)?;
    config_json::write_generation(&dir.join(GENERATION), config)?;
    remove_former_weights(dir, &written)
}

/// Groups tensors, in order, into files of at most `max` bytes.
fn split(tensors: Vec<Source<'_>>, max: Option<u64>) -> Vec<Vec<Source<'_>>> {
    let mut shards: Vec<Vec<Source>> = vec![Vec::new()];
    let mut size = 0;
    for tensor in tensors {
        let bytes = tensor.bytes() as u64;
        if max.is_some_and(|max| size > 0 && size + bytes > max) {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        shards.last_mut().expect("at least one").push(tensor);
    }
    shards
}

/// A reader takes `model.safetensors` before an index, so a former one would hide new shards.
fn remove_former_weights(dir: &Path, written: &BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir).at(dir)? {
        let entry = entry.at(dir)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let shard = name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
        if (shard || name == WEIGHTS || name == INDEX) && !written.contains(&name) {
            fs::remove_file(entry.path()).at(entry.path())?;
        }
    }
    Ok(())
}
