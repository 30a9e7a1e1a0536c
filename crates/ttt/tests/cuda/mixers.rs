//! Mamba and the rungs of the paper's ladder on a GPU: operations, whole models, states, recorded decoding, training.

use ttt::batch::{Batch, Segment};
use ttt::config::{Config, Inner};
use ttt::device::Device;
use ttt::generate::{Decoder, Draw, Sampling, Sequence};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::{sample, selective_scan};
use ttt::state::States;
use ttt::tensor::DType;

use crate::models::{VOCAB, carries_and_saves, is_the_definition, moved, reads_in_chunks, trains_and_goes_back};
use crate::support::{Random, rungs, shaken_by};
use crate::{case, cases, gpu};

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

/// A model with every parameter away from its start. Mamba's step sizes come out of three products in a row, each rounded in bf16, and
/// go through an exponential: they stay of the order of 1.
fn shaken(name: &str, config: &Config, device: &Device, seed: u64) -> Lm {
    let size = if name == "Mamba" { 0.125 } else { 0.25 };
    shaken_by(size, config, &device.cpu_beside(), DType::F32, seed)
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

#[test]
fn whole_models() {
    let Some(gpu) = gpu() else { return };
    for (i, (name, config)) in configs().into_iter().enumerate() {
        let ways = [Keep::Saved { group: 4 }, Keep::Input { group: 4 }];
        is_the_definition(name, &shaken(name, &config, gpu, i as u64), &[70, 33, 5], &ways);
    }
}

#[test]
fn reading_in_chunks_forking_and_resetting() {
    let Some(gpu) = gpu() else { return };
    for (name, config) in configs() {
        reads_in_chunks(name, &shaken(name, &config, gpu, 4), &[7, 1, 1, 30, 20, 1, 30], 5e-5);
    }
}

#[test]
fn gradients_cross_cuts_and_states_go_to_files() {
    let Some(gpu) = gpu() else { return };
    for (name, config) in configs() {
        carries_and_saves(name, &shaken(name, &config, gpu, 6), [32, 20]);
    }
}

/// Recorded steps of decoding choose what ordinary ones do and leave the same states.
#[test]
fn recorded_steps_are_ordinary_steps() {
    let Some(gpu) = gpu() else { return };
    for (name, config) in configs() {
        let host = shaken(name, &config, gpu, 7);
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

#[test]
fn training_follows_the_cpu_and_the_model_goes_back() {
    for (name, config) in configs() {
        trains_and_goes_back(name, &config, 1e-3, [10, 10]);
    }
}
