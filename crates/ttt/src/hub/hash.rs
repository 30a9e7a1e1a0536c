//! The identity of a model's weights.

use sha2::{Digest, Sha256};

use crate::params::{Entry, ParamId};
use crate::weights::Values;

/// SHA-256, in hexadecimal, over every parameter's name, shape and f32 values in the order of the table.
///
/// It depends on what the weights are alone: not on how files are sharded, on gaps in memory, on the device, or on the type that
/// they are stored in. Weights rounded to half precision or to integers are other weights.
pub fn model_hash(weights: &impl Values) -> String {
    hash_of(weights, |_| true)
}

/// The same over all parameters but the initial fast weights: what a skill belongs to.
pub fn base_hash(weights: &impl Values) -> String {
    hash_of(weights, |entry| !entry.initial_state)
}

fn hash_of(weights: &impl Values, which: impl Fn(&Entry) -> bool) -> String {
    let mut hash = Sha256::new();
    let (mut values, mut bytes) = (vec![0.0f32; 1 << 14], Vec::new());
    for (index, entry) in weights.table().entries().iter().enumerate().filter(|(_, entry)| which(entry)) {
        // Lengths come first, so that no two lists of tensors give one string of bytes.
        hash.update((entry.name.len() as u64).to_le_bytes());
        hash.update(entry.name.as_bytes());
        hash.update((entry.shape.len() as u64).to_le_bytes());
        for axis in &entry.shape {
            hash.update((*axis as u64).to_le_bytes());
        }
        for first in (0..entry.elements()).step_by(values.len()) {
            let values = &mut values[..(entry.elements() - first).min(1 << 14)];
            weights.read(ParamId(index), first, values);
            bytes.clear();
            bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            hash.update(&bytes);
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
