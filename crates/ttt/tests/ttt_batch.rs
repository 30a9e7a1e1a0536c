//! Batch descent and linear attention: the fast code against the plain loops, both against finite differences, each other and
//! TTT-Linear, however sequences are cut and packed; on a GPU, where there is one, against the plain loops.

mod ttt_case;

use std::sync::Arc;

use ttt::batch::Segment;
use ttt::config::{Inner, TokenScale};
use ttt::device::cuda::{Cuda, Options};
use ttt::device::{Device, Kernels};
use ttt::ops::inner::Variant;
use ttt::ops::linear_attention::{self, Kind};
use ttt::ops::ttt_batch;
use ttt::tensor::{DType, Tensor};
use ttt_case::{Case, close, largest, noise, variants};

/// What is computed: batch descent, or linear attention on the same q, k and v.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Batch { scale: TokenScale, bias: bool, variant: Variant },
    Attention(Kind),
}

/// Inputs of one op, with a state that has something in it and gradients of everything that comes out.
#[derive(Clone, Debug)]
struct Trial {
    op: Op,
    heads: usize,
    d: usize,
    lens: Vec<usize>,
    position: usize,
    /// q, k, v, lr, gamma, beta and the states `[sequences, h, S]`.
    x: [Vec<f64>; 7],
    dout: Vec<f64>,
    dstate: Vec<f64>,
}

const NAMES: [&str; 7] = ["q", "k", "v", "lr", "gamma", "beta", "state"];

fn device(kernels: Kernels) -> Device {
    Device::cpu_with(2, kernels).unwrap()
}

fn state_len(op: Op, d: usize) -> usize {
    match op {
        Op::Batch { .. } => ttt_batch::state_len(d),
        Op::Attention(_) => linear_attention::state_len(d),
    }
}

fn tensor(device: &Device, dtype: DType, shape: &[usize], x: &[f64]) -> Tensor {
    let made = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let tensor = Tensor::from_slice(&device.cpu_beside(), shape, x).unwrap().cast(made).unwrap().to(device).unwrap();
    if dtype == made { tensor } else { tensor.cast(dtype).unwrap() }
}

impl Trial {
    fn new(op: Op, heads: usize, d: usize, lens: &[usize], position: usize) -> Trial {
        let n: usize = lens.iter().sum();
        let len = state_len(op, d);
        let mut state = noise(7, lens.len() * heads * len, 0.3);
        for own in state.chunks_exact_mut(len) {
            match op {
                Op::Batch { bias: false, .. } => {
                    own[d * d..d * d + d].fill(0.0);
                    own[2 * d * d + d..].fill(0.0);
                }
                // A sum of features is positive.
                Op::Attention(Kind::Normalised) => own[d * d..].iter_mut().for_each(|x| *x = x.abs() + 0.1),
                Op::Attention(Kind::Plain) => own[d * d..].fill(0.0),
                _ => {}
            }
        }
        let wide = n * heads * d;
        let lr = noise(4, n * heads, 0.2).iter().map(|x| x + 0.3).collect();
        let gamma = noise(5, heads * d, 0.2).iter().map(|x| x + 1.0).collect();
        let x = [noise(1, wide, 1.0), noise(2, wide, 1.0), noise(3, wide, 1.0), lr, gamma, noise(6, heads * d, 0.2), state];
        let (dout, dstate) = (noise(8, wide, 1.0), noise(9, lens.len() * heads * len, 1.0));
        Trial { op, heads, d, lens: lens.to_vec(), position, x, dout, dstate }
    }

    /// The sequences in slots that are in reverse, the first slot unused.
    fn segments(&self) -> Vec<Segment> {
        let mut first_row = 0;
        let segment = |(i, len): (usize, &usize)| {
            first_row += len;
            Segment { first_row: first_row - len, len: *len, slot: self.lens.len() - i, phase: self.position }
        };
        self.lens.iter().enumerate().map(segment).collect()
    }

    /// Slots from sequences and back.
    fn in_slots(&self) -> Vec<f64> {
        let each = self.heads * state_len(self.op, self.d);
        let mut slots = vec![f64::NAN; each];
        self.x[6].chunks_exact(each).rev().for_each(|own| slots.extend(own));
        slots
    }

    /// Outputs and final states, or with gradients `(values, [dq, dk, dv, dlr, dgamma, dbeta, dstate])`.
    fn run(&self, device: &Device, dtype: DType, gradients: bool) -> (Vec<f64>, Vec<f64>, Vec<Vec<f64>>) {
        let (n, h, d, len) = (self.lens.iter().sum::<usize>(), self.heads, self.d, state_len(self.op, self.d));
        // States, rates and parameters, in f32 beside bf16 too.
        let master = if dtype == DType::Bf16 { DType::F32 } else { dtype };
        let place = |i: usize, shape: [usize; 2]| tensor(device, master, &shape, &self.x[i]);
        // The three side by side, so that rows have a stride.
        let wide = h * d;
        let rows = (0..n).flat_map(|t| [0, 1, 2].into_iter().flat_map(move |i| (0..wide).map(move |c| (i, t * wide + c))));
        let qkv = tensor(device, dtype, &[n, 3 * wide], &rows.map(|(i, at)| self.x[i][at]).collect::<Vec<_>>());
        let part = |i: usize| qkv.view().col_range(i * wide..(i + 1) * wide);
        let (lr, gamma, beta) = (place(3, [n, h]), place(4, [h, d]), place(5, [h, d]));
        let segments = self.segments();
        let mut state = tensor(device, master, &[self.lens.len() + 1, h, len], &self.in_slots());
        let (out, start) = match self.op {
            Op::Batch { .. } => ttt_batch::forward(&self.batch(&part, [&lr, &gamma, &beta], &segments), &mut state, gradients),
            Op::Attention(_) => linear_attention::forward(&self.attention(&part, &segments), &mut state, gradients),
        }
        .unwrap();
        let each = h * len;
        let end = state.to_f64_vec()[each..].chunks_exact(each).rev().flatten().copied().collect();
        let mut all = Vec::new();
        if let Some(start) = start {
            let filled = |dtype, shape: [usize; 2], x| tensor(device, dtype, &shape, &vec![x; shape[0] * shape[1]]);
            let quarter = |shape: [usize; 2]| filled(master, shape, 0.25);
            let [mut dq, mut dk, mut dv] = [(); 3].map(|()| filled(dtype, [n, wide], f64::NAN));
            let (mut dlr, mut dgamma, mut dbeta) = (filled(master, [n, h], f64::NAN), quarter([h, d]), quarter([h, d]));
            let mut dstate = tensor(device, master, &[self.lens.len(), h, len], &self.dstate);
            let dout = tensor(device, dtype, &[n, wide], &self.dout);
            let [dq_, dk_, dv_] = [&mut dq, &mut dk, &mut dv].map(|t| t.view_mut());
            match self.op {
                Op::Batch { .. } => {
                    let [dlr, dgamma, dbeta] = [&mut dlr, &mut dgamma, &mut dbeta].map(|t| t.view_mut());
                    let grads = ttt_batch::Grads { dq: dq_, dk: dk_, dv: dv_, dlr, dgamma, dbeta };
                    let inputs = self.batch(&part, [&lr, &gamma, &beta], &segments);
                    ttt_batch::backward(&inputs, &start, dout.view(), &mut dstate, grads).unwrap();
                }
                Op::Attention(_) => {
                    let grads = linear_attention::Grads { dq: dq_, dk: dk_, dv: dv_ };
                    linear_attention::backward(&self.attention(&part, &segments), &start, dout.view(), &mut dstate, grads).unwrap();
                }
            }
            all.extend([&dq, &dk, &dv, &dlr].map(Tensor::to_f64_vec));
            all.extend([&dgamma, &dbeta].map(|t| t.to_f64_vec().iter().map(|x| x - 0.25).collect::<Vec<_>>()));
            all.push(dstate.to_f64_vec());
            if let Op::Attention(_) = self.op {
                [3, 4, 5].into_iter().for_each(|i| all[i].fill(0.0));
            }
        }
        (out.to_f64_vec(), end, all)
    }

    fn batch<'a>(
        &self,
        part: &impl Fn(usize) -> ttt::device::view::View<'a>,
        [lr, gamma, beta]: [&'a Tensor; 3],
        segments: &'a [Segment],
    ) -> ttt_batch::Inputs<'a> {
        let Op::Batch { scale, bias, variant } = self.op else { panic!("batch descent") };
        let (lr, gamma, beta) = (lr.view(), gamma.view(), beta.view());
        ttt_batch::Inputs { q: part(0), k: part(1), v: part(2), lr, gamma, beta, variant, bias, token_scale: scale, segments }
    }

    fn attention<'a>(
        &self,
        part: &impl Fn(usize) -> ttt::device::view::View<'a>,
        segments: &'a [Segment],
    ) -> linear_attention::Inputs<'a> {
        let Op::Attention(kind) = self.op else { panic!("linear attention") };
        linear_attention::Inputs { q: part(0), k: part(1), v: part(2), heads: self.heads, kind, segments }
    }

    /// Only the tokens `range` of the one sequence, from the given state.
    fn cut(&self, range: std::ops::Range<usize>, state: Vec<f64>) -> Trial {
        assert_eq!(self.lens.len(), 1);
        let mut part = self.clone();
        let wide = self.heads * self.d;
        for (i, width) in [wide, wide, wide, self.heads].into_iter().enumerate() {
            part.x[i] = self.x[i][range.start * width..range.end * width].to_vec();
        }
        part.dout = self.dout[range.start * wide..range.end * wide].to_vec();
        part.lens = vec![range.len()];
        part.position = self.position + range.start;
        part.x[6] = state;
        part
    }

    fn loss(&self, device: &Device) -> f64 {
        let (out, end, _) = self.run(device, DType::F64, false);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        dot(&out, &self.dout) + dot(&end, &self.dstate)
    }
}

fn ops() -> Vec<Op> {
    let mut all = [Kind::Plain, Kind::Biased, Kind::Normalised].map(Op::Attention).to_vec();
    for variant in variants() {
        for (scale, bias) in [(TokenScale::Mean, true), (TokenScale::Sum, false)] {
            all.push(Op::Batch { scale, bias, variant });
        }
    }
    all
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let device = device(Kernels::Reference);
    for op in ops() {
        let trial = Trial::new(op, 2, 4, &[5, 1, 3], 2);
        let (_, _, grads) = trial.run(&device, DType::F64, true);
        for (i, name) in NAMES.into_iter().enumerate() {
            let one = |at: usize| {
                let moved = |step: f64| {
                    let mut moved = trial.clone();
                    moved.x[i][at] += step;
                    moved.loss(&device)
                };
                // Of order 6.
                let h = 1e-4;
                let difference = |step: f64| moved(step * h) - moved(-step * h);
                (45.0 * difference(1.0) - 9.0 * difference(2.0) + difference(3.0)) / (60.0 * h)
            };
            let all: Vec<usize> = (0..trial.x[i].len()).filter(|at| !is_fixed(op, i, trial.d, *at)).collect();
            // A prime step meets every row and column in turn.
            let some = all.iter().copied().step_by(if all.len() > 60 { 3 } else { 1 });
            let (got, expected): (Vec<f64>, Vec<f64>) = some.map(|at| (grads[i][at], one(at))).unzip();
            if largest(&expected) > 0.0 {
                close(&format!("{op:?} d{name}"), &got, &expected, 1e-9);
            } else {
                assert_eq!(largest(&got), 0.0, "{op:?} d{name}");
            }
        }
    }
}

/// Whether an element of the state does not exist: bias and its sum of a model without one, the sum beside plain attention.
fn is_fixed(op: Op, i: usize, d: usize, at: usize) -> bool {
    let at = at % state_len(op, d);
    match op {
        Op::Batch { bias: false, .. } if i == 6 => (d * d..d * d + d).contains(&at) || at >= 2 * d * d + d,
        Op::Attention(Kind::Plain) if i == 6 => at >= d * d,
        _ => false,
    }
}

#[test]
fn fast_code_computes_what_the_loops_do() {
    let (plain, fast) = (device(Kernels::Reference), device(Kernels::Fast));
    for op in ops() {
        for (heads, d, lens) in [(2, 16, vec![130, 0, 3, 64, 1]), (1, 64, vec![65, 4]), (3, 6, vec![63, 200])] {
            let mut trial = Trial::new(op, heads, d, &lens, 0);
            // Sums of hundreds of tokens, of a size at which f32 shows what it can.
            trial.x[..2].iter_mut().flatten().for_each(|x| *x *= 0.3);
            let what = format!("{op:?} of {heads} x {d}, {lens:?}:");
            let (out, end, grads) = trial.run(&plain, DType::F64, true);
            let (fast_out, fast_end, fast_grads) = trial.run(&fast, DType::F32, true);
            close(&format!("{what} out"), &fast_out, &out, 2e-5);
            close(&format!("{what} end"), &fast_end, &end, 2e-5);
            for ((name, fast), grad) in NAMES.iter().zip(&fast_grads).zip(&grads) {
                close(&format!("{what} d{name}"), fast, grad, 5e-5);
            }
        }
    }
}

/// One head of every length around a chunk and packed ones, on a GPU whose new tensors are NaN. Looks for it at run time and says so
/// when there is none, which is a failure if `TTT_TEST_DEVICE=cuda` is set.
#[test]
fn a_gpu_computes_what_the_loops_do() {
    let gpu = match Cuda::open(Options { ordinal: 0, poison: true }) {
        Ok(cuda) => Device::Cuda(Arc::new(cuda)),
        Err(e) => {
            assert!(std::env::var("TTT_TEST_DEVICE").as_deref() != Ok("cuda"), "TTT_TEST_DEVICE=cuda, but {e}");
            return eprintln!("no GPU: nothing was tested ({e})");
        }
    };
    let plain = device(Kernels::Reference);
    let packed = vec![130, 0, 3, 64, 1, 200];
    let lengths = [1, 15, 16, 17, 63, 1040].map(|t| (1, 64, vec![t]));
    let sizes: Vec<(usize, usize, Vec<usize>)> =
        lengths.into_iter().chain([(2, 16, packed.clone()), (3, 6, vec![65]), (2, 96, packed)]).collect();
    for op in ops() {
        for (heads, d, lens) in &sizes {
            let mut trial = Trial::new(op, *heads, *d, lens, 0);
            // Sums of hundreds of tokens, of a size at which f32 shows what it can.
            trial.x[..2].iter_mut().flatten().for_each(|x| *x *= 0.3);
            let rounded = |x: &mut f64| *x = half::bf16::from_f32(*x as f32).to_f64();
            trial.x[..3].iter_mut().flatten().for_each(rounded);
            trial.dout.iter_mut().for_each(rounded);
            let (out, end, grads) = trial.run(&plain, DType::F64, true);
            for (dtype, bound, gradient_bound) in [(DType::F32, 2e-5, 1e-4), (DType::Bf16, 1e-2, 1e-2)] {
                let what = format!("{op:?} of {heads} x {d}, {lens:?} {dtype:?}:");
                let ours = trial.run(&gpu, dtype, true);
                close(&format!("{what} out"), &ours.0, &out, bound);
                close(&format!("{what} end"), &ours.1, &end, 2e-5);
                for ((name, ours), grad) in NAMES.iter().zip(&ours.2).zip(&grads) {
                    close(&format!("{what} d{name}"), ours, grad, gradient_bound);
                }
                assert!(ours == trial.run(&gpu, dtype, true), "{what} another result when run again");
            }
        }
    }
}

#[test]
fn cuts_change_nothing() {
    for (kernels, dtype, bound) in [(Kernels::Reference, DType::F64, 1e-12), (Kernels::Fast, DType::F32, 2e-5)] {
        let device = device(kernels);
        for op in ops() {
            let mut trial = Trial::new(op, 2, 8, &[150], 3);
            trial.x[..2].iter_mut().flatten().for_each(|x| *x *= 0.5);
            let (out, end, grads) = trial.run(&device, dtype, true);
            for cuts in [vec![0, 150], vec![0, 1, 2, 66, 67, 150], vec![0, 64, 128, 149, 150]] {
                let mut parts: Vec<Trial> = Vec::new();
                let (mut pieces, mut state) = (Vec::new(), trial.x[6].clone());
                for range in cuts.windows(2).map(|pair| pair[0]..pair[1]) {
                    let part = trial.cut(range, state);
                    let (own, next, _) = part.run(&device, dtype, false);
                    pieces.extend(own);
                    (state, _) = (next, parts.push(part));
                }
                close(&format!("{op:?} out, {cuts:?}"), &pieces, &out, bound);
                close(&format!("{op:?} end, {cuts:?}"), &state, &end, bound);
                // The gradient crosses cuts too: that of a part's end is what the part behind it hands back.
                let (mut dstate, mut back) = (trial.dstate.clone(), vec![Vec::new(); 6]);
                for part in parts.iter_mut().rev() {
                    part.dstate = dstate;
                    let (_, _, own) = part.run(&device, dtype, true);
                    for (i, sum) in back.iter_mut().enumerate() {
                        match i {
                            4 | 5 if sum.is_empty() => sum.clone_from(&own[i]),
                            4 | 5 => sum.iter_mut().zip(&own[i]).for_each(|(a, b)| *a += b),
                            _ => *sum = [&own[i][..], sum].concat(),
                        }
                    }
                    dstate = own[6].clone();
                }
                back.push(dstate);
                for ((name, back), grad) in NAMES.iter().zip(&back).zip(&grads) {
                    close(&format!("{op:?} d{name}, {cuts:?}"), back, grad, 5.0 * bound);
                }
            }
        }
    }
}

/// A mini-batch of TTT-Linear no shorter than the sequence is batch descent.
#[test]
fn up_to_64_tokens_it_is_ttt_linear() {
    for (kernels, dtype, bound) in [(Kernels::Reference, DType::F64, 1e-12), (Kernels::Fast, DType::F32, 2e-5)] {
        let device = device(kernels);
        for variant in variants() {
            for scale in [TokenScale::Mean, TokenScale::Sum] {
                // The last sequence is a whole mini-batch, so that the weights move in both.
                let (h, d, k, lens) = (2, 16, 64, [64, 1, 37, 64]);
                let mut case = Case::new(Inner::Linear, h, d, k, &lens).with(variant);
                case.tok = (0..k).map(|i| scale.at(i)).collect();
                case.lr.iter_mut().for_each(|lr| *lr /= 4.0);
                let run = case.forward(&device, dtype, None);
                let grads = case.backward(&device, dtype, 1);
                let len = d * d + d;
                let mut trial = Trial::new(Op::Batch { scale, bias: true, variant }, h, d, &lens, 0);
                let with_zeros = |w: &[f64]| w.chunks_exact(len).flat_map(|w| [w, &vec![0.0; len]].concat()).collect::<Vec<_>>();
                let state = with_zeros(&case.w0);
                trial.x = [&case.q, &case.k_rows, &case.v, &case.lr, &case.gamma, &case.beta, &state].map(|x| x.to_vec());
                trial.dout.clone_from(&case.dz);
                // W' = W0 - τ_last SW where the mini-batch is full; elsewhere nothing of it is left.
                let tau = case.tok[k - 1];
                trial.dstate = Vec::new();
                for (i, dw) in case.dw.chunks_exact(len).enumerate() {
                    let full = lens[i / h] == k;
                    trial.dstate.extend(dw);
                    trial.dstate.extend(dw.iter().map(|dw| if full { -tau * dw } else { 0.0 }));
                }
                let what = format!("{variant:?} {scale:?} {dtype:?}");
                let (out, end, own) = trial.run(&device, dtype, true);
                close(&format!("{what} z"), &out, &run.z, bound);
                let moved: Vec<f64> = end
                    .chunks_exact(2 * len)
                    .enumerate()
                    .flat_map(|(i, state)| {
                        let tau = if lens[i / h] == k { tau } else { 0.0 };
                        (0..len).map(|j| state[j] - tau * state[len + j]).collect::<Vec<_>>()
                    })
                    .collect();
                close(&format!("{what} w"), &moved, &case.final_weights(&run), bound);
                let initial: Vec<f64> = own[6].chunks_exact(2 * len).flat_map(|own| own[..len].to_vec()).collect();
                let expected = [&grads.q, &grads.k, &grads.v, &grads.lr, &grads.gamma, &grads.beta, &grads.w0];
                for ((name, own), expected) in NAMES.iter().zip(own[..6].iter().chain([&initial])).zip(expected) {
                    close(&format!("{what} d{name}"), own, expected, 5.0 * bound);
                }
            }
        }
    }
}

/// Theorem 1, now beyond 64 tokens and without the constant feature: batch descent from zero with the paper's step is causal linear
/// attention, in outputs and gradients.
#[test]
fn theorem_1_the_first_rungs_are_equal() {
    for (kernels, dtype, bound) in [(Kernels::Reference, DType::F64, 1e-13), (Kernels::Fast, DType::F32, 2e-6)] {
        let device = device(kernels);
        let variant = Variant { layer_norm: false, residual: false };
        let (lens, h, d) = ([150, 7], 2, 8);
        let mut batch = Trial::new(Op::Batch { scale: TokenScale::Sum, bias: false, variant }, h, d, &lens, 0);
        let mut attention = Trial::new(Op::Attention(Kind::Plain), h, d, &lens, 0);
        batch.x[3].fill(1.0);
        batch.x[6].fill(0.0);
        attention.x[6].fill(0.0);
        // Attention's state is -SW: Ĝ = -v.
        let len = d * d + d;
        let (mut of_batch, mut of_attention) = (Vec::new(), Vec::new());
        for dstate in attention.dstate.chunks_exact(len) {
            of_attention.extend(dstate[..d * d].iter().chain(&vec![0.0; d]));
            of_batch.extend([&vec![0.0; len][..], &dstate[..d * d].iter().map(|x| -x).collect::<Vec<_>>(), &vec![0.0; d]].concat());
        }
        (batch.dstate, attention.dstate) = (of_batch, of_attention);
        let (z, end, grads) = batch.run(&device, dtype, true);
        let (o, attention_end, attention_grads) = attention.run(&device, dtype, true);
        close("z", &z, &o, bound);
        let sums: Vec<f64> = end.chunks_exact(2 * len).flat_map(|s| s[len..].iter().map(|x| -x)).collect();
        close("state", &sums, &attention_end, bound);
        for i in 0..3 {
            close(NAMES[i], &grads[i], &attention_grads[i], bound);
        }
        // And both are the sum over pairs, written out.
        let mut pairs = vec![0.0; o.len()];
        let mut start = 0;
        for t in lens {
            for i in start..start + t {
                for j in start..=i {
                    for head in 0..h {
                        let at = |row: usize| (row * h + head) * d;
                        let weight: f64 = (0..d).map(|c| batch.x[0][at(i) + c] * batch.x[1][at(j) + c]).sum();
                        (0..d).for_each(|c| pairs[at(i) + c] += weight * batch.x[2][at(j) + c]);
                    }
                }
            }
            start += t;
        }
        close("pairs", &z, &pairs, bound);
    }
}

/// Katharopoulos et al.: the weights of a token are positive and sum to 1, so equal values come out as they are.
#[test]
fn the_normaliser_averages() {
    let device = device(Kernels::Fast);
    let mut trial = Trial::new(Op::Attention(Kind::Normalised), 2, 8, &[100], 0);
    trial.x[2].fill(0.75);
    trial.x[6].fill(0.0);
    let (out, ..) = trial.run(&device, DType::F32, false);
    close("average", &out, &vec![0.75; out.len()], 1e-5);
    // Two tokens by hand.
    let mut two = Trial::new(Op::Attention(Kind::Normalised), 1, 1, &[2], 0);
    two.x = [vec![0.5, -1.0], vec![2.0, -0.5], vec![3.0, 5.0], vec![1.0; 2], vec![1.0], vec![0.0], vec![0.0; 2]];
    let (out, ..) = two.run(&device, DType::F64, false);
    let (second, third) = ((-1.0f64).exp(), (-0.5f64).exp());
    let weights = [second * 3.0, second * third];
    close(
        "two",
        &out,
        &[3.0 * 4.5 / (4.5 + 1e-6), (weights[0] * 3.0 + weights[1] * 5.0) / (weights[0] + weights[1] + 1e-6)],
        1e-12,
    );
}
