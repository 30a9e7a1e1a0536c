//! Initial values: how each parameter starts, from the seed and its name alone.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use super::Entry;

/// How a parameter starts: in a TTT model and the Transformer as in the official JAX code, in Mamba as in its authors' code.
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
    /// Evenly spread from minus this to this.
    Uniform(f64),
    /// `ln(1), ln(2), ...` along the last axis: Mamba's `ln(−A)` (S4D-real).
    LogCount,
    /// The bias with which Mamba's step sizes, `softplus(bias)`, are spread from 0.001 to 0.1 evenly in their logarithm.
    StepBias,
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
        Init::Uniform(bound) => {
            let mut random = Normal::new(seed, &entry.name);
            (0..n).map(|_| bound * (2.0 * random.unit() - 1.0)).collect()
        }
        Init::LogCount => {
            let [_, count] = entry.matrix_shape();
            (0..n).map(|i| ((i % count + 1) as f64).ln()).collect()
        }
        Init::StepBias => {
            let mut random = Normal::new(seed, &entry.name);
            let (least, most) = (0.001f64.ln(), 0.1f64.ln());
            let mut step = || (least + (most - least) * random.unit()).exp();
            // The inverse of softplus: ln(e^step − 1).
            (0..n).map(|_| step().exp_m1().ln()).collect()
        }
    }
}

/// Random numbers (ChaCha8) of a seed and a name: even ones, and unit normal ones (Box-Muller).
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

    /// 53 random bits, from 0 to below 1.
    fn unit(&mut self) -> f64 {
        (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn next(&mut self) -> f64 {
        if let Some(x) = self.spare.take() {
            return x;
        }
        // 1 - u lies in (0, 1].
        let (radius, angle) = ((-2.0 * (1.0 - self.unit()).ln()).sqrt(), std::f64::consts::TAU * self.unit());
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::config::{Config, Inner};
    use crate::device::Device;
    use crate::params::{MixerIds, ParamTable, Params};
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
        let MixerIds::Ttt(ttt) = &ids.blocks[0].mixer else { panic!("a TTT layer") };
        let conv = ttt.convs.unwrap()[0];
        assert!((std(conv.0) / 0.5 - 1.0).abs() < 0.1);
        assert_eq!(std(conv.1), 0.0);
        assert_eq!(std(ids.norm), 1.0);
    }

    #[test]
    fn mamba_starts_with_the_published_spread() {
        let config = Config { num_hidden_layers: 1, ..Config::mamba("130m").unwrap() };
        let (table, ids) = ParamTable::new(&config);
        let params = Params::init(&Arc::new(table), &Device::cpu().unwrap(), DType::F64, 7).unwrap();
        let MixerIds::Mamba(ids) = &ids.blocks[0].mixer else { panic!("a Mamba layer") };
        let a_log: &[f64] = params.values(ids.a_log);
        assert_eq!(a_log[..3], [0.0, 2f64.ln() as f32 as f64, 3f64.ln() as f32 as f64]);
        assert_eq!(a_log[15], a_log[31]);
        let steps: Vec<f64> = params.values::<f64>(ids.dt_proj.1).iter().map(|b| b.exp().ln_1p()).collect();
        assert!(steps.iter().all(|step| (0.000_999..0.100_1).contains(step)));
        let mean = steps.iter().map(|step| step.ln()).sum::<f64>() / steps.len() as f64;
        assert!((mean - 0.01f64.ln()).abs() < 0.1, "{mean}");
        let weights: &[f64] = params.values(ids.dt_proj.0);
        let bound = 48f64.powf(-0.5);
        assert!(weights.iter().all(|w| w.abs() <= bound) && weights.iter().any(|w| *w < -0.98 * bound));
    }
}
