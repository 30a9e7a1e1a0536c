//! What the paper's ladder from linear attention to TTT-Linear (its Table 1) varies in a TTT layer. The defaults are those of every
//! published model, whose `config.json` has none of these fields.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Config, Inner, Mixer};
use crate::{Error, Result};

/// Linear attention in the place of the inner model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinearAttention {
    /// Products of queries and keys as they are.
    Plain,
    /// Feature map elu + 1, and division by the sum of a token's weights (Katharopoulos et al., arXiv 2006.16236).
    Normalised,
}

/// Scale τ of the sum of gradients that a token sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenScale {
    /// 1/(i + 1) for the token at position i of its mini-batch: the mean of the gradients up to its own, as in the official code.
    #[default]
    Mean,
    /// 1: their sum, as in the paper's equation 6.
    Sum,
}

impl TokenScale {
    /// τ of the token at a position.
    pub fn at(self, position: usize) -> f64 {
        match self {
            TokenScale::Mean => 1.0 / (position + 1) as f64,
            TokenScale::Sum => 1.0,
        }
    }
}

/// A `mini_batch_size` that is the whole sequence, written `sequence`: batch gradient descent.
pub const SEQUENCE: usize = 0;
const NAME: &str = "sequence";

/// Names of the fields that are ours, with defaults that change nothing.
pub(crate) const FIELDS: [&str; 7] =
    ["linear_attention", "ttt_layer_norm", "ttt_residual", "ttt_bias", "ttt_learnable_init", "ttt_learnable_lr", "ttt_token_scale"];

/// [`SEQUENCE`] by its name, other sizes as numbers.
pub(super) mod mini_batch {
    use super::*;

    pub(in crate::config) fn serialize<S: Serializer>(size: &usize, to: S) -> Result<S::Ok, S::Error> {
        if *size == SEQUENCE { to.serialize_str(NAME) } else { to.serialize_u64(*size as u64) }
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a number of tokens, or `sequence`")]
        enum Size {
            Tokens(usize),
            Name(Name),
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Name {
            Sequence,
        }
        match Size::deserialize(from)? {
            Size::Tokens(SEQUENCE) => Err(D::Error::custom("mini_batch_size is 0; it must be from 1 to 64, or `sequence`")),
            Size::Tokens(size) => Ok(size),
            Size::Name(Name::Sequence) => Ok(SEQUENCE),
        }
    }
}

impl Config {
    /// Whether the learner of a TTT layer is not one that learns in mini-batches: what it carries are sums over all tokens, and its
    /// positions count on.
    pub fn sums(&self) -> bool {
        self.mixer == Mixer::Ttt && (self.linear_attention.is_some() || self.mini_batch_size == SEQUENCE)
    }

    /// Whether the layer has the learned gates and scales of η.
    pub(crate) fn learns_lr(&self) -> bool {
        self.linear_attention.is_none() && self.ttt_learnable_lr
    }

    /// Whether the learner has learned initial weights.
    pub(crate) fn learns_init(&self) -> bool {
        self.linear_attention.is_none() && self.ttt_learnable_init
    }

    /// Whether the inner model has LayerNorm, and so its weight and bias.
    pub(crate) fn norms_inner(&self) -> bool {
        self.linear_attention.is_none() && self.ttt_layer_norm
    }

    /// Checks what can be combined.
    pub(super) fn validate_ladder(&self) -> Result<()> {
        let wrong = |message: &str| Err(Error::Config(message.into()));
        if self.mini_batch_size > 64 {
            let message = format!("mini_batch_size is {}; it must be from 1 to 64, or `sequence`", self.mini_batch_size);
            return Err(Error::Config(message));
        }
        let sequence = self.mini_batch_size == SEQUENCE;
        if sequence && self.linear_attention.is_none() && self.ttt_layer_type == Inner::Mlp {
            return wrong("mini_batch_size is `sequence`, which is there for ttt_layer_type `linear` alone");
        }
        if !self.ttt_bias && (!sequence || self.ttt_learnable_init) {
            return wrong("ttt_bias is false; that is there for mini_batch_size `sequence` with ttt_learnable_init false alone");
        }
        if sequence && self.ttt_learnable_lr && self.linear_attention.is_none() && self.ttt_token_scale != Default::default() {
            return wrong("ttt_token_scale is `sum`; with ttt_learnable_lr it is `mean`");
        }
        Ok(())
    }
}
