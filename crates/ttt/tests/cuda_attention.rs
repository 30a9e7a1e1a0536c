//! The Transformer on a GPU against the CPU: attention and its gradients, whole models, growing caches, recorded decoding. Looks for
//! a GPU at run time and says so when there is none, which is a failure if `TTT_TEST_DEVICE=cuda` is set. New tensors are NaN here,
//! so that an element nobody writes is noticed.

#[path = "ops/attention_cases.rs"]
mod attention_cases;
#[path = "ops/case.rs"]
#[allow(dead_code)]
mod case;
mod support;

use std::sync::{Arc, OnceLock};

use attention_cases::{attention_case, fresh_case, halves_case, odd_cases};
use support::{Random, relative, transformer};
use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::device::cuda::{Cuda, Options};
use ttt::device::{Device, Kernels};
use ttt::dstates::DStates;
use ttt::generate::{Decoder, Draw, Sampling, Sequence};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::{adamw, sample};
use ttt::params::Params;
use ttt::state::States;
use ttt::tensor::{DType, Tensor};
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

/// Outputs, log-sums' effect on gradients, every gradient and what is handed on, around the sizes of blocks; twice, bit for bit.
#[test]
fn attention_and_every_gradient() {
    let Some(gpu) = gpu() else { return };
    let mut cases = odd_cases();
    // The head sizes of the fast kernels and others, at each length alone; grouped heads behind a past.
    for d in [64, 96, 128, 80] {
        // (The gradients of a single token's query and key are 0, and no measure of an error.)
        cases.extend([&[1, 2][..], &[15], &[16], &[17], &[63]].map(|lens| fresh_case([2, 2], d, lens)));
        cases.push(attention_case([4, 2], d, &[[1, 0], [15, 3], [16, 64], [17, 0], [63, 70], [0, 5], [130, 61]]));
        // A token of each, as in decoding, of caches that are split and are not.
        cases.push(attention_case([4, 1], d, &[[1, 0], [1, 5], [1, 63], [1, 64], [1, 700]]));
    }
    cases.extend([64, 96, 128].map(|d| fresh_case([2, 1], d, &[1040])));
    for case in cases {
        for strided in [false, true] {
            case.check_gpu(gpu, DType::F32, strided, 2e-5);
            case.check_gpu(gpu, DType::Bf16, strided, 2e-2);
        }
    }
}

#[test]
fn halves_turn_by_the_position() {
    let Some(gpu) = gpu() else { return };
    for case in [halves_case(3, 64), halves_case(2, 10), halves_case(2, 96)] {
        case.check_gpu(gpu, DType::F32, false, 2e-6);
        case.check_gpu(gpu, DType::F32, true, 2e-6);
        case.check_gpu(gpu, DType::Bf16, false, 1e-2);
    }
}

/// (columns, heads, heads that share one of keys and values): the fast kernels, and the plain ones.
const SHAPES: [(usize, usize, usize); 4] = [(128, 2, 1), (256, 4, 2), (192, 2, 2), (96, 3, 1)];

fn small((hidden_size, num_attention_heads, shared): (usize, usize, usize)) -> Config {
    let like = Config {
        vocab_size: 300,
        hidden_size,
        intermediate_size: 344,
        num_hidden_layers: 2,
        num_attention_heads,
        ..Config::preset("tiny", Inner::Linear).unwrap()
    };
    transformer(like, shared)
}

/// A model whose every parameter is away from its initial value, with scores of the order of 1: in bf16 a score is off by a part of
/// itself, and so is its exponential.
fn shaken(config: &Config, device: &Device, seed: u64) -> Lm {
    let mut model = Lm::new(config, device, DType::F32, seed).unwrap();
    let mut random = Random::new(seed ^ 0x5eed);
    let params = model.params_mut().data_mut().as_mut_slice::<f32>();
    params.iter_mut().for_each(|x| *x += (0.125 * random.unit()) as f32);
    model
}

/// The same weights on another device.
fn moved(model: &Lm, device: &Device, dtype: DType) -> Lm {
    Lm::from_params(model.config(), model.params().to(device, dtype).unwrap()).unwrap()
}

fn logits_and_gradient(model: &Lm, keep: Keep) -> [Vec<f64>; 2] {
    let mut random = Random::new(9);
    let batch = Batch::packed(&[170, 33, 5].map(|n| random.tokens(n, 300)));
    let targets = random.tokens(208, 300);
    let weights: Vec<f64> = (0..208).map(|t| if t % 7 == 3 { 0.0 } else { 1.0 / 208.0 }).collect();
    let mut grads = Params::zeros(model.params().table(), model.device(), model.params().data().dtype()).unwrap();
    let (hidden, saved) = model.forward(&batch, None, keep, 1.0).unwrap();
    let logits = model.logits(&hidden, &(0..208).collect::<Vec<_>>()).unwrap().to_f64_vec();
    let (_, dhidden) = model.loss(&hidden, &targets, &weights, &mut grads).unwrap();
    model.backward(&batch, saved.unwrap(), dhidden, None, &mut grads).unwrap();
    [logits, grads.data().to_f64_vec()]
}

#[test]
fn whole_models() {
    let Some(gpu) = gpu() else { return };
    for shape in SHAPES {
        let host = shaken(&small(shape), &gpu.cpu_beside(), 3);
        let check = moved(&host, &Device::cpu_with(0, Kernels::Reference).unwrap(), DType::F64);
        let want = logits_and_gradient(&check, Keep::Saved { group: 1 });
        for (dtype, ratio, gradient_ratio) in [(DType::F32, 1e-4, 5e-4), (DType::Bf16, 4e-2, 1e-1)] {
            let model = moved(&host, gpu, dtype);
            for keep in [Keep::Saved { group: 1 }, Keep::Input { group: 1 }] {
                let ours = logits_and_gradient(&model, keep);
                let errors = [0, 1].map(|i| relative(&ours[i], &want[i]));
                eprintln!("{shape:?} {dtype:?} {keep:?}: logits {:.1e}, gradient {:.1e}", errors[0], errors[1]);
                assert!(errors[0] < ratio && errors[1] < gradient_ratio, "{shape:?} {dtype:?} {keep:?}: {errors:?}");
                assert_eq!(ours, logits_and_gradient(&model, keep), "another result when run again");
            }
        }
    }
}

/// Logits of what follows `tokens` in a slot.
fn read(model: &Lm, states: &mut States, tokens: &[u32], slot: usize) -> Vec<f64> {
    let mut batch = Batch::default();
    batch.push(tokens, slot);
    let hidden = model.forward_rows(&batch, states, &[tokens.len() - 1]).unwrap();
    model.logits(&hidden, &[0]).unwrap().to_f64_vec()
}

#[test]
fn reading_in_chunks_forking_and_resetting() {
    let Some(gpu) = gpu() else { return };
    for shape in SHAPES {
        let host = shaken(&small(shape), &gpu.cpu_beside(), 4);
        for (dtype, ratio) in [(DType::F32, 2e-5), (DType::Bf16, 3e-2)] {
            let model = moved(&host, gpu, dtype);
            let tokens = Random::new(3).tokens(300, 300);
            let mut states = model.states(3).unwrap();
            let want = read(&model, &mut states, &tokens, 2);
            let (mut at, mut last) = (0, Vec::new());
            for len in [7, 1, 1, 30, 20, 1, 120, 63, 57] {
                last = read(&model, &mut states, &tokens[at..at + len], 0);
                at += len;
                if at == 39 {
                    states.copy_slot(0, 1);
                }
            }
            assert_eq!(at, 300);
            assert!(relative(&last, &want) < ratio, "{shape:?} {dtype:?}: {}", relative(&last, &want));
            let mut fork = states.fork().unwrap();
            assert!(relative(&read(&model, &mut fork, &tokens[39..], 1), &want) < ratio, "{dtype:?}: a copied slot");
            states.reset(&model, 0);
            assert!(relative(&read(&model, &mut states, &tokens, 0), &want) < ratio, "{dtype:?}: a slot that was reset");
        }
    }
}

/// Gradient of two segments of the same sequences, carried across the cut.
fn gradient_in_segments(model: &Lm) -> Vec<f64> {
    let mut random = Random::new(21);
    let mut states = model.states(2).unwrap();
    let mut grads = Params::zeros(model.params().table(), model.device(), model.params().data().dtype()).unwrap();
    let mut passes = Vec::new();
    for len in [72, 150] {
        let batch = Batch::packed(&[random.tokens(len, 300), random.tokens(len, 300)]);
        let targets = random.tokens(2 * len, 300);
        let (hidden, saved) = model.forward(&batch, Some(&mut states), Keep::Saved { group: 1 }, 1.0).unwrap();
        let (_, dhidden) = model.loss(&hidden, &targets, &vec![0.01; 2 * len], &mut grads).unwrap();
        passes.push((batch, saved.unwrap(), dhidden));
    }
    let mut dstates = DStates::zeros(&states).unwrap();
    for (batch, saved, dhidden) in passes.into_iter().rev() {
        model.backward(&batch, saved, dhidden, Some(&mut dstates), &mut grads).unwrap();
    }
    grads.data().to_f64_vec()
}

#[test]
fn gradients_cross_cuts_and_states_go_to_files() {
    let Some(gpu) = gpu() else { return };
    for shape in SHAPES {
        let host = shaken(&small(shape), &gpu.cpu_beside(), 6);
        let want = gradient_in_segments(&host);
        for (dtype, ratio) in [(DType::F32, 5e-4), (DType::Bf16, 1e-1)] {
            let model = moved(&host, gpu, dtype);
            let error = relative(&gradient_in_segments(&model), &want);
            assert!(error < ratio, "{shape:?} {dtype:?}: {error}");

            // Saved on the GPU, restored there and on the CPU.
            let mut states = model.states(1).unwrap();
            read(&model, &mut states, &Random::new(3).tokens(37, 300), 0);
            let bytes = states.to_bytes(0, &model, &[], None).unwrap();
            let logits = read(&model, &mut states, &[5, 6, 7], 0);
            for (model, ratio) in [(&model, 0.0), (&host, if dtype == DType::F32 { 1e-4 } else { 4e-2 })] {
                let mut restored = model.states(1).unwrap();
                restored.restore_bytes(0, model, bytes.clone()).unwrap();
                let error = relative(&read(model, &mut restored, &[5, 6, 7], 0), &logits);
                assert!(error <= ratio, "{shape:?} {dtype:?} restored on {:?}: {error}", model.device());
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
                (0..129).map(|i| ((start + i * stride + i * i / 7) % 300) as u32).collect()
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
    let (config, cpu) = (small((256, 4, 2)), gpu.cpu_beside());
    let want = losses(&mut Lm::new(&config, &cpu, DType::F32, 5).unwrap(), 20);
    let mut long = Vec::new();
    for (dtype, ratio) in [(DType::F32, 1e-3), (DType::Bf16, 2e-2)] {
        let mut model = Lm::new(&config, gpu, dtype, 5).unwrap();
        let ours = losses(&mut model, 300);
        let error = relative(&ours[..20], &want);
        eprintln!("{dtype:?}: 20 losses within {error:.1e} of the CPU's, from {:.3} to {:.3}", ours[0], ours[299]);
        assert!(error < ratio, "{dtype:?}: {ours:?} and not {want:?}");
        long.push(ours[250..].iter().sum::<f64>() / 50.0);

        // Saved from the GPU, read on the CPU.
        let folder = std::env::temp_dir().join(format!("ttt-cuda-attention-{}-{dtype:?}", std::process::id()));
        ttt::hub::save(&folder, &config, model.params(), ttt::hub::SaveOptions::default()).unwrap();
        let back = Lm::load(&folder, &cpu, DType::F32).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(ttt::hub::model_hash(back.params()), ttt::hub::model_hash(model.params()));
        let [ours, back] = [&model, &back].map(|m| logits_and_gradient(m, Keep::Saved { group: 4 })[0].clone());
        let limit = if dtype == DType::F32 { 1e-4 } else { 4e-2 };
        assert!(relative(&ours, &back) < limit, "{dtype:?}: logits on the CPU differ by {}", relative(&ours, &back));
    }
    let difference = (long[0] / long[1] - 1.0).abs();
    assert!(difference < 0.01, "the last 50 of 300 losses in f32 and in mixed precision: {long:?}");
}

/// Slots in which sequences of different lengths have been read, and the logits of their last tokens.
fn prompted(model: &Lm, count: usize) -> (States, Tensor) {
    let mut states = model.states(count).unwrap();
    let prompts: Vec<Vec<u32>> = (0..count).map(|i| Random::new(i as u64).tokens(3 + 5 * i % 29, 300)).collect();
    let batch = Batch::packed(&prompts);
    let last: Vec<usize> = batch.seqs.iter().map(|s| s.first_row + s.len - 1).collect();
    let hidden = model.forward_rows(&batch, &mut states, &last).unwrap();
    let logits = model.logits(&hidden, &(0..count).collect::<Vec<_>>()).unwrap();
    (states, logits)
}

/// Recorded decoding is ordinary decoding, token for token, while the caches have to grow on the way; sequences at different
/// positions, one of which ends.
#[test]
fn recorded_steps_are_ordinary_steps_while_caches_grow() {
    let Some(gpu) = gpu() else { return };
    for shape in SHAPES {
        for dtype in [DType::Bf16, DType::F32] {
            let model = moved(&shaken(&small(shape), &gpu.cpu_beside(), 5), gpu, dtype);
            let mut decoder = Decoder::new(&model);
            for count in [1, 3, 12, 70] {
                let (mut states, logits) = prompted(&model, count);
                let sampling = Sampling { temperature: 0.8, top_k: 100, top_p: 0.95, seed: 9 };
                let mut draws: Vec<Draw> = (0..count).map(|i| Draw::new(sampling, i as u64)).collect();
                let steps = if count == 1 { 400 } else { 150 };
                let mut want = Vec::new();
                let mut next = logits;
                for step in 0..=steps {
                    let chosen = sample::forward(next.view(), &mut draws).unwrap();
                    want.push(chosen.iter().map(|c| c.token).collect::<Vec<u32>>());
                    if step < steps {
                        let tokens: Vec<[u32; 1]> = chosen.iter().map(|c| [c.token]).collect();
                        let (hidden, _) = model.forward(&Batch::packed(&tokens), Some(&mut states), Keep::Nothing, 1.0).unwrap();
                        next = model.logits(&hidden, &(0..count).collect::<Vec<_>>()).unwrap();
                    }
                }
                // Sequence 2 ends with a token that comes.
                let end = want[40].get(2).copied();
                let ends = |i: usize| [if i == 2 { end } else { None }, None];
                let sequences: Vec<Sequence> =
                    (0..count).map(|slot| Sequence { slot, draw: Draw::new(sampling, slot as u64), ends: ends(slot) }).collect();
                let (mut recorded, logits) = prompted(&model, count);
                let mut ours = Vec::new();
                {
                    let mut session = decoder.start(&mut recorded, &sequences, &logits).unwrap();
                    for _ in 0..steps {
                        session.step().unwrap();
                        if session.waiting() > 2 {
                            ours.extend(session.take());
                        }
                    }
                    while let Some(choices) = session.take() {
                        ours.push(choices);
                    }
                }
                let name = format!("{shape:?} {dtype:?}, {count} sequences");
                for i in 0..count {
                    let is: Vec<u32> = ours.iter().map_while(|row| row[i].map(|c| c.token)).collect();
                    let all: Vec<u32> = want.iter().map(|row| row[i]).collect();
                    let ended = all.iter().position(|token| ends(i)[0] == Some(*token)).map_or(all.len(), |at| at + 1);
                    assert_eq!(is, all[..ended], "{name}: tokens of sequence {i}");
                    let read = (3 + 5 * i % 29 + is.len() - 1) as u64;
                    assert_eq!(recorded.position(i), read, "{name}: position of sequence {i}");
                }
                // What was read goes on as in the states that were not recorded.
                let tokens = [1, 2, 3];
                let [ours, want] = [&mut recorded, &mut states].map(|states| read(&model, states, &tokens, 0));
                assert!(relative(&ours, &want) < if dtype == DType::F32 { 1e-5 } else { 1e-2 }, "{name}: what follows");
            }
        }
    }
}
