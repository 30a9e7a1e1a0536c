//! The published sizes.

use super::{Backbone, Config, Inner, Mixer};
use crate::{Error, Result};

/// Names that [`Config::preset`] and [`Config::transformer`] know.
pub const PRESETS: [&str; 6] = ["tiny", "125m", "350m", "760m", "1.3b", "1b"];

/// Names that [`Config::mamba`] knows besides those: the published ones of the same sizes.
pub const MAMBA_PRESETS: [&str; 4] = ["130m", "370m", "790m", "1.4b"];

impl Config {
    /// A published size (paper, Table 3) or `tiny`, with the Mamba backbone, `pre_conv` and the inner model's base
    /// learning rate: what the official JAX presets train.
    ///
    /// # Errors
    /// An unknown name, with the known ones.
    pub fn preset(name: &str, inner: Inner) -> Result<Config> {
        let config = Config { scan_checkpoint_group_size: 4, pre_conv: true, ..shape(name)? };
        Ok(config.with_inner(inner).with_backbone(Backbone::Mamba))
    }

    /// The Transformer of the same size: the paper's baseline (`self_attention` of the official JAX code).
    ///
    /// # Errors
    /// An unknown name, with the known ones.
    pub fn transformer(name: &str) -> Result<Config> {
        Ok(Config { mixer: Mixer::Attention, ..shape(name)? })
    }

    /// The Mamba of about the same size, under its own name or that of the size: 24 x 768 (130m), 48 x 1024 (370m), 48 x 1536
    /// (790m), 48 x 2048 (1.4b; Gu & Dao, arXiv 2312.00752, Table 12), or `tiny`. The vocabulary is that of the other presets.
    ///
    /// # Errors
    /// An unknown name, with the known ones.
    pub fn mamba(name: &str) -> Result<Config> {
        let (like, hidden, layers) = match name {
            "tiny" => ("tiny", 192, 8),
            "130m" | "125m" => ("125m", 768, 24),
            "370m" | "350m" => ("350m", 1024, 48),
            "790m" | "760m" => ("760m", 1536, 48),
            "1.4b" | "1.3b" | "1b" => ("1.3b", 2048, 48),
            _ => return Err(unknown(name, &[&PRESETS[..], &MAMBA_PRESETS].concat())),
        };
        // What the published models were trained with.
        let rms_norm_eps = 1e-5;
        Ok(Config { mixer: Mixer::Mamba, hidden_size: hidden, num_hidden_layers: layers, rms_norm_eps, ..shape(like)? })
    }
}

/// What the models of a size have in common.
fn shape(name: &str) -> Result<Config> {
    let (hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, vocab_size) = match name {
        "tiny" => (192, 512, 4, 4, 258),
        "125m" => (768, 2048, 12, 12, 32_000),
        "350m" => (1024, 2736, 24, 16, 32_000),
        "760m" => (1536, 4096, 24, 16, 32_000),
        "1.3b" | "1b" => (2048, 5504, 24, 32, 32_000),
        _ => return Err(unknown(name, &PRESETS)),
    };
    let sizes = Config { hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, vocab_size, ..Config::default() };
    Ok(match name {
        // Bytes, and the two ids behind them.
        "tiny" => Config { bos_token_id: Some(256), eos_token_id: Some(257), ..sizes },
        _ => sizes,
    })
}

fn unknown(name: &str, known: &[&str]) -> Error {
    Error::Config(format!("no preset is called `{name}`; there are {}", known.join(", ")))
}
