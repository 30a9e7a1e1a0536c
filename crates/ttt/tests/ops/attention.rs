//! Attention and the rotary positions before it.

use ttt::batch::Segment;
use ttt::ops::attention::{self, Inputs};
use ttt::ops::rope::{self, Direction, Table};

use crate::attention_cases::{attention_case, fresh_case, halves_case, odd_cases};
use crate::case::{Case, expect_close, fast, filled, placed, reference};

#[test]
fn gradients_are_those_of_finite_differences() {
    for case in [
        attention_case([2, 2], 2, &[[0, 3], [1, 2], [2, 0], [4, 3]]),
        attention_case([4, 2], 3, &[[3, 1], [2, 0]]),
        attention_case([3, 1], 2, &[[5, 2]]),
        fresh_case([2, 1], 3, &[4, 0, 1]),
    ] {
        case.check_finite_differences(false);
        case.check_finite_differences(true);
    }
}

#[test]
fn the_fast_version_is_the_reference() {
    for case in odd_cases() {
        case.check_fast(false);
        case.check_fast(true);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    odd_cases().iter().for_each(Case::check_threads);
}

/// Scores far beyond what an exponential holds, as in a trained model whose attention has settled.
#[test]
fn large_scores_do_not_overflow() {
    for device in [fast(2), reference()] {
        let (n, d) = (150, 16);
        let [q, k, v] = [1, 2, 3].map(|seed| filled(&device, &[n, d], seed));
        let large: Vec<f64> = q.to_f64_vec().iter().map(|x| 1000.0 * x).collect();
        let q = placed(&device, &[n, d], &large, q.dtype());
        let segments = [Segment { first_row: 0, len: n, slot: 0, phase: 0 }];
        let inputs = Inputs { q: q.view(), k: k.view(), v: v.view(), head_dim: d, past: None, segments: &segments };
        let [o, log_sum] = device.install(|| attention::forward(&inputs)).unwrap();
        // One key has nearly all of the weight.
        let (q, k, v) = (q.to_f64_vec(), k.to_f64_vec(), v.to_f64_vec());
        for t in 0..n {
            let score = |s: usize| (0..d).map(|c| q[t * d + c] * k[s * d + c]).sum::<f64>() / 4.0;
            let scores: Vec<f64> = (0..=t).map(score).collect();
            let top = scores.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
            let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let want: Vec<f64> = (0..d).map(|c| weights.iter().enumerate().map(|(s, w)| w / sum * v[s * d + c]).sum()).collect();
            // A score of thousands in f32 is off by some 1e-4, and so is the ratio of two weights.
            expect_close("o", &o.to_f64_vec()[t * d..(t + 1) * d], &want, 2e-3);
            let l = log_sum.to_f64_vec()[t];
            assert!((l - top - sum.ln()).abs() < 1e-6 * top.abs().max(1.0) + 1e-3, "L of row {t}: {l}");
        }
    }
}

#[test]
fn halves_turn_by_the_position() {
    halves_case(2, 4).check_finite_differences(false);
    for case in [halves_case(3, 64), halves_case(2, 10)] {
        case.check_fast(false);
        case.check_threads();
    }
    // Row 2 of a sequence that has read 5 tokens: channel i and i + d/2 turn by 7 θ^(-2i/d).
    let device = reference();
    let segments = [Segment { first_row: 0, len: 3, slot: 0, phase: 5 }];
    let mut x = placed(&device, &[3, 4], &[1.0, 2.0, 3.0, 4.0].repeat(3), ttt::tensor::DType::F64);
    let table = Table::of_batch(&device, x.dtype(), &segments, 4, 100.0).unwrap();
    rope::rotate(x.view_mut(), &table, &segments, 1, Direction::Forward);
    let (a, b) = (7f64, 0.7f64);
    let want = [a.cos() - 3.0 * a.sin(), 2.0 * b.cos() - 4.0 * b.sin(), 3.0 * a.cos() + a.sin(), 4.0 * b.cos() + 2.0 * b.sin()];
    expect_close("row 2", &x.to_f64_vec()[8..], &want, 1e-14);
    // Some rows of a table are those rows' positions.
    let mut alone = placed(&device, &[1, 4], &[1.0, 2.0, 3.0, 4.0], ttt::tensor::DType::F64);
    let own = [Segment { first_row: 0, len: 1, slot: 0, phase: 7 }];
    rope::rotate(alone.view_mut(), &table.gather(&[2]).unwrap(), &own, 1, Direction::Forward);
    assert_eq!(alone.to_f64_vec(), x.to_f64_vec()[8..]);
}
