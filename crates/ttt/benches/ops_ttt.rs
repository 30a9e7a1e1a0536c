//! Time of TTT-Linear and TTT-MLP on one core: 12 heads of width 64, mini-batches of 16; 512 tokens forward and backward
//! (384 mini-batch-heads), and one token of each of 8 sequences (96 token-heads).
//!
//!     cargo bench -p ttt --bench ops_ttt

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ttt::batch::Segment;
use ttt::config::Inner;
use ttt::device::{Device, Kernels};
use ttt::ops::inner::{FastWeights, InputGrads, Inputs, ParamGrads, Variant};
use ttt::ops::{ttt_linear, ttt_mlp};
use ttt::tensor::{DType, Tensor};

const HEADS: usize = 12;
const D: usize = 64;
const K: usize = 16;

fn noise(device: &Device, shape: &[usize], scale: f32, shift: f32) -> Tensor {
    let mut x = 0x2545_f491_4f6c_dd1du64;
    let data: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            ((x >> 40) as f32 / 8_388_608.0 - 1.0) * scale + shift
        })
        .collect();
    Tensor::from_slice(device, shape, &data).unwrap()
}

struct Data {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    tok: Tensor,
    gamma: Tensor,
    beta: Tensor,
    segments: Vec<Segment>,
}

impl Data {
    fn new(device: &Device, lens: &[usize], phase: usize) -> Data {
        let n: usize = lens.iter().sum();
        let mut first_row = 0;
        let segments = lens.iter().enumerate().map(|(slot, &len)| {
            first_row += len;
            Segment { first_row: first_row - len, len, slot, phase }
        });
        let segments = segments.collect();
        let wide = || noise(device, &[n, HEADS * D], 1.0, 0.0);
        Data {
            q: wide(),
            k: wide(),
            v: wide(),
            lr: noise(device, &[n, HEADS], 0.003, 0.004),
            tok: noise(device, &[1, K], 0.1, 0.3),
            gamma: noise(device, &[HEADS, D], 0.2, 1.0),
            beta: noise(device, &[HEADS, D], 0.2, 0.0),
            segments,
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            lr: self.lr.view(),
            tok: self.tok.view(),
            gamma: self.gamma.view(),
            beta: self.beta.view(),
            variant: Variant::default(),
            segments: &self.segments,
        }
    }
}

fn ops(c: &mut Criterion) {
    let device = Device::cpu_with(1, Kernels::Fast).unwrap();
    for (name, inner) in [("ttt_linear", Inner::Linear), ("ttt_mlp", Inner::Mlp)] {
        let forward = match inner {
            Inner::Linear => ttt_linear::forward,
            Inner::Mlp => ttt_mlp::forward,
        };
        let backward = match inner {
            Inner::Linear => ttt_linear::backward,
            Inner::Mlp => ttt_mlp::backward,
        };
        let state_of = |slots: usize| {
            let mut state = FastWeights::zeros(&device, DType::F32, inner, slots, HEADS, D, K).unwrap();
            let shape = state.weights().shape().to_vec();
            *state.weights_mut() = noise(&device, &shape, 0.1, 0.0);
            state
        };
        let mut group = c.benchmark_group(name);
        group
            .sample_size(20)
            .measurement_time(std::time::Duration::from_secs(2))
            .warm_up_time(std::time::Duration::from_millis(500));

        let data = Data::new(&device, &[512], 0);
        let inputs = data.inputs();
        let mut state = state_of(1);
        group.throughput(Throughput::Elements((512 / K * HEADS) as u64));
        group.bench_function("forward", |b| b.iter(|| device.install(|| forward(&inputs, &mut state, None).unwrap())));
        for g in [1, 4] {
            let mut state = state_of(1);
            let saved = forward(&inputs, &mut state, Some(g)).unwrap().1.unwrap();
            let wide = || Tensor::zeros(&device, &[512, HEADS * D], DType::F32).unwrap();
            let dz = noise(&device, &[512, HEADS * D], 1.0, 0.0);
            let (mut dq, mut dk, mut dv) = (wide(), wide(), wide());
            let mut dlr = noise(&device, &[512, HEADS], 0.0, 0.0);
            let mut dstate = noise(&device, &[1, HEADS, FastWeights::state_len(inner, D)], 0.01, 0.0);
            let mut dtok = noise(&device, &[1, K], 0.0, 0.0);
            let (mut dgamma, mut dbeta) = (noise(&device, &[HEADS, D], 0.0, 0.0), noise(&device, &[HEADS, D], 0.0, 0.0));
            group.bench_function(format!("backward g={g}"), |b| {
                b.iter(|| {
                    let d = InputGrads { dq: dq.view_mut(), dk: dk.view_mut(), dv: dv.view_mut(), dlr: dlr.view_mut() };
                    let p = ParamGrads { dtok: dtok.view_mut(), dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut() };
                    device.install(|| backward(&inputs, &saved, dz.view(), &mut dstate, d, p).unwrap())
                })
            });
        }

        let data = Data::new(&device, &[1; 8], 7);
        let inputs = data.inputs();
        let mut state = state_of(8);
        group.throughput(Throughput::Elements(8 * HEADS as u64));
        group.bench_function("decode", |b| b.iter(|| device.install(|| forward(&inputs, &mut state, None).unwrap())));
        group.finish();
    }
}

criterion_group!(benches, ops);
criterion_main!(benches);
