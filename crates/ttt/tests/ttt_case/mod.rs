//! Seeded cases for the TTT operations, and their outputs and gradients as plain vectors.
#![allow(dead_code)]

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use safetensors::SafeTensors;
use ttt::batch::Segment;
use ttt::config::Inner;
use ttt::device::Device;
use ttt::device::view::View;
use ttt::ops::inner::{FastWeights, InputGrads, Inputs, ParamGrads, Saved, Variant};
use ttt::ops::{ttt_linear, ttt_mlp};
use ttt::tensor::{DType, Tensor};

/// Uniform in ±`scale`, from splitmix64 of `seed * 2³² + i`; `fixtures/make_ttt_oracle.py` has the same function.
pub fn noise(seed: u64, n: usize, scale: f64) -> Vec<f64> {
    (0..n as u64)
        .map(|i| {
            let mut x = ((seed << 32) + i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .map(|x| x * scale)
        .collect()
}

pub fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |a, b| a.max(b.abs()))
}

/// Fails unless the largest difference is at most `bound` of the largest expected value.
#[track_caller]
pub fn close(what: &str, got: &[f64], expected: &[f64], bound: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let scale = largest(expected).max(1e-30);
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        let error = (a - b).abs() / scale;
        assert!(error <= bound, "{what}[{i}]: {a}, not {b} ({error:.1e} of {scale:.3} > {bound:.1e})");
    }
}

/// Norm of the difference over the norm of what is expected.
pub fn distance(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied()).max(1e-30)
}

#[derive(Clone, Debug)]
pub struct Case {
    pub inner: Inner,
    pub variant: Variant,
    pub heads: usize,
    pub d: usize,
    pub k: usize,
    pub lens: Vec<usize>,
    pub phase: usize,
    /// Columns beside q, k and v in their matrix.
    pub pad: usize,
    pub q: Vec<f64>,
    pub k_rows: Vec<f64>,
    pub v: Vec<f64>,
    pub lr: Vec<f64>,
    pub tok: Vec<f64>,
    pub gamma: Vec<f64>,
    pub beta: Vec<f64>,
    pub w0: Vec<f64>,
    pub dz: Vec<f64>,
    pub dw: Vec<f64>,
}

pub struct Run {
    pub z: Vec<f64>,
    pub state: FastWeights,
    pub saved: Option<Saved>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Grads {
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub lr: Vec<f64>,
    pub tok: Vec<f64>,
    pub gamma: Vec<f64>,
    pub beta: Vec<f64>,
    pub w0: Vec<f64>,
}

impl Grads {
    pub fn named(&self) -> [(&'static str, &[f64]); 8] {
        [
            ("q", &self.q),
            ("k", &self.k),
            ("v", &self.v),
            ("lr", &self.lr),
            ("tok", &self.tok),
            ("gamma", &self.gamma),
            ("beta", &self.beta),
            ("w0", &self.w0),
        ]
    }
}

/// The device's copy of a case's inputs; q, k and v are column blocks of one matrix.
struct Placed {
    qkv: Tensor,
    lr: Tensor,
    tok: Tensor,
    gamma: Tensor,
    beta: Tensor,
}

fn tensor(device: &Device, dtype: DType, shape: &[usize], data: &[f64]) -> Tensor {
    let made = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let tensor = Tensor::from_slice(&device.cpu_beside(), shape, data).unwrap().cast(made).unwrap().to(device).unwrap();
    if dtype == made { tensor } else { tensor.cast(dtype).unwrap() }
}

/// Type of what is not an activation: f32 in mixed precision.
fn master(dtype: DType) -> DType {
    if dtype == DType::Bf16 { DType::F32 } else { dtype }
}

/// With and without LayerNorm and residual.
pub fn variants() -> impl Iterator<Item = Variant> {
    [true, false].into_iter().flat_map(|layer_norm| [true, false].map(|residual| Variant { layer_norm, residual }))
}

impl Case {
    pub fn with(mut self, variant: Variant) -> Case {
        self.variant = variant;
        self
    }

    pub fn new(inner: Inner, heads: usize, d: usize, k: usize, lens: &[usize]) -> Case {
        let n: usize = lens.iter().sum();
        let wide = n * heads * d;
        let state = lens.len() * heads * FastWeights::state_len(inner, d);
        let base = if inner == Inner::Linear { 2.0 } else { 1.0 };
        Case {
            inner,
            variant: Variant::default(),
            heads,
            d,
            k,
            lens: lens.to_vec(),
            phase: 0,
            pad: 5,
            q: noise(1, wide, 1.0),
            k_rows: noise(2, wide, 1.0),
            v: noise(3, wide, 1.0),
            lr: noise(4, n * heads, 0.5).iter().map(|x| base * (x + 0.5) / d as f64).collect(),
            tok: noise(5, k, 0.1).iter().enumerate().map(|(i, x)| (1.0 / (i + 1) as f64 + x).max(0.0)).collect(),
            gamma: noise(6, heads * d, 0.3).iter().map(|x| 1.0 + x).collect(),
            beta: noise(7, heads * d, 0.3),
            w0: noise(8, state, 0.3),
            dz: noise(9, wide, 1.0),
            dw: noise(10, state, 0.3),
        }
    }

    /// The same with numbers that a GPU has in mixed precision: q, k, v and dz in bf16, the others in f32.
    pub fn in_mixed_precision(mut self) -> Case {
        for x in [&mut self.q, &mut self.k_rows, &mut self.v, &mut self.dz].into_iter().flatten() {
            *x = half::bf16::from_f32(*x as f32).to_f64();
        }
        let others = [&mut self.lr, &mut self.tok, &mut self.gamma, &mut self.beta, &mut self.w0, &mut self.dw];
        others.into_iter().flatten().for_each(|x| *x = f64::from(*x as f32));
        self
    }

    pub fn field_mut(&mut self, name: &str) -> &mut Vec<f64> {
        match name {
            "q" => &mut self.q,
            "k" => &mut self.k_rows,
            "v" => &mut self.v,
            "lr" => &mut self.lr,
            "tok" => &mut self.tok,
            "gamma" => &mut self.gamma,
            "beta" => &mut self.beta,
            "w0" => &mut self.w0,
            _ => panic!("{name}"),
        }
    }

    pub fn starts(&self) -> Vec<usize> {
        self.lens
            .iter()
            .scan(0, |next, len| {
                *next += len;
                Some(*next - len)
            })
            .collect()
    }

    fn state_len(&self) -> usize {
        FastWeights::state_len(self.inner, self.d)
    }

    /// Slot of a sequence in [`Case::forward`]: in reverse, slot 0 unused.
    fn slot(&self, sequence: usize) -> usize {
        self.lens.len() - sequence
    }

    fn segments(&self) -> Vec<Segment> {
        let starts = self.starts();
        (0..self.lens.len())
            .map(|s| Segment { first_row: starts[s], len: self.lens[s], slot: self.slot(s), phase: self.phase })
            .collect()
    }

    fn place(&self, device: &Device, dtype: DType, rows: &[usize]) -> Placed {
        let wide = self.heads * self.d;
        let mut qkv = vec![f64::NAN; rows.len() * (3 * wide + self.pad)];
        let mut lr = vec![];
        for (i, row) in rows.iter().enumerate() {
            for (part, x) in [&self.v, &self.q, &self.k_rows].into_iter().enumerate() {
                qkv[i * (3 * wide + self.pad) + part * wide..][..wide].copy_from_slice(&x[row * wide..][..wide]);
            }
            lr.extend_from_slice(&self.lr[row * self.heads..][..self.heads]);
        }
        Placed {
            qkv: tensor(device, dtype, &[rows.len(), 3 * wide + self.pad], &qkv),
            lr: tensor(device, master(dtype), &[rows.len(), self.heads], &lr),
            tok: tensor(device, master(dtype), &[1, self.k], &self.tok),
            gamma: tensor(device, master(dtype), &[self.heads, self.d], &self.gamma),
            beta: tensor(device, master(dtype), &[self.heads, self.d], &self.beta),
        }
    }

    fn inputs<'a>(&self, placed: &'a Placed, segments: &'a [Segment]) -> Inputs<'a> {
        let wide = self.heads * self.d;
        let part = |i: usize| placed.qkv.view().col_range(i * wide..(i + 1) * wide);
        Inputs {
            q: part(1),
            k: part(2),
            v: part(0),
            lr: placed.lr.view(),
            tok: placed.tok.view(),
            gamma: placed.gamma.view(),
            beta: placed.beta.view(),
            variant: self.variant,
            segments,
        }
    }

    fn state_with(&self, device: &Device, dtype: DType, slots: usize, slot: impl Fn(usize) -> usize) -> FastWeights {
        let dtype = master(dtype);
        let mut state = FastWeights::zeros(device, dtype, self.inner, slots, self.heads, self.d, self.k).unwrap();
        let each = self.heads * self.state_len();
        let mut weights = vec![0.0; slots * each];
        for s in 0..self.lens.len() {
            weights[slot(s) * each..][..each].copy_from_slice(&self.w0[s * each..][..each]);
        }
        let shape = state.weights().shape().to_vec();
        *state.weights_mut() = tensor(device, dtype, &shape, &weights);
        let shape = state.rows().shape().to_vec();
        *state.rows_mut() = tensor(device, dtype, &shape, &vec![f64::NAN; shape.iter().product()]);
        state
    }

    /// A state whose slots are the sequences.
    pub fn state(&self, device: &Device, dtype: DType) -> FastWeights {
        self.state_with(device, dtype, self.lens.len(), |s| s)
    }

    /// Outputs of some rows of the case.
    pub fn forward_rows(
        &self,
        device: &Device,
        dtype: DType,
        rows: &[usize],
        segments: &[Segment],
        state: &mut FastWeights,
    ) -> Vec<f64> {
        let placed = self.place(device, dtype, rows);
        let inputs = self.inputs(&placed, segments);
        match self.inner {
            Inner::Linear => ttt_linear::forward(&inputs, state, None),
            Inner::Mlp => ttt_mlp::forward(&inputs, state, None),
        }
        .unwrap()
        .0
        .to_f64_vec()
    }

    pub fn forward(&self, device: &Device, dtype: DType, keep: Option<usize>) -> Run {
        let rows: Vec<usize> = (0..self.lens.iter().sum()).collect();
        let (placed, segments) = (self.place(device, dtype, &rows), self.segments());
        let inputs = self.inputs(&placed, &segments);
        let mut state = self.state_with(device, dtype, self.lens.len() + 1, |s| self.slot(s));
        let (z, saved) = match self.inner {
            Inner::Linear => ttt_linear::forward(&inputs, &mut state, keep),
            Inner::Mlp => ttt_mlp::forward(&inputs, &mut state, keep),
        }
        .unwrap();
        Run { z: z.to_f64_vec(), state, saved }
    }

    /// `[sequences, h, S]` after a run.
    pub fn final_weights(&self, run: &Run) -> Vec<f64> {
        let (all, each) = (run.state.weights().to_f64_vec(), self.heads * self.state_len());
        (0..self.lens.len()).flat_map(|s| all[self.slot(s) * each..][..each].to_vec()).collect()
    }

    /// How often a forward and a backward with checkpoints every 2 mini-batches allocate.
    pub fn counted(&self, device: &Device, dtype: DType, count: &AtomicUsize) -> [usize; 2] {
        self.backward_counted(device, dtype, 2, count).1
    }

    /// All gradients of <z, dz> + <final weights, dw>. Outputs are NaN before; sums start at 1/4, which is taken off again.
    pub fn backward(&self, device: &Device, dtype: DType, group: usize) -> Grads {
        self.backward_counted(device, dtype, group, &AtomicUsize::new(0)).0
    }

    fn backward_counted(&self, device: &Device, dtype: DType, group: usize, count: &AtomicUsize) -> (Grads, [usize; 2]) {
        let n: usize = self.lens.iter().sum();
        let wide = self.heads * self.d;
        let rows: Vec<usize> = (0..n).collect();
        let (placed, segments) = (self.place(device, dtype, &rows), self.segments());
        let inputs = self.inputs(&placed, &segments);
        let phase_0: Vec<Segment> = segments.iter().map(|s| Segment { phase: 0, ..*s }).collect();
        let mut state = self.state_with(device, dtype, self.lens.len() + 1, |s| self.slot(s));
        let kept_inputs = Inputs { segments: &phase_0, ..inputs };
        let before = count.load(Relaxed);
        let saved = match self.inner {
            Inner::Linear => ttt_linear::forward(&kept_inputs, &mut state, Some(group)),
            Inner::Mlp => ttt_mlp::forward(&kept_inputs, &mut state, Some(group)),
        }
        .unwrap()
        .1
        .unwrap();
        let forward = count.load(Relaxed) - before;

        let nan = |shape: &[usize], dtype| tensor(device, dtype, shape, &vec![f64::NAN; shape.iter().product()]);
        let quarter = |shape: &[usize]| tensor(device, master(dtype), shape, &vec![0.25; shape.iter().product()]);
        let dz = tensor(device, dtype, &[n, wide], &self.dz);
        let mut dstate = tensor(device, master(dtype), &[self.lens.len(), self.heads, self.state_len()], &self.dw);
        let (mut dqkv, mut dlr) = (nan(&[n, 3 * wide], dtype), nan(&[n, self.heads], master(dtype)));
        let mut dtok = quarter(&[1, self.k]);
        let (mut dgamma, mut dbeta) = (quarter(&[self.heads, self.d]), quarter(&[self.heads, self.d]));
        let (dv, rest) = dqkv.view_mut().split_cols(wide);
        let (dq, dk) = rest.split_cols(wide);
        let d = InputGrads { dq, dk, dv, dlr: dlr.view_mut() };
        let p = ParamGrads { dtok: dtok.view_mut(), dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut() };
        let before = count.load(Relaxed);
        match self.inner {
            Inner::Linear => ttt_linear::backward(&inputs, &saved, dz.view(), &mut dstate, d, p),
            Inner::Mlp => ttt_mlp::backward(&inputs, &saved, dz.view(), &mut dstate, d, p),
        }
        .unwrap();
        let backward = count.load(Relaxed) - before;
        let all = dqkv.to_f64_vec();
        let part = |i: usize| (0..n).flat_map(|row| all[row * 3 * wide + i * wide..][..wide].to_vec()).collect();
        let less = |t: &Tensor| t.to_f64_vec().iter().map(|x| x - 0.25).collect();
        let grads = Grads {
            q: part(1),
            k: part(2),
            v: part(0),
            lr: dlr.to_f64_vec(),
            tok: less(&dtok),
            gamma: less(&dgamma),
            beta: less(&dbeta),
            w0: dstate.to_f64_vec(),
        };
        (grads, [forward, backward])
    }

    /// Outputs and final weights of the primal form in f64.
    pub fn primal(&self) -> (Vec<f64>, Vec<f64>) {
        let (h, d, s) = (self.heads, self.d, self.state_len());
        let (mut z, mut w) = (vec![f64::NAN; self.q.len()], self.w0.clone());
        for (sequence, start) in self.starts().into_iter().enumerate() {
            let rows = start..start + self.lens[sequence];
            for head in 0..h {
                let pick = |x: &[f64], width: usize| -> Vec<f64> {
                    rows.clone().flat_map(|row| x[(row * h + head) * width..][..width].to_vec()).collect()
                };
                let [q, k, v] = [&self.q, &self.k_rows, &self.v].map(|x| pick(x, d));
                let (lr, mut out) = (pick(&self.lr, 1), vec![0.0; q.len()]);
                let norm = [&self.gamma, &self.beta].map(|x| &x[head * d..][..d]);
                let w = &mut w[(sequence * h + head) * s..][..s];
                let primal = match self.inner {
                    Inner::Linear => ttt_linear::reference::primal::<f64>,
                    Inner::Mlp => ttt_mlp::reference::primal::<f64>,
                };
                primal([&q, &k, &v], [&lr, &self.tok], norm, self.variant, w, &mut out);
                for (row, out) in rows.clone().zip(out.chunks_exact(d)) {
                    z[(row * h + head) * d..][..d].copy_from_slice(out);
                }
            }
        }
        (z, w)
    }

    pub fn statistics(&self, device: &Device, dtype: DType, run: &Run) -> Vec<[f64; 3]> {
        let rows: Vec<usize> = (0..self.lens.iter().sum()).collect();
        let (placed, segments) = (self.place(device, dtype, &rows), self.segments());
        let (inputs, saved) = (self.inputs(&placed, &segments), run.saved.as_ref().unwrap());
        match self.inner {
            Inner::Linear => ttt_linear::statistics(
                &inputs,
                saved,
                &self.state_with(device, dtype, self.lens.len() + 1, |s| self.slot(s)),
                &run.state,
            ),
            Inner::Mlp => ttt_mlp::statistics(
                &inputs,
                saved,
                &self.state_with(device, dtype, self.lens.len() + 1, |s| self.slot(s)),
                &run.state,
            ),
        }
        .unwrap()
    }

    /// The statistics by another way: with q = k and no learning rate the output is f(k), so the error is z - v.
    pub fn expected_statistics(&self) -> Vec<[f64; 3]> {
        let device = Device::cpu().unwrap();
        let (mut sums, wide) = (vec![], self.heads * self.d);
        for (s, start) in self.starts().into_iter().enumerate() {
            let each = self.heads * self.state_len();
            let mut one = self.clone();
            one.lens = vec![1];
            one.q = self.k_rows.clone();
            one.lr.fill(0.0);
            let weights_at = |len: usize| {
                let mut state = self.state(&device, DType::F64);
                let segment = Segment { first_row: 0, len, slot: s, phase: 0 };
                self.forward_rows(&device, DType::F64, &(start..start + len).collect::<Vec<_>>(), &[segment], &mut state);
                state.weights().to_f64_vec()[s * each..][..each].to_vec()
            };
            for m in 0..self.lens[s] / self.k {
                if sums.len() == m {
                    sums.push([0.0; 4]);
                }
                let token = start + (m + 1) * self.k - 1;
                for (i, len) in [0, m * self.k, (m + 1) * self.k].into_iter().enumerate() {
                    one.w0 = weights_at(len);
                    let segment = Segment { first_row: 0, len: 1, slot: 0, phase: 0 };
                    let z = one.forward_rows(&device, DType::F64, &[token], &[segment], &mut one.state(&device, DType::F64));
                    sums[m][i] += z.iter().zip(&self.v[token * wide..]).map(|(z, v)| (z - v) * (z - v)).sum::<f64>();
                }
                sums[m][3] += wide as f64;
            }
        }
        sums.into_iter().map(|[a, b, c, count]| [a / count, b / count, c / count]).collect()
    }
}

/// [`FastWeights::start`] against the layout written out.
pub fn check_start(inner: Inner) {
    let (device, heads, d, k) = (Device::cpu().unwrap(), 3, 4, 2);
    let shapes: &[[usize; 2]] = match inner {
        Inner::Linear => &[[d, d], [1, d]],
        Inner::Mlp => &[[d, 4 * d], [1, 4 * d], [4 * d, d], [1, d]],
    };
    let parts: Vec<Tensor> = shapes
        .iter()
        .enumerate()
        .map(|(i, [rows, cols])| {
            tensor(&device, DType::F32, &[heads * rows, *cols], &noise(20 + i as u64, heads * rows * cols, 1.0))
        })
        .collect();
    let mut state = FastWeights::zeros(&device, DType::F32, inner, 2, heads, d, k).unwrap();
    state.start(1, &parts.iter().map(Tensor::view).collect::<Vec<View<'_>>>());
    let mut expected = vec![0.0; state.weights().len() / 2];
    for head in 0..heads {
        for (part, [rows, cols]) in parts.iter().zip(shapes) {
            expected.extend(&part.to_f64_vec()[head * rows * cols..][..rows * cols]);
        }
    }
    assert_eq!(state.weights().to_f64_vec(), expected);
}

pub struct Oracle {
    pub name: String,
    pub case: Case,
    pub z: Vec<f64>,
    pub w: Vec<f64>,
    pub grads: Grads,
}

/// Outputs and gradients that `fixtures/make_ttt_oracle.py` computed for seeded cases.
pub fn oracle() -> Vec<Oracle> {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/ttt_oracle.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let get = |name: String| -> Vec<f64> {
        let tensor = file.tensor(&name).unwrap();
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) as f64).collect()
    };
    let mut cases: Vec<String> = file.names().iter().filter_map(|n| n.strip_suffix(".z").map(str::to_owned)).collect();
    cases.sort();
    cases
        .into_iter()
        .map(|name| {
            // <inner>-h<heads>-d<width>-k<mini-batch>-t<tokens>
            let mut parts = name.split('-');
            let inner = if parts.next() == Some("linear") { Inner::Linear } else { Inner::Mlp };
            let [heads, d, k, t] = std::array::from_fn(|_| parts.next().unwrap()[1..].parse().unwrap());
            let of = |what: &str| get(format!("{name}.{what}"));
            let grads = Grads {
                q: of("dq"),
                k: of("dk"),
                v: of("dv"),
                lr: of("dlr"),
                tok: of("dtok"),
                gamma: of("dgamma"),
                beta: of("dbeta"),
                w0: of("dw0"),
            };
            Oracle { case: Case::new(inner, heads, d, k, &[t]), z: of("z"), w: of("w"), grads, name }
        })
        .collect()
}
