//! Mamba as a model: against Hugging Face's code, in any cut, as a state file, stored narrow, in training, and in the memory plan.

mod support;

use std::path::PathBuf;

use support::{Random, relative, shaken_model};
use ttt::DStates;
use ttt::Storage;
use ttt::batch::Batch;
use ttt::config::{Config, Mixer};
use ttt::device::{Device, Kernels};
use ttt::hub::safetensors::File;
use ttt::hub::{ModelFolder, SaveOptions, save};
use ttt::layer::Keep;
use ttt::lm::{Lm, Saved};
use ttt::ops::adamw;
use ttt::params::{ParamTable, Params};
use ttt::plan;
use ttt::state::States;
use ttt::tensor::{DType, Tensor};
use ttt::train::Settings;
use ttt::train::step::{Carry, MicroBatch, Optimizer, StepSettings};
use ttt::verify::verify;

const VOCAB: usize = 40;
/// What is kept for a backward pass, where the group of the inner loop means nothing.
const SAVED: Keep = Keep::Saved { group: 1 };
const INPUT: Keep = Keep::Input { group: 1 };

/// What Hugging Face's code made (see `make.py` there).
fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mamba")
}

/// Sizes that no vector divides.
fn config() -> Config {
    Config {
        mixer: Mixer::Mamba,
        vocab_size: VOCAB,
        hidden_size: 22,
        num_hidden_layers: 2,
        state_size: 5,
        expand: 3,
        time_step_rank: Some(3),
        ..Config::default()
    }
}

fn model(dtype: DType, seed: u64) -> Lm {
    shaken_model(&config(), &Device::cpu().unwrap(), dtype, seed)
}

fn logits(model: &Lm, states: Option<&mut States>, batch: &Batch) -> Vec<f64> {
    let (hidden, _) = model.forward(batch, states, Keep::Nothing, 1.0).unwrap();
    model.logits(&hidden, &(0..batch.tokens.len()).collect::<Vec<_>>()).unwrap().to_f64_vec()
}

fn one(tokens: &[u32], slot: usize) -> Batch {
    let mut batch = Batch::default();
    batch.push(tokens, slot);
    batch
}

/// The state of a slot, all layers.
fn state(states: &States, slot: usize) -> Vec<f64> {
    let mut all = Vec::new();
    for layer in 0..config().num_hidden_layers {
        for (_, tensor) in states.layer(layer).tensors() {
            let values = tensor.to_f64_vec();
            let per_slot = values.len() / states.slots();
            all.extend_from_slice(&values[slot * per_slot..][..per_slot]);
        }
    }
    all
}

#[test]
fn it_computes_what_hugging_face_does() {
    let reference = fixture().join("reference.safetensors");
    let plain = Device::cpu_with(1, Kernels::Reference).unwrap();
    for (device, dtype, limit) in
        [(&plain, DType::F64, 1e-11), (&plain, DType::F32, 2e-5), (&Device::cpu().unwrap(), DType::F32, 2e-5)]
    {
        let model = Lm::load(fixture(), device, dtype).unwrap();
        let all = verify(&model, &reference).unwrap();
        // Every parameter has a gradient, and the embedding is the head.
        assert_eq!(all.len(), 2 + model.params().table().entries().len());
        for c in &all {
            assert!(c.relative <= limit, "{device:?} {dtype:?}: {} is off by {:e}", c.name, c.relative);
        }
    }
    // The code as it is, which rounds to f32 on the way.
    let file = File::open(&reference).unwrap();
    let [b, t, _] = file.tensor("logits_f32").unwrap().shape[..] else { panic!("logits have three axes") };
    let ids = file.tensor("input_ids").unwrap().to_u32().unwrap();
    let model = Lm::load(fixture(), &Device::cpu().unwrap(), DType::F32).unwrap();
    let ours = logits(&model, None, &Batch::packed(&ids.chunks(t).collect::<Vec<_>>()));
    assert_eq!(ours.len(), b * t * model.config().vocab_size);
    let error = relative(&ours, &file.tensor("logits_f32").unwrap().to_vec::<f64>().unwrap());
    assert!(error < 2e-5, "{error:e}");
}

/// The names, shapes and settings of the folder that Hugging Face wrote.
#[test]
fn a_folder_is_one_of_hugging_face() {
    let model = Lm::load(fixture(), &Device::cpu().unwrap(), DType::F32).unwrap();
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("again");
    save(&dir, model.config(), model.params(), SaveOptions::default()).unwrap();
    let [theirs, ours] = [fixture(), dir.clone()].map(|dir| File::open(dir.join("model.safetensors")).unwrap());
    assert_eq!(theirs.names().count(), ours.names().count());
    for name in theirs.names() {
        let (a, b) = (theirs.tensor(name).unwrap(), ours.tensor(name).unwrap());
        assert!(a.shape == b.shape && a.bytes == b.bytes, "{name}");
    }
    let [theirs, ours] = [fixture(), dir.clone()]
        .map(|dir| serde_json::from_slice::<serde_json::Value>(&std::fs::read(dir.join("config.json")).unwrap()).unwrap());
    for name in [
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "state_size",
        "num_hidden_layers",
        "layer_norm_epsilon",
        "expand",
        "conv_kernel",
        "time_step_rank",
        "use_bias",
        "use_conv_bias",
        "hidden_act",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ] {
        assert_eq!(ours[name], theirs[name], "{name}");
    }
    let again = ModelFolder::open(&dir).unwrap();
    assert_eq!(again.config(), model.config());
}

/// However sequences are cut, packed and moved between slots, logits and states are those of one pass over each; token by token,
/// this is decoding against reading at once.
#[test]
fn any_cut_is_the_whole() {
    for (seed, dtype, limit) in [(1, DType::F32, 2e-5), (2, DType::F64, 1e-10), (3, DType::F32, 2e-5)] {
        let model = model(dtype, seed);
        let mut random = Random::new(seed);
        let sequences: Vec<Vec<u32>> = [90, 1, 37].into_iter().map(|n| random.tokens(n, VOCAB)).collect();
        let mut states = model.states(4).unwrap();
        let mut slots = [0, 1, 2];
        let (mut at, mut outputs) = ([0; 3], vec![Vec::new(); 3]);
        while (0..3).any(|i| at[i] < sequences[i].len()) {
            let (mut batch, mut who) = (Batch::default(), Vec::new());
            for i in 0..3 {
                let left = sequences[i].len() - at[i];
                if left > 0 {
                    let len = if random.below(2) == 0 { 1 } else { 1 + random.below(left.min(40)) };
                    batch.push(&sequences[i][at[i]..at[i] + len], slots[i]);
                    who.push((i, len));
                }
            }
            let all = logits(&model, Some(&mut states), &batch);
            let mut row = 0;
            for (i, len) in who {
                outputs[i].extend_from_slice(&all[row * VOCAB..(row + len) * VOCAB]);
                (at[i], row) = (at[i] + len, row + len);
            }
            // One of them moves to the slot that nobody has.
            let (i, free) = (random.below(3), (0..4).find(|slot| !slots.contains(slot)).unwrap());
            states.copy_slot(slots[i], free);
            slots[i] = free;
        }
        for (i, tokens) in sequences.iter().enumerate() {
            let mut whole = model.states(1).unwrap();
            let want = logits(&model, Some(&mut whole), &one(tokens, 0));
            assert!(relative(&outputs[i], &want) < limit, "seed {seed}, sequence {i}");
            assert!(relative(&want, &logits(&model, None, &one(tokens, 0))) == 0.0, "with and without states");
            assert!(relative(&state(&states, slots[i]), &state(&whole, 0)) < limit, "seed {seed}, state {i}");
            let rows = [0, tokens.len() - 1];
            let mut again = model.states(1).unwrap();
            let hidden = model.forward_rows(&one(tokens, 0), &mut again, &rows).unwrap();
            let some = model.logits(&hidden, &[0, 1]).unwrap().to_f64_vec();
            let want = rows.map(|row| want[row * VOCAB..(row + 1) * VOCAB].to_vec()).concat();
            assert!(relative(&some, &want) < limit, "some rows alone");
            assert!(state(&again, 0) == state(&whole, 0));
        }
    }
}

#[test]
fn a_state_file_goes_on_bit_for_bit() {
    let model = model(DType::F32, 4);
    let mut random = Random::new(4);
    let (text, next) = (random.tokens(71, VOCAB), random.tokens(9, VOCAB));
    let mut states = model.states(2).unwrap();
    logits(&model, Some(&mut states), &one(&text, 1));
    let saved = states.to_bytes(1, &model, &[7], None).unwrap();
    let mut other = model.states(1).unwrap();
    let header = other.restore_bytes(0, &model, saved.clone()).unwrap();
    assert_eq!((header.tokens, header.pending.as_slice()), (71, &[7][..]));
    assert!(saved == other.to_bytes(0, &model, &[7], None).unwrap());
    let goes_on = logits(&model, Some(&mut states), &one(&next, 1));
    assert!(goes_on == logits(&model, Some(&mut other), &one(&next, 0)));
    // That of another model is refused.
    let another = model_of(5);
    let error = another.states(1).unwrap().restore_bytes(0, &another, saved).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
}

fn model_of(seed: u64) -> Lm {
    model(DType::F32, seed)
}

fn zeros(model: &Lm) -> Params {
    Params::zeros(model.params().table(), model.device(), model.dtype()).unwrap()
}

/// Two documents, the first of which goes on over two cuts, with gradient across them, are the documents read at once.
#[test]
fn gradients_cross_cuts() {
    for (dtype, limit) in [(DType::F64, 1e-10), (DType::F32, 1e-4)] {
        for keep in [SAVED, INPUT] {
            let model = model(dtype, 6);
            let mut random = Random::new(6);
            let (long, short) = (random.tokens(110, VOCAB), random.tokens(13, VOCAB));
            let (long_targets, short_targets) = (random.tokens(110, VOCAB), random.tokens(13, VOCAB));
            let mut whole = zeros(&model);
            let batch = Batch::packed(&[&long, &short]);
            let (hidden, saved) = model.forward(&batch, None, keep, 1.0).unwrap();
            let targets = [&long_targets[..], &short_targets].concat();
            let (_, dhidden) = model.loss(&hidden, &targets, &[0.5; 123], &mut whole).unwrap();
            model.backward(&batch, saved.unwrap(), dhidden, None, &mut whole).unwrap();

            let mut grads = zeros(&model);
            let mut states = model.states(2).unwrap();
            let mut passes: Vec<(Batch, Saved, Tensor)> = Vec::new();
            for (from, to) in [(0, 3), (3, 70), (70, 110)] {
                let mut batch = one(&long[from..to], 1);
                let mut targets = long_targets[from..to].to_vec();
                if from == 70 {
                    batch.push_fresh(&short, 1);
                    targets.extend_from_slice(&short_targets);
                }
                let (hidden, saved) = model.forward(&batch, Some(&mut states), keep, 1.0).unwrap();
                let weights = vec![0.5; targets.len()];
                let (_, dhidden) = model.loss(&hidden, &targets, &weights, &mut grads).unwrap();
                passes.push((batch, saved.unwrap(), dhidden));
            }
            let mut dstates = DStates::zeros(&states).unwrap();
            for (batch, saved, dhidden) in passes.into_iter().rev() {
                model.backward(&batch, saved, dhidden, Some(&mut dstates), &mut grads).unwrap();
            }
            let (ours, want) = (grads.data().to_f64_vec(), whole.data().to_f64_vec());
            for entry in model.params().table().entries() {
                let error = relative(&ours[entry.range()], &want[entry.range()]);
                assert!(error < limit, "{dtype:?} {keep:?}: {} is off by {error:e}", entry.name);
            }
        }
    }
}

#[test]
fn narrow_weights_compute_nearly_the_same() {
    let model = model(DType::F32, 7);
    let tokens = Random::new(7).tokens(50, VOCAB);
    let want = logits(&model, None, &one(&tokens, 0));
    // Half a unit of bf16 is 2^-9, of a row of int8 1/254 of its largest; both are errors of every product in four a layer.
    for (storage, limit) in [(Storage::Bf16, 0.03), (Storage::Int8, 0.06)] {
        let narrow = model.narrowed(storage).unwrap();
        let is = logits(&narrow, None, &one(&tokens, 0));
        let error = relative(&is, &want);
        assert!(error > 1e-4 && error < limit, "{storage}: {error}");
        let mut states = narrow.states(1).unwrap();
        let steps: Vec<f64> = tokens.iter().flat_map(|t| logits(&narrow, Some(&mut states), &one(&[*t], 0))).collect();
        assert!(relative(&steps, &is) < 2e-5, "{storage}, token by token");
    }
}

const ADAMW: adamw::Settings = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

fn step_settings(keep: Keep) -> StepSettings {
    StepSettings { lr: 3e-3, inner_lr: 1.0, clip: 1.0, adamw: ADAMW, keep }
}

fn micro_batch(sequences: &[Vec<u32>]) -> MicroBatch {
    let inputs: Vec<&[u32]> = sequences.iter().map(|s| &s[..s.len() - 1]).collect();
    let batch = Batch::packed(&inputs);
    let targets = sequences.iter().flat_map(|s| s[1..].to_vec()).collect();
    let mask = vec![1.0; batch.tokens.len()];
    MicroBatch { batch, targets, mask }
}

/// Made by this code at its first release and looked at: they fall, and they catch any later change of arithmetic or order.
#[test]
fn ten_losses_of_a_fixed_seed() {
    let expected = [4.153939, 3.843845, 3.586173, 3.350760, 3.146611, 2.970266, 2.805187, 2.646059, 2.496176, 2.352049];
    let config = Config { vocab_size: 64, hidden_size: 64, num_hidden_layers: 2, ..Config::mamba("tiny").unwrap() };
    let mut model = Lm::new(&config, &Device::cpu().unwrap(), DType::F32, 1).unwrap();
    let mut optimizer = Optimizer::new(&model).unwrap();
    let mut random = Random::new(2);
    let data: Vec<Vec<u32>> =
        (0..4).map(|_| (0..65).map(|i| ((i * i) as u32 % 13 + random.below(3) as u32) % 64).collect()).collect();
    let losses: Vec<f64> =
        (0..10).map(|_| optimizer.step(&mut model, &[micro_batch(&data)], &step_settings(SAVED)).unwrap().loss).collect();
    assert!(relative(&losses, &expected) < 1e-4, "{losses:?}");
}

/// Weight decay pulls at every parameter but A and D.
#[test]
fn a_and_d_do_not_decay() {
    let after = |weight_decay: f64| {
        let mut model = model(DType::F32, 8);
        let mut optimizer = Optimizer::new(&model).unwrap();
        let data = [Random::new(8).tokens(20, VOCAB)];
        let settings = StepSettings { adamw: adamw::Settings { weight_decay, ..ADAMW }, ..step_settings(SAVED) };
        optimizer.step(&mut model, &[micro_batch(&data)], &settings).unwrap();
        model
    };
    let (without, with) = (after(0.0), after(0.5));
    let [a, b] = [&without, &with].map(|model| model.params().data().to_f64_vec());
    for entry in without.params().table().entries() {
        let same = a[entry.range()] == b[entry.range()];
        assert_eq!(same, entry.name.ends_with("A_log") || entry.name.ends_with(".D"), "{}", entry.name);
    }
}

/// The runs in `configs/` are the paper's recipe with the published shapes.
#[test]
fn configs_are_the_published_models() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    for (size, preset, parameters, steps) in [
        ("125m", "130m", 115_096_320, 4_800),
        ("350m", "370m", 352_797_696, 13_500),
        ("760m", "790m", 765_126_144, 29_000),
        ("1.3b", "1.4b", 1_334_740_992, 50_000),
    ] {
        let settings = Settings::load(folder.join(format!("{size}-mamba.toml"))).unwrap();
        let config = settings.model_config().unwrap();
        assert_eq!(config.mixer, Mixer::Mamba);
        // The published count with our vocabulary instead of 50,280 ids.
        assert_eq!(ParamTable::new(&config).0.parameters(), parameters, "{size}");
        assert_eq!(ParamTable::new(&Config::mamba(preset).unwrap()).0.parameters(), parameters, "{preset}");
        assert_eq!(settings.steps(), steps, "{size}");
    }
}

/// The plan is made before anything is allocated and must be near what is then allocated.
#[test]
fn planned_memory_is_within_a_tenth_of_the_measured_peak() {
    let near = |what: &str, planned: usize, measured: usize| {
        let ratio = planned as f64 / measured as f64;
        assert!((ratio - 1.0).abs() < 0.1, "{what}: planned {planned}, measured {measured}");
    };
    let config = Config { vocab_size: 512, num_hidden_layers: 4, ..Config::mamba("tiny").unwrap() };
    for keep in [SAVED, INPUT] {
        let device = Device::cpu().unwrap();
        let mut model = Lm::new(&config, &device, DType::F32, 1).unwrap();
        let mut optimizer = Optimizer::new(&model).unwrap();
        let data: Vec<Vec<u32>> = (0..4).map(|i| Random::new(i).tokens(257, 512)).collect();
        device.memory().reset_peak();
        optimizer.step(&mut model, &[micro_batch(&data)], &step_settings(keep)).unwrap();
        let planned = plan::Step::new(&config, &[256; 4], keep, plan::Place::Cpu).memory();
        near(&format!("{keep:?}"), planned.total(), device.memory().usage().peak);
        assert_eq!(planned.fast_weights, 0);
    }
    for (keep, gradient, recompute) in [(SAVED, false, false), (SAVED, true, false), (SAVED, true, true), (INPUT, true, false)] {
        let device = Device::cpu().unwrap();
        let mut model = Lm::new(&config, &device, DType::F32, 1).unwrap();
        let mut optimizer = Optimizer::new(&model).unwrap();
        let mut states = model.states(4).unwrap();
        let segment = |seed: u64| {
            let mut micro = MicroBatch::default();
            (0..4).for_each(|slot| micro.batch.push(&Random::new(seed + slot).tokens(64, 512), slot as usize));
            micro.targets = micro.batch.tokens.clone();
            micro.mask = vec![1.0; 256];
            micro
        };
        let groups = [vec![segment(1), segment(5), segment(9)]];
        device.memory().reset_peak();
        let carry = Carry { states: &mut states, gradient, recompute };
        optimizer.step_segments(&mut model, &groups, carry, &step_settings(keep)).unwrap();
        let segments = plan::Segments { slots: 4, per_step: 3, sequence: 192, gradient, recompute };
        let planned =
            plan::Step { segments: Some(segments), ..plan::Step::new(&config, &[64; 4], keep, plan::Place::Cpu) }.memory();
        near(&format!("{keep:?} {gradient} {recompute}"), planned.total(), device.memory().usage().peak);
    }
    let device = Device::cpu().unwrap();
    let model = Lm::new(&config, &device, DType::F32, 1).unwrap();
    let mut states = model.states(2).unwrap();
    let batch = Batch::packed(&[Random::new(1).tokens(512, 512), Random::new(2).tokens(512, 512)]);
    device.memory().reset_peak();
    model.forward(&batch, Some(&mut states), Keep::Nothing, 1.0).unwrap();
    near("prefill", plan::inference_memory(&config, 2, 512, plan::Place::Cpu).total(), device.memory().usage().peak);
}
