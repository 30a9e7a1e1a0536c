//! Initial values: how each parameter starts, from the seed and its name alone.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use super::Entry;

/// How a parameter starts (the JAX column of the official initialisation).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Normal with this standard deviation.
    Normal(f64),
    /// Normal cut at two standard deviations, scaled so that the standard deviation *after* the cut is this.
    TruncatedNormal(f64),
}

/// The values that a parameter starts with.
pub(super) fn initial_values(entry: &Entry, seed: u64) -> Vec<f64> {
    let n = entry.elements();
    match entry.init {
        Init::Zeros => vec![0.0; n],
        Init::Ones => vec![1.0; n],
        Init::Normal(std) => {
            let mut normal = Normal::new(seed, &entry.name);
            (0..n).map(|_| std * normal.next()).collect()
        }
        Init::TruncatedNormal(std) => {
            let mut normal = Normal::new(seed, &entry.name);
            // Standard deviation of a unit normal cut at +-2.
            let std = std / 0.879_625_661_034_239_8;
            let mut cut = || loop {
                let x = normal.next();
                if x.abs() <= 2.0 {
                    return std * x;
                }
            };
            (0..n).map(|_| cut()).collect()
        }
    }
}

/// Unit normal numbers (Box-Muller over ChaCha8) of a seed and a name.
struct Normal {
    rng: ChaCha8Rng,
    spare: Option<f64>,
}

impl Normal {
    fn new(seed: u64, name: &str) -> Normal {
        use sha2::{Digest, Sha256};
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(name.as_bytes());
        Normal { rng: ChaCha8Rng::from_seed(hash.finalize().into()), spare: None }
    }

    fn next(&mut self) -> f64 {
        if let Some(x) = self.spare.take() {
            return x;
        }
        // 53 random bits; 1 - u lies in (0, 1].
        let mut unit = || (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let (radius, angle) = ((-2.0 * (1.0 - unit()).ln()).sqrt(), std::f64::consts::TAU * unit());
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::config::{Config, Inner};
    use crate::device::Device;
    use crate::params::{ParamTable, Params};
    use crate::tensor::DType;

    #[test]
    fn initial_values_have_the_stated_spread() {
        let config = Config { vocab_size: 300, ..Config::preset("tiny", Inner::Mlp).unwrap() };
        let (table, ids) = ParamTable::new(&config);
        let table = Arc::new(table);
        let params = Params::init(&table, &Device::cpu().unwrap(), DType::F32, 7).unwrap();
        let std = |id| {
            let x: &[f32] = params.values(id);
            (x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / x.len() as f64).sqrt()
        };
        assert!((std(ids.embed) / 0.02 - 1.0).abs() < 0.02);
        let conv = ids.blocks[0].ttt.convs.unwrap()[0];
        assert!((std(conv.0) / 0.5 - 1.0).abs() < 0.1);
        assert_eq!(std(conv.1), 0.0);
        assert_eq!(std(ids.norm), 1.0);
    }
}
