//! Which parameters a model has, under the names of its official code: `TTTForCausalLM`, and Hugging Face's `LlamaForCausalLM` and
//! `MambaForCausalLM`.

use super::init::Init;
use super::table::{ParamId, ParamTable};
use crate::config::{Config, Inner, Mixer};

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
    /// The learned inner learning rate; none where it is fixed.
    pub lr: Option<LrIds>,
    /// Weight and bias of the LayerNorm inside f, where there is one.
    pub ttt_norm: Option<(ParamId, ParamId)>,
    /// Weight and bias of the LayerNorm before the output projection.
    pub post_norm: (ParamId, ParamId),
    /// Initial fast weights: W1, b1 (TTT-Linear) or W1, b1, W2, b2 (TTT-MLP); none where they are 0.
    pub initial: Vec<ParamId>,
}

/// Parameters of the learned inner learning rate.
#[derive(Clone, Copy, Debug)]
pub struct LrIds {
    /// Offset of the token scale, for each position of a mini-batch; none where the mini-batch is the sequence.
    pub token_idx: Option<ParamId>,
    /// Weight of the gate.
    pub weight: ParamId,
    /// Bias of the gate.
    pub bias: ParamId,
}

/// Parameters of one attention layer.
#[derive(Clone, Debug)]
pub struct AttentionIds {
    /// Projection to q; those to k and v follow it without a gap.
    pub q_proj: ParamId,
    /// Projection to k.
    pub k_proj: ParamId,
    /// Projection to v.
    pub v_proj: ParamId,
    /// Output projection.
    pub o_proj: ParamId,
}

/// Parameters of one Mamba layer.
#[derive(Clone, Debug)]
pub struct MambaIds {
    /// `[x | gate]`, `[2 inner, D]`.
    pub in_proj: ParamId,
    /// Weight `[inner, 1, taps]` and bias `[inner]` of the convolution.
    pub conv: (ParamId, ParamId),
    /// `[step | B | C]`, `[rank + 2 state, inner]`.
    pub x_proj: ParamId,
    /// Weight `[inner, rank]` and bias `[inner]` of the projection to step sizes.
    pub dt_proj: (ParamId, ParamId),
    /// `ln(−A)`, `[inner, state]`.
    pub a_log: ParamId,
    /// The skip D, `[inner]`.
    pub d: ParamId,
    /// Output projection, `[D, inner]`.
    pub out_proj: ParamId,
}

/// Parameters of what mixes tokens.
#[derive(Clone, Debug)]
pub enum MixerIds {
    /// A TTT layer.
    Ttt(TttIds),
    /// An attention layer.
    Attention(AttentionIds),
    /// A Mamba layer.
    Mamba(MambaIds),
}

/// Parameters of a feed-forward part.
#[derive(Clone, Debug)]
pub struct FeedForwardIds {
    /// Norm before it.
    pub norm: ParamId,
    /// Gate projection; the up projection follows it without a gap.
    pub gate_proj: ParamId,
    /// Up projection.
    pub up_proj: ParamId,
    /// Down projection.
    pub down_proj: ParamId,
}

/// Parameters of one block.
#[derive(Clone, Debug)]
pub struct BlockIds {
    /// Norm, weight and bias of the convolution before the TTT layer.
    pub pre_conv: Option<(ParamId, ParamId, ParamId)>,
    /// Norm before the mixer.
    pub norm: ParamId,
    /// What mixes tokens.
    pub mixer: MixerIds,
    /// The feed-forward part, which Mamba's blocks do not have.
    pub feed_forward: Option<FeedForwardIds>,
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
        let (d, v) = (config.hidden_size, config.vocab_size);
        let normal = Init::Normal(config.initializer_range);
        let [embed, prefix, norm] = match config.mixer {
            Mixer::Ttt | Mixer::Attention => ["model.embed_tokens.weight", "model.layers", "model.norm.weight"],
            Mixer::Mamba => ["backbone.embeddings.weight", "backbone.layers", "backbone.norm_f.weight"],
        };
        let embed = t.add(embed, &[v, d], normal);
        let block = match config.mixer {
            Mixer::Ttt => ttt_block,
            Mixer::Attention => attention_block,
            Mixer::Mamba => mamba_block,
        };
        let blocks = (0..config.num_hidden_layers).map(|layer| block(&mut t, config, &format!("{prefix}.{layer}."))).collect();
        let norm = t.add(norm, &[d], Init::Ones);
        let head = if config.tie_word_embeddings { embed } else { t.add("lm_head.weight", &[v, d], normal) };
        (t.finished(), ModelIds { embed, blocks, norm, head })
    }
}

/// A TTT model's convolutions. Lecun normal: the fan-in of a depthwise convolution is its number of taps.
fn conv_normal(config: &Config) -> Init {
    Init::TruncatedNormal((1.0 / config.conv_kernel as f64).sqrt())
}

fn ttt_block(t: &mut ParamTable, config: &Config, p: &str) -> BlockIds {
    let (d, taps) = (config.hidden_size, config.conv_kernel);
    let pre_conv = config.pre_conv.then(|| {
        (
            t.add(&format!("{p}conv.norm.weight"), &[d], Init::Ones),
            t.add(&format!("{p}conv.conv.weight"), &[d, 1, taps], conv_normal(config)),
            t.add(&format!("{p}conv.conv.bias"), &[d], Init::Zeros),
        )
    });
    let norm = t.add(&format!("{p}seq_norm.weight"), &[d], Init::Ones);
    let mixer = MixerIds::Ttt(ttt_layer(t, config, &format!("{p}seq_modeling_block.")));
    let feed_forward = Some(feed_forward(t, config, p, "ffn_norm"));
    BlockIds { pre_conv, norm, mixer, feed_forward }
}

fn ttt_layer(t: &mut ParamTable, config: &Config, s: &str) -> TttIds {
    let (d, taps) = (config.hidden_size, config.conv_kernel);
    let (h, hd, k) = (config.num_attention_heads, config.head_dim(), config.mini_batch_size);
    let normal = Init::Normal(config.initializer_range);
    // The official code hard-codes 0.02 for the learning-rate gate and the initial fast weights.
    let inner_normal = Init::Normal(0.02);
    // q, k, v and g lie one behind the other, so that they are also one matrix.
    let q_proj = t.add(&format!("{s}q_proj.weight"), &[d, d], normal);
    let k_proj = (!config.share_qk).then(|| t.join(&format!("{s}k_proj.weight"), &[d, d], normal));
    let v_proj = t.join(&format!("{s}v_proj.weight"), &[d, d], normal);
    let g_proj = config.use_gate.then(|| t.join(&format!("{s}g_proj.weight"), &[d, d], normal));
    let o_proj = t.add(&format!("{s}o_proj.weight"), &[d, d], normal);
    let convs = config.share_qk.then(|| {
        ["conv_q", "conv_k"].map(|c| {
            (
                t.add(&format!("{s}{c}.weight"), &[d, 1, taps], conv_normal(config)),
                t.add(&format!("{s}{c}.bias"), &[d], Init::Zeros),
            )
        })
    });
    let lr = config.learns_lr().then(|| LrIds {
        token_idx: (!config.sums()).then(|| t.add(&format!("{s}learnable_token_idx"), &[k], Init::Zeros)),
        weight: t.add(&format!("{s}learnable_ttt_lr_weight"), &[h, 1, d], inner_normal),
        bias: t.add(&format!("{s}learnable_ttt_lr_bias"), &[h, 1], Init::Zeros),
    });
    let ttt_norm = config.norms_inner().then(|| {
        (t.add(&format!("{s}ttt_norm_weight"), &[h, hd], Init::Ones), t.add(&format!("{s}ttt_norm_bias"), &[h, hd], Init::Zeros))
    });
    let post_norm =
        (t.add(&format!("{s}post_norm.weight"), &[d], Init::Ones), t.add(&format!("{s}post_norm.bias"), &[d], Init::Zeros));
    let inner_shapes: &[(&str, [usize; 3], Init)] = match config.ttt_layer_type {
        _ if !config.learns_init() => &[],
        Inner::Linear => &[("W1", [h, hd, hd], inner_normal), ("b1", [h, 1, hd], Init::Zeros)],
        Inner::Mlp => &[
            ("W1", [h, hd, 4 * hd], inner_normal),
            ("b1", [h, 1, 4 * hd], Init::Zeros),
            ("W2", [h, 4 * hd, hd], inner_normal),
            ("b2", [h, 1, hd], Init::Zeros),
        ],
    };
    let initial: Vec<ParamId> = inner_shapes.iter().map(|(n, shape, init)| t.add(&format!("{s}{n}"), shape, *init)).collect();
    for id in &initial {
        t.mark_initial_state(*id);
    }
    TttIds { q_proj, k_proj, v_proj, g_proj, o_proj, convs, lr, ttt_norm, post_norm, initial }
}

/// A block of Hugging Face's Llama.
fn attention_block(t: &mut ParamTable, config: &Config, p: &str) -> BlockIds {
    let (d, kv) = (config.hidden_size, config.key_value_size());
    let normal = Init::Normal(config.initializer_range);
    let norm = t.add(&format!("{p}input_layernorm.weight"), &[d], Init::Ones);
    // q, k and v lie one behind the other, so that they are also one matrix.
    let q_proj = t.add(&format!("{p}self_attn.q_proj.weight"), &[d, d], normal);
    let k_proj = t.join(&format!("{p}self_attn.k_proj.weight"), &[kv, d], normal);
    let v_proj = t.join(&format!("{p}self_attn.v_proj.weight"), &[kv, d], normal);
    let o_proj = t.add(&format!("{p}self_attn.o_proj.weight"), &[d, d], normal);
    let mixer = MixerIds::Attention(AttentionIds { q_proj, k_proj, v_proj, o_proj });
    let feed_forward = Some(feed_forward(t, config, p, "post_attention_layernorm"));
    BlockIds { pre_conv: None, norm, mixer, feed_forward }
}

/// A block of Hugging Face's Mamba, which starts as in the authors' code (`mamba_ssm`): matrices and convolutions as PyTorch starts
/// them, uniform within 1/√(fan-in), the output projection divided by √(number of blocks). A and D do not decay.
fn mamba_block(t: &mut ParamTable, config: &Config, p: &str) -> BlockIds {
    let (d, inner, taps) = (config.hidden_size, config.inner_size(), config.conv_kernel);
    let (n, rank) = (config.state_size, config.step_rank());
    let uniform = |fan_in: usize| Init::Uniform((fan_in as f64).powf(-0.5));
    let norm = t.add(&format!("{p}norm.weight"), &[d], Init::Ones);
    let s = format!("{p}mixer.");
    let a_log = t.add(&format!("{s}A_log"), &[inner, n], Init::LogCount);
    let skip = t.add(&format!("{s}D"), &[inner], Init::Ones);
    for id in [a_log, skip] {
        t.mark_without_decay(id);
    }
    let in_proj = t.add(&format!("{s}in_proj.weight"), &[2 * inner, d], uniform(d));
    let conv = (
        t.add(&format!("{s}conv1d.weight"), &[inner, 1, taps], uniform(taps)),
        t.add(&format!("{s}conv1d.bias"), &[inner], uniform(taps)),
    );
    let x_proj = t.add(&format!("{s}x_proj.weight"), &[rank + 2 * n, inner], uniform(inner));
    let dt_proj = (
        t.add(&format!("{s}dt_proj.weight"), &[inner, rank], uniform(rank)),
        t.add(&format!("{s}dt_proj.bias"), &[inner], Init::StepBias),
    );
    let out_proj = t.add(&format!("{s}out_proj.weight"), &[d, inner], uniform(inner * config.num_hidden_layers));
    let mixer = MixerIds::Mamba(MambaIds { in_proj, conv, x_proj, dt_proj, a_log, d: skip, out_proj });
    BlockIds { pre_conv: None, norm, mixer, feed_forward: None }
}

fn feed_forward(t: &mut ParamTable, config: &Config, p: &str, norm: &str) -> FeedForwardIds {
    let (d, i) = (config.hidden_size, config.intermediate_size);
    let normal = Init::Normal(config.initializer_range);
    FeedForwardIds {
        norm: t.add(&format!("{p}{norm}.weight"), &[d], Init::Ones),
        gate_proj: t.add(&format!("{p}mlp.gate_proj.weight"), &[i, d], normal),
        up_proj: t.join(&format!("{p}mlp.up_proj.weight"), &[i, d], normal),
        down_proj: t.add(&format!("{p}mlp.down_proj.weight"), &[d, i], normal),
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

    /// The official counts of the Transformer baseline (JAX `self_attention`; that of 125m was read off the official model).
    #[test]
    fn published_parameter_counts_of_the_transformer() {
        let published = [("125m", 109_529_856), ("350m", 335_201_280), ("760m", 728_704_512), ("1.3b", 1_279_887_360)];
        for (preset, count) in published {
            assert_eq!(ParamTable::new(&Config::transformer(preset).unwrap()).0.parameters(), count, "{preset}");
        }
    }

    /// Those of the published Mamba models with their vocabulary (`state-spaces/mamba-130m-hf` and so on).
    #[test]
    fn published_parameter_counts_of_mamba() {
        for (preset, count) in [("130m", 129_135_360), ("370m", 371_516_416), ("790m", 793_204_224), ("1.4b", 1_372_178_432)] {
            let config = Config { vocab_size: 50_280, ..Config::mamba(preset).unwrap() };
            assert_eq!(ParamTable::new(&config).0.parameters(), count, "{preset}");
        }
    }
}
