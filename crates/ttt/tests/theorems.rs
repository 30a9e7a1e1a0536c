//! What TTT is equal to (paper 2.6, Theorems 1 and 2): the operation in f64 against plain loops of the other model.
//!
//! The inner model is affine, `Z = k W + b`. The paper has no b; here it is as if k and q had one more feature that is always 1, so
//! q·k reads `q·k + 1`. The first test of Theorem 1 says so, the second takes the 1 away by construction.

mod ttt_case;

use ttt::batch::Segment;
use ttt::config::Inner;
use ttt::device::{Device, Kernels};
use ttt::ops::attention::Inputs;
use ttt::ops::inner::Variant;
use ttt::tensor::{DType, Tensor};
use ttt_case::{Case, Run, close, largest, noise, variants};

/// The inner model alone: `f(x) = x W + b`, which learns v.
const BARE: Variant = Variant { layer_norm: false, residual: false };

fn device() -> Device {
    Device::cpu_with(1, Kernels::Reference).unwrap()
}

fn run(case: &Case) -> Run {
    case.forward(&device(), DType::F64, None)
}

/// One head and sequence of t tokens in mini-batches of K.
fn case(inner: Inner, variant: Variant, d: usize, k: usize, t: usize) -> Case {
    Case::new(inner, 1, d, k, &[t]).with(variant)
}

/// [`case`] from W0 = 0, b0 = 0 with learning rate 1 for all pairs of tokens.
fn from_zero(d: usize, k: usize, t: usize) -> Case {
    let mut case = case(Inner::Linear, BARE, d, k, t);
    for (x, value) in [(&mut case.w0, 0.0), (&mut case.lr, 1.0), (&mut case.tok, 1.0)] {
        x.fill(value);
    }
    case
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn axpy(y: &mut [f64], a: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// x W + b for W `[inputs, outputs]`.
fn affine(x: &[f64], w: &[f64], b: &[f64]) -> Vec<f64> {
    let mut y = b.to_vec();
    for (x, w) in x.iter().zip(w.chunks_exact(b.len())) {
        axpy(&mut y, *x, w);
    }
    y
}

/// The rows of a matrix of width d.
fn rows(x: &[f64], d: usize) -> Vec<&[f64]> {
    x.chunks_exact(d).collect()
}

/// The rows with the feature that is always 1.
fn with_one(x: &[f64], d: usize) -> Vec<Vec<f64>> {
    x.chunks_exact(d).map(|row| row.iter().copied().chain([1.0]).collect()).collect()
}

/// Causal linear attention, no normaliser, feature map or scale: z_t = Σ_{s<=t} (q_t · k_s) v_s.
fn linear_attention<R: AsRef<[f64]>>(q: &[R], k: &[R], v: &[&[f64]]) -> Vec<f64> {
    let mut z = vec![];
    for (t, q) in q.iter().enumerate() {
        let mut sum = vec![0.0; v[0].len()];
        for s in 0..=t {
            axpy(&mut sum, dot(q.as_ref(), k[s].as_ref()), v[s]);
        }
        z.extend(sum);
    }
    z
}

#[test]
fn theorem_1_batch_descent_from_zero_is_linear_attention() {
    for (d, k, t) in [(8, 16, 16), (8, 40, 23), (5, 7, 7), (1, 1, 1)] {
        let case = from_zero(d, k, t);
        let (q, keys, v) = (with_one(&case.q, d), with_one(&case.k_rows, d), rows(&case.v, d));
        let run = run(&case);
        close("z", &run.z, &linear_attention(&q, &keys, &v), 1e-12);

        // The fast weights are attention's state, Σ kᵀ v, once their mini-batch is complete.
        let mut state = vec![0.0; (d + 1) * d];
        if t == k {
            for (k, v) in keys.iter().zip(&v) {
                state.chunks_exact_mut(d).zip(k).for_each(|(row, k)| axpy(row, *k, v));
            }
        }
        close("w", &case.final_weights(&run), &state, 1e-12);
    }
}

#[test]
fn theorem_1_without_the_constant_feature() {
    // Before each (k, v) the inner model reads (-k, -v). Together they move b by v - v = 0 and W by 2 kᵀ v, so with the paper's
    // step of ½ what is left is Σ (q · k) v.
    for (d, t) in [(8, 16), (5, 9)] {
        let plain = from_zero(d, t, t);
        let mut pairs = from_zero(d, 2 * t, 2 * t);
        pairs.lr.fill(0.5);
        for (pairs, plain, sign) in
            [(&mut pairs.q, &plain.q, 1.0), (&mut pairs.k_rows, &plain.k_rows, -1.0), (&mut pairs.v, &plain.v, -1.0)]
        {
            *pairs = plain
                .chunks_exact(d)
                .flat_map(|x| x.iter().map(|x| sign * x).chain(x.iter().copied()).collect::<Vec<_>>())
                .collect();
        }
        let run = run(&pairs);
        let z: Vec<f64> = run.z.chunks_exact(2 * d).flat_map(|pair| pair[d..].to_vec()).collect();
        close("z", &z, &linear_attention(&rows(&plain.q, d), &rows(&plain.k_rows, d), &rows(&plain.v, d)), 1e-12);
        assert_eq!(largest(&pairs.final_weights(&run)[d * d..]), 0.0, "b has moved");
    }
}

#[test]
fn theorem_1_holds_for_the_gradients_too() {
    let (d, t) = (6, 11);
    let mut case = from_zero(d, 20, t);
    case.dw.fill(0.0);
    let grads = case.backward(&device(), DType::F64, 1);
    let [q, k, v, dz] = [&case.q, &case.k_rows, &case.v, &case.dz].map(|x| rows(x, d));
    let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![0.0; t * d]);
    for t in 0..t {
        for s in 0..=t {
            axpy(&mut dq[t * d..][..d], dot(dz[t], v[s]), k[s]);
            axpy(&mut dk[s * d..][..d], dot(dz[t], v[s]), q[t]);
            axpy(&mut dv[s * d..][..d], dot(q[t], k[s]) + 1.0, dz[t]);
        }
    }
    close("dq", &grads.q, &dq, 1e-12);
    close("dk", &grads.k, &dk, 1e-12);
    close("dv", &grads.v, &dv, 1e-12);
}

/// DeltaNet: S_t = S_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ, o_t = S_t q_t, for S `[d, e]` and keys of e features. Moves S on.
fn delta_net(s: &mut [Vec<f64>], [q, k]: [&[Vec<f64>]; 2], v: &[&[f64]], rates: &[f64]) -> Vec<f64> {
    let mut outputs = vec![];
    for t in 0..v.len() {
        let (k, e) = (&k[t], k[t].len());
        for (row, v) in s.iter_mut().zip(v[t]) {
            let old = row.clone();
            for j in 0..e {
                let column = (0..e).map(|i| old[i] * (f64::from(i == j) - rates[t] * k[i] * k[j]));
                row[j] = column.sum::<f64>() + rates[t] * v * k[j];
            }
            outputs.push(dot(row, &q[t]));
        }
    }
    outputs
}

#[test]
fn delta_net_is_a_mini_batch_of_one_token() {
    for (d, t) in [(8, 30), (5, 12)] {
        let case = case(Inner::Linear, BARE, d, 1, t);
        let (q, k, v) = (with_one(&case.q, d), with_one(&case.k_rows, d), rows(&case.v, d));
        let rates: Vec<f64> = case.lr.iter().map(|lr| lr * case.tok[0]).collect();
        // `[W | b]` is S transposed.
        let mut s: Vec<Vec<f64>> = (0..d).map(|i| case.w0.iter().skip(i).step_by(d).copied().collect()).collect();
        let outputs = delta_net(&mut s, [&q, &k], &v, &rates);
        let run = run(&case);
        close("z", &run.z, &outputs, 1e-12);
        let end: Vec<f64> = (0..=d).flat_map(|j| s.iter().map(move |row| row[j])).collect();
        close("w", &case.final_weights(&run), &end, 1e-12);
    }
}

#[test]
fn linear_attention_is_not_delta_net() {
    // The same tokens from the same weights: the size of the mini-batch is all that makes one or the other.
    let (d, t) = (8, 16);
    let (batch, online) = (run(&from_zero(d, t, t)).z, run(&from_zero(d, 1, t)).z);
    close("the first token", &batch[..d], &online[..d], 1e-14);
    assert!(largest(&batch[d..].iter().zip(&online[d..]).map(|(a, b)| a - b).collect::<Vec<_>>()) > 0.1);
}

/// f(x) under the weights w, written out.
fn model(case: &Case, w: &[f64], x: &[f64]) -> Vec<f64> {
    let d = case.d;
    let mut y = match case.inner {
        Inner::Linear => affine(x, &w[..d * d], &w[d * d..]),
        Inner::Mlp => {
            let (first, second) = w.split_at(4 * d * d + 4 * d);
            let hidden = affine(x, &first[..4 * d * d], &first[4 * d * d..]);
            let gelu = |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            let hidden: Vec<f64> = hidden.into_iter().map(gelu).collect();
            affine(&hidden, &second[..4 * d * d], &second[4 * d * d..])
        }
    };
    if case.variant.layer_norm {
        let mean = y.iter().sum::<f64>() / d as f64;
        let variance = y.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / d as f64;
        for (c, y) in y.iter_mut().enumerate() {
            *y = case.gamma[c] * (*y - mean) / (variance + 1e-6).sqrt() + case.beta[c];
        }
    }
    if case.variant.residual {
        axpy(&mut y, 1.0, x);
    }
    y
}

/// Gradient in w of Σ_s lr_s ½‖f(k_s) - v_s‖² over the tokens s, by central differences of order 6.
fn gradient(case: &Case, w: &[f64], tokens: std::ops::Range<usize>) -> Vec<f64> {
    let (k, v, h) = (rows(&case.k_rows, case.d), rows(&case.v, case.d), 3e-4);
    let loss = |w: &[f64]| -> f64 {
        let error = |s: usize| model(case, w, k[s]).iter().zip(v[s]).map(|(f, v)| (f - v).powi(2)).sum::<f64>();
        tokens.clone().map(|s| case.lr[s] * 0.5 * error(s)).sum()
    };
    let mut moved = w.to_vec();
    let mut at = |i: usize, step: f64| {
        moved[i] = w[i] + step * h;
        let loss = loss(&moved);
        moved[i] = w[i];
        loss
    };
    (0..w.len())
        .map(|i| {
            let mut difference = |step: f64| at(i, step) - at(i, -step);
            (45.0 * difference(1.0) - 9.0 * difference(2.0) + difference(3.0)) / (60.0 * h)
        })
        .collect()
}

/// w - rate * gradient.
fn descend(w: &[f64], rate: f64, gradient: &[f64]) -> Vec<f64> {
    w.iter().zip(gradient).map(|(w, g)| w - rate * g).collect()
}

/// Both learners in all variants.
fn models() -> impl Iterator<Item = (Inner, Variant)> {
    [Inner::Linear, Inner::Mlp].into_iter().flat_map(|inner| variants().map(move |variant| (inner, variant)))
}

#[test]
fn batch_descent_is_one_mini_batch() {
    for (inner, variant) in models() {
        for (d, k, t) in [(4, 6, 6), (6, 9, 5)] {
            let case = case(inner, variant, d, k, t);
            let run = run(&case);
            let (mut z, mut w) = (vec![], vec![]);
            for (t, q) in rows(&case.q, d).into_iter().enumerate() {
                // All gradients are taken at W0, and all of them count alike.
                w = descend(&case.w0, case.tok[t], &gradient(&case, &case.w0, 0..t + 1));
                z.extend(model(&case, &w, q));
            }
            close(&format!("{inner:?} {variant:?} z"), &run.z, &z, 1e-8);
            // An open mini-batch has not moved the weights yet.
            close(&format!("{inner:?} {variant:?} w"), &case.final_weights(&run), if t == k { &w } else { &case.w0 }, 1e-8);
        }
    }
}

#[test]
fn online_descent_is_a_mini_batch_of_one_token() {
    for (inner, variant) in models() {
        let (d, t) = (5, 7);
        let case = case(inner, variant, d, 1, t);
        let run = run(&case);
        let (mut z, mut w) = (vec![], case.w0.clone());
        for (t, q) in rows(&case.q, d).into_iter().enumerate() {
            w = descend(&w, case.tok[0], &gradient(&case, &w, t..t + 1));
            z.extend(model(&case, &w, q));
        }
        close(&format!("{inner:?} {variant:?} z"), &run.z, &z, 1e-8);
        close(&format!("{inner:?} {variant:?} w"), &case.final_weights(&run), &w, 1e-8);
    }
}

/// A learner without weights, the Nadaraya-Watson estimator f(x) = Σ_s κ_s y_s / Σ_s κ_s over the pairs it was given, where κ_s is
/// the kernel of x and x_s.
struct NadarayaWatson<K> {
    kernel: K,
    pairs: Vec<(Vec<f64>, Vec<f64>)>,
}

impl<K: Fn(&[f64], &[f64]) -> f64> NadarayaWatson<K> {
    fn estimate(&self, x: &[f64]) -> Vec<f64> {
        let (mut sum, mut total) = (vec![0.0; self.pairs[0].1.len()], 0.0);
        for (seen, y) in &self.pairs {
            let weight = (self.kernel)(x, seen);
            axpy(&mut sum, weight, y);
            total += weight;
        }
        sum.iter().map(|x| x / total).collect()
    }
}

/// The TTT layer with that learner: it learns each token, then answers for it.
fn estimator_layer(x: &[&[f64]], v: &[Vec<f64>], kernel: impl Fn(&[f64], &[f64]) -> f64) -> Vec<f64> {
    let mut learner = NadarayaWatson { kernel, pairs: vec![] };
    let mut z = vec![];
    for (x, v) in x.iter().zip(v) {
        learner.pairs.push((x.to_vec(), v.clone()));
        z.extend(learner.estimate(x));
    }
    z
}

/// softmax(scale Q Kᵀ + causal mask) V.
fn softmax_attention([q, k, v]: [&[Vec<f64>]; 3], scale: f64) -> Vec<f64> {
    let (t, d) = (q.len(), v[0].len());
    let mut scores = vec![vec![f64::NEG_INFINITY; t]; t];
    for i in 0..t {
        for j in 0..=i {
            scores[i][j] = scale * dot(&q[i], &k[j]);
        }
    }
    for row in &mut scores {
        let top = row.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
        row.iter_mut().for_each(|x| *x = (*x - top).exp());
        let total: f64 = row.iter().sum();
        row.iter_mut().for_each(|x| *x /= total);
    }
    let mut z = vec![0.0; t * d];
    for (z, row) in z.chunks_exact_mut(d).zip(&scores) {
        row.iter().zip(v).for_each(|(p, v)| axpy(z, *p, v));
    }
    z
}

#[test]
fn theorem_2_the_nadaraya_watson_estimator_is_softmax_attention() {
    let (hidden, d, t) = (12, 8, 20);
    let x = noise(31, t * hidden, 1.0);
    let x = rows(&x, hidden);
    let [theta_q, theta_k, theta_v] = [32, 33, 34].map(|seed| noise(seed, hidden * d, 0.5));
    let project = |x: &[f64], theta: &[f64]| affine(x, theta, &vec![0.0; d]);
    let [q, k, v] = [&theta_q, &theta_k, &theta_v].map(|theta| x.iter().map(|x| project(x, theta)).collect::<Vec<_>>());

    // κ(x, x') = exp(θ_K x · θ_Q x'): the seen token is its first argument and the one asked about its second.
    let kernel = |x: &[f64], other: &[f64]| dot(&project(x, &theta_k), &project(other, &theta_q)).exp();
    let attention = softmax_attention([&q, &k, &v], 1.0);
    close("z", &estimator_layer(&x, &v, |asked, seen| kernel(seen, asked)), &attention, 1e-12);

    // So does the operation that a Transformer runs, once its 1/√d is taken back.
    let tensor = |rows: &[Vec<f64>], scale: f64| {
        let data: Vec<f64> = rows.iter().flatten().map(|x| scale * x).collect();
        Tensor::from_slice(&device(), &[t, d], &data).unwrap()
    };
    let [q_scaled, keys, values] = [tensor(&q, (d as f64).sqrt()), tensor(&k, 1.0), tensor(&v, 1.0)];
    let segments = [Segment { first_row: 0, len: t, slot: 0, phase: 0 }];
    let inputs = Inputs { q: q_scaled.view(), k: keys.view(), v: values.view(), head_dim: d, past: None, segments: &segments };
    let [o, _] = ttt::ops::attention::forward(&inputs).unwrap();
    close("o", &o.to_f64_vec(), &estimator_layer(&x, &v, |asked, seen| kernel(seen, asked)), 1e-12);

    // The temperature is in θ: there is no 1/√d.
    let apart = |a: &[f64]| largest(&a.iter().zip(&attention).map(|(a, b)| a - b).collect::<Vec<_>>());
    assert!(apart(&softmax_attention([&q, &k, &v], 1.0 / (d as f64).sqrt())) > 0.1);
    // The kernel is not symmetric: with its arguments the other way round this is no attention of q over k, but of k over q.
    let swapped = estimator_layer(&x, &v, kernel);
    assert!(apart(&swapped) > 0.1);
    close("z", &swapped, &softmax_attention([&k, &q, &v], 1.0), 1e-12);
}
