//! Whether a model computes what a reference file says: the answer to "were these weights loaded correctly?".

use std::path::Path;

use crate::batch::Batch;
use crate::hub::safetensors::{Dtype, File};
use crate::layer::Keep;
use crate::lm::Lm;
use crate::params::Params;
use crate::tensor::Tensor;
use crate::train::loss::sequence_mean_weights;
use crate::{Error, Result};

/// How far one quantity is from its reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// `logits`, `loss` or `grad.<parameter name>`.
    pub name: String,
    /// Largest absolute difference.
    pub error: f64,
    /// That difference over the reference's largest magnitude.
    pub relative: f64,
}

/// Compares a model with a reference file.
///
/// The file holds `input_ids [b, t]` and `logits [b, t, v]`, and optionally `loss` with `targets [b, t]` and `loss_mask [b, t]`,
/// and optionally `grad.<parameter name>` tensors. Other tensors are ignored. `targets[i, j]` is what the model should say after
/// `input_ids[i, j]`, and `loss_mask[i, j]` (floating-point, integer or BOOL) how much that counts; the loss is the mean over
/// sequences of the masked mean. Without `targets` they are the next inputs, `input_ids[i, j + 1]`, and the last position of a
/// sequence, which has none, does not count, whatever the mask says of it.
///
/// # Errors
/// A file that cannot be read, lacks a tensor, or does not fit the model.
pub fn verify(model: &Lm, path: &Path) -> Result<Vec<Comparison>> {
    let file = File::open(path)?;
    let missing = |name: &str| Error::format(path, format!("the reference holds no `{name}`"));
    let (ids_shape, ids) = token_ids(&file, "input_ids")?.ok_or_else(|| missing("input_ids"))?;
    let [b, t] = *ids_shape else {
        return Err(Error::format(path, format!("`input_ids` has shape {ids_shape:?}, not [sequences, tokens]")));
    };
    if b * t == 0 {
        return Err(Error::format(path, "`input_ids` is empty"));
    }
    let (shape, logits) = numbers(&file, "logits")?.ok_or_else(|| missing("logits"))?;
    let wanted = [b, t, model.config().vocab_size];
    if shape != wanted {
        return Err(Error::format(path, format!("`logits` has shape {shape:?}, but this model gives {wanted:?}")));
    }
    let sequences: Vec<&[u32]> = ids.chunks(t).collect();
    let batch = Batch::packed(&sequences);

    let grad_names: Vec<String> = file.names().filter(|n| n.starts_with("grad.")).map(str::to_owned).collect();
    let loss = numbers(&file, "loss")?;
    let keep = if grad_names.is_empty() { Keep::Nothing } else { Keep::Saved { group: model.config().checkpoint_group() } };
    let (hidden, saved) = model.forward(&batch, None, keep, 1.0)?;
    let rows: Vec<usize> = (0..b * t).collect();
    let ours = model.logits(&hidden, &rows)?.to_f64_vec();
    let mut all = vec![compare("logits", &ours, &logits)];
    if loss.is_none() && grad_names.is_empty() {
        return Ok(all);
    }

    let (targets, weights) = targets_and_weights(&file, path, &ids, b, t)?;
    let mut grads = Params::zeros(model.params().table(), model.device(), model.dtype())?;
    let (nll, dhidden): (Vec<f64>, Tensor) = model.loss(&hidden, &targets, &weights, &mut grads)?;
    if let Some((_, reference)) = loss {
        if reference.len() != 1 {
            return Err(Error::format(path, format!("`loss` holds {} numbers, not one", reference.len())));
        }
        let ours: f64 = nll.iter().zip(&weights).map(|(n, w)| n * w).sum();
        all.push(compare("loss", &[ours], &reference));
    }
    if let Some(saved) = saved {
        model.backward(&batch, saved, dhidden, &mut grads)?;
        let table = model.params().table().clone();
        let flat = grads.data().to_f64_vec();
        for name in grad_names {
            let parameter = name.strip_prefix("grad.").expect("filtered by prefix");
            let unknown = || Error::format(path, format!("`{name}` is the gradient of no parameter of this model"));
            let id = table.find(parameter).ok_or_else(unknown)?;
            let (shape, reference) = numbers(&file, &name)?.ok_or_else(|| missing(&name))?;
            if shape != table.entry(id).shape {
                let ours = &table.entry(id).shape;
                return Err(Error::format(path, format!("`{name}` has shape {shape:?}, but the parameter's is {ours:?}")));
            }
            all.push(compare(&name, &flat[table.entry(id).range()], &reference));
        }
    }
    Ok(all)
}

/// Targets and the weight of each row's likelihood in the loss.
fn targets_and_weights(file: &File, path: &Path, ids: &[u32], b: usize, t: usize) -> Result<(Vec<u32>, Vec<f64>)> {
    let check = |name: &str, shape: &[usize]| match shape == [b, t] {
        true => Ok(()),
        false => Err(Error::format(path, format!("`{name}` has shape {shape:?}, but `input_ids` has [{b}, {t}]"))),
    };
    let mut mask = vec![1.0; b * t];
    if let Some(tensor) = file.find("loss_mask") {
        check("loss_mask", tensor.shape)?;
        mask = match tensor.dtype {
            Dtype::BOOL => tensor.bytes.iter().map(|b| f64::from(u8::from(*b != 0))).collect(),
            _ if tensor.check_float().is_ok() => tensor.to_vec()?,
            _ => tensor.to_i64()?.into_iter().map(|m| m as f64).collect(),
        };
        if let Some(wrong) = mask.iter().find(|m| !(m.is_finite() && **m >= 0.0)) {
            return Err(tensor.wrong(format!("holds {wrong}; a weight is a number from 0 up")));
        }
    }
    let targets = match token_ids(file, "targets")? {
        Some((shape, targets)) => {
            check("targets", &shape)?;
            targets
        }
        None => {
            mask.iter_mut().skip(t - 1).step_by(t).for_each(|last| *last = 0.0);
            (0..b * t).map(|i| if (i + 1) % t == 0 { 0 } else { ids[i + 1] }).collect()
        }
    };
    Ok((targets, sequence_mean_weights(&mask, &vec![t; b])))
}

type Found<T> = Option<(Vec<usize>, Vec<T>)>;

fn numbers(file: &File, name: &str) -> Result<Found<f64>> {
    file.find(name).map(|t| Ok((t.shape.to_vec(), t.to_vec::<f64>()?))).transpose()
}

fn token_ids(file: &File, name: &str) -> Result<Found<u32>> {
    file.find(name).map(|t| Ok((t.shape.to_vec(), t.to_u32()?))).transpose()
}

fn compare(name: &str, ours: &[f64], reference: &[f64]) -> Comparison {
    let error = ours.iter().zip(reference).map(|(a, b)| (a - b).abs()).fold(0.0, nan_max);
    let scale = reference.iter().map(|x| x.abs()).fold(0.0, f64::max);
    let relative = if error == 0.0 { 0.0 } else { error / scale };
    Comparison { name: name.to_owned(), error, relative }
}

/// The larger of two numbers, where not-a-number is larger than any.
fn nan_max(a: f64, b: f64) -> f64 {
    if b.is_nan() || b > a { b } else { a }
}
