//! The identity of a model's weights.

use sha2::{Digest, Sha256};

use crate::params::{Entry, ParamId, Params};
use crate::tensor::{DType, with_dtype};

/// SHA-256, in hexadecimal, over every parameter's name, shape and f32 values in the order of the table.
///
/// It depends on the weights alone: not on how files are sharded, on gaps in the flat buffer or on the device. Weights rounded to
/// half precision are other weights.
pub fn model_hash(params: &Params) -> String {
    hash_of(params, |_| true)
}

/// The same over all parameters but the initial fast weights: what a skill belongs to.
pub fn base_hash(params: &Params) -> String {
    hash_of(params, |entry| !entry.initial_state)
}

fn hash_of(params: &Params, which: impl Fn(&Entry) -> bool) -> String {
    use crate::tensor::Element;
    let mut hash = Sha256::new();
    let mut bytes = Vec::new();
    for (index, entry) in params.table().entries().iter().enumerate().filter(|(_, entry)| which(entry)) {
        // Lengths come first, so that no two lists of tensors give one string of bytes.
        hash.update((entry.name.len() as u64).to_le_bytes());
        hash.update(entry.name.as_bytes());
        hash.update((entry.shape.len() as u64).to_le_bytes());
        for axis in &entry.shape {
            hash.update((*axis as u64).to_le_bytes());
        }
        with_dtype!(params.data().dtype(), E => {
            for chunk in params.values::<E>(ParamId(index)).chunks(1 << 14) {
                if cfg!(target_endian = "little") && E::DTYPE == DType::F32 {
                    hash.update(bytemuck::cast_slice::<E, u8>(chunk));
                    continue;
                }
                bytes.clear();
                for x in chunk {
                    bytes.extend_from_slice(&(x.to_f64() as f32).to_le_bytes());
                }
                hash.update(&bytes);
            }
        });
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
