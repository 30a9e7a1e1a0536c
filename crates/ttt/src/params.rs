//! The table of a model's parameters, and flat buffers laid out by it.
//!
//! [`ParamTable`] is the only list of parameters: counts, initial values, files, the optimizer and the memory plan walk it.
//! [`Params`] is one flat buffer over it; weights, gradients and both moments of the optimizer are four of them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::Result;
use crate::config::{Config, Inner};
use crate::device::Device;
use crate::device::view::{Mat, View, ViewMut};
use crate::tensor::{DType, Tensor, with_dtype};

/// Index of a parameter in its [`ParamTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamId(pub usize);

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

/// One parameter.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Official Hugging Face name.
    pub name: String,
    /// Official shape.
    pub shape: Vec<usize>,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Initial values.
    pub init: Init,
    /// Whether it is part of the initial fast weights, W0.
    pub initial_state: bool,
}

impl Entry {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its elements in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.elements()
    }

    /// Whether it is one of the large matrices, which a model for reading only may store narrow: a projection, the embedding or
    /// the output matrix.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() == 2 && self.name.ends_with(".weight")
    }

    /// `[rows, cols]`: all axes but the last are rows.
    pub fn matrix_shape(&self) -> [usize; 2] {
        let cols = self.shape.last().copied().unwrap_or(1);
        [self.shape.iter().rev().skip(1).product(), cols]
    }
}

/// Elements that entries are aligned to: 256 bytes of f32.
const ALIGN: usize = 64;

/// Every parameter of a model, in the order of its flat buffers.
#[derive(Debug)]
pub struct ParamTable {
    entries: Vec<Entry>,
    by_name: HashMap<String, ParamId>,
    len: usize,
}

/// Parameters of one TTT layer.
#[derive(Clone, Debug)]
pub struct TttIds {
    /// Projection to q, or to the input that q and k share.
    pub q_proj: ParamId,
    /// Projection to k, when not shared.
    pub k_proj: Option<ParamId>,
    /// Projection to v.
    pub v_proj: ParamId,
    /// Projection to the output gate.
    pub g_proj: Option<ParamId>,
    /// Output projection.
    pub o_proj: ParamId,
    /// Weight and bias of the convolutions for q and k.
    pub convs: Option<[(ParamId, ParamId); 2]>,
    /// Offset of the token scale.
    pub token_idx: ParamId,
    /// Weight of the inner learning rate's gate.
    pub lr_weight: ParamId,
    /// Bias of the inner learning rate's gate.
    pub lr_bias: ParamId,
    /// Weight and bias of the LayerNorm inside f.
    pub ttt_norm: (ParamId, ParamId),
    /// Weight and bias of the LayerNorm before the output projection.
    pub post_norm: (ParamId, ParamId),
    /// Initial fast weights: W1, b1 (TTT-Linear) or W1, b1, W2, b2 (TTT-MLP).
    pub initial: Vec<ParamId>,
}

/// Parameters of one block.
#[derive(Clone, Debug)]
pub struct BlockIds {
    /// Norm, weight and bias of the convolution before the TTT layer.
    pub pre_conv: Option<(ParamId, ParamId, ParamId)>,
    /// Norm before the TTT layer.
    pub seq_norm: ParamId,
    /// The TTT layer.
    pub ttt: TttIds,
    /// Norm before the feed-forward part.
    pub ffn_norm: ParamId,
    /// Gate projection; the up projection follows it without a gap.
    pub gate_proj: ParamId,
    /// Up projection.
    pub up_proj: ParamId,
    /// Down projection.
    pub down_proj: ParamId,
}

/// Parameters of a model.
#[derive(Clone, Debug)]
pub struct ModelIds {
    /// Token embedding.
    pub embed: ParamId,
    /// The blocks.
    pub blocks: Vec<BlockIds>,
    /// Final norm.
    pub norm: ParamId,
    /// Output matrix: the embedding, or one of its own.
    pub head: ParamId,
}

impl ParamTable {
    /// The table of a model, and where its layers find their parameters.
    pub fn new(config: &Config) -> (ParamTable, ModelIds) {
        let mut t = ParamTable { entries: Vec::new(), by_name: HashMap::new(), len: 0 };
        let (d, i, v) = (config.hidden_size, config.intermediate_size, config.vocab_size);
        let (h, hd, k, taps) = (config.num_attention_heads, config.head_dim(), config.mini_batch_size, config.conv_kernel);
        let normal = Init::Normal(config.initializer_range);
        // The official code hard-codes 0.02 for the learning-rate gate and the initial fast weights.
        let inner_normal = Init::Normal(0.02);
        // Lecun normal: the fan-in of a depthwise convolution is its number of taps.
        let conv_normal = Init::TruncatedNormal((1.0 / taps as f64).sqrt());

        let embed = t.add("model.embed_tokens.weight", &[v, d], normal);
        let mut blocks = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let p = format!("model.layers.{layer}.");
            let s = format!("{p}seq_modeling_block.");
            let pre_conv = config.pre_conv.then(|| {
                (
                    t.add(&format!("{p}conv.norm.weight"), &[d], Init::Ones),
                    t.add(&format!("{p}conv.conv.weight"), &[d, 1, taps], conv_normal),
                    t.add(&format!("{p}conv.conv.bias"), &[d], Init::Zeros),
                )
            });
            let seq_norm = t.add(&format!("{p}seq_norm.weight"), &[d], Init::Ones);
            // q, k, v and g lie one behind the other, so that they are also one matrix.
            let q_proj = t.add(&format!("{s}q_proj.weight"), &[d, d], normal);
            let k_proj = (!config.share_qk).then(|| t.join(&format!("{s}k_proj.weight"), &[d, d], normal));
            let v_proj = t.join(&format!("{s}v_proj.weight"), &[d, d], normal);
            let g_proj = config.use_gate.then(|| t.join(&format!("{s}g_proj.weight"), &[d, d], normal));
            let o_proj = t.add(&format!("{s}o_proj.weight"), &[d, d], normal);
            let convs = config.share_qk.then(|| {
                ["conv_q", "conv_k"].map(|c| {
                    (
                        t.add(&format!("{s}{c}.weight"), &[d, 1, taps], conv_normal),
                        t.add(&format!("{s}{c}.bias"), &[d], Init::Zeros),
                    )
                })
            });
            let token_idx = t.add(&format!("{s}learnable_token_idx"), &[k], Init::Zeros);
            let lr_weight = t.add(&format!("{s}learnable_ttt_lr_weight"), &[h, 1, d], inner_normal);
            let lr_bias = t.add(&format!("{s}learnable_ttt_lr_bias"), &[h, 1], Init::Zeros);
            let ttt_norm = (
                t.add(&format!("{s}ttt_norm_weight"), &[h, hd], Init::Ones),
                t.add(&format!("{s}ttt_norm_bias"), &[h, hd], Init::Zeros),
            );
            let post_norm =
                (t.add(&format!("{s}post_norm.weight"), &[d], Init::Ones), t.add(&format!("{s}post_norm.bias"), &[d], Init::Zeros));
            let inner_shapes: &[(&str, [usize; 3], Init)] = match config.ttt_layer_type {
                Inner::Linear => &[("W1", [h, hd, hd], inner_normal), ("b1", [h, 1, hd], Init::Zeros)],
                Inner::Mlp => &[
                    ("W1", [h, hd, 4 * hd], inner_normal),
                    ("b1", [h, 1, 4 * hd], Init::Zeros),
                    ("W2", [h, 4 * hd, hd], inner_normal),
                    ("b2", [h, 1, hd], Init::Zeros),
                ],
            };
            let initial: Vec<ParamId> =
                inner_shapes.iter().map(|(n, shape, init)| t.add(&format!("{s}{n}"), shape, *init)).collect();
            for id in &initial {
                t.entries[id.0].initial_state = true;
            }
            let ffn_norm = t.add(&format!("{p}ffn_norm.weight"), &[d], Init::Ones);
            let gate_proj = t.add(&format!("{p}mlp.gate_proj.weight"), &[i, d], normal);
            let up_proj = t.join(&format!("{p}mlp.up_proj.weight"), &[i, d], normal);
            let down_proj = t.add(&format!("{p}mlp.down_proj.weight"), &[d, i], normal);
            let ttt = TttIds {
                q_proj,
                k_proj,
                v_proj,
                g_proj,
                o_proj,
                convs,
                token_idx,
                lr_weight,
                lr_bias,
                ttt_norm,
                post_norm,
                initial,
            };
            blocks.push(BlockIds { pre_conv, seq_norm, ttt, ffn_norm, gate_proj, up_proj, down_proj });
        }
        let norm = t.add("model.norm.weight", &[d], Init::Ones);
        let head = if config.tie_word_embeddings { embed } else { t.add("lm_head.weight", &[v, d], normal) };
        t.len = t.len.next_multiple_of(ALIGN);
        (t, ModelIds { embed, blocks, norm, head })
    }

    fn add(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        self.len = self.len.next_multiple_of(ALIGN);
        self.join(name, shape, init)
    }

    /// Adds a parameter directly behind the previous one.
    fn join(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        let id = ParamId(self.entries.len());
        let entry = Entry { name: name.to_owned(), shape: shape.to_vec(), offset: self.len, init, initial_state: false };
        self.len += entry.elements();
        self.by_name.insert(name.to_owned(), id);
        self.entries.push(entry);
        id
    }

    /// All parameters, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// One parameter.
    pub fn entry(&self, id: ParamId) -> &Entry {
        &self.entries[id.0]
    }

    /// The parameter with this official name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.by_name.get(name).copied()
    }

    /// Elements of a flat buffer, gaps included.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Number of parameters, gaps not counted.
    pub fn parameters(&self) -> usize {
        self.entries.iter().map(Entry::elements).sum()
    }
}

/// One number for every parameter of a model, in one flat buffer.
#[derive(Clone, Debug)]
pub struct Params {
    table: Arc<ParamTable>,
    data: Tensor,
}

impl Params {
    /// All zeros.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn zeros(table: &Arc<ParamTable>, device: &Device, dtype: DType) -> Result<Params> {
        Ok(Params { table: table.clone(), data: Tensor::zeros(device, &[table.len()], dtype)? })
    }

    /// Initial values. Each parameter's depend on the seed and its name alone.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn init(table: &Arc<ParamTable>, device: &Device, dtype: DType, seed: u64) -> Result<Params> {
        let mut params = Params::zeros(table, device, dtype)?;
        let ids: Vec<ParamId> = (0..table.entries.len()).map(ParamId).collect();
        let values: Vec<Vec<f64>> = ids.par_iter().map(|id| initial_values(table.entry(*id), seed)).collect();
        for (id, values) in ids.into_iter().zip(values) {
            with_dtype!(dtype, E => {
                use crate::tensor::Element;
                for (x, v) in params.values_mut::<E>(id).iter_mut().zip(&values) {
                    // Rounding through f32 makes an f64 model start from the same numbers as an f32 one.
                    *x = E::from_f64(*v as f32 as f64);
                }
            });
        }
        Ok(params)
    }

    /// The table that lays the buffer out.
    pub fn table(&self) -> &Arc<ParamTable> {
        &self.table
    }

    /// The whole buffer.
    pub fn data(&self) -> &Tensor {
        &self.data
    }

    /// The whole buffer, to write.
    pub fn data_mut(&mut self) -> &mut Tensor {
        &mut self.data
    }

    /// Elements of one parameter.
    ///
    /// # Panics
    /// When they are not `E`.
    pub fn values<E: crate::tensor::Element>(&self, id: ParamId) -> &[E] {
        &self.data.as_slice()[self.table.entry(id).range()]
    }

    /// Elements of one parameter, to write.
    ///
    /// # Panics
    /// When they are not `E`.
    pub fn values_mut<E: crate::tensor::Element>(&mut self, id: ParamId) -> &mut [E] {
        let range = self.table.entry(id).range();
        &mut self.data.as_mut_slice()[range]
    }

    /// One parameter as a matrix `[all axes but the last, last axis]`.
    pub fn view(&self, id: ParamId) -> View<'_> {
        self.fused(id, id)
    }

    /// One parameter as a matrix, to write.
    pub fn view_mut(&mut self, id: ParamId) -> ViewMut<'_> {
        self.fused_mut(id, id)
    }

    /// The parameters from `first` to `last` as one matrix, rows one below the other.
    ///
    /// # Panics
    /// When they do not lie one behind the other with equal numbers of columns.
    pub fn fused(&self, first: ParamId, last: ParamId) -> View<'_> {
        let (range, [rows, cols]) = self.span(first, last);
        with_dtype!(self.data.dtype(), E => View::new(Mat::<E>::new(&self.data.as_slice()[range], rows, cols), self.data.device()))
    }

    /// The parameters from `first` to `last` as one matrix, to write.
    ///
    /// # Panics
    /// When they do not lie one behind the other with equal numbers of columns.
    pub fn fused_mut(&mut self, first: ParamId, last: ParamId) -> ViewMut<'_> {
        let (range, [rows, cols]) = self.span(first, last);
        self.data.view_mut().reshape_range(range, rows, cols)
    }

    /// Several parameters at once, to write.
    ///
    /// # Panics
    /// When the ids are not ascending.
    pub fn views_mut<const N: usize>(&mut self, ids: [ParamId; N]) -> [ViewMut<'_>; N] {
        assert!(ids.is_sorted_by(|a, b| a < b), "parameters to borrow at once must ascend: {ids:?}");
        let mut at = 0;
        let flat = self.data.len();
        let mut rest = Some(self.data.view_mut().reshape(flat, 1));
        ids.map(|id| {
            let entry = self.table.entry(id);
            let [rows, cols] = entry.matrix_shape();
            let (_, tail) = rest.take().expect("one remainder").split_rows(entry.offset - at);
            let (own, tail) = tail.split_rows(entry.elements());
            at = entry.offset + entry.elements();
            rest = Some(tail);
            own.reshape(rows, cols)
        })
    }

    fn span(&self, first: ParamId, last: ParamId) -> (Range<usize>, [usize; 2]) {
        let [_, cols] = self.table.entry(first).matrix_shape();
        let mut rows = 0;
        let mut end = self.table.entry(first).offset;
        for id in first.0..=last.0 {
            let entry = &self.table.entries[id];
            assert!(
                entry.offset == end && entry.matrix_shape()[1] == cols,
                "`{}` does not continue the matrix before it",
                entry.name
            );
            rows += entry.matrix_shape()[0];
            end += entry.elements();
        }
        (self.table.entry(first).offset..end, [rows, cols])
    }
}

fn initial_values(entry: &Entry, seed: u64) -> Vec<f64> {
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
    use super::*;
    use crate::config::Backbone;

    fn count(preset: &str, inner: Inner, backbone: Backbone, pre_conv: bool) -> usize {
        let mut config = Config::preset(preset, inner).unwrap().with_backbone(backbone);
        config.pre_conv = pre_conv;
        ParamTable::new(&config).0.parameters()
    }

    /// The official counts, tied embeddings; the 125m ones with convolutions were read off the official JAX model.
    #[test]
    fn published_parameter_counts() {
        use Backbone::{Mamba, Transformer};
        use Inner::{Linear, Mlp};
        let published = [
            ("125m", [110_276_688, 110_331_984, 110_368_848, 110_424_144, 114_442_320, 114_589_776]),
            ("350m", [337_291_008, 337_438_464, 337_536_768, 337_684_224, 348_399_360, 348_792_576]),
            ("760m", [733_018_368, 733_239_552, 733_387_008, 733_608_192, 757_938_432, 758_528_256]),
            ("1b", [1_284_852_864, 1_285_147_776, 1_285_344_384, 1_285_639_296, 1_307_069_568, 1_307_856_000]),
            ("1.3b", [1_284_852_864, 1_285_147_776, 1_285_344_384, 1_285_639_296, 1_307_069_568, 1_307_856_000]),
        ];
        for (preset, counts) in published {
            let ours = [
                count(preset, Linear, Transformer, false),
                count(preset, Linear, Transformer, true),
                count(preset, Linear, Mamba, false),
                count(preset, Linear, Mamba, true),
                count(preset, Mlp, Transformer, false),
                count(preset, Mlp, Mamba, true),
            ];
            assert_eq!(ours, counts, "{preset}");
        }
    }

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

    #[test]
    fn several_parameters_are_borrowed_at_once() {
        let config = Config::preset("tiny", Inner::Linear).unwrap();
        let (table, ids) = ParamTable::new(&config);
        let mut params = Params::zeros(&Arc::new(table), &Device::cpu().unwrap(), DType::F32).unwrap();
        let ttt = &ids.blocks[1].ttt;
        let [mut gamma, mut w1] = params.views_mut([ttt.ttt_norm.0, ttt.initial[0]]);
        gamma.as_mat::<f32>().row_mut(3)[5] = 1.0;
        w1.as_mat::<f32>().row_mut(47)[47] = 2.0;
        assert_eq!(params.values::<f32>(ttt.ttt_norm.0)[3 * 48 + 5], 1.0);
        assert_eq!(params.values::<f32>(ttt.initial[0])[47 * 48 + 47], 2.0);
    }
}
