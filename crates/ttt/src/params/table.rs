//! The table of a model's parameters: names, shapes, places in the flat buffers, initial values.

use std::collections::HashMap;
use std::ops::Range;

use super::init::Init;
use crate::config::{Config, Inner};

/// Index of a parameter in its [`ParamTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamId(pub usize);

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
        let mut t = ParamTable::empty();
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

    /// The initial fast weights alone, in this table's order.
    pub fn initial_state(&self) -> ParamTable {
        let mut t = ParamTable::empty();
        for entry in self.entries.iter().filter(|e| e.initial_state) {
            let id = t.add(&entry.name, &entry.shape, entry.init);
            t.entries[id.0].initial_state = true;
        }
        t.len = t.len.next_multiple_of(ALIGN);
        t
    }

    /// For gradients when the initial fast weights alone are learned: the same ids, but matrices that stay as they are have no
    /// rows, so that their gradients take neither memory nor work.
    pub fn gradients_of_initial_state(&self) -> ParamTable {
        let mut t = ParamTable::empty();
        for entry in &self.entries {
            // Norms and biases are small, start constant, and their gradients come with others'.
            let matrix = entry.shape.len() == 2 && matches!(entry.init, Init::Normal(_));
            let unwanted = matrix && !entry.initial_state;
            let shape = if unwanted { vec![0, entry.shape[1]] } else { entry.shape.clone() };
            // Matrices that are one in the model stay one.
            let id = if unwanted { t.join(&entry.name, &shape, entry.init) } else { t.add(&entry.name, &shape, entry.init) };
            t.entries[id.0].initial_state = entry.initial_state;
        }
        t.len = t.len.next_multiple_of(ALIGN);
        t
    }

    fn empty() -> ParamTable {
        ParamTable { entries: Vec::new(), by_name: HashMap::new(), len: 0 }
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
}
