//! Every operation: gradients against finite differences in f64; the fast f32 version against the f64 reference in outputs and
//! every gradient, at odd sizes; the same bits on one thread and on two.

mod attention;
mod attention_cases;
#[allow(dead_code)] // what only the test of GPUs calls
mod case;
mod cases;
mod scan;

use case::{Case, filled};
use cases::*;
use ttt::batch::Segment;
use ttt::ops::rope::{Direction, Table};
use ttt::ops::*;
use ttt::tensor::Tensor;

fn small_cases() -> Vec<Case> {
    vec![
        linear_case(3, 5, 4),
        embedding_case(6, 4, 3),
        rms_norm_case(3, 7),
        layer_norm_case(3, 7),
        conv_case(3, 4),
        conv_case(2, 1),
        conv_case(2, 2),
        conv_case_without_window(3, 4),
        rope_case(2, 6),
        gelu_gate_case(3, 5),
        swiglu_case(3, 5),
        silu_case(3, 5),
        silu_gate_case(3, 5),
        scan_case(&[0, 2, 67, 0, 3], 3, 2),
        scan_case_without_states(2, 3),
        inner_lr_case(4, 5, 3, 0.25),
        inner_lr_case(2, 3, 2, 0.0),
        token_scale_case(9),
        add_case(2, 3),
        cross_entropy_case(4, 3, 6),
    ]
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for case in small_cases() {
        case.check_finite_differences(false);
        case.check_finite_differences(true);
    }
}

#[test]
fn fast_versions_are_the_reference() {
    for case in odd_cases() {
        case.check_fast(false);
        case.check_fast(true);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for case in odd_cases() {
        case.check_threads();
    }
}

#[test]
fn a_row_is_the_same_alone_and_among_others() {
    let device = case::fast(2);
    let (x, w) = (filled(&device, &[64, 259], 1), filled(&device, &[1030, 259], 2));
    let all = linear::forward(x.view(), w.view()).unwrap();
    for rows in [0..1, 1..3, 3..6, 6..10, 10..17, 17..64] {
        let some = linear::forward(x.view().row_range(rows.clone()), w.view()).unwrap();
        assert_eq!(some.as_slice::<f32>(), &all.as_slice::<f32>()[rows.start * 1030..rows.end * 1030], "rows {rows:?}");
    }
}

#[test]
fn a_convolution_in_chunks_is_the_convolution() {
    let device = case::fast(2);
    let (n, channels, taps) = (40, 19, 4);
    let x = filled(&device, &[n, channels], 1);
    let (w, bias) = (filled(&device, &[channels, taps], 2), filled(&device, &[1, channels], 3));
    let whole = [Segment { first_row: 0, len: n, slot: 0, phase: 0 }];
    let mut window = filled(&device, &[2, taps - 1, channels], 4);
    let start = window.copy().unwrap();
    let expected = conv::forward(x.view(), w.view(), bias.view(), &whole, Some(&start)).unwrap();
    let mut at = 0;
    for len in [1, 0, 2, 1, 15, 3, 17, 1] {
        let chunk = [Segment { first_row: 0, len, slot: 0, phase: at % 16 }];
        let rows = x.view().row_range(at..at + len);
        let y = conv::forward(rows, w.view(), bias.view(), &chunk, Some(&window)).unwrap();
        conv::advance(rows, &chunk, &mut window);
        assert_eq!(y.as_slice::<f32>(), &expected.as_slice::<f32>()[at * channels..(at + len) * channels], "rows from {at}");
        at += len;
    }
    assert_eq!(at, n);
    let last = &x.as_slice::<f32>()[(n - 3) * channels..];
    assert_eq!(&window.as_slice::<f32>()[..3 * channels], last);
    assert_eq!(&window.as_slice::<f32>()[3 * channels..], &start.as_slice::<f32>()[3 * channels..], "the other slot");
}

#[test]
fn cross_entropy_skips_rows_of_weight_zero() {
    let device = case::fast(2);
    // More rows than fit one chunk of logits.
    let (n, d, v) = (350, 11, 37_000);
    let (hidden, w) = (filled(&device, &[n, d], 1), filled(&device, &[v, d], 2));
    let mut targets: Vec<u32> = (0..n).map(|i| (i * 7919 % v) as u32).collect();
    let mut weights: Vec<f64> = (0..n).map(|i| 0.5 + 0.01 * i as f64).collect();
    for i in (0..n).step_by(3) {
        (targets[i], weights[i]) = (u32::MAX, 0.0);
    }
    let mut dw = Tensor::zeros(&device, &[v, d], ttt::tensor::DType::F32).unwrap();
    let run = || cross_entropy::forward_backward(hidden.view(), w.view(), &targets, &weights, dw.view_mut()).unwrap();
    let (nll, dhidden) = device.install(run);

    // The naive way, with all logits, in f64.
    let (h, m) = (hidden.to_f64_vec(), w.to_f64_vec());
    let (mut want_dhidden, mut want_dw) = (vec![0.0; n * d], vec![0.0; v * d]);
    for i in 0..n {
        if weights[i] == 0.0 {
            assert_eq!(nll[i], 0.0);
            continue;
        }
        let logits: Vec<f64> = (0..v).map(|j| (0..d).map(|c| h[i * d + c] * m[j * d + c]).sum()).collect();
        let sum: f64 = logits.iter().map(|x| x.exp()).sum();
        let want = sum.ln() - logits[targets[i] as usize];
        assert!((nll[i] - want).abs() < 1e-5 * want.abs().max(1.0), "row {i}: {} and not {want}", nll[i]);
        for j in 0..v {
            let hit = if j == targets[i] as usize { 1.0 } else { 0.0 };
            let dlogit = weights[i] * (logits[j].exp() / sum - hit);
            for c in 0..d {
                want_dhidden[i * d + c] += dlogit * m[j * d + c];
                want_dw[j * d + c] += dlogit * h[i * d + c];
            }
        }
    }
    case::expect_close("dhidden", &dhidden.to_f64_vec(), &want_dhidden, 1e-5);
    case::expect_close("dw", &dw.to_f64_vec(), &want_dw, 1e-5);
    assert_eq!(nll, {
        let all = cross_entropy::forward(hidden.view(), w.view(), &targets.iter().map(|&t| t.min(1)).collect::<Vec<_>>()).unwrap();
        (0..n).map(|i| if weights[i] == 0.0 || targets[i] > 1 { nll[i] } else { all[i] }).collect::<Vec<_>>()
    });
}

#[test]
fn adamw_by_hand() {
    let settings = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    for device in [case::reference(), case::fast(2)] {
        for n in [1, 5, 40_001] {
            let one = |x: f32| Tensor::from_slice(&device, &[n], &vec![x; n]).unwrap();
            let (mut p, g, mut m, mut v) = (one(2.0), one(-8.0), one(0.0), one(0.0));
            // The first step moves by lr · sign(g), whatever the size of g, and by the decay.
            adamw::step(&mut p, &g, &mut m, &mut v, 0, 0.01, 0.5, &settings);
            for (name, tensor, want) in [("m", &m, 0.1 * -4.0), ("v", &v, 0.05 * 16.0), ("p", &p, 2.0 + 0.01 - 0.01 * 0.1 * 2.0)] {
                case::expect_close(name, &tensor.to_f64_vec(), &vec![want; n], 1e-6);
            }
            // The second, with another gradient.
            let g = one(1.0);
            adamw::step(&mut p, &g, &mut m, &mut v, 1, 0.02, 1.0, &settings);
            let (m1, v1, p1) = (0.9 * -0.4 + 0.1, 0.95 * 0.8 + 0.05, 2.008);
            let move_by = (m1 / (1.0 - 0.81)) / (f64::sqrt(v1 / (1.0 - 0.9025)) + 1e-8) + 0.1 * p1;
            for (name, tensor, want) in [("m", &m, m1), ("v", &v, v1), ("p", &p, p1 - 0.02 * move_by)] {
                case::expect_close(name, &tensor.to_f64_vec(), &vec![want; n], 1e-6);
            }
        }
    }
}

#[test]
fn the_gradient_norm_is_the_same_on_any_number_of_threads() {
    let sums: Vec<f64> = [1, 2, 3]
        .map(|threads| {
            let device = case::fast(threads);
            let x = filled(&device, &[100_003], 5);
            device.install(|| grad_norm::sum_of_squares(&x))
        })
        .to_vec();
    assert!(sums[0] == sums[1] && sums[0] == sums[2], "{sums:?}");
    let x = filled(&case::reference(), &[100_003], 5);
    let exact = x.to_f64_vec().iter().map(|x| x * x).sum::<f64>();
    assert!((sums[0] - exact).abs() < 1e-12 * exact, "{} and not {exact}", sums[0]);
}

#[test]
fn the_first_bad_element_is_found() {
    for device in [case::reference(), case::fast(2)] {
        let mut x = filled(&device, &[300, 211], 6);
        assert_eq!(grad_norm::first_non_finite(x.view()), None);
        for (bad, value) in [(60_001, f32::NAN), (60_000, f32::INFINITY), (50_123, f32::NEG_INFINITY)] {
            x.as_mut_slice::<f32>()[bad] = value;
            assert_eq!(device.install(|| grad_norm::first_non_finite(x.view())), Some(bad));
        }
        // Only what the view shows counts: element 50123 is in column 116, 60000 in column 76.
        assert_eq!(grad_norm::first_non_finite(x.view().col_range(0..77)), Some(60_000 / 211 * 77 + 76));
        assert_eq!(grad_norm::first_non_finite(x.view().col_range(0..20)), None);
    }
}

#[test]
#[should_panic(expected = "`w` is [4, 6] and should be [4, 5]")]
fn a_wrong_shape_panics_with_both_shapes() {
    let device = case::reference();
    let (x, w) = (filled(&device, &[3, 5], 1), filled(&device, &[4, 6], 2));
    linear::forward(x.view(), w.view()).unwrap();
}

#[test]
#[should_panic(expected = "a segment starts at row 3 and should start at row 2")]
fn a_hole_between_segments_panics() {
    let device = case::reference();
    let mut x = filled(&device, &[5, 4], 1);
    let table = Table::new(&device, x.dtype(), 16, 4, 10_000.0).unwrap();
    let holes = [Segment { first_row: 0, len: 2, slot: 0, phase: 0 }, Segment { first_row: 3, len: 2, slot: 1, phase: 0 }];
    rope::rotate(x.view_mut(), &table, &holes, 1, Direction::Forward);
}
