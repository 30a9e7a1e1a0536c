//! What a state file may do to a program that reads it, whatever bytes it holds: nothing but to be restored or refused. Used by
//! the tests and by the fuzzer.
#![allow(dead_code)]

use std::sync::Arc;

use ttt::config::{Config, Inner};
use ttt::device::{Device, Kernels};
use ttt::generate::learn;
use ttt::lm::Lm;
use ttt::params::{ParamTable, Params};
use ttt::state::{StateFile, States};
use ttt::tensor::DType;

/// A model whose state is small, and a slot of it inside a mini-batch.
pub struct Harness {
    pub model: Lm,
    states: States,
    before: Vec<u8>,
}

impl Harness {
    pub fn new(inner: Inner) -> Harness {
        let config = Config {
            vocab_size: 11,
            hidden_size: 8,
            intermediate_size: 6,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            mini_batch_size: 4,
            use_gate: true,
            share_qk: true,
            pre_conv: true,
            ..Config::default()
        }
        .with_inner(inner);
        let device = Device::cpu_with(1, Kernels::Fast).unwrap();
        // Weights that do not depend on how models are initialised: kept files stay states of this model.
        let mut params = Params::zeros(&Arc::new(ParamTable::new(&config).0), &device, DType::F32).unwrap();
        let numbers = params.data_mut().as_mut_slice::<f32>();
        numbers.iter_mut().enumerate().for_each(|(i, x)| *x = ((i % 17) as f32 - 8.0) / 64.0);
        let model = Lm::from_params(&config, params).unwrap();
        let mut states = model.states(1).unwrap();
        learn(&model, &mut states, 0, &[1, 2, 3, 4, 5, 6]).unwrap();
        let before = states.to_bytes(0, &model, &[7], Some("bytes")).unwrap();
        Harness { model, states, before }
    }

    /// The file of the slot.
    pub fn file(&self) -> &[u8] {
        &self.before
    }

    /// Reads bytes as a state file in every way that there is; true when they were restored.
    ///
    /// # Panics
    /// When a refused file changed the slot, or a restored one is not what the slot then holds.
    pub fn read(&mut self, bytes: &[u8]) -> bool {
        let Harness { model, states, before } = self;
        if let Ok(file) = StateFile::from_bytes(bytes) {
            let _ = file.check_finite();
            let own = StateFile::from_bytes(&before[..]).unwrap();
            let _ = (own.distances(&file), own.same_state(&file), file.distances(&own));
        }
        match states.restore_bytes(0, model, bytes) {
            Ok(header) => {
                let after = states.to_bytes(0, model, &header.pending, header.tokenizer.as_deref()).unwrap();
                let (ours, theirs) = (StateFile::from_bytes(after).unwrap(), StateFile::from_bytes(bytes).unwrap());
                assert!(ours.same_state(&theirs), "the slot is not what the file holds");
                states.restore_bytes(0, model, &before[..]).unwrap();
                true
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                let now = states.to_bytes(0, model, &[7], Some("bytes")).unwrap();
                assert!(now == *before, "a refused file changed the slot: {error}");
                false
            }
        }
    }
}
