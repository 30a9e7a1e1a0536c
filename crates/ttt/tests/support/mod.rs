//! What several test files share: golden files and small models.
#![allow(dead_code, missing_docs)]

pub mod runs;

use std::collections::HashMap;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use ttt::batch::Batch;
use ttt::config::{Config, Inner, LinearAttention, Mixer, SEQUENCE, TokenScale};
use ttt::device::Device;
use ttt::layer::state::Extent;
use ttt::lm::Lm;
use ttt::params::{ParamId, ParamTable, Params};
use ttt::state::States;
use ttt::tensor::{DType, Element};

/// Numbers and shape of a tensor.
pub type Array = (Vec<usize>, Vec<f64>);

/// A golden file: what the official JAX code computed (see `tests/fixtures/golden/README.md`).
pub struct Golden {
    pub name: &'static str,
    pub config: Config,
    pub tensors: HashMap<String, Array>,
}

pub const GOLDEN: [&str; 4] =
    ["linear_mamba_preconv", "mlp_mamba_preconv", "linear_transformer_nopreconv", "mlp_transformer_nopreconv"];

impl Golden {
    pub fn load(name: &'static str) -> Golden {
        let path = format!("{}/tests/fixtures/golden/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let meta = header.metadata().clone().unwrap();
        let int = |key: &str| meta[key].parse::<usize>().unwrap();
        let float = |key: &str| meta[key].parse::<f64>().unwrap();
        let flag = |key: &str| meta[key] == "True";
        let config = Config {
            vocab_size: int("vocab_size"),
            hidden_size: int("hidden_size"),
            intermediate_size: int("intermediate_size"),
            num_hidden_layers: int("num_hidden_layers"),
            num_attention_heads: int("num_attention_heads"),
            mini_batch_size: int("mini_batch_size"),
            ttt_layer_type: if meta["ttt_layer_type"] == "mlp" { Inner::Mlp } else { Inner::Linear },
            ttt_base_lr: float("ttt_base_lr"),
            use_gate: flag("use_gate"),
            share_qk: flag("share_qk"),
            pre_conv: flag("pre_conv"),
            rope_theta: float("rope_theta"),
            rms_norm_eps: float("rms_norm_eps"),
            ..Config::default()
        };
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, t)| (name.to_owned(), (t.shape().to_vec(), numbers(&t)))).collect();
        Golden { name, config, tensors }
    }

    pub fn array(&self, name: &str) -> &[f64] {
        &self.tensors[name].1
    }

    pub fn model(&self, device: &Device, dtype: DType) -> Lm {
        let table = Arc::new(ParamTable::new(&self.config).0);
        let mut params = Params::zeros(&table, device, dtype).unwrap();
        for (i, entry) in table.entries().iter().enumerate() {
            let (shape, values) = &self.tensors[&format!("param.{}", entry.name)];
            assert_eq!(*shape, entry.shape, "{}", entry.name);
            set(&mut params, ParamId(i), values);
        }
        Lm::from_params(&self.config, params).unwrap()
    }

    /// Two sequences of 64 tokens.
    pub fn batch(&self) -> Batch {
        let ids: Vec<u32> = self.array("input_ids").iter().map(|x| *x as u32).collect();
        Batch::packed(&ids.chunks(64).collect::<Vec<_>>())
    }

    pub fn targets(&self) -> Vec<u32> {
        self.array("targets").iter().map(|x| *x as u32).collect()
    }
}

fn numbers(t: &safetensors::tensor::TensorView<'_>) -> Vec<f64> {
    use safetensors::Dtype;
    let chunks = |n: usize| t.data().chunks_exact(n);
    match t.dtype() {
        Dtype::F32 => chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
        Dtype::F64 => chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::I32 => chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
        other => panic!("{other:?}"),
    }
}

pub fn set(params: &mut Params, id: ParamId, values: &[f64]) {
    match params.data().dtype() {
        DType::F32 => params.values_mut::<f32>(id).iter_mut().zip(values).for_each(|(x, v)| *x = *v as f32),
        DType::F64 => params.values_mut::<f64>(id).copy_from_slice(values),
        DType::Bf16 => unreachable!("weights are never bf16"),
    }
}

/// Numbers between -1 and 1.
pub struct Random(ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n as u64) as usize
    }

    pub fn tokens(&mut self, n: usize, vocab: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(vocab) as u32).collect()
    }
}

/// A small model whose every parameter is away from its initial value, so that no term of any gradient vanishes.
pub fn shaken_model(config: &Config, device: &Device, dtype: DType, seed: u64) -> Lm {
    shaken_by(0.25, config, device, dtype, seed)
}

/// The same, no parameter by more than `size`.
pub fn shaken_by(size: f64, config: &Config, device: &Device, dtype: DType, seed: u64) -> Lm {
    let mut model = Lm::new(config, device, dtype, seed).unwrap();
    let mut random = Random::new(seed ^ 0x5eed);
    let params = model.params_mut();
    let n = params.data().len();
    let noise: Vec<f64> = (0..n).map(|_| size * random.unit()).collect();
    match dtype {
        DType::F32 => params.data_mut().as_mut_slice::<f32>().iter_mut().zip(noise).for_each(|(x, e)| *x += e as f32),
        DType::F64 => params.data_mut().as_mut_slice::<f64>().iter_mut().zip(noise).for_each(|(x, e)| *x += e as f32 as f64),
        DType::Bf16 => unreachable!("a CPU has no bf16"),
    }
    model
}

/// Largest absolute difference over the largest magnitude of `b`.
#[track_caller]
pub fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(0f64, |m, x| m.max(x.abs()));
    let error = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f64, |m, e| if e.is_nan() || e > m { e } else { m });
    if error == 0.0 { 0.0 } else { error / scale }
}

pub fn as_f64<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

/// The state of a slot, tensor by tensor, as much of it as there is; with the open rows of a mini-batch or without.
pub fn state_values(model: &Lm, states: &States, slot: usize, open_rows: bool) -> Vec<Vec<f64>> {
    let tokens = states.position(slot);
    let phase = model.config().mini_batch().map_or(0, |k| (tokens % k as u64) as usize);
    let mut all = Vec::new();
    for i in 0..model.config().num_hidden_layers {
        for (name, tensor) in states.layer(i).tensors() {
            let extent = Extent::of(name);
            if extent == Extent::OpenRows && !open_rows {
                continue;
            }
            let values = tensor.to_f64_vec();
            let per_slot = values.len() / states.slots();
            let slab = &values[slot * per_slot..][..per_slot];
            let ranges = extent.ranges(&tensor.shape()[1..], tokens as usize, phase);
            all.push(ranges.into_iter().flat_map(|range| slab[range].to_vec()).collect());
        }
    }
    all
}

/// A Transformer of the sizes of a TTT configuration; of several heads of queries `shared` share one of keys and values.
pub fn transformer(like: Config, shared: usize) -> Config {
    let num_key_value_heads = (shared > 1).then(|| like.num_attention_heads / shared);
    let default = Config::default();
    Config {
        mixer: Mixer::Attention,
        num_key_value_heads,
        use_gate: false,
        share_qk: false,
        pre_conv: false,
        ttt_layer_type: default.ttt_layer_type,
        ttt_base_lr: default.ttt_base_lr,
        ..like
    }
}

/// The paper's ladder made of a TTT-Linear's configuration: the rungs before the published models, in order, and behind them what
/// else their fields can be combined to.
pub fn rungs(like: &Config) -> [Config; 8] {
    let attention = |kind| Config { linear_attention: Some(kind), ..like.clone() };
    let equal = Config {
        mini_batch_size: SEQUENCE,
        ttt_layer_norm: false,
        ttt_residual: false,
        ttt_bias: false,
        ttt_learnable_init: false,
        ttt_learnable_lr: false,
        ttt_base_lr: 1.0,
        ttt_token_scale: TokenScale::Sum,
        ..like.clone()
    };
    let init = Config { ttt_bias: true, ttt_learnable_init: true, ..equal.clone() };
    let norm = Config {
        ttt_layer_norm: true,
        ttt_residual: true,
        ttt_base_lr: 0.5 / like.head_dim() as f64,
        ttt_token_scale: TokenScale::Mean,
        ..init.clone()
    };
    let mini_batch = Config { mini_batch_size: like.mini_batch_size, ..norm.clone() };
    [
        attention(LinearAttention::Normalised),
        attention(LinearAttention::Plain),
        equal,
        init,
        norm,
        mini_batch,
        Config { mini_batch_size: SEQUENCE, ..like.clone() },
        Config { ttt_learnable_init: false, ttt_layer_norm: false, ..like.clone() },
    ]
}
