//! TTT-Linear and TTT-MLP on a GPU: operations, whole models, statistics.

use ttt::batch::{Batch, Segment};
use ttt::config::{Config, Inner};
use ttt::device::{Device, Kernels};
use ttt::layer::Keep;
use ttt::lm::Lm;
use ttt::ops::{adamw, grad_norm};
use ttt::tensor::{DType, Tensor};

use crate::models::{VOCAB, carries_and_saves, is_the_definition, moved, reads_in_chunks};
use crate::support::{Random, relative, shaken_model};
use crate::{case, cases, gpu, ttt_case};

fn reference() -> Device {
    Device::cpu_with(0, Kernels::Reference).unwrap()
}

#[test]
fn operations_in_f32() {
    let Some(gpu) = gpu() else { return };
    for case in cases::odd_cases() {
        case.check_gpu(gpu, DType::F32, false, 2e-5);
        case.check_gpu(gpu, DType::F32, true, 2e-5);
    }
}

#[test]
fn operations_in_mixed_precision() {
    let Some(gpu) = gpu() else { return };
    // Sizes that are read and written 8 elements at a time too.
    let wide = vec![
        cases::linear_case(64, 256, 128),
        cases::rms_norm_case(70, 768),
        cases::rms_norm_residual_case(70, 768),
        cases::linear_onto_case(64, 256, 128),
        cases::layer_norm_case(70, 768),
        cases::conv_case(768, 4),
        cases::rope_case(3, 64),
        cases::gelu_gate_case(61, 768),
        cases::swiglu_case(61, 768),
        cases::add_case(61, 768),
        cases::embedding_case(300, 37, 128),
        cases::inner_lr_case(61, 768, 12, 0.75).scaled(1, 0.05),
        cases::cross_entropy_case(61, 64, 1000).scaled(1, 0.3),
    ];
    for case in wide.into_iter().chain(cases::odd_cases().into_iter().filter(|case| !case.is("cross_entropy"))) {
        case.check_gpu(gpu, DType::Bf16, false, 2e-2);
        case.check_gpu(gpu, DType::Bf16, true, 2e-2);
    }
}

/// Enough rows that a thread walks over several, in segments that start and end inside and at the ends of its rows.
#[test]
fn convolutions_of_many_rows() {
    let Some(gpu) = gpu() else { return };
    let (mut segments, mut first_row) = (Vec::new(), 0);
    for (slot, len) in [1, 2, 3, 1500, 0, 33, 4, 1, 64, 3000, 32, 7].into_iter().enumerate() {
        segments.push(Segment { first_row, len, slot, phase: 0 });
        first_row += len;
    }
    let (n, c) = (first_row, 768);
    let run = |device: &Device, dtype: DType| {
        let make = |shape: &[usize], seed, dtype| {
            let values: Vec<f64> = case::filled(&device.cpu_beside(), shape, seed).to_f64_vec();
            let rounded: Vec<f64> = values.iter().map(|x| half::bf16::from_f32(*x as f32).to_f64()).collect();
            case::placed(device, shape, &rounded, dtype)
        };
        let (x, dy, window) = (make(&[n, c], 1, dtype), make(&[n, c], 2, dtype), make(&[segments.len(), 3, c], 5, dtype));
        let master = if dtype == DType::Bf16 { DType::F32 } else { dtype };
        let (w, bias) = (make(&[c, 4], 3, master), make(&[1, c], 4, master));
        let (mut dw, mut dbias) = (make(&[c, 4], 6, master), make(&[1, c], 7, master));
        device.install(|| {
            let y = ttt::ops::conv::forward(x.view(), w.view(), bias.view(), &segments, Some(&window)).unwrap();
            let (dw_view, dbias_view) = (dw.view_mut(), dbias.view_mut());
            let (dy, x, w) = (dy.view(), x.view(), w.view());
            let dx = ttt::ops::conv::backward(dy, x, w, &segments, Some(&window), dw_view, dbias_view, None).unwrap();
            [y, dx, dw, dbias].map(|t| t.to_f64_vec())
        })
    };
    let want = run(&gpu.cpu_beside(), DType::F32);
    for (dtype, ratio) in [(DType::F32, 1e-5), (DType::Bf16, 1e-2)] {
        let ours = run(gpu, dtype);
        for (name, (ours, want)) in ["y", "dx", "dw", "dbias"].iter().zip(ours.iter().zip(&want)) {
            case::expect_close(&format!("{name} {dtype:?}"), ours, want, ratio);
        }
        assert_eq!(ours, run(gpu, dtype), "{dtype:?}: another result when run again");
    }
}

#[test]
fn optimizer_and_norms() {
    let Some(gpu) = gpu() else { return };
    let settings = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let n = 40_004;
    let run = |device: &Device| {
        let make = |seed: usize| case::filled(&device.cpu_beside(), &[n], seed).to(device).unwrap();
        let (mut p, g, mut m) = (make(1), make(2), make(3));
        let mut v = Tensor::from_slice(device, &[n], &vec![0.25f32; n]).unwrap();
        let mut copies = device.as_cuda().map(|_| p.cast(DType::Bf16).unwrap());
        for step in 3..5 {
            adamw::step_with_copies(&mut p, copies.as_mut(), &g, &mut m, &mut v, step, 0.01, 0.5, &settings);
        }
        let sum = grad_norm::sum_of_squares(&g);
        ([p.to_f64_vec(), m.to_f64_vec(), v.to_f64_vec()], copies.map(|c| c.to_f64_vec()), sum)
    };
    let (ours, copies, sum) = run(gpu);
    let (want, _, want_sum) = run(&reference());
    for (name, (ours, want)) in ["params", "m", "v"].iter().zip(ours.iter().zip(&want)) {
        case::expect_close(name, ours, want, 1e-6);
    }
    let rounded: Vec<f64> = ours[0].iter().map(|x| half::bf16::from_f32(*x as f32).to_f64()).collect();
    assert_eq!(copies.unwrap(), rounded, "copies for products");
    assert!((sum - want_sum).abs() < 1e-6 * want_sum, "{sum} and not {want_sum}");

    let mut host = case::filled(&gpu.cpu_beside(), &[300, 211], 6);
    assert_eq!(grad_norm::first_non_finite(host.to(gpu).unwrap().view()), None);
    for (bad, value) in [(60_001, f32::NAN), (60_000, f32::INFINITY), (50_123, f32::NEG_INFINITY)] {
        host.as_mut_slice::<f32>()[bad] = value;
        let x = host.to(gpu).unwrap();
        assert_eq!(grad_norm::first_non_finite(x.view()), Some(bad));
    }
}

/// (type, ratio for outputs and gradients, ratio for the gradients of the token scale: long sums that cancel)
const PRECISIONS: [(DType, f64, f64); 2] = [(DType::F32, 1e-4, 1e-4), (DType::Bf16, 3e-2, 6e-2)];

#[test]
fn ttt_linear_forward_and_every_gradient() {
    let sizes = [(3, 64, 16), (2, 96, 16), (2, 48, 16), (1, 128, 8), (2, 10, 5), (2, 16, 1), (1, 64, 64)];
    forward_and_every_gradient(Inner::Linear, &sizes, 1040);
}

#[test]
fn ttt_mlp_forward_and_every_gradient() {
    let sizes = [(3, 64, 16), (1, 96, 16), (2, 64, 8), (1, 128, 8), (2, 10, 5), (2, 16, 1), (1, 32, 64)];
    forward_and_every_gradient(Inner::Mlp, &sizes, 304);
}

/// For each (heads, head size, mini-batch); `long` is the length of the longest sequence, in whole mini-batches.
fn forward_and_every_gradient(inner: Inner, sizes: &[(usize, usize, usize)], long: usize) {
    for size in sizes {
        check_sizes(inner, *size, &[&[1], &[15], &[16], &[17], &[63], &[long], &[33, 0, 16, 7, 40]]);
    }
}

/// The kernels round where the reference with a GPU's roundings does: what is left is the order of sums, and numbers that fall on the
/// other side of a rounding. Limits as in `scripts/kernels`.
#[test]
fn kernels_round_where_the_reference_does() {
    let Some(gpu) = gpu() else { return };
    let rounded = Device::cpu_with(0, Kernels::Rounded).unwrap();
    for inner in [Inner::Linear, Inner::Mlp] {
        for (d, k) in [(64, 16), (64, 8), (96, 16)] {
            for lens in [&[304][..], &[33, 0, 16, 7, 40]] {
                let case = ttt_case::Case { pad: 8, ..ttt_case::Case::new(inner, 2, d, k, lens).in_mixed_precision() };
                let [(z, w, grads), (want_z, want_w, want_grads)] =
                    [(gpu, DType::Bf16), (&rounded, DType::F64)].map(|(on, dtype)| {
                        let run = case.forward(on, dtype, None);
                        (run.z.clone(), case.final_weights(&run), case.backward(on, dtype, 16))
                    });
                let mut errors = vec![("z", ttt_case::distance(&z, &want_z)), ("weights", ttt_case::distance(&w, &want_w))];
                let named = grads.named().into_iter().zip(want_grads.named());
                errors.extend(named.map(|((what, ours), (_, want))| (what, ttt_case::distance(ours, want))));
                eprintln!("{inner:?} d = {d}, K = {k}, {lens:?}: {errors:?}");
                for (what, error) in errors {
                    assert!(
                        error < if what == "tok" { 2e-2 } else { 6e-3 },
                        "{inner:?} d = {d}, K = {k}, {lens:?}: {what} {error:.1e}"
                    );
                }
            }
        }
    }
}

/// Every head size and mini-batch that is supported runs through some kernel.
#[test]
fn every_head_size_with_every_mini_batch() {
    for inner in [Inner::Linear, Inner::Mlp] {
        for d in [64, 96, 128] {
            for k in [8, 16, 32, 64] {
                check_sizes(inner, (1, d, k), &[&[2 * k + 3, 1, k]]);
            }
        }
    }
}

/// For (heads, head size, mini-batch) and lengths of the sequences.
fn check_sizes(inner: Inner, (heads, d, k): (usize, usize, usize), lens: &[&[usize]]) {
    let Some(gpu) = gpu() else { return };
    for lens in lens {
        let case = ttt_case::Case::new(inner, heads, d, k, lens);
        let (want, want_grads) = (case.forward(&reference(), DType::F64, None), case.backward(&reference(), DType::F64, 2));
        // Rows of 8 aligned elements, which the fast kernels want, and others.
        for ((dtype, ratio, token_ratio), pad) in [(PRECISIONS[0], 5), (PRECISIONS[1], 5), (PRECISIONS[1], 8)] {
            let case = ttt_case::Case { pad, ..case.clone() };
            let name = format!("{heads} heads of {d}, K = {k}, {lens:?} {dtype:?}, {pad} beside");
            let ours = case.forward(gpu, dtype, None);
            ttt_case::close(&format!("{name}: z"), &ours.z, &want.z, ratio);
            let weights = [case.final_weights(&ours), case.final_weights(&want)];
            ttt_case::close(&format!("{name}: weights"), &weights[0], &weights[1], ratio);
            for group in [1, 4] {
                let grads = case.backward(gpu, dtype, group);
                for ((what, ours), (_, want)) in grads.named().into_iter().zip(want_grads.named()) {
                    // Long sums that cancel; with K = 1 one sum over all tokens, of which rounding leaves a few bits.
                    let ratio = match what {
                        "tok" if k == 1 && dtype == DType::Bf16 => 0.5,
                        "tok" => token_ratio,
                        _ => ratio,
                    };
                    ttt_case::close(&format!("{name} g = {group}: d{what}"), ours, want, ratio);
                }
                assert_eq!(grads, case.backward(gpu, dtype, group), "{name}: other gradients when run again");
            }
        }
    }
}

#[test]
fn ttt_linear_in_chunks_is_ttt_linear() {
    in_chunks(Inner::Linear);
}

#[test]
fn ttt_mlp_in_chunks_is_ttt_mlp() {
    in_chunks(Inner::Mlp);
}

fn in_chunks(inner: Inner) {
    let Some(gpu) = gpu() else { return };
    for ((dtype, ratio, _), pad) in [(PRECISIONS[0], 5), (PRECISIONS[1], 5), (PRECISIONS[1], 8)] {
        let case = ttt_case::Case { pad, ..ttt_case::Case::new(inner, 2, 64, 16, &[75]) };
        let whole = case.forward(gpu, dtype, None);
        let mut state = case.state(gpu, dtype);
        let (mut z, mut at) = (Vec::new(), 0);
        for len in [5, 1, 1, 9, 15, 2, 0, 31, 1, 10] {
            let segment = Segment { first_row: 0, len, slot: 0, phase: at % 16 };
            z.extend(case.forward_rows(gpu, dtype, &(at..at + len).collect::<Vec<_>>(), &[segment], &mut state));
            at += len;
        }
        ttt_case::close(&format!("{dtype:?}: z"), &z, &whole.z, ratio / 10.0);
        ttt_case::close(&format!("{dtype:?}: weights"), &state.weights().to_f64_vec(), &case.final_weights(&whole), ratio / 10.0);
    }
}

pub fn small(backbone_bits: usize) -> Config {
    small_of(Inner::Linear, backbone_bits)
}

pub fn small_of(inner: Inner, backbone_bits: usize) -> Config {
    let flag = |i: usize| backbone_bits >> i & 1 == 1;
    Config {
        vocab_size: VOCAB,
        hidden_size: 128,
        intermediate_size: 344,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        use_gate: flag(0),
        share_qk: flag(1),
        pre_conv: flag(2),
        tie_word_embeddings: flag(3),
        ..Config::preset("tiny", inner).unwrap()
    }
}

#[test]
fn whole_models() {
    let Some(gpu) = gpu() else { return };
    let linear = (0..16).map(|bits| (bits, small(bits)));
    for (bits, config) in linear.chain([0, 15].map(|bits| (bits, small_of(Inner::Mlp, bits)))) {
        let host = shaken_model(&config, &gpu.cpu_beside(), DType::F32, bits as u64);
        let ways = [Keep::Saved { group: 4 }, Keep::Start { group: 4 }, Keep::Input { group: 4 }];
        is_the_definition(&format!("configuration {bits}"), &host, &[70, 33, 5], &ways);
    }
}

/// A model of either learner with all there is.
fn whole(device: &Device, inner: Inner, seed: u64) -> Lm {
    shaken_model(&small_of(inner, 0b1111), &device.cpu_beside(), DType::F32, seed)
}

#[test]
fn reading_in_chunks_forking_and_resetting() {
    let Some(gpu) = gpu() else { return };
    for inner in [Inner::Linear, Inner::Mlp] {
        reads_in_chunks(&format!("{inner:?}"), &whole(gpu, inner, 4), &[7, 1, 1, 30, 20, 1, 30], 2e-5);
    }
}

#[test]
fn gradients_cross_cuts_and_states_go_to_files() {
    let Some(gpu) = gpu() else { return };
    for inner in [Inner::Linear, Inner::Mlp] {
        carries_and_saves(&format!("{inner:?}"), &whole(gpu, inner, 6), [32, 20]);
    }
}

#[test]
fn statistics_are_the_cpus() {
    for inner in [Inner::Linear, Inner::Mlp] {
        have_the_cpus_statistics(inner);
    }
}

fn have_the_cpus_statistics(inner: Inner) {
    let Some(gpu) = gpu() else { return };
    let host = shaken_model(&small_of(inner, 0b0111), &gpu.cpu_beside(), DType::F32, 8);
    let batch = Batch::one(&Random::new(2).tokens(70, 300));
    let want = host.inner_statistics(&batch).unwrap();
    for (dtype, ratio) in [(DType::F32, 1e-4), (DType::Bf16, 4e-2)] {
        let ours = moved(&host, gpu, dtype).inner_statistics(&batch).unwrap();
        for (ours, want) in ours.iter().zip(&want) {
            for (ours, want) in [(&ours.initial, &want.initial), (&ours.before, &want.before), (&ours.after, &want.after)] {
                assert!(relative(ours, want) < ratio, "{dtype:?}: {ours:?} and not {want:?}");
            }
            assert!(relative(&ours.target_variance, &want.target_variance) < ratio);
        }
    }
}

#[test]
fn what_a_gpu_does_not_run_is_said() {
    let Some(gpu) = gpu() else { return };
    assert!(Lm::new(&small(0), gpu, DType::F64, 0).unwrap_err().to_string().contains("f64 needs a CPU"));
    let too_much = Tensor::empty(gpu, &[1 << 40], DType::F32).unwrap_err().to_string();
    assert!(too_much.contains("out of GPU memory") && too_much.contains("free"), "{too_much}");
}
