//! Decoding on a GPU: recorded steps against ordinary ones bit for bit, kernels for few rows against the CPU, the sampler against its
//! definition.

use std::sync::OnceLock;

use ttt::batch::{Batch, Segment};
use ttt::config::{Config, Inner};
use ttt::device::{Device, Kernels};
use ttt::generate::{Choice, Decoder, Draw, Generator, Sampling, Sequence};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::{sample, step};
use ttt::state::States;
use ttt::tensor::{DType, Tensor};

use crate::models::moved;
use crate::support::{Random, relative, shaken_model};
use crate::{TURN, open};

/// GPUs whose new tensors are NaN (an element that nobody writes is noticed) and are as they come.
fn gpus() -> &'static [Device] {
    static GPUS: OnceLock<Vec<Device>> = OnceLock::new();
    TURN.with(|_| ());
    GPUS.get_or_init(|| [true, false].into_iter().map_while(open).collect())
}

/// Numbers around 0 that bf16 holds.
fn filled(device: &Device, shape: &[usize], dtype: DType, seed: u64, scale: f64) -> Tensor {
    let mut random = Random::new(seed);
    let len: usize = shape.iter().product();
    let value = |t: u32| half::bf16::from_f64((t as f64 / 500_000.0 - 1.0) * scale).to_f32();
    let values: Vec<f32> = random.tokens(len, 1_000_000).into_iter().map(value).collect();
    let tensor = Tensor::from_slice(&device.cpu_beside(), shape, &values).unwrap();
    let moved = tensor.to(device).unwrap();
    if moved.dtype() == dtype || device.as_cuda().is_none() { moved } else { moved.cast(dtype).unwrap() }
}

/// Every function of `ops::step` at numbers of rows around the kernels' sizes, beside the same on the CPU.
#[test]
fn products_of_few_rows() {
    for gpu in gpus() {
        for rows in [1, 2, 3, 4, 5, 8, 9, 16, 17, 65] {
            for [k, n] in [[768, 2304], [2048, 768], [344, 96], [128, 300], [72, 8]] {
                let run = |device: &Device, dtype: DType| {
                    let make = |shape: &[usize], seed, scale| filled(device, shape, dtype, seed, scale);
                    let master = |shape: &[usize], seed, scale| filled(device, shape, DType::F32, seed, scale);
                    let (x, w) = (make(&[rows, k], 1, 1.0), make(&[n, k], 2, 0.2));
                    // A block of a wider matrix.
                    let wide = make(&[rows, 2 * k], 3, 1.0);
                    let (scale, shift) = (master(&[1, k], 4, 1.0), master(&[1, k], 5, 0.5));
                    let even = n / 2 * 2;
                    let pair = make(&[even, k], 6, 0.2);
                    device.install(|| {
                        let (y, normed) = step::norm_linear(x.view(), scale.view(), 1e-6, w.view()).unwrap();
                        let plain = ttt::ops::linear::forward(x.view(), w.view()).unwrap();
                        let f32s = ttt::ops::linear::forward_as(x.view(), w.view(), DType::F32).unwrap();
                        let swiglu = step::norm_swiglu(x.view(), scale.view(), 1e-6, pair.view()).unwrap();
                        let (mut added, mut gated, mut ungated) =
                            (make(&[rows, n], 7, 1.0), make(&[rows, n], 8, 1.0), make(&[rows, n], 9, 1.0));
                        step::add_linear(&mut added, x.view(), w.view()).unwrap();
                        let (norm, gate) = ([scale.view(), shift.view()], wide.view().col_range(k..2 * k));
                        step::add_gated_linear(&mut gated, x.view(), norm, 1e-6, Some(gate), w.view()).unwrap();
                        step::add_gated_linear(&mut ungated, wide.view().col_range(0..k), norm, 1e-6, None, w.view()).unwrap();
                        [y, normed, plain, f32s, swiglu, added, gated, ungated].map(|t| t.to_f64_vec())
                    })
                };
                let want = run(&Device::cpu_with(0, Kernels::Reference).unwrap(), DType::F32);
                let ours = run(gpu, DType::Bf16);
                let names =
                    ["norm_linear", "its norm", "linear", "linear to f32", "norm_swiglu", "add_linear", "gated", "not gated"];
                for ((name, ours), want) in names.iter().zip(&ours).zip(&want) {
                    // One rounding of operands and of the result, or several one behind the other.
                    let limit = match *name {
                        // Sums in f32 in another order.
                        "linear to f32" => 1e-5,
                        "norm_swiglu" | "gated" => 2e-2,
                        _ => 8e-3,
                    };
                    let error = relative(ours, want);
                    assert!(error < limit, "{name}, {rows} rows, {k} to {n}: {error:.1e}");
                }
                assert_eq!(ours, run(gpu, DType::Bf16), "{rows} rows, {k} to {n}: another result when run again");
            }
        }
    }
}

/// The convolution before a layer in a step, with windows that move on.
#[test]
fn convolutions_of_a_step() {
    for gpu in gpus() {
        for (rows, c, taps) in [(1, 768, 4), (2, 2056, 4), (4, 1160, 4), (5, 96, 4), (70, 128, 2), (3, 64, 8), (2, 64, 1)] {
            let segments: Vec<Segment> =
                (0..rows).map(|i| Segment { first_row: i, len: 1, slot: rows - i, phase: i % 16 }).collect();
            let run = |device: &Device, dtype: DType| {
                let mut x = filled(device, &[rows, c], dtype, 1, 1.0);
                let mut window = filled(device, &[rows + 1, taps - 1, c], dtype, 2, 1.0);
                let master = |shape: &[usize], seed| filled(device, shape, DType::F32, seed, 1.0);
                let (scale, w, bias) = (master(&[1, c], 3), master(&[c, taps], 4), master(&[1, c], 5));
                device.install(|| {
                    for _ in 0..3 {
                        let parts = [w.view(), bias.view()];
                        step::add_conv(&mut x, scale.view(), 1e-6, parts, &segments, &mut window).unwrap();
                    }
                    let conv = step::Conv {
                        scale: scale.view(),
                        weight: w.view(),
                        bias: bias.view(),
                        segments: &segments,
                        window: &window,
                    };
                    let matrix = filled(device, &[24, c], dtype, 6, 0.3);
                    let made = step::conv_norm_linear(x.view(), conv, scale.view(), 1e-6, matrix.view()).unwrap();
                    let step::ConvNormLinear { residual, product: (y, normed), now } = made;
                    [&x, &residual, &y, &normed, &now, &window].map(Tensor::to_f64_vec)
                })
            };
            let want = run(&Device::cpu_with(0, Kernels::Reference).unwrap(), DType::F32);
            let ours = run(gpu, DType::Bf16);
            let names = ["x", "residual", "product", "norm", "next of the windows", "windows"];
            for ((name, ours), want) in names.iter().zip(&ours).zip(&want).filter(|(_, want)| !want.is_empty()) {
                let error = relative(ours, want);
                assert!(error < 2e-2, "{name} of {rows} rows, {taps} taps: {error:.1e}");
            }
        }
    }
}

/// The sampler's kernel and its definition choose the same tokens.
#[test]
fn tokens_are_chosen_as_defined() {
    let cpu = Device::cpu().unwrap();
    let settings = [
        (0.0, 0, 1.0),
        (1.0, 0, 1.0),
        (0.7, 0, 1.0),
        (1e-3, 0, 1.0),
        (1.3, 5, 1.0),
        (1.0, 0, 0.8),
        (0.9, 40, 0.95),
        (1.0, 1, 0.5),
        (2.0, 2000, 0.999),
        (5.0, 0, 1e-9),
        (1.0, 1 << 20, 0.3),
    ];
    for gpu in gpus() {
        for vocab in [1, 2, 31, 300, 1024, 5000, 32_000] {
            // Many equal logits, and hardly any.
            for levels in [7.0, 1e5] {
                let rows = 3 * settings.len();
                let mut random = Random::new(vocab as u64);
                let values: Vec<f32> = random
                    .tokens(rows * vocab, 1 << 20)
                    .into_iter()
                    .map(|t| (t as f32 / 1048576.0 * levels).floor() / levels * 20.0 - 8.0)
                    .collect();
                let draws: Vec<Draw> = (0..rows)
                    .map(|i| {
                        let (temperature, top_k, top_p) = settings[i % settings.len()];
                        let sampling = Sampling { temperature, top_k, top_p, seed: 3 };
                        Draw { drawn: 1000 * i as u64, ..Draw::new(sampling, i as u64) }
                    })
                    .collect();
                let choose = |device: &Device| -> Vec<Choice> {
                    let logits = Tensor::from_slice(&cpu, &[rows, vocab], &values).unwrap().to(device).unwrap();
                    let mut draws = draws.clone();
                    let mut all = Vec::new();
                    for _ in 0..10 {
                        all.extend(sample::forward(logits.view(), &mut draws).unwrap());
                    }
                    all
                };
                let (ours, want) = (choose(gpu), choose(&cpu));
                for (i, (ours, want)) in ours.iter().zip(&want).enumerate() {
                    let how = draws[i % rows].sampling;
                    assert_eq!(ours.token, want.token, "vocabulary of {vocab}, {levels} levels, draw {i}: {how:?}");
                    assert!((ours.logprob - want.logprob).abs() < 1e-5, "{ours:?} and not {want:?}");
                }
            }
        }
    }
}

fn config(inner: Inner, backbone: usize, (hidden, heads): (usize, usize)) -> Config {
    let flag = |i: usize| backbone >> i & 1 == 1;
    Config {
        vocab_size: 500,
        hidden_size: hidden,
        intermediate_size: 344,
        num_hidden_layers: 3,
        num_attention_heads: heads,
        use_gate: flag(0),
        share_qk: flag(1),
        pre_conv: flag(2),
        ..Config::preset("tiny", inner).unwrap()
    }
}

/// The numbers of each slot that count: of an open mini-batch the rows that were seen.
fn numbers(states: &States, model: &Lm, slots: &[usize]) -> Vec<Vec<f64>> {
    let mut all = vec![Vec::new(); slots.len()];
    for layer in 0..model.config().num_hidden_layers {
        for (name, tensor) in states.layer(layer).tensors() {
            let (values, per_slot) = (tensor.to_f64_vec(), tensor.len() / states.slots());
            for (all, slot) in all.iter_mut().zip(slots) {
                let own = &values[slot * per_slot..][..per_slot];
                match *tensor.shape() {
                    [_, heads, _, row] if name == "open_rows" => {
                        let phase = states.position(*slot) as usize % model.config().mini_batch_size;
                        own.chunks_exact(per_slot / heads).for_each(|head| all.extend(&head[..phase * row]));
                    }
                    _ => all.extend(own),
                }
            }
        }
    }
    all
}

/// Slots in which sequences of different lengths have been read, as many to spare, and the logits of their last tokens.
fn prompted(model: &Lm, slots: &[usize]) -> (States, Tensor) {
    let mut states = model.states(2 * slots.len() + 2).unwrap();
    let mut batch = Batch::default();
    for (i, slot) in slots.iter().enumerate() {
        batch.push(&Random::new(i as u64).tokens(3 + 5 * i % 29, model.config().vocab_size), *slot);
    }
    let last: Vec<usize> = batch.seqs.iter().map(|s| s.first_row + s.len - 1).collect();
    let hidden = model.forward_rows(&batch, &mut states, &last).unwrap();
    let logits = model.logits(&hidden, &(0..slots.len()).collect::<Vec<_>>()).unwrap();
    (states, logits)
}

/// Tokens of ordinary decoding: a pass of the model over a token of each sequence that has not ended, and a choice.
fn ordinary(model: &Lm, states: &mut States, sequences: &[Sequence], logits: Tensor, steps: usize) -> Vec<Vec<Option<u32>>> {
    let mut draws: Vec<Draw> = sequences.iter().map(|s| s.draw).collect();
    let mut last: Vec<Option<u32>> = sample::forward(logits.view(), &mut draws).unwrap().iter().map(|c| Some(c.token)).collect();
    let mut all = vec![last.clone()];
    for _ in 0..steps {
        let ended = |i: &usize| last[*i].is_none_or(|token| sequences[*i].ends.contains(&Some(token)));
        let open: Vec<usize> = (0..sequences.len()).filter(|i| !ended(i)).collect();
        // Ended sequences stay in the batch, so that products see the same rows; their state is put back.
        let ended: Vec<(usize, usize)> =
            (0..sequences.len()).filter(|i| !open.contains(i)).map(|i| (sequences[i].slot, sequences.len() + 2 + i)).collect();
        ended.iter().for_each(|(slot, spare)| states.copy_slot(*slot, *spare));
        let mut batch = Batch::default();
        for (i, s) in sequences.iter().enumerate() {
            batch.push(&[last[i].unwrap_or(0)], s.slot);
        }
        let (hidden, _) = model.forward(&batch, Some(states), Keep::Nothing, 1.0).unwrap();
        let logits = model.logits(&hidden, &(0..sequences.len()).collect::<Vec<_>>()).unwrap();
        let choices = sample::forward(logits.view(), &mut draws).unwrap();
        ended.iter().for_each(|(slot, spare)| states.copy_slot(*spare, *slot));
        for i in 0..sequences.len() {
            last[i] = open.contains(&i).then_some(choices[i].token);
        }
        all.push(last.clone());
    }
    all
}

/// Recorded decoding is ordinary decoding bit for bit: tokens, positions and all states, greedy and sampled, for sequences at
/// different phases, some of which end on the way.
#[test]
fn recorded_steps_are_ordinary_steps() {
    for gpu in gpus() {
        let cases = [(0b111, (128, 2)), (0b000, (128, 2)), (0b011, (96, 2)), (0b101, (192, 2)), (0b111, (96, 3))];
        let linear = cases.map(|(backbone, sizes)| (Inner::Linear, backbone, sizes));
        let mlp = [(Inner::Mlp, 0b111, (128, 2)), (Inner::Mlp, 0b000, (96, 2))];
        for (inner, backbone, sizes) in linear.into_iter().chain(mlp) {
            for dtype in [DType::Bf16, DType::F32] {
                let host = shaken_model(&config(inner, backbone, sizes), &gpu.cpu_beside(), DType::F32, 5);
                let model = moved(&host, gpu, dtype);
                let mut decoder = Decoder::new(&model);
                for (count, temperature) in [(1, 0.0), (3, 1.0), (7, 1.0), (12, 0.8), (70, 1.0)] {
                    let slots: Vec<usize> = (0..count).map(|i| (i * 5 + 1) % (count + 2)).collect();
                    let slots = if (count + 2) % 5 == 0 { (1..=count).collect() } else { slots };
                    let sampling = Sampling { temperature, top_k: 100, top_p: 0.95, seed: 9 };
                    // Every third sequence ends behind tokens that are likely to come.
                    let ends = |i: usize| if i % 3 == 2 { [Some(7), Some(8 + i as u32 % 50)] } else { [None; 2] };
                    let sequence =
                        |(i, slot): (usize, &usize)| Sequence { slot: *slot, draw: Draw::new(sampling, i as u64), ends: ends(i) };
                    let sequences: Vec<Sequence> = slots.iter().enumerate().map(sequence).collect();
                    let steps = 37;
                    let (mut states, logits) = prompted(&model, &slots);
                    let want = ordinary(&model, &mut states, &sequences, logits, steps);
                    let (mut recorded, logits) = prompted(&model, &slots);
                    let ours = {
                        let mut session = decoder.start(&mut recorded, &sequences, &logits).unwrap();
                        let mut all = Vec::new();
                        for _ in 0..steps {
                            session.step().unwrap();
                            if session.waiting() > 2 {
                                all.extend(session.take());
                            }
                        }
                        while let Some(choices) = session.take() {
                            all.push(choices);
                        }
                        all
                    };
                    let ours: Vec<Vec<Option<u32>>> =
                        ours.into_iter().map(|row| row.into_iter().map(|c| c.map(|c| c.token)).collect()).collect();
                    let name =
                        format!("{inner:?} {backbone:03b} {sizes:?} {dtype:?}, {count} sequences at temperature {temperature}");
                    assert_eq!(ours, want, "{name}");
                    for slot in &slots {
                        assert_eq!(recorded.position(*slot), states.position(*slot), "{name}: position of slot {slot}");
                    }
                    let [ours, want] = [&recorded, &states].map(|states| numbers(states, &model, &slots));
                    assert!(ours == want && !ours.iter().flatten().any(|x| x.is_nan()), "{name}: states");
                }
            }
        }
    }
}

/// Token by token in few launches is reading all at once, on the CPU in f64, within what bf16 costs.
#[test]
fn decoding_is_prefill() {
    for gpu in gpus() {
        for (backbone, sizes) in [(0b111, (128, 2)), (0b000, (128, 2)), (0b011, (96, 2)), (0b110, (192, 2))] {
            let host = shaken_model(&config(Inner::Linear, backbone, sizes), &gpu.cpu_beside(), DType::F32, 2);
            let (check, model) =
                (moved(&host, &Device::cpu_with(0, Kernels::Reference).unwrap(), DType::F64), moved(&host, gpu, DType::Bf16));
            for count in [1, 3, 9, 20, 66] {
                let tokens: Vec<Vec<u32>> = (0..count).map(|i| Random::new(i).tokens(37, 500)).collect();
                let (hidden, _) = check.forward(&Batch::packed(&tokens), None, Keep::Nothing, 1.0).unwrap();
                let last: Vec<usize> = (0..count as usize).map(|i| 37 * i + 36).collect();
                let want = check.logits(&hidden, &last).unwrap().to_f64_vec();
                let mut states = model.states(count as usize).unwrap();
                let mut logits = Vec::new();
                for t in 0..37 {
                    let one: Vec<[u32; 1]> = tokens.iter().map(|all| [all[t]]).collect();
                    let (hidden, _) = model.forward(&Batch::packed(&one), Some(&mut states), Keep::Nothing, 1.0).unwrap();
                    logits = model.logits(&hidden, &(0..count as usize).collect::<Vec<_>>()).unwrap().to_f64_vec();
                }
                let error = relative(&logits, &want);
                eprintln!("{backbone:03b} {sizes:?}, {count} sequences: {error:.1e}");
                assert!(error < 4e-2, "{backbone:03b} {sizes:?}, {count} sequences: {error:.1e}");
            }
        }
    }
}

/// A generator on a GPU writes what a decoder does, in pieces, and the state goes on from where it was left.
#[test]
fn generators_write_on() {
    for gpu in gpus() {
        let host = shaken_model(&config(Inner::Linear, 0b111, (128, 2)), &gpu.cpu_beside(), DType::F32, 7);
        let model = moved(&host, gpu, DType::Bf16);
        let prompt = Random::new(1).tokens(21, 500);
        let sampling = Sampling { temperature: 0.9, top_k: 0, top_p: 0.9, seed: 4 };
        let run = |pieces: &[usize]| {
            let mut states = model.states(1).unwrap();
            let mut generator = Generator::new(&model, sampling).unwrap();
            let (mut pending, mut tokens) = (prompt.clone(), Vec::new());
            for limit in pieces {
                generator.read(&mut states, 0, &pending).unwrap();
                let last = generator
                    .write(&mut states, 0, *limit, [None; 2], |choice| {
                        tokens.push(choice.token);
                        Ok::<bool, ttt::Error>(true)
                    })
                    .unwrap();
                pending = vec![last.unwrap()];
            }
            (tokens, states.position(0))
        };
        let whole = run(&[60]);
        assert_eq!(whole.1, 21 + 59);
        assert_eq!(run(&[1, 20, 2, 37]), whole);
        // Stopped by the caller: what was under way counts.
        let mut states = model.states(1).unwrap();
        let mut generator = Generator::new(&model, sampling).unwrap();
        generator.read(&mut states, 0, &prompt).unwrap();
        let mut tokens = Vec::new();
        let last = generator.write(&mut states, 0, 60, [None; 2], |choice| {
            tokens.push(choice.token);
            Ok::<bool, ttt::Error>(tokens.len() < 10)
        });
        assert_eq!(last.unwrap(), tokens.last().copied());
        assert!((10..14).contains(&tokens.len()) && tokens == whole.0[..tokens.len()]);
        assert_eq!(states.position(0), 20 + tokens.len() as u64);
        // Ended by a token.
        let end = whole.0[30];
        let at = whole.0.iter().position(|t| *t == end).unwrap();
        let mut states = model.states(1).unwrap();
        let mut generator = Generator::new(&model, sampling).unwrap();
        generator.read(&mut states, 0, &prompt).unwrap();
        let mut tokens = Vec::new();
        let last = generator.write(&mut states, 0, 60, [Some(end), None], |choice| {
            tokens.push(choice.token);
            Ok::<bool, ttt::Error>(true)
        });
        assert_eq!((last.unwrap(), &tokens[..]), (Some(end), &whole.0[..at]));
        assert_eq!(states.position(0), 21 + at as u64);
    }
}

/// Steps that are waited for are ordinary steps bit for bit, whoever is there, and a slot that was saved and restored in between
/// goes on as if nothing had happened, without another noticing.
#[test]
fn steps_of_whoever_is_there() {
    for gpu in gpus() {
        let host = shaken_model(&config(Inner::Linear, 0b111, (128, 2)), &gpu.cpu_beside(), DType::F32, 6);
        let model = moved(&host, gpu, DType::Bf16);
        let slots: Vec<usize> = (0..9).collect();
        let [(mut ours, _), (mut want, _)] = [(); 2].map(|()| prompted(&model, &slots));
        let (mut decoder, mut random, mut drawn, mut last) = (Decoder::new(&model), Random::new(3), [0; 9], [1; 9]);
        for round in 0..60 {
            let here: Vec<usize> = (0..9).filter(|_| random.below(4) > 0).collect();
            if here.is_empty() {
                continue;
            }
            let sampling = |i: usize| Sampling { temperature: i as f64 / 4.0, top_k: 50, top_p: 0.9, seed: i as u64 };
            let mut draws: Vec<Draw> = here.iter().map(|&i| Draw { drawn: drawn[i], ..Draw::new(sampling(i), 0) }).collect();
            let sequence = |(i, draw): (&usize, &Draw)| Sequence { slot: *i, draw: *draw, ends: [None; 2] };
            let sequences: Vec<Sequence> = here.iter().zip(&draws).map(sequence).collect();
            let tokens: Vec<u32> = here.iter().map(|i| last[*i]).collect();
            let chosen = decoder.step(&mut ours, &sequences, &tokens).unwrap();
            let mut batch = Batch::default();
            here.iter().zip(&tokens).for_each(|(slot, token)| batch.push(&[*token], *slot));
            let (hidden, _) = model.forward(&batch, Some(&mut want), Keep::Nothing, 1.0).unwrap();
            let logits = model.logits(&hidden, &(0..here.len()).collect::<Vec<_>>()).unwrap();
            let ordinary = sample::forward(logits.view(), &mut draws).unwrap();
            for ((&i, ours), want) in here.iter().zip(&chosen).zip(&ordinary) {
                assert_eq!(ours.token, want.token, "round {round}, slot {i}");
                (last[i], drawn[i]) = (ours.token, drawn[i] + 1);
            }
            if round % 7 == 0 {
                let file = ours.to_bytes(round % 9, &model, &[], None).unwrap();
                ours.restore_bytes(round % 9, &model, file).unwrap();
            }
        }
        assert_eq!(numbers(&ours, &model, &slots), numbers(&want, &model, &slots));
        assert!(slots.iter().all(|slot| ours.position(*slot) == want.position(*slot)));
    }
}
