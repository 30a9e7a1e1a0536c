//! The states that segments continue, in a checkpoint: `carried_states.safetensors`.

use std::path::Path;

use crate::hub::safetensors::{self, Dtype, File, Source};
use crate::layer::state::Extent;
use crate::state::States;
use crate::tensor::with_dtype;
use crate::{Error, Result};

/// Name of the file.
pub(super) const NAME: &str = "carried_states.safetensors";
const POSITIONS: &str = "positions";

/// Writes the states of all slots into the folder of a checkpoint.
pub(super) fn write(folder: &Path, states: &States) -> Result<()> {
    let positions: Vec<i64> = (0..states.slots()).map(|slot| states.position(slot) as i64).collect();
    let on_cpu = states.on_cpu()?;
    let mut tensors = vec![Source::i64s(POSITIONS, &[positions.len()], &positions)];
    for (i, layer) in on_cpu.as_ref().unwrap_or(states).layers.iter().enumerate() {
        for (name, tensor) in layer.tensors() {
            let name = format!("layers.{i}.{name}");
            tensors.push(
                with_dtype!(tensor.dtype(), E => Source::floats::<E>(name, Dtype::F32, tensor.shape(), tensor.as_slice::<E>())),
            );
        }
    }
    safetensors::write(folder.join(NAME), &[], tensors)
}

/// Fills states with those of a checkpoint.
///
/// # Errors
/// A file that is missing, damaged, or of another model or number of sequences.
pub(super) fn read(folder: &Path, states: &mut States) -> Result<()> {
    if let Some(mut on_cpu) = states.on_cpu()? {
        read(folder, &mut on_cpu)?;
        return states.set_from_cpu(&on_cpu);
    }
    let path = folder.join(NAME);
    let file = File::open(&path)?;
    let positions = file.tensor(POSITIONS)?;
    positions.check_shape(&[states.slots()])?;
    if positions.dtype != Dtype::I64 {
        return Err(Error::format(path, format!("`{POSITIONS}` holds {}; I64 is needed", positions.dtype)));
    }
    for (i, layer) in states.layers.iter_mut().enumerate() {
        // What grows is as large as it was.
        let grown = layer.tensors().filter(|(name, _)| Extent::of(name) == Extent::Tokens);
        let tokens = grown.filter_map(|(name, _)| file.find(&format!("layers.{i}.{name}"))?.shape.get(1).copied()).max();
        layer.reserve(tokens.unwrap_or(0))?;
        for (name, tensor) in layer.tensors_mut() {
            let saved = file.tensor(&format!("layers.{i}.{name}"))?;
            saved.check_shape(tensor.shape())?;
            with_dtype!(tensor.dtype(), E => saved.read(tensor.as_mut_slice::<E>()))?;
        }
    }
    for (slot, bytes) in positions.bytes.chunks_exact(8).enumerate() {
        states.set_position(slot, i64::from_le_bytes(bytes.try_into().expect("eight bytes")) as u64);
    }
    Ok(())
}
