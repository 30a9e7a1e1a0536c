//! Mamba and the rungs of the paper's ladder on a GPU against the CPU: operations, whole models, states,
//! recorded decoding, training. Looks for a GPU at run time and says so when there is none, which is a failure if
//! `TTT_TEST_DEVICE=cuda` is set. New tensors are NaN here, so that an element nobody writes is noticed.

#[path = "ops/case.rs"]
#[allow(dead_code)]
mod case;
#[path = "ops/cases.rs"]
#[allow(dead_code)]
mod cases;
mod support;

use std::sync::{Arc, OnceLock};

use support::{Random, relative, rungs, shaken_model};
use ttt::batch::{Batch, Segment};
use ttt::config::{Config, Inner};
use ttt::device::cuda::{Cuda, Options};
use ttt::device::{Device, Kernels};
use ttt::generate::{Decoder, Draw, Sampling, Sequence};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::{adamw, sample, selective_scan};
use ttt::params::Params;
use ttt::state::States;
use ttt::tensor::DType;
use ttt::train::step::{MicroBatch, Optimizer, StepSettings};

/// The GPU, opened once.
fn gpu() -> Option<&'static Device> {
    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    GPU.get_or_init(|| match Cuda::open(Options { ordinal: 0, poison: true }) {
        Ok(cuda) => Some(Device::Cuda(Arc::new(cuda))),
        Err(e) => {
            assert!(std::env::var("TTT_TEST_DEVICE").as_deref() != Ok("cuda"), "TTT_TEST_DEVICE=cuda, but {e}");
            eprintln!("no GPU: nothing was tested ({e})");
            None
        }
    })
    .as_ref()
}

const VOCAB: usize = 300;

/// Models of every kind that is tested here, by name.
fn configs() -> Vec<(&'static str, Config)> {
    let like = Config {
        vocab_size: VOCAB,
        hidden_size: 128,
        intermediate_size: 344,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        ..Config::preset("tiny", Inner::Linear).unwrap()
    };
    let [normalised, plain, equal, init, norm, mini_batch, eta, _] = rungs(&like);
    let mamba = Config { vocab_size: VOCAB, hidden_size: 128, num_hidden_layers: 2, ..Config::mamba("tiny").unwrap() };
    // 96 columns a head: two tiles of a product.
    let wide = Config { hidden_size: 192, ..eta.clone() };
    vec![
        ("Mamba", mamba),
        ("linear attention with a normaliser", normalised),
        ("linear attention", plain),
        ("batch descent", equal),
        ("learned W0", init),
        ("LayerNorm and residual", norm),
        ("mini-batches, eta not learned", mini_batch),
        ("batch descent, eta learned", eta),
        ("wide heads", wide),
    ]
}

/// The same weights on another device.
fn moved(model: &Lm, device: &Device, dtype: DType) -> Lm {
    Lm::from_params(model.config(), model.params().to(device, dtype).unwrap()).unwrap()
}

#[test]
fn scans_of_many_lengths() {
    let Some(gpu) = gpu() else { return };
    const PACKED: [usize; 8] = [40, 1, 0, 300, 7, 256, 257, 16];
    const EIGHT: [usize; 8] = [70; 8];
    const SIXTEEN: [usize; 16] = [33; 16];
    let cases = || {
        vec![
            cases::scan_case(&[1], 24, 16),
            cases::scan_case(&[15], 48, 16),
            cases::scan_case(&[16], 96, 16),
            cases::scan_case(&[17], 50, 7),
            cases::scan_case(&[63], 64, 16),
            cases::scan_case(&[1040], 72, 16),
            cases::scan_case(&PACKED, 101, 16),
            // Two and four groups of channels a block.
            cases::scan_case(&EIGHT, 1536, 16),
            cases::scan_case(&SIXTEEN, 1536, 4),
            cases::silu_case(61, 768),
            cases::silu_gate_case(61, 768),
        ]
    };
    for case in cases() {
        case.check_gpu(gpu, DType::F32, false, 2e-5);
        case.check_gpu(gpu, DType::F32, true, 2e-5);
        case.check_gpu(gpu, DType::Bf16, false, 1e-2);
        case.check_gpu(gpu, DType::Bf16, true, 1e-2);
    }
}

/// Cuts between and inside the spans of the kernel for whole sequences, and pieces that the one for a few tokens reads.
#[test]
fn a_scan_in_pieces_is_the_scan() {
    let Some(gpu) = gpu() else { return };
    let (tokens, channels, states) = (700, 107, 16);
    let shapes = [
        [tokens, channels],
        [tokens, channels],
        [tokens, states],
        [tokens, states],
        [channels, states],
        [1, channels],
        [1, channels],
    ];
    for (dtype, ratio) in [(DType::F32, 3e-6), (DType::Bf16, 8e-3)] {
        let make = |(seed, shape): (usize, &[usize; 2])| {
            let values = case::filled(&gpu.cpu_beside(), shape, seed).to_f64_vec();
            case::placed(gpu, shape, &values, if seed < 4 { dtype } else { DType::F32 })
        };
        let all: Vec<_> = shapes.iter().enumerate().map(make).collect();
        let run = |pieces: &[usize]| {
            let mut state = case::filled(&gpu.cpu_beside(), &[2, states, channels], 9).to(gpu).unwrap();
            let (mut y, mut at) = (Vec::new(), 0);
            for len in pieces {
                let rows = |i: usize| all[i].view().row_range(at..at + len);
                let segments = [Segment { first_row: 0, len: *len, slot: 1, phase: at % 16 }];
                let inputs = selective_scan::Inputs {
                    x: rows(0),
                    dt: rows(1),
                    b: rows(2),
                    c: rows(3),
                    a_log: all[4].view(),
                    d: all[5].view(),
                    dt_bias: all[6].view(),
                    segments: &segments,
                };
                y.extend(selective_scan::forward(&inputs, Some(&mut state), false).unwrap().0.to_f64_vec());
                at += len;
            }
            assert_eq!(at, tokens);
            (y, state.to_f64_vec())
        };
        let (y, state) = run(&[tokens]);
        for pieces in [&[1, 0, 1, 254, 256, 3, 15, 170][..], &[8, 9, 300, 383]] {
            let (own, end) = run(pieces);
            case::expect_close(&format!("{dtype:?} y"), &own, &y, ratio);
            case::expect_close(&format!("{dtype:?} state"), &end, &state, 3e-6);
        }
    }
}

fn logits_and_gradient(model: &Lm, keep: Keep) -> [Vec<f64>; 2] {
    let mut random = Random::new(9);
    let batch = Batch::packed(&[70, 33, 5].map(|n| random.tokens(n, VOCAB)));
    let targets = random.tokens(108, VOCAB);
    let weights: Vec<f64> = (0..108).map(|t| if t % 7 == 3 { 0.0 } else { 1.0 / 108.0 }).collect();
    let mut grads = Params::zeros(model.params().table(), model.device(), model.params().data().dtype()).unwrap();
    let (hidden, saved) = model.forward(&batch, None, keep, 0.7).unwrap();
    let logits = model.logits(&hidden, &(0..108).collect::<Vec<_>>()).unwrap().to_f64_vec();
    let (_, dhidden) = model.loss(&hidden, &targets, &weights, &mut grads).unwrap();
    model.backward(&batch, saved.unwrap(), dhidden, None, &mut grads).unwrap();
    [logits, grads.data().to_f64_vec()]
}

#[test]
fn whole_models() {
    let Some(gpu) = gpu() else { return };
    for (i, (name, config)) in configs().into_iter().enumerate() {
        let host = shaken_model(&config, &gpu.cpu_beside(), DType::F32, i as u64);
        let check = moved(&host, &Device::cpu_with(0, Kernels::Reference).unwrap(), DType::F64);
        let want = logits_and_gradient(&check, Keep::Saved { group: 2 });
        for (dtype, ratio, gradient_ratio) in [(DType::F32, 1e-4, 5e-4), (DType::Bf16, 4e-2, 1e-1)] {
            let model = moved(&host, gpu, dtype);
            // Mamba's step sizes come out of three products in a row, each rounded, and go through an exponential.
            let ratio = if name == "Mamba" && dtype == DType::Bf16 { 6e-2 } else { ratio };
            for keep in [Keep::Saved { group: 4 }, Keep::Input { group: 4 }] {
                let ours = logits_and_gradient(&model, keep);
                let errors = [0, 1].map(|i| relative(&ours[i], &want[i]));
                eprintln!("{name} {dtype:?} {keep:?}: logits {:.1e}, gradient {:.1e}", errors[0], errors[1]);
                assert!(errors[0] < ratio && errors[1] < gradient_ratio, "{name} {dtype:?} {keep:?}: {errors:?}");
                assert_eq!(ours, logits_and_gradient(&model, keep), "{name}: another result when run again");
            }
        }
    }
}

#[test]
fn reading_in_chunks_forking_and_resetting() {
    let Some(gpu) = gpu() else { return };
    for (name, config) in configs() {
        let host = shaken_model(&config, &gpu.cpu_beside(), DType::F32, 4);
        for (dtype, ratio) in [(DType::F32, 5e-5), (DType::Bf16, 3e-2)] {
            let model = moved(&host, gpu, dtype);
            let tokens = Random::new(3).tokens(90, VOCAB);
            let all = |states: &mut States, tokens: &[u32], slot| {
                let mut batch = Batch::default();
                batch.push(tokens, slot);
                let hidden = model.forward_rows(&batch, states, &[tokens.len() - 1]).unwrap();
                model.logits(&hidden, &[0]).unwrap().to_f64_vec()
            };
            let mut states = model.states(3).unwrap();
            let want = all(&mut states, &tokens, 2);
            let mut at = 0;
            let mut last = Vec::new();
            for len in [7, 1, 1, 30, 20, 1, 30] {
                last = all(&mut states, &tokens[at..at + len], 0);
                at += len;
                if at == 39 {
                    states.copy_slot(0, 1);
                }
            }
            assert!(relative(&last, &want) < ratio, "{name} {dtype:?}: {}", relative(&last, &want));
            let mut fork = states.fork().unwrap();
            assert!(relative(&all(&mut fork, &tokens[39..], 1), &want) < ratio, "{name} {dtype:?}: a copied slot");
            states.reset(&model, 0);
            assert!(relative(&all(&mut states, &tokens, 0), &want) < ratio, "{name} {dtype:?}: a slot that was reset");
        }
    }
}

/// Gradient of two segments of the same sequences, carried across the cut.
fn gradient_in_segments(model: &Lm) -> Vec<f64> {
    let mut random = Random::new(21);
    let mut states = model.states(2).unwrap();
    let mut grads = Params::zeros(model.params().table(), model.device(), model.params().data().dtype()).unwrap();
    let mut passes = Vec::new();
    for len in [32, 20] {
        let batch = Batch::packed(&[random.tokens(len, VOCAB), random.tokens(len, VOCAB)]);
        let targets = random.tokens(2 * len, VOCAB);
        let (hidden, saved) = model.forward(&batch, Some(&mut states), Keep::Saved { group: 2 }, 1.0).unwrap();
        let weights = vec![0.01; 2 * len];
        let (_, dhidden) = model.loss(&hidden, &targets, &weights, &mut grads).unwrap();
        passes.push((batch, saved.unwrap(), dhidden));
    }
    let mut dstates = ttt::dstates::DStates::zeros(&states).unwrap();
    for (batch, saved, dhidden) in passes.into_iter().rev() {
        model.backward(&batch, saved, dhidden, Some(&mut dstates), &mut grads).unwrap();
    }
    grads.data().to_f64_vec()
}

#[test]
fn gradients_cross_cuts_and_states_go_to_files() {
    let Some(gpu) = gpu() else { return };
    for (name, config) in configs() {
        let host = shaken_model(&config, &gpu.cpu_beside(), DType::F32, 6);
        let want = gradient_in_segments(&host);
        for (dtype, ratio) in [(DType::F32, 5e-4), (DType::Bf16, 1e-1)] {
            let model = moved(&host, gpu, dtype);
            let error = relative(&gradient_in_segments(&model), &want);
            assert!(error < ratio, "{name} {dtype:?}: {error}");

            // Saved on the GPU, restored there and on the CPU.
            let next = |model: &Lm, states: &mut States| {
                let (hidden, _) = model.forward(&Batch::one(&[5, 6, 7]), Some(states), Keep::Nothing, 1.0).unwrap();
                model.logits(&hidden, &[2]).unwrap().to_f64_vec()
            };
            let mut states = model.states(1).unwrap();
            model.forward(&Batch::one(&Random::new(3).tokens(37, VOCAB)), Some(&mut states), Keep::Nothing, 1.0).unwrap();
            let bytes = states.to_bytes(0, &model, &[], None).unwrap();
            let logits = next(&model, &mut states);
            for (model, ratio) in [(&model, 0.0), (&host, if dtype == DType::F32 { 1e-4 } else { 4e-2 })] {
                let mut restored = model.states(1).unwrap();
                restored.restore_bytes(0, model, bytes.clone()).unwrap();
                let error = relative(&next(model, &mut restored), &logits);
                assert!(error <= ratio, "{name} {dtype:?} restored on {:?}: {error}", model.device());
            }
        }
    }
}

/// Recorded steps of decoding choose what ordinary ones do and leave the same states.
#[test]
fn recorded_steps_are_ordinary_steps() {
    let Some(gpu) = gpu() else { return };
    for (name, config) in configs() {
        let host = shaken_model(&config, &gpu.cpu_beside(), DType::F32, 7);
        let model = moved(&host, gpu, DType::Bf16);
        let prompt = |states: &mut States| {
            let mut batch = Batch::default();
            (0..3).for_each(|slot| batch.push(&Random::new(slot as u64).tokens(5 + 9 * slot, VOCAB), slot));
            let last: Vec<usize> = batch.seqs.iter().map(|s| s.first_row + s.len - 1).collect();
            let hidden = model.forward_rows(&batch, states, &last).unwrap();
            model.logits(&hidden, &[0, 1, 2]).unwrap()
        };
        let sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 1 };
        let sequence = |slot: usize| Sequence { slot, draw: Draw::new(sampling, slot as u64), ends: [None; 2] };
        let (mut states, mut recorded) = (model.states(3).unwrap(), model.states(3).unwrap());
        let mut logits = prompt(&mut states);
        let first = prompt(&mut recorded);
        let sequences: Vec<Sequence> = (0..3).map(sequence).collect();
        let mut draws: Vec<Draw> = sequences.iter().map(|s| s.draw).collect();
        let mut decoder = Decoder::new(&model);
        let mut session = decoder.start(&mut recorded, &sequences, &first).unwrap();
        for step in 0..70 {
            let chosen: Vec<u32> = sample::forward(logits.view(), &mut draws).unwrap().iter().map(|c| c.token).collect();
            let ours = session.take().expect("choices of the step before");
            let ours: Vec<u32> = ours.iter().map(|c| c.as_ref().expect("a sequence that goes on").token).collect();
            assert_eq!(ours, chosen, "{name}: step {step}");
            session.step().unwrap();
            let tokens: Vec<[u32; 1]> = chosen.iter().map(|token| [*token]).collect();
            let (hidden, _) = model.forward(&Batch::packed(&tokens), Some(&mut states), Keep::Nothing, 1.0).unwrap();
            logits = model.logits(&hidden, &[0, 1, 2]).unwrap();
        }
        drop(session);
        for layer in 0..2 {
            for ((what, a), (_, b)) in states.layer(layer).tensors().zip(recorded.layer(layer).tensors()) {
                if what != "open_rows" {
                    assert_eq!(a.to_f64_vec(), b.to_f64_vec(), "{name}: {what} of layer {layer}");
                }
            }
        }
    }
}

/// Losses of a small model on text that can be learned.
fn losses(model: &mut Lm, steps: usize) -> Vec<f64> {
    let mut optimizer = Optimizer::new(model).unwrap();
    let adamw = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let mut random = Random::new(1);
    let mut step = || {
        let sequences: Vec<Vec<u32>> = (0..4)
            .map(|_| {
                let (start, stride) = (random.below(200), 1 + random.below(5));
                (0..129).map(|i| ((start + i * stride + i * i / 7) % VOCAB) as u32).collect()
            })
            .collect();
        let inputs: Vec<&[u32]> = sequences.iter().map(|s| &s[..128]).collect();
        let targets = sequences.iter().flat_map(|s| s[1..].to_vec()).collect();
        let micro = MicroBatch { batch: Batch::packed(&inputs), targets, mask: vec![1.0; 512] };
        let settings = StepSettings { lr: 1e-3, inner_lr: 1.0, clip: 1.0, adamw, keep: Keep::Saved { group: 4 } };
        optimizer.step(model, &[micro], &settings).unwrap().loss
    };
    (0..steps).map(|_| step()).collect()
}

#[test]
fn training_follows_the_cpu_and_the_model_goes_back() {
    let Some(gpu) = gpu() else { return };
    for (name, config) in configs() {
        let cpu = gpu.cpu_beside();
        let want = losses(&mut Lm::new(&config, &cpu, DType::F32, 5).unwrap(), 10);
        for (dtype, ratio) in [(DType::F32, 1e-3), (DType::Bf16, 2e-2)] {
            let mut model = Lm::new(&config, gpu, dtype, 5).unwrap();
            let ours = losses(&mut model, 10);
            let error = relative(&ours, &want);
            eprintln!("{name} {dtype:?}: 10 losses within {error:.1e} of the CPU's, from {:.3} to {:.3}", ours[0], ours[9]);
            assert!(error < ratio && ours[9] < ours[0], "{name} {dtype:?}: {ours:?} and not {want:?}");
            // Trained on the GPU, saved, read on the CPU.
            let folder = std::env::temp_dir().join(format!("ttt-mixers-{}-{dtype:?}", std::process::id()));
            ttt::hub::save(&folder, &config, model.params(), ttt::hub::SaveOptions::default()).unwrap();
            let back = Lm::load(&folder, &cpu, DType::F32).unwrap();
            std::fs::remove_dir_all(&folder).unwrap();
            let [ours, back] = [&model, &back].map(|m| logits_and_gradient(m, Keep::Saved { group: 4 })[0].clone());
            let limit = if dtype == DType::F32 { 1e-4 } else { 4e-2 };
            assert!(relative(&ours, &back) < limit, "{name} {dtype:?}: logits on the CPU differ by {}", relative(&ours, &back));
        }
    }
}
