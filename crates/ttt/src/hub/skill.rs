//! Skills: initial fast weights W0 learned for one model, in a small file that is loaded over it.
//!
//! A safetensors file with the tensors of W0 under their official names, in f32. Its metadata says `ttt_skill` (the version of the
//! format), `base` ([`base_hash`] of the model it was learned for), `name`, `tokens` (read while learning) and `tokenizer` (the
//! fingerprint). The base is identified by every parameter *but* W0, so that a skill replaces another one.

use std::path::Path;

use super::hash::base_hash;
use super::safetensors::{Dtype, File, write};
use super::weights;
use crate::params::{ParamId, Params};
use crate::weights::Weights;
use crate::{Error, Result};

/// Key of the format's version.
const MARK: &str = "ttt_skill";
/// That version.
const VERSION: &str = "1";

/// What a skill file says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkillInfo {
    /// What people call it.
    pub name: String,
    /// Tokens that it was learned from.
    pub tokens: u64,
    /// [`crate::data::Tokenizer::fingerprint`] of the tokenizer that made them.
    pub tokenizer: String,
}

/// An open skill file.
pub struct Skill {
    file: File,
    info: SkillInfo,
    base: String,
}

impl Skill {
    /// Writes W0 of `params` as a skill, atomically.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(path: impl AsRef<Path>, params: &Params, info: &SkillInfo) -> Result<()> {
        let metadata = [
            (MARK, VERSION.to_owned()),
            ("name", info.name.clone()),
            ("tokens", info.tokens.to_string()),
            ("tokenizer", info.tokenizer.clone()),
            ("base", base_hash(params)),
        ];
        let table = std::sync::Arc::new(params.table().initial_state());
        let mut initial = Params::zeros(&table, params.data().device(), params.data().dtype())?;
        initial.copy_shared(params);
        write(path, &metadata, weights::sources(&initial, "", Dtype::F32))
    }

    /// Opens a file and reads what it says about itself.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a file that is damaged, no skill, or of another version.
    pub fn open(path: impl AsRef<Path>) -> Result<Skill> {
        let path = path.as_ref();
        let file = File::open(path)?;
        let wrong = |message: String| Error::format(path, message);
        match file.metadata().get(MARK).map(String::as_str) {
            Some(VERSION) => {}
            Some(other) => return Err(wrong(format!("skill format {other}; this program reads format {VERSION}"))),
            None => return Err(wrong("no skill: skills are what `ttt train --only-initial-state` writes".into())),
        }
        let text = |key: &str| {
            file.metadata()
                .get(key)
                .cloned()
                .ok_or_else(|| wrong(format!("the skill's metadata lacks `{key}`; the file is damaged")))
        };
        let tokens = text("tokens")?;
        let tokens = tokens.parse().map_err(|_| wrong(format!("`tokens` in the skill's metadata is `{tokens}`, not a number")))?;
        let info = SkillInfo { name: text("name")?, tokens, tokenizer: text("tokenizer")? };
        let base = text("base")?;
        for (key, hash) in [("tokenizer", &info.tokenizer), ("base", &base)] {
            if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(wrong(format!("`{key}` in the skill's metadata is no SHA-256; the file is damaged")));
            }
        }
        Ok(Skill { file, info, base })
    }

    /// What the file says about itself.
    pub fn info(&self) -> &SkillInfo {
        &self.info
    }

    /// [`base_hash`] of the model that it belongs to.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Numbers in the file.
    pub fn elements(&self) -> usize {
        self.file.names().filter_map(|name| self.file.find(name)).map(|t| t.elements()).sum()
    }

    /// Puts the skill in the place of a model's W0. Everything is checked before a number changes.
    ///
    /// # Errors
    /// [`Error::Format`]: a skill of another model, with other tensors than this model's W0, or with numbers that are not finite.
    pub fn apply(&self, weights: &mut Weights) -> Result<()> {
        let path = self.file.path();
        let base = base_hash(weights);
        if self.base != base {
            return Err(Error::format(
                path,
                format!(
                    "the skill {:?} was learned for another model (base {}, this one's is {}); `ttt info MODEL` shows a model's base{}",
                    self.info.name,
                    &self.base[..16],
                    &base[..16],
                    if weights.storage().is_narrow() { ", and --dtype f32 leaves its numbers as they are" } else { "" }
                ),
            ));
        }
        let table = weights.table().clone();
        let initial = |name: &str| table.find(name).is_some_and(|id| table.entry(id).initial_state);
        if let Some(name) = self.file.names().find(|name| !initial(name)) {
            return Err(Error::format(path, format!("`{name}` is none of the model's initial fast weights")));
        }
        let mut loaded = Vec::new();
        for (index, entry) in table.entries().iter().enumerate().filter(|(_, e)| e.initial_state) {
            let tensor = self.file.tensor(&entry.name)?;
            tensor.check_shape(&entry.shape)?;
            let values = tensor.to_vec::<f32>()?;
            if let Some(at) = values.iter().position(|x| !x.is_finite()) {
                return Err(tensor.wrong(format!("holds {} at element {at}", values[at])));
            }
            loaded.push((ParamId(index), values));
        }
        for (id, values) in loaded {
            weights.set(id, &values);
        }
        Ok(())
    }
}
