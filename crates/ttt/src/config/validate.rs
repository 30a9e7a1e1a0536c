//! Which models can exist.

use super::{Config, Mixer};
use crate::{Error, Result};

/// Bounds that no real model reaches and no damaged file gets past: sizes computed within them neither overflow nor fill the memory
/// before the weights are looked at.
const MAX_LAYERS: usize = 4096;
const MAX_PARAMETERS: u128 = 1 << 40;

impl Config {
    /// Checks that a model of this shape can exist.
    ///
    /// # Errors
    /// The first field that is wrong, its value, and what it may be.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::Config(message));
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("conv_kernel", self.conv_kernel),
            ("num_key_value_heads", self.key_value_heads()),
            ("state_size", self.state_size),
            ("expand", self.expand),
            ("time_step_rank", self.step_rank()),
        ];
        for (name, value) in sizes {
            if value == 0 || value > 1 << 30 {
                return wrong(format!("{name} is {value}; it must be at least 1 and at most {}", 1 << 30));
            }
        }
        if self.mixer != Mixer::Mamba {
            self.validate_heads()?;
        }
        if self.mixer == Mixer::Ttt {
            self.validate_ladder()?;
        }
        if self.hidden_act != "silu" {
            return wrong(format!("hidden_act is `{}`; the models here use `silu`", self.hidden_act));
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

    fn validate_heads(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::Config(message));
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return wrong(format!(
                "hidden_size {} is not divisible by num_attention_heads {}",
                self.hidden_size, self.num_attention_heads
            ));
        }
        if !self.head_dim().is_multiple_of(2) {
            return wrong(format!("the head size {} (hidden_size / num_attention_heads) must be even for RoPE", self.head_dim()));
        }
        if !self.num_attention_heads.is_multiple_of(self.key_value_heads()) {
            return wrong(format!(
                "num_attention_heads {} is not divisible by num_key_value_heads {}",
                self.num_attention_heads,
                self.key_value_heads()
            ));
        }
        Ok(())
    }

    /// No fewer parameters than the model has: the table's sums, rounded up.
    fn parameters_at_most(&self) -> u128 {
        let wide = |x: usize| x as u128;
        let (d, i, v) = (wide(self.hidden_size), wide(self.intermediate_size), wide(self.vocab_size));
        let block = match self.mixer {
            // Five projections, the feed-forward part, W1 and W2 of TTT-MLP, three convolutions, norms and biases.
            Mixer::Ttt => {
                d * (5 * d + 3 * i + 8 * wide(self.head_dim()) + 3 * wide(self.conv_kernel) + 16 + wide(self.num_attention_heads))
                    + wide(self.mini_batch_size)
            }
            Mixer::Attention => d * (4 * d + 3 * i + 2),
            // Projections in and out, those to B, C and the step sizes, A, D, the convolution, biases, the norm.
            Mixer::Mamba => {
                let (inner, n, rank) = (wide(self.expand) * d, wide(self.state_size), wide(self.step_rank()));
                inner * (3 * d + 2 * rank + 3 * n + wide(self.conv_kernel) + 3) + d
            }
        };
        2 * v * d + d + wide(self.num_hidden_layers) * block
    }
}
