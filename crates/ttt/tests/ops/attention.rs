//! Attention: its cases, with and without a past, with heads that share keys and values.

use ttt::batch::Segment;
use ttt::ops::attention::{self, Cache, Grads, Inputs};
use ttt::ops::rope::{self, Direction, Table};
use ttt::tensor::Tensor;

use crate::case::{Case, expect_close, fast, filled, placed, reference, tensor_of};

/// Sizes of one case.
#[derive(Clone)]
struct Sizes {
    /// Heads of queries, and of keys and values.
    heads: [usize; 2],
    /// Channels of a head.
    d: usize,
    /// Of each segment the tokens and the tokens before it.
    segments: Vec<[usize; 2]>,
}

impl Sizes {
    fn rows(&self) -> usize {
        self.segments.iter().map(|[len, _]| len).sum()
    }

    /// Rows of a slot, more than there ever are tokens.
    fn capacity(&self) -> usize {
        self.segments.iter().map(|[len, phase]| len + phase).max().unwrap() + 1
    }

    /// Packed, in slots of another order.
    fn segments(&self) -> Vec<Segment> {
        let mut first_row = 0;
        let slots = self.segments.len();
        let segment = |(i, [len, phase]): (usize, &[usize; 2])| {
            first_row += len;
            Segment { first_row: first_row - len, len: *len, slot: slots - 1 - i, phase: *phase }
        };
        self.segments.iter().enumerate().map(segment).collect()
    }

    fn cache(&self, keys: Tensor, values: Tensor) -> Cache {
        let [keys, values] = [keys, values].map(|x| x.reshape(&[self.segments.len(), self.capacity(), self.heads[1] * self.d]));
        Cache { keys, values }
    }
}

/// Outputs: o, and keys and values of every slot afterwards.
fn attention_case(heads: [usize; 2], d: usize, segments: &[[usize; 2]]) -> Case {
    let sizes = Sizes { heads, d, segments: segments.to_vec() };
    let (n, q, kv) = (sizes.rows(), heads[0] * d, heads[1] * d);
    let past = &[segments.len() * sizes.capacity(), kv];
    let again = sizes.clone();
    Case::new("attention", &[("q", &[n, q]), ("k", &[n, kv]), ("v", &[n, kv]), ("keys", past), ("values", past)])
        .forward(move |x| {
            let segments = sizes.segments();
            let mut cache = sizes.cache(tensor_of(x[3]), tensor_of(x[4]));
            // As in a model: what is appended is not read from the cache.
            cache.append(x[1], x[2], &segments);
            let inputs = Inputs { q: x[0], k: x[1], v: x[2], head_dim: d, past: Some(&cache), segments: &segments };
            let [o, _] = attention::forward(&inputs).unwrap();
            vec![o, cache.keys, cache.values]
        })
        .backward(move |x, dy| {
            let segments = again.segments();
            let cache = again.cache(tensor_of(x[3]), tensor_of(x[4]));
            let inputs = Inputs { q: x[0], k: x[1], v: x[2], head_dim: d, past: Some(&cache), segments: &segments };
            let [o, log_sum] = attention::forward(&inputs).unwrap();
            let empty = |x: ttt::device::view::View| Tensor::empty(x.device(), &x.shape(), x.dtype()).unwrap();
            let [mut dq, mut dk, mut dv] = [empty(x[0]), empty(x[1]), empty(x[2])];
            let [mut dkeys, mut dvalues] = [dy[1].copy().unwrap(), dy[2].copy().unwrap()];
            let grads = Grads { dq: dq.view_mut(), dk: dk.view_mut(), dv: dv.view_mut() };
            let dpast = Some([&mut dkeys, &mut dvalues]);
            attention::backward(&inputs, [&o, &log_sum], dy[0].view(), dpast, grads).unwrap();
            vec![dq, dk, dv, dkeys, dvalues]
        })
}

/// Sequences that all begin here.
fn fresh_case(heads: [usize; 2], d: usize, lengths: &[usize]) -> Case {
    let sizes = Sizes { heads, d, segments: lengths.iter().map(|len| [*len, 0]).collect() };
    let (n, q, kv) = (sizes.rows(), heads[0] * d, heads[1] * d);
    let (segments, again) = (sizes.segments(), sizes.segments());
    Case::new("attention without past", &[("q", &[n, q]), ("k", &[n, kv]), ("v", &[n, kv])])
        .forward(move |x| {
            let inputs = Inputs { q: x[0], k: x[1], v: x[2], head_dim: d, past: None, segments: &segments };
            let [o, _] = attention::forward(&inputs).unwrap();
            vec![o]
        })
        .backward(move |x, dy| {
            let inputs = Inputs { q: x[0], k: x[1], v: x[2], head_dim: d, past: None, segments: &again };
            let [o, log_sum] = attention::forward(&inputs).unwrap();
            let [mut dq, mut dk, mut dv] = [x[0], x[1], x[2]].map(|x| Tensor::empty(x.device(), &x.shape(), x.dtype()).unwrap());
            let grads = Grads { dq: dq.view_mut(), dk: dk.view_mut(), dv: dv.view_mut() };
            attention::backward(&inputs, [&o, &log_sum], dy[0].view(), None, grads).unwrap();
            vec![dq, dk, dv]
        })
}

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

/// Few rows and many, spans of a long past, blocks that are cut short, any head size.
fn odd_cases() -> Vec<Case> {
    vec![
        attention_case([6, 2], 64, &[[0, 5], [1, 301], [3, 0], [150, 0], [70, 131], [0, 0], [17, 129], [16, 3]]),
        attention_case([3, 3], 10, &[[65, 1], [1, 0], [1, 40], [2, 700]]),
        attention_case([2, 1], 96, &[[129, 64]]),
        attention_case([1, 1], 2, &[[1, 9000]]),
        fresh_case([5, 1], 7, &[33, 1, 0, 200]),
        fresh_case([4, 4], 48, &[64, 128]),
    ]
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

/// The halves of each head turn; other positions than those of any other row.
fn halves_case(heads: usize, head_dim: usize) -> Case {
    let segments = Sizes { heads: [heads, heads], d: head_dim, segments: vec![[3, 7], [0, 1], [61, 0], [1, 40_000]] }.segments();
    let rows = segments.iter().map(|s| s.len).sum();
    let rotate = move |x: &mut Tensor, direction| {
        let table = Table::of_batch(x.device(), x.dtype(), &segments, head_dim, 10_000.0).unwrap();
        rope::rotate(x.view_mut(), &table, &segments, heads, direction);
    };
    let back = rotate.clone();
    Case::new("rope of halves", &[("x", &[rows, heads * head_dim])])
        .forward(move |v| {
            let mut y = tensor_of(v[0]);
            rotate(&mut y, Direction::Forward);
            vec![y]
        })
        .backward(move |_, dy| {
            let mut dx = dy[0].copy().unwrap();
            back(&mut dx, Direction::Backward);
            vec![dx]
        })
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
