//! Which parameter an array of the official JAX code is, and how its axes lie.

/// How an array becomes the official PyTorch code's tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// The same elements in the same order.
    Same,
    /// `[i, o]` becomes `[o, i]`: kernels of `flax.linen.Dense`, and `[taps, 1, D]` of `Conv` without turning the taps round.
    Transposed,
}

/// Name below a block, name below `model.layers.N.`, layout.
const BLOCK: [(&str, &str, Layout); 8] = [
    ("seq_norm/kernel", "seq_norm.weight", Layout::Same),
    ("ffn_norm/kernel", "ffn_norm.weight", Layout::Same),
    ("feed_forward/w1/kernel", "mlp.gate_proj.weight", Layout::Transposed),
    ("feed_forward/w3/kernel", "mlp.up_proj.weight", Layout::Transposed),
    ("feed_forward/w2/kernel", "mlp.down_proj.weight", Layout::Transposed),
    ("conv/conv_norm/kernel", "conv.norm.weight", Layout::Same),
    ("conv/conv1/kernel", "conv.conv.weight", Layout::Transposed),
    ("conv/conv1/bias", "conv.conv.bias", Layout::Same),
];

/// Name below `seq_modeling_block`, in both codes, and layout. Some names hold a slash of their own; joined paths hide that.
const LAYER: [(&str, &str, Layout); 20] = [
    ("wq/kernel", "q_proj.weight", Layout::Transposed),
    ("wk/kernel", "k_proj.weight", Layout::Transposed),
    ("wv/kernel", "v_proj.weight", Layout::Transposed),
    ("wo/kernel", "o_proj.weight", Layout::Transposed),
    ("wg/kernel", "g_proj.weight", Layout::Transposed),
    ("conv_q/kernel", "conv_q.weight", Layout::Transposed),
    ("conv_q/bias", "conv_q.bias", Layout::Same),
    ("conv_k/kernel", "conv_k.weight", Layout::Transposed),
    ("conv_k/bias", "conv_k.bias", Layout::Same),
    ("learnable_token_idx", "learnable_token_idx", Layout::Same),
    ("learnable_ttt_lr/kernel", "learnable_ttt_lr_weight", Layout::Same),
    ("learnable_ttt_lr/bias", "learnable_ttt_lr_bias", Layout::Same),
    ("ttt_norm/scale", "ttt_norm_weight", Layout::Same),
    ("ttt_norm/bias", "ttt_norm_bias", Layout::Same),
    ("post_norm/scale", "post_norm.weight", Layout::Same),
    ("post_norm/bias", "post_norm.bias", Layout::Same),
    ("ttt_dense_0", "W1", Layout::Same),
    ("ttt_bias_0", "b1", Layout::Same),
    ("ttt_dense_1", "W2", Layout::Same),
    ("ttt_bias_1", "b2", Layout::Same),
];

/// The official PyTorch name and the layout of the array at `path`, a path below `params` joined by slashes; `None` for what is no
/// parameter of a TTT model.
pub(super) fn official(path: &str) -> Option<(String, Layout)> {
    match path {
        "model/wte/embedding" => return Some(("model.embed_tokens.weight".into(), Layout::Same)),
        "model/ln_f/kernel" => return Some(("model.norm.weight".into(), Layout::Same)),
        "lm_head/kernel" => return Some(("lm_head.weight".into(), Layout::Transposed)),
        _ => {}
    }
    let (layer, name) = path.strip_prefix("model/h/")?.split_once('/')?;
    // "07" and "+7" are other names of 7.
    let layer: usize = layer.parse().ok().filter(|n: &usize| n.to_string() == layer)?;
    let find = |table: &[(&str, &'static str, Layout)], name: &str| {
        table.iter().find(|(theirs, ..)| *theirs == name).map(|(_, ours, layout)| (*ours, *layout))
    };
    Some(match name.strip_prefix("seq_modeling_block/") {
        Some(name) => {
            let (ours, layout) = find(&LAYER, name)?;
            (format!("model.layers.{layer}.seq_modeling_block.{ours}"), layout)
        }
        None => {
            let (ours, layout) = find(&BLOCK, name)?;
            (format!("model.layers.{layer}.{ours}"), layout)
        }
    })
}

/// The name that Hugging Face's Llama has for a parameter of the Transformer baseline, from that of the same parameter in a TTT
/// model.
pub(super) fn of_transformer(name: &str) -> String {
    name.replace(".seq_modeling_block.", ".self_attn.")
        .replace(".seq_norm.", ".input_layernorm.")
        .replace(".ffn_norm.", ".post_attention_layernorm.")
}
