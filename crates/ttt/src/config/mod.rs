//! Hyperparameters of a model: those of a TTT model have the names and defaults of the official `TTTConfig`, those of the two
//! baselines the names of Hugging Face's Llama and Mamba where it has them ([`crate::hub::config_json`] maps the others).

pub(crate) mod ladder;
mod presets;
mod validate;

pub use ladder::{LinearAttention, SEQUENCE, TokenScale};
pub use presets::{MAMBA_PRESETS, PRESETS};

use serde::{Deserialize, Serialize};

/// What mixes the tokens of a sequence in every block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mixer {
    /// A hidden state that is itself a model and learns: the TTT layer (paper section 2).
    #[default]
    Ttt,
    /// Causal softmax self-attention with rotary positions over the whole sequence: the paper's Transformer baseline.
    Attention,
    /// A selective state space (Mamba-1), without feed-forward parts: the paper's Mamba baseline.
    Mamba,
}

impl Mixer {
    /// All of them.
    pub const ALL: [Mixer; 3] = [Mixer::Ttt, Mixer::Attention, Mixer::Mamba];

    /// Whether a model with this mixer has the field of [`Config`] that is called `name`.
    pub fn has_field(self, name: &str) -> bool {
        let also: &[&str] = match self {
            Mixer::Ttt => &[
                "intermediate_size",
                "num_attention_heads",
                "rope_theta",
                "use_gate",
                "share_qk",
                "ttt_layer_type",
                "ttt_base_lr",
                "mini_batch_size",
                "pre_conv",
                "conv_kernel",
                "scan_checkpoint_group_size",
                "max_position_embeddings",
            ],
            Mixer::Attention => {
                &["intermediate_size", "num_attention_heads", "num_key_value_heads", "rope_theta", "max_position_embeddings"]
            }
            Mixer::Mamba => &["conv_kernel", "state_size", "expand", "time_step_rank"],
        };
        let shared = [
            "mixer",
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "hidden_act",
            "initializer_range",
            "rms_norm_eps",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "tie_word_embeddings",
        ];
        shared.contains(&name) || also.contains(&name) || (self == Mixer::Ttt && ladder::FIELDS.contains(&name))
    }
}

/// The inner model f, the hidden state that learns while it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Inner {
    /// `f(x) = x + LN(x W1 + b1)` (paper section 2.7, TTT-Linear).
    Linear,
    /// `f(x) = x + LN(gelu(x W1 + b1) W2 + b2)`, four times as wide inside (TTT-MLP).
    Mlp,
}

/// The two block designs of the paper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backbone {
    /// Separate q, k, v; no gate.
    Transformer,
    /// One projection shared by q and k with a convolution each, and an output gate.
    Mamba,
}

/// What fixes a model's shape and mathematics. The defaults are those of the official `TTTConfig`; a model has the fields that
/// its mixer has ([`Mixer::has_field`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// What mixes tokens; `model_type` in `config.json`.
    pub mixer: Mixer,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream, D.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of heads, each with an inner model of its own; of attention, those of the queries.
    pub num_attention_heads: usize,
    /// Activation of the feed-forward part, or inside a Mamba block; `silu` is the only one.
    pub hidden_act: String,
    /// Tokens the model was trained on at once; information only, every model reads any length.
    pub max_position_embeddings: usize,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Id that fills, of no use here.
    pub pad_token_id: Option<u32>,
    /// Id that begins a text.
    pub bos_token_id: Option<u32>,
    /// Id that ends a text.
    pub eos_token_id: Option<u32>,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Gate the layer's output by gelu of a projection (Mamba backbone).
    pub use_gate: bool,
    /// One projection for q and k, with a convolution each (Mamba backbone).
    pub share_qk: bool,
    /// The inner model.
    pub ttt_layer_type: Inner,
    /// Base inner learning rate: 1.0 for TTT-Linear, 0.1 for TTT-MLP.
    pub ttt_base_lr: f64,
    /// Tokens per inner gradient step, K, or [`SEQUENCE`].
    #[serde(with = "ladder::mini_batch")]
    pub mini_batch_size: usize,
    /// Linear attention in the place of the inner model; the fields `ttt_...` and `mini_batch_size` then say nothing.
    pub linear_attention: Option<LinearAttention>,
    /// LayerNorm in the inner model.
    pub ttt_layer_norm: bool,
    /// `x +` in the inner model; without it, it learns v itself and not `v - k`.
    pub ttt_residual: bool,
    /// Bias in the inner model.
    pub ttt_bias: bool,
    /// Learned initial fast weights; without them, they are 0.
    pub ttt_learnable_init: bool,
    /// Learned inner learning rates: the gate of every token and head and the scale of every position. Without them the rate is
    /// `ttt_base_lr` itself and the scale `ttt_token_scale`.
    pub ttt_learnable_lr: bool,
    /// Scale of the sum of gradients that a token sees, where it is not learned.
    pub ttt_token_scale: TokenScale,
    /// A causal convolution before the TTT layer in every block.
    pub pre_conv: bool,
    /// Taps of every convolution.
    pub conv_kernel: usize,
    /// Attention: heads of keys and values, each read by as many heads of queries; none: as many as those.
    pub num_key_value_heads: Option<usize>,
    /// Mamba: numbers of state for each inner channel.
    pub state_size: usize,
    /// Mamba: inner channels over `hidden_size`.
    pub expand: usize,
    /// Mamba: rank of the projection to step sizes; none: a sixteenth of `hidden_size`, rounded up.
    pub time_step_rank: Option<usize>,
    /// Training keeps the fast weights of every this many mini-batches and rebuilds the rest; 0 means 1.
    pub scan_checkpoint_group_size: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            mixer: Mixer::Ttt,
            vocab_size: 32_000,
            hidden_size: 2048,
            intermediate_size: 5504,
            num_hidden_layers: 24,
            num_attention_heads: 32,
            hidden_act: "silu".into(),
            max_position_embeddings: 2048,
            initializer_range: 0.02,
            rms_norm_eps: 1e-6,
            pad_token_id: None,
            bos_token_id: Some(1),
            eos_token_id: Some(2),
            tie_word_embeddings: true,
            rope_theta: 10_000.0,
            use_gate: false,
            share_qk: false,
            ttt_layer_type: Inner::Linear,
            ttt_base_lr: 1.0,
            mini_batch_size: 16,
            linear_attention: None,
            ttt_layer_norm: true,
            ttt_residual: true,
            ttt_bias: true,
            ttt_learnable_init: true,
            ttt_learnable_lr: true,
            ttt_token_scale: TokenScale::Mean,
            pre_conv: false,
            conv_kernel: 4,
            num_key_value_heads: None,
            state_size: 16,
            expand: 2,
            time_step_rank: None,
            scan_checkpoint_group_size: 0,
        }
    }
}

impl Config {
    /// With another inner model and its base learning rate.
    pub fn with_inner(mut self, inner: Inner) -> Config {
        self.ttt_layer_type = inner;
        self.ttt_base_lr = match inner {
            Inner::Linear => 1.0,
            Inner::Mlp => 0.1,
        };
        self
    }

    /// With another backbone.
    pub fn with_backbone(mut self, backbone: Backbone) -> Config {
        self.use_gate = backbone == Backbone::Mamba;
        self.share_qk = self.use_gate;
        self
    }

    /// The inner model that learns in mini-batches, where there is one.
    pub fn inner(&self) -> Option<Inner> {
        (self.mixer == Mixer::Ttt && !self.sums()).then_some(self.ttt_layer_type)
    }

    /// What people call such a model.
    pub fn kind(&self) -> &'static str {
        match (self.mixer, self.ttt_layer_type) {
            (Mixer::Ttt, _) if self.linear_attention.is_some() => "linear attention",
            (Mixer::Ttt, Inner::Linear) => "TTT-Linear",
            (Mixer::Ttt, Inner::Mlp) => "TTT-MLP",
            (Mixer::Attention, _) => "Transformer",
            (Mixer::Mamba, _) => "Mamba",
        }
    }

    /// Tokens of a mini-batch of the inner loop, K, where there is one.
    pub fn mini_batch(&self) -> Option<usize> {
        self.inner().map(|_| self.mini_batch_size)
    }

    /// Whether blocks have a feed-forward part.
    pub fn has_feed_forward(&self) -> bool {
        self.mixer != Mixer::Mamba
    }

    /// Width of a head, d.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Mini-batches between two kept states of the fast weights, g.
    pub fn checkpoint_group(&self) -> usize {
        self.scan_checkpoint_group_size.max(1)
    }

    /// Attention: heads of keys and values.
    pub fn key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Attention: width of all keys, and of all values.
    pub fn key_value_size(&self) -> usize {
        self.key_value_heads() * self.head_dim()
    }

    /// Mamba: inner channels.
    pub fn inner_size(&self) -> usize {
        self.expand * self.hidden_size
    }

    /// Mamba: rank of the projection to step sizes.
    pub fn step_rank(&self) -> usize {
        self.time_step_rank.unwrap_or(self.hidden_size.div_ceil(16))
    }
}
