//! TTT-Linear and TTT-MLP: every gradient against finite differences, an outside program and the other implementation; every
//! form, cut and packing against every other.

mod ttt_case;

use proptest::prelude::*;
use ttt::batch::Segment;
use ttt::config::Inner;
use ttt::device::{Device, Kernels};
use ttt::ops::inner::Variant;
use ttt::tensor::DType;
use ttt_case::{Case, Grads, close, distance, largest, variants};

const BOTH: [Inner; 2] = [Inner::Linear, Inner::Mlp];

/// Both learners with and without LayerNorm and residual.
fn models() -> impl Iterator<Item = (Inner, Variant)> {
    BOTH.into_iter().flat_map(|inner| variants().map(move |variant| (inner, variant)))
}

fn reference() -> Device {
    Device::cpu_with(2, Kernels::Reference).unwrap()
}

fn fast() -> Device {
    Device::cpu_with(2, Kernels::Fast).unwrap()
}

/// L = <z, dz> + <final weights, dw_final>.
fn objective(case: &Case, device: &Device) -> f64 {
    let run = case.forward(device, DType::F64, None);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(&run.z, &case.dz) + dot(&case.final_weights(&run), &case.dw)
}

fn derivative(case: &Case, device: &Device, name: &str, direction: &[f64]) -> f64 {
    let h = 3e-4;
    let at = |step: f64| {
        let mut moved = case.clone();
        for (x, d) in moved.field_mut(name).iter_mut().zip(direction) {
            *x += step * d;
        }
        objective(&moved, device)
    };
    // Central differences of order 6.
    let d = |k: f64| at(k * h) - at(-k * h);
    (45.0 * d(1.0) - 9.0 * d(2.0) + d(3.0)) / (60.0 * h)
}

#[test]
fn every_gradient_entry_is_the_finite_difference() {
    let device = reference();
    // (A head of width 2 is no use here: its LayerNorm gives only signs.)
    for (inner, variant) in models() {
        for (k, lens, d) in [(3, &[4, 2][..], 4), (2, &[5], 4), (1, &[3], 6)] {
            let case = Case::new(inner, 2, d, k, lens).with(variant);
            let grads = case.backward(&device, DType::F64, 2);
            for (name, grad) in grads.named() {
                let (scale, label) = (largest(grad), format!("{inner:?} {variant:?} K={k} d={d}: d{name}"));
                let unused = !variant.layer_norm && ["gamma", "beta"].contains(&name);
                assert_eq!(scale == 0.0, unused, "{label} is at most {scale}");
                for i in 0..grad.len() {
                    let mut direction = vec![0.0; grad.len()];
                    direction[i] = 1.0;
                    let expected = derivative(&case, &device, name, &direction);
                    let error = (grad[i] - expected).abs();
                    assert!(error <= 1e-6 * scale, "{label}[{i}] = {} but {expected} by differences", grad[i]);
                }
            }
        }
    }
}

/// The references with a GPU's roundings are near the definition and not it, and the same however a text is cut.
#[test]
fn rounded_references_are_near_the_definition() {
    let rounded = Device::cpu_with(2, Kernels::Rounded).unwrap();
    for inner in BOTH {
        let case = Case::new(inner, 2, 16, 4, &[23, 8]).in_mixed_precision();
        let [exact, ours] = [&reference(), &rounded].map(|device| case.forward(device, DType::F64, None));
        let [exact_grads, grads] = [&reference(), &rounded].map(|device| case.backward(device, DType::F64, 2));
        let mut errors = vec![("z", distance(&ours.z, &exact.z))];
        errors.push(("weights", distance(&case.final_weights(&ours), &case.final_weights(&exact))));
        errors.extend(grads.named().into_iter().zip(exact_grads.named()).map(|((what, a), (_, b))| (what, distance(a, b))));
        for (what, error) in errors {
            assert!((1e-4..3e-2).contains(&error), "{inner:?}: {what} {error:.1e}");
        }
        assert_eq!(grads, case.backward(&rounded, DType::F64, 3), "{inner:?}: other checkpoints");
        let mut state = case.state(&rounded, DType::F64);
        let (mut z, mut at) = (Vec::new(), 0);
        for len in [1, 2, 7, 0, 13] {
            let segment = Segment { first_row: 0, len, slot: 0, phase: at % 4 };
            let rows: Vec<usize> = (at..at + len).collect();
            z.extend(case.forward_rows(&rounded, DType::F64, &rows, &[segment], &mut state));
            at += len;
        }
        assert!(distance(&z, &ours.z[..z.len()]) < 1e-9, "{inner:?}: in chunks");
    }
}

#[test]
fn gradients_in_random_directions_are_finite_differences() {
    let device = reference();
    for (inner, variant) in models() {
        let case = Case::new(inner, 2, 6, 5, &[13, 4, 10]).with(variant);
        let grads = case.backward(&device, DType::F64, 2);
        for (name, grad) in grads.named() {
            for seed in 0..8 {
                let direction = ttt_case::noise(100 + seed, grad.len(), 0.3);
                let expected = derivative(&case, &device, name, &direction);
                let got: f64 = grad.iter().zip(&direction).map(|(g, d)| g * d).sum();
                let scale = grad.iter().zip(&direction).map(|(g, d)| (g * d).abs()).sum::<f64>();
                let label = format!("{inner:?} {variant:?}: d{name} in direction {seed}");
                assert!((got - expected).abs() <= 1e-6 * scale, "{label}: {got}, not {expected}");
            }
        }
    }
}

#[test]
fn the_primal_form_gives_the_same_outputs_and_weights() {
    for (inner, variant) in models() {
        for (k, len, d) in [(1, 5, 4), (4, 15, 6), (16, 33, 8), (7, 7, 2)] {
            let case = Case::new(inner, 2, d, k, &[len, 3]).with(variant);
            let run = case.forward(&reference(), DType::F64, None);
            let (z, w) = case.primal();
            close("z", &run.z, &z, 1e-11);
            close("w", &case.final_weights(&run), &w, 1e-11);
        }
    }
}

#[test]
fn a_mini_batch_longer_than_the_sequence_is_one_descent_from_the_initial_weights() {
    for inner in BOTH {
        // With K >= t every gradient is taken at W0: each output depends on the others only through the sum of gradients, so the
        // first 5 tokens of a long mini-batch are those of a short one, and the weights do not move before it is complete.
        let long = Case::new(inner, 1, 4, 9, &[5]);
        let mut short = long.clone();
        short.k = 5;
        short.tok.truncate(5);
        let (a, b) = (long.forward(&reference(), DType::F64, None), short.forward(&reference(), DType::F64, None));
        close("z", &a.z, &b.z, 1e-14);
        assert_eq!(long.final_weights(&a), long.w0);
        // ... and when it is complete they move by the sum of all K gradients at W0, which does not depend on the order.
        let mut reversed = short.clone();
        for (x, width) in [(&mut reversed.q, 4), (&mut reversed.k_rows, 4), (&mut reversed.v, 4), (&mut reversed.lr, 1)] {
            *x = x.chunks(width).rev().flatten().copied().collect();
        }
        let c = reversed.forward(&reference(), DType::F64, None);
        close("w", &reversed.final_weights(&c), &short.final_weights(&b), 1e-13);
        assert!(largest(&short.final_weights(&b).iter().zip(&short.w0).map(|(a, b)| a - b).collect::<Vec<_>>()) > 1e-3);
    }
}

/// (outputs, final weights) when the sequences are cut into chunks and the chunks packed into common calls.
fn in_chunks(case: &Case, device: &Device, dtype: DType, cuts: &[usize]) -> (Vec<f64>, Vec<f64>) {
    let mut state = case.state(device, dtype);
    let starts: Vec<usize> = case.starts();
    let mut done = vec![0; case.lens.len()];
    let mut z = vec![f64::NAN; case.q.len()];
    let mut cut = 0;
    while done.iter().zip(&case.lens).any(|(a, b)| a < b) {
        let (mut rows, mut segments) = (vec![], vec![]);
        // Sequences in changing order, some of them with no token in this call.
        for s in (0..case.lens.len()).map(|s| (s + cut) % case.lens.len()) {
            let len = cuts[(cut + s) % cuts.len()].min(case.lens[s] - done[s]);
            segments.push(Segment { first_row: rows.len(), len, slot: s, phase: done[s] % case.k });
            rows.extend(starts[s] + done[s]..starts[s] + done[s] + len);
            done[s] += len;
        }
        let part = case.forward_rows(device, dtype, &rows, &segments, &mut state);
        let width = case.heads * case.d;
        for (i, row) in rows.iter().enumerate() {
            z[row * width..][..width].copy_from_slice(&part[i * width..][..width]);
        }
        cut += 1;
    }
    (z, state.weights().to_f64_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn chunks_and_packing_change_nothing(
        mlp: bool,
        k in 1usize..=20,
        lens in prop::collection::vec(0usize..50, 1..4),
        cuts in prop::collection::vec(0usize..24, 1..5),
        wide: bool,
        variant in prop::sample::select(variants().collect::<Vec<_>>()),
    ) {
        prop_assume!(cuts.iter().any(|c| *c > 0) && lens.iter().any(|l| *l > 0));
        let cuts: Vec<usize> = cuts.into_iter().chain([1]).collect();
        let inner = BOTH[mlp as usize];
        let case = Case::new(inner, 2, if wide { 16 } else { 6 }, k, &lens).with(variant);
        for (device, dtype, bound) in [(reference(), DType::F64, 1e-10), (fast(), DType::F32, 2e-5)] {
            let run = case.forward(&device, dtype, None);
            let (z, w) = in_chunks(&case, &device, dtype, &cuts);
            close("z", &z, &run.z, bound);
            close("w", &w, &case.final_weights(&run), bound);
        }
    }
}

#[test]
fn outputs_of_a_prefix_are_the_prefix_of_the_outputs() {
    for inner in BOTH {
        let case = Case::new(inner, 2, 16, 16, &[40]);
        for (device, dtype, bound) in [(reference(), DType::F64, 1e-14), (fast(), DType::F32, 2e-6)] {
            let whole = case.forward(&device, dtype, None);
            for len in [0, 1, 15, 16, 17, 31, 39] {
                let mut state = case.state(&device, dtype);
                let segment = Segment { first_row: 0, len, slot: 0, phase: 0 };
                let z = case.forward_rows(&device, dtype, &(0..len).collect::<Vec<_>>(), &[segment], &mut state);
                close("z", &z, &whole.z[..z.len()], bound);
            }
        }
    }
}

#[test]
fn every_checkpoint_distance_gives_the_same_gradients_bit_for_bit() {
    for inner in BOTH {
        for (k, d) in [(4, 6), (16, 16), (5, 32)] {
            let case = Case::new(inner, 2, d, k, &[6 * k + 3, 2, 4 * k]);
            for (device, dtype) in [(reference(), DType::F64), (reference(), DType::F32), (fast(), DType::F32)] {
                let one = case.backward(&device, dtype, 1);
                for group in [2, 3, 5, 7, 100] {
                    assert!(case.backward(&device, dtype, group) == one, "{inner:?} {dtype:?} K={k} d={d} g={group}");
                }
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for inner in BOTH {
        let case = Case::new(inner, 3, 16, 8, &[37, 5, 16]);
        let runs = [1, 3].map(|threads| {
            let device = Device::cpu_with(threads, Kernels::Fast).unwrap();
            device.install(|| (case.forward(&device, DType::F32, None).z, case.backward(&device, DType::F32, 2)))
        });
        assert!(runs[0] == runs[1]);
    }
}

#[test]
fn kept_bytes_are_the_checkpoints() {
    for inner in BOTH {
        let (heads, d, k, lens) = (2, 16, 4, [17, 0, 3, 32]);
        let case = Case::new(inner, heads, d, k, &lens);
        let state_len = match inner {
            Inner::Linear => d * d + d,
            Inner::Mlp => 8 * d * d + 5 * d,
        };
        for group in [1, 2, 3, 8, 9] {
            let saved = case.forward(&fast(), DType::F32, Some(group)).saved.unwrap();
            let expected: usize = lens.iter().map(|len| 4 * heads * len.div_ceil(k).div_ceil(group) * state_len).sum();
            assert_eq!((saved.bytes(), saved.group()), (expected, group));
        }
    }
}

#[test]
fn the_fast_code_agrees_with_the_reference() {
    for inner in BOTH {
        let shapes = [
            (16, 16, &[1][..]),
            (16, 1, &[5]),
            (16, 3, &[7, 4]),
            (48, 8, &[63]),
            (64, 16, &[15]),
            (64, 16, &[48, 17]),
            (64, 64, &[130]),
            (96, 16, &[33]),
            (80, 24, &[63]),
            (128, 17, &[40]),
            (32, 40, &[85]),
        ];
        for (d, k, lens) in shapes {
            let case = Case::new(inner, 2, d, k, lens);
            let label = format!("{inner:?} d={d} K={k} {lens:?}");
            let (a, b) = (case.forward(&fast(), DType::F32, None), case.forward(&reference(), DType::F64, None));
            close(&format!("{label}: z"), &a.z, &b.z, 1e-5);
            close(&format!("{label}: w"), &case.final_weights(&a), &case.final_weights(&b), 1e-5);
            let (a, b) = (case.backward(&fast(), DType::F32, 2), case.backward(&reference(), DType::F64, 2));
            let c = case.backward(&reference(), DType::F32, 2);
            for (((name, a), (_, b)), (_, c)) in a.named().into_iter().zip(b.named()).zip(c.named()) {
                close(&format!("{label}: d{name}"), a, b, 4e-5);
                close(&format!("{label}: d{name} of the f32 reference"), c, b, 4e-5);
            }
        }
    }
}

#[test]
fn where_the_fast_code_ends_the_reference_goes_on() {
    for inner in BOTH {
        // The fast code covers the first of these alone.
        let covered = Case::new(inner, 2, 16, 4, &[7]);
        let same = |case: &Case| case.backward(&fast(), DType::F32, 2) == case.backward(&reference(), DType::F32, 2);
        assert!(!same(&covered), "{inner:?}: no fast code");
        for variant in variants().skip(1) {
            assert!(same(&covered.clone().with(variant)), "{inner:?} {variant:?}");
        }
        for (d, k) in [(24, 4), (144, 4), (16, 65)] {
            assert!(same(&Case::new(inner, 1, d, k, &[5])), "{inner:?} d={d} K={k}");
        }
    }
}

#[test]
fn the_references_agree_with_an_outside_program() {
    let mut seen = 0;
    for case in ttt_case::oracle() {
        for (device, dtype, bound) in [(reference(), DType::F64, 2e-6), (fast(), DType::F32, 4e-5)] {
            let label = format!("{} {dtype:?}", case.name);
            let run = case.case.forward(&device, dtype, None);
            close(&format!("{label}: z"), &run.z, &case.z, bound);
            close(&format!("{label}: w"), &case.case.final_weights(&run), &case.w, bound);
            let grads: Grads = case.case.backward(&device, dtype, 3);
            for ((name, got), (_, expected)) in grads.named().into_iter().zip(case.grads.named()) {
                close(&format!("{label}: d{name}"), got, expected, bound);
            }
        }
        seen += 1;
    }
    assert!(seen >= 8, "{seen} cases");
}

#[test]
fn statistics_are_the_squared_errors_along_the_sequence() {
    for (inner, variant) in models() {
        let case = Case::new(inner, 2, 8, 4, &[13, 8]).with(variant);
        let expected = case.expected_statistics();
        for (device, dtype, bound) in [(reference(), DType::F64, 1e-12), (fast(), DType::F32, 1e-5)] {
            let run = case.forward(&device, dtype, Some(1));
            let got = case.statistics(&device, dtype, &run);
            assert_eq!(got.len(), 3);
            close("statistics", got.as_flattened(), expected.as_flattened(), bound);
        }
        // The inner model fits its last token better after the gradient step than before it.
        assert!(expected.iter().all(|[_, before, after]| after < before));
    }
}

#[test]
fn a_started_slot_holds_the_official_parameters() {
    for inner in BOTH {
        ttt_case::check_start(inner);
    }
}

#[test]
#[should_panic(expected = "name the same slot")]
fn two_segments_of_one_slot_are_refused() {
    let case = Case::new(Inner::Linear, 1, 4, 4, &[2, 2]);
    let device = reference();
    let segment = Segment { first_row: 0, len: 2, slot: 0, phase: 0 };
    let segments = [segment, Segment { first_row: 2, ..segment }];
    case.forward_rows(&device, DType::F64, &[0, 1, 2, 3], &segments, &mut case.state(&device, DType::F64));
}

#[test]
#[should_panic(expected = "starts inside a mini-batch")]
fn a_backward_from_inside_a_mini_batch_is_refused() {
    let mut case = Case::new(Inner::Linear, 1, 4, 4, &[6]);
    case.phase = 1;
    case.backward(&reference(), DType::F64, 1);
}
