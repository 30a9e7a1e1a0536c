//! The Transformer on a GPU: attention and its gradients, whole models, growing caches, recorded decoding.

use ttt::batch::Batch;
use ttt::config::{Config, Inner};
use ttt::device::Device;
use ttt::generate::{Decoder, Draw, Sampling, Sequence};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::sample;
use ttt::state::States;
use ttt::tensor::{DType, Tensor};

use crate::attention_cases::{attention_case, fresh_case, halves_case, odd_cases};
use crate::gpu;
use crate::models::{
    VOCAB, carries_and_saves, is_the_definition, moved, precision_does_not_matter, read, reads_in_chunks, trains_and_goes_back,
};
use crate::support::{Random, relative, shaken_by, transformer};

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
        vocab_size: VOCAB,
        hidden_size,
        intermediate_size: 344,
        num_hidden_layers: 2,
        num_attention_heads,
        ..Config::preset("tiny", Inner::Linear).unwrap()
    };
    transformer(like, shared)
}

/// A model with scores of the order of 1: in bf16 a score is off by a part of itself, and so is its exponential.
fn shaken(shape: (usize, usize, usize), device: &Device, seed: u64) -> Lm {
    shaken_by(0.125, &small(shape), &device.cpu_beside(), DType::F32, seed)
}

#[test]
fn whole_models() {
    let Some(gpu) = gpu() else { return };
    for shape in SHAPES {
        let ways = [Keep::Saved { group: 1 }, Keep::Input { group: 1 }];
        is_the_definition(&format!("{shape:?}"), &shaken(shape, gpu, 3), &[170, 33, 5], &ways);
    }
}

#[test]
fn reading_in_chunks_forking_and_resetting() {
    let Some(gpu) = gpu() else { return };
    for shape in SHAPES {
        reads_in_chunks(&format!("{shape:?}"), &shaken(shape, gpu, 4), &[7, 1, 1, 30, 20, 1, 120, 63, 57], 2e-5);
    }
}

#[test]
fn gradients_cross_cuts_and_states_go_to_files() {
    let Some(gpu) = gpu() else { return };
    for shape in SHAPES {
        carries_and_saves(&format!("{shape:?}"), &shaken(shape, gpu, 6), [72, 150]);
    }
}

#[test]
fn training_follows_the_cpu_and_the_model_goes_back() {
    // At 1e-3 where it ends depends on any rounding of the weights, much finer ones than bf16's too.
    if let Some(losses) = trains_and_goes_back("Transformer", &small((256, 4, 2)), 5e-4, [20, 300]) {
        precision_does_not_matter("Transformer", losses);
    }
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
            let model = moved(&shaken(shape, gpu, 5), gpu, dtype);
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
