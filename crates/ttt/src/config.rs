//! Hyperparameters of a model: the official `TTTConfig` (Hugging Face `config.json`) with its names and defaults, and the presets.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

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

/// What fixes a model's shape and mathematics. Field names and defaults are those of the official `TTTConfig`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Always `ttt`.
    pub model_type: String,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream, D.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of heads, each with an inner model of its own.
    pub num_attention_heads: usize,
    /// Activation of the feed-forward part; `silu` is the only one.
    pub hidden_act: String,
    /// Tokens the model was trained on at once; information only, a TTT model reads any length.
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
    /// Tokens per inner gradient step, K.
    pub mini_batch_size: usize,
    /// A causal convolution before the TTT layer in every block.
    pub pre_conv: bool,
    /// Taps of every convolution.
    pub conv_kernel: usize,
    /// Training keeps the fast weights of every this many mini-batches and rebuilds the rest; 0 means 1.
    pub scan_checkpoint_group_size: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            model_type: "ttt".into(),
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
            pre_conv: false,
            conv_kernel: 4,
            scan_checkpoint_group_size: 0,
        }
    }
}

/// Bounds that no real model reaches and no damaged file gets past: sizes computed within them neither overflow nor fill the memory
/// before the weights are looked at.
const MAX_LAYERS: usize = 4096;
const MAX_PARAMETERS: u128 = 1 << 40;

/// Names that [`Config::preset`] knows.
pub const PRESETS: [&str; 6] = ["tiny", "125m", "350m", "760m", "1.3b", "1b"];

impl Config {
    /// A published size (paper, Table 3) or `tiny`, with the Mamba backbone, `pre_conv` and the inner model's base
    /// learning rate: what the official JAX presets train.
    ///
    /// # Errors
    /// An unknown name, with the known ones.
    pub fn preset(name: &str, inner: Inner) -> Result<Config> {
        let (hidden, intermediate, layers, heads, vocab) = match name {
            "tiny" => (192, 512, 4, 4, 258),
            "125m" => (768, 2048, 12, 12, 32_000),
            "350m" => (1024, 2736, 24, 16, 32_000),
            "760m" => (1536, 4096, 24, 16, 32_000),
            "1.3b" | "1b" => (2048, 5504, 24, 32, 32_000),
            _ => return Err(Error::Config(format!("no preset is called `{name}`; there are {}", PRESETS.join(", ")))),
        };
        let mut config = Config {
            hidden_size: hidden,
            intermediate_size: intermediate,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            vocab_size: vocab,
            scan_checkpoint_group_size: 4,
            pre_conv: true,
            ..Config::default()
        }
        .with_inner(inner)
        .with_backbone(Backbone::Mamba);
        if name == "tiny" {
            (config.bos_token_id, config.eos_token_id) = (Some(256), Some(257));
        }
        Ok(config)
    }

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

    /// Width of a head, d.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Mini-batches between two kept states of the fast weights, g.
    pub fn checkpoint_group(&self) -> usize {
        self.scan_checkpoint_group_size.max(1)
    }

    /// Checks that a model of this shape can exist.
    ///
    /// # Errors
    /// The first field that is wrong, its value, and what it may be.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::Config(message));
        if self.model_type != "ttt" {
            return wrong(format!("model_type is `{}`, but this program reads models of type `ttt`", self.model_type));
        }
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("conv_kernel", self.conv_kernel),
        ];
        for (name, value) in sizes {
            if value == 0 || value > 1 << 30 {
                return wrong(format!("{name} is {value}; it must be at least 1 and at most {}", 1 << 30));
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return wrong(format!(
                "hidden_size {} is not divisible by num_attention_heads {}",
                self.hidden_size, self.num_attention_heads
            ));
        }
        if !self.head_dim().is_multiple_of(2) {
            return wrong(format!("the head size {} (hidden_size / num_attention_heads) must be even for RoPE", self.head_dim()));
        }
        if !(1..=64).contains(&self.mini_batch_size) {
            return wrong(format!("mini_batch_size is {}; it must be from 1 to 64", self.mini_batch_size));
        }
        if self.hidden_act != "silu" {
            return wrong(format!("hidden_act is `{}`; TTT models use `silu`", self.hidden_act));
        }
        if self.num_hidden_layers > MAX_LAYERS || self.parameters_at_most() > MAX_PARAMETERS {
            return wrong(format!(
                "num_hidden_layers {}, hidden_size {}, intermediate_size {}, vocab_size {} and conv_kernel {} make a model of more than \
                 {MAX_LAYERS} layers or {MAX_PARAMETERS} parameters",
                self.num_hidden_layers, self.hidden_size, self.intermediate_size, self.vocab_size, self.conv_kernel
            ));
        }
        let positive = [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta), ("ttt_base_lr", self.ttt_base_lr)];
        for (name, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return wrong(format!("{name} is {value}; it must be a positive number"));
            }
        }
        if !(self.initializer_range >= 0.0 && self.initializer_range.is_finite()) {
            return wrong(format!("initializer_range is {}; it must be a number from 0 up", self.initializer_range));
        }
        Ok(())
    }

    /// No fewer parameters than the model has: the table's sums, rounded up.
    fn parameters_at_most(&self) -> u128 {
        let wide = |x: usize| x as u128;
        let (d, i, v) = (wide(self.hidden_size), wide(self.intermediate_size), wide(self.vocab_size));
        // Five projections, the feed-forward part, W1 and W2 of TTT-MLP, three convolutions, norms and biases.
        let block = d
            * (5 * d + 3 * i + 8 * wide(self.head_dim()) + 3 * wide(self.conv_kernel) + 16 + wide(self.num_attention_heads))
            + wide(self.mini_batch_size);
        2 * v * d + d + wide(self.num_hidden_layers) * block
    }
}
