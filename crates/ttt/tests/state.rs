//! The state is exact: however sequences are cut, packed into batches, forked, moved between slots, and saved and restored on the
//! way, outputs and end states are those of one pass over each.

mod support;

use support::{Random, relative, shaken_model, state_values, transformer};
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::device::Device;
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::state::States;
use ttt::tensor::DType;

const VOCAB: usize = 40;

fn config(inner: Inner, mamba: bool, mini_batch_size: usize) -> Config {
    let config = Config {
        vocab_size: VOCAB,
        hidden_size: 32,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        mini_batch_size,
        use_gate: mamba,
        share_qk: mamba,
        pre_conv: mamba,
        ..Config::default()
    };
    // A large base rate, so that the inner loop matters.
    Config { ttt_base_lr: 2.0, ..config.with_inner(inner) }
}

/// Logits of every row of a batch.
fn read(model: &Lm, states: &mut States, batch: &Batch) -> Vec<f64> {
    let (hidden, _) = model.forward(batch, Some(states), Keep::Nothing, 1.0).unwrap();
    model.logits(&hidden, &(0..batch.tokens.len()).collect::<Vec<_>>()).unwrap().to_f64_vec()
}

fn one(tokens: &[u32], slot: usize) -> Batch {
    let mut batch = Batch::default();
    batch.push(tokens, slot);
    batch
}

fn values(model: &Lm, states: &States, slot: usize) -> Vec<Vec<f64>> {
    state_values(model, states, slot, true)
}

/// Reads `sequences` in random pieces, packed at random, while states are forked, moved, saved and restored.
fn wander(model: &Lm, sequences: &[Vec<u32>], random: &mut Random) -> (States, Vec<usize>, Vec<Vec<f64>>) {
    let n = sequences.len();
    // One slot is always free.
    let mut states = model.states(n + 1).unwrap();
    let mut slots: Vec<usize> = (0..n).collect();
    let (mut at, mut outputs) = (vec![0; n], vec![Vec::new(); n]);
    while at.iter().zip(sequences).any(|(at, s)| *at < s.len()) {
        let (mut batch, mut who) = (Batch::default(), Vec::new());
        let first = random.below(n);
        for i in (0..n).map(|i| (first + i) % n) {
            let left = sequences[i].len() - at[i];
            if left > 0 && random.below(3) > 0 {
                let most = if random.below(3) == 0 { left } else { left.min(5) };
                let len = 1 + random.below(most);
                batch.push(&sequences[i][at[i]..at[i] + len], slots[i]);
                who.push((i, len));
            }
        }
        if batch.tokens.is_empty() {
            continue;
        }
        let logits = read(model, &mut states, &batch);
        let mut row = 0;
        for (i, len) in who {
            outputs[i].extend_from_slice(&logits[row * VOCAB..(row + len) * VOCAB]);
            (at[i], row) = (at[i] + len, row + len);
        }

        let i = random.below(n);
        let free = (0..=n).find(|slot| !slots.contains(slot)).unwrap();
        match random.below(5) {
            0 => {
                states.copy_slot(slots[i], free);
                slots[i] = free;
            }
            1 => {
                let fork = states.fork().unwrap();
                // What happens to the one is nothing to the other.
                read(model, &mut states, &one(&random.tokens(7, VOCAB), slots[i]));
                states = fork;
            }
            2 => {
                let saved = states.to_bytes(slots[i], model, &[], None).unwrap();
                // The slot it goes to was used before, perhaps.
                read(model, &mut states, &one(&random.tokens(3, VOCAB), free));
                states.restore_bytes(free, model, saved.clone()).unwrap();
                assert!(saved == states.to_bytes(free, model, &[], None).unwrap(), "a restored state is saved as another");
                let len = 1 + random.below(20);
                let next = random.tokens(len, VOCAB);
                let mut other = model.states(1).unwrap();
                other.restore_bytes(0, model, saved).unwrap();
                let mut fork = states.fork().unwrap();
                let goes_on = read(model, &mut fork, &one(&next, slots[i]));
                assert!(goes_on == read(model, &mut other, &one(&next, 0)), "a restored state goes on in another way");
                assert!(values(model, &fork, slots[i]) == values(model, &other, 0));
                slots[i] = free;
            }
            _ => {}
        }
    }
    (states, slots, outputs)
}

fn exact(config: impl Fn(usize) -> Config) {
    let device = Device::cpu().unwrap();
    for seed in 0..36 {
        let mut random = Random::new(1000 + seed);
        let mini_batch = [1, 5, 8, 16][random.below(4)];
        let (dtype, limit) = if seed % 2 == 0 { (DType::F32, 2e-5) } else { (DType::F64, 1e-10) };
        let model = shaken_model(&config(mini_batch), &device, dtype, seed);
        let sequences: Vec<Vec<u32>> = (0..1 + random.below(4))
            .map(|_| {
                let len = 1 + random.below(60);
                random.tokens(len, VOCAB)
            })
            .collect();
        let (states, slots, outputs) = wander(&model, &sequences, &mut random);
        for (i, tokens) in sequences.iter().enumerate() {
            let mut whole = model.states(1).unwrap();
            let logits = read(&model, &mut whole, &one(tokens, 0));
            let error = relative(&outputs[i], &logits);
            assert!(error < limit, "seed {seed}, sequence {i}: logits {error}");
            assert_eq!(states.position(slots[i]), tokens.len() as u64);
            for (ours, theirs) in values(&model, &states, slots[i]).iter().zip(values(&model, &whole, 0)) {
                let error = relative(ours, &theirs);
                assert!(error < limit, "seed {seed}, sequence {i}: state {error}");
            }
        }
    }
}

#[test]
fn linear_transformer_is_exact() {
    exact(|k| config(Inner::Linear, false, k));
}

#[test]
fn linear_mamba_is_exact() {
    exact(|k| config(Inner::Linear, true, k));
}

#[test]
fn mlp_transformer_is_exact() {
    exact(|k| config(Inner::Mlp, false, k));
}

#[test]
fn mlp_mamba_is_exact() {
    exact(|k| config(Inner::Mlp, true, k));
}

#[test]
fn attention_is_exact() {
    exact(|k| transformer(config(Inner::Linear, false, k), 1));
}

#[test]
fn attention_with_shared_keys_and_values_is_exact() {
    exact(|k| transformer(config(Inner::Linear, false, k), 2));
}

/// A layer whose token scale has ended at 0 keeps nothing beyond a mini-batch; the others do.
#[test]
fn a_layer_without_a_last_token_scale_stays_where_it_began() {
    let mut model = shaken_model(&config(Inner::Linear, false, 8), &Device::cpu().unwrap(), DType::F64, 3);
    let name = "model.layers.1.seq_modeling_block.learnable_token_idx";
    let id = model.params().table().find(name).unwrap();
    *model.params_mut().values_mut::<f64>(id).last_mut().unwrap() = -1.0;
    let scale = |layer: usize| model.blocks()[layer].mixer().ttt().unwrap().last_token_scale(model.weights()).unwrap().unwrap();
    assert!(scale(0) > 0.0 && scale(1) == 0.0);
    let mut states = model.states(1).unwrap();
    let weights = |states: &States, layer: usize| states.layer(layer).ttt().fast.weights().to_f64_vec();
    let before = [0, 1].map(|layer| weights(&states, layer));
    read(&model, &mut states, &one(&Random::new(2).tokens(24, VOCAB), 0));
    assert!(weights(&states, 0) != before[0] && weights(&states, 1) == before[1]);
}
