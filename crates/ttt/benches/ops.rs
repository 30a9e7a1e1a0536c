//! Speed of the operations on all cores: `cargo bench -p ttt --bench ops [-- <filter>]`.
//!
//! The throughput is GFLOP/s for products and losses ("Gelem/s" in the output) and the memory that must be read and written for
//! the rest. `read` is the bandwidth that decoding is measured against.

use criterion::{Criterion, Throughput};
use std::hint::black_box;
use std::time::Duration;
use ttt::batch::Segment;
use ttt::device::Device;
use ttt::ops::rope::{Direction, Table};
use ttt::ops::*;
use ttt::tensor::{DType, Tensor};

fn filled(device: &Device, shape: &[usize]) -> Tensor {
    let data: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5).collect();
    Tensor::from_slice(device, shape, &data).unwrap()
}

fn products(c: &mut Criterion, device: &Device) {
    let mut group = c.benchmark_group("linear");
    for [n, i, o] in [[512, 768, 768], [512, 768, 2304], [512, 768, 4096], [512, 2048, 768], [2048, 256, 688]] {
        let (x, w, dy) = (filled(device, &[n, i]), filled(device, &[o, i]), filled(device, &[n, o]));
        let mut dw = Tensor::zeros(device, &[o, i], DType::F32).unwrap();
        group.throughput(Throughput::Elements(2 * (n * i * o) as u64));
        group.bench_function(format!("forward {n}x{i}x{o}"), |b| b.iter(|| linear::forward(x.view(), w.view()).unwrap()));
        group.bench_function(format!("backward_input {n}x{i}x{o}"), |b| {
            b.iter(|| linear::backward_input(dy.view(), w.view()).unwrap())
        });
        group.bench_function(format!("backward_weight {n}x{i}x{o}"), |b| {
            b.iter(|| linear::backward_weight(dy.view(), x.view(), dw.view_mut()))
        });
    }
}

fn decoding(c: &mut Criterion, device: &Device) {
    let mut group = c.benchmark_group("decode");
    for [o, i] in [[768, 768], [2304, 768], [4096, 768], [768, 2048], [32000, 768]] {
        let w = filled(device, &[o, i]);
        group.throughput(Throughput::Bytes(w.bytes() as u64));
        group.bench_function(format!("read [{o}, {i}]"), |b| b.iter(|| read(w.as_slice())));
        for n in [1, 2, 4, 8, 32] {
            let x = filled(device, &[n, i]);
            group.bench_function(format!("[{n}, {i}] x [{o}, {i}]"), |b| b.iter(|| linear::forward(x.view(), w.view()).unwrap()));
        }
    }
}

/// Reads everything once, with vector loads, on all threads.
fn read(data: &[f32]) -> f32 {
    if data.len() > 65_536 {
        let (a, b) = data.split_at((data.len() / 2).next_multiple_of(1024));
        let (a, b) = rayon::join(|| read(a), || read(b));
        return a + b;
    }
    let mut lanes = [0f32; 64];
    for chunk in data.as_chunks::<64>().0 {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    black_box(lanes).iter().sum()
}

fn rows(c: &mut Criterion, device: &Device) {
    let mut group = c.benchmark_group("rows");
    let (n, d) = (2048, 768);
    let (x, z, dy) = (filled(device, &[n, d]), filled(device, &[n, d]), filled(device, &[n, d]));
    let (w, b) = (filled(device, &[1, d]), filled(device, &[1, d]));
    let mut wide = filled(device, &[n, d]);
    let mut dw = Tensor::zeros(device, &[1, d], DType::F32).unwrap();
    let mut db = Tensor::zeros(device, &[1, d], DType::F32).unwrap();
    let segments = [Segment { first_row: 0, len: n, slot: 0, phase: 0 }];
    let tensors = |k: usize| Throughput::Bytes((k * n * d * 4) as u64);

    group.throughput(tensors(2));
    group.bench_function("rms_norm forward", |bench| bench.iter(|| rms_norm::forward(x.view(), w.view(), 1e-6).unwrap()));
    group.bench_function("layer_norm forward", |bench| {
        bench.iter(|| layer_norm::forward(x.view(), w.view(), b.view(), 1e-6).unwrap())
    });
    let table = Table::new(device, DType::F32, 16, 64, 10_000.0).unwrap();
    group.bench_function("rope", |bench| {
        bench.iter(|| rope::rotate(wide.view_mut(), &table, &segments, d / 64, Direction::Forward))
    });
    let taps = filled(device, &[d, 4]);
    group.bench_function("conv forward", |bench| {
        bench.iter(|| conv::forward(x.view(), taps.view(), b.view(), &segments, None).unwrap())
    });
    group.throughput(tensors(3));
    group.bench_function("rms_norm backward", |bench| {
        bench.iter(|| rms_norm::backward(dy.view(), x.view(), w.view(), 1e-6, dw.view_mut()).unwrap())
    });
    group.bench_function("layer_norm backward", |bench| {
        bench.iter(|| layer_norm::backward(dy.view(), x.view(), w.view(), 1e-6, dw.view_mut(), db.view_mut()).unwrap())
    });
    let mut dtaps = Tensor::zeros(device, &[d, 4], DType::F32).unwrap();
    group.bench_function("conv backward", |bench| {
        bench.iter(|| {
            let (dw, dbias) = (dtaps.view_mut(), db.view_mut());
            conv::backward(dy.view(), x.view(), taps.view(), &segments, None, dw, dbias, None).unwrap()
        })
    });
    group.bench_function("add", |bench| bench.iter(|| add::add_to(wide.view_mut(), x.view())));
    group.bench_function("gelu_gate forward", |bench| bench.iter(|| gelu_gate::forward(z.view(), x.view()).unwrap()));
    group.throughput(tensors(5));
    group.bench_function("gelu_gate backward", |bench| {
        bench.iter(|| gelu_gate::backward(dy.view(), z.view(), x.view(), wide.view_mut()).unwrap())
    });
    let (gate_up, dy) = (filled(device, &[n, 4096]), filled(device, &[n, 2048]));
    group.throughput(Throughput::Bytes((n * 3 * 2048 * 4) as u64));
    group.bench_function("swiglu forward", |bench| bench.iter(|| swiglu::forward(gate_up.view()).unwrap()));
    group.throughput(Throughput::Bytes((n * 5 * 2048 * 4) as u64));
    group.bench_function("swiglu backward", |bench| bench.iter(|| swiglu::backward(dy.view(), gate_up.view()).unwrap()));
    let (heads, bias) = (filled(device, &[12, d]), filled(device, &[1, 12]));
    group.throughput(Throughput::Elements((2 * n * d * 12) as u64));
    group.bench_function("inner_lr forward", |bench| {
        bench.iter(|| inner_lr::forward(x.view(), heads.view(), bias.view(), 0.1).unwrap())
    });
}

fn loss_and_optimizer(c: &mut Criterion, device: &Device) {
    let mut group = c.benchmark_group("step");
    let (n, d, v) = (512, 768, 32_000);
    let (hidden, w) = (filled(device, &[n, d]), filled(device, &[v, d]));
    let mut dw = Tensor::zeros(device, &[v, d], DType::F32).unwrap();
    let (targets, weights) = (vec![7; n], vec![1.0; n]);
    group.throughput(Throughput::Elements(2 * (n * d * v) as u64));
    group
        .bench_function("cross_entropy forward", |b| b.iter(|| cross_entropy::forward(hidden.view(), w.view(), &targets).unwrap()));
    group.throughput(Throughput::Elements(6 * (n * d * v) as u64));
    group.bench_function("cross_entropy forward_backward", |b| {
        b.iter(|| cross_entropy::forward_backward(hidden.view(), w.view(), &targets, &weights, dw.view_mut()).unwrap())
    });
    let mut tensors = [0; 4].map(|_| filled(device, &[v * d]));
    let [p, g, m, s] = &mut tensors;
    s.fill_zero();
    let settings = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    group.throughput(Throughput::Bytes((7 * v * d * 4) as u64));
    group.bench_function("adamw", |b| b.iter(|| adamw::step(p, g, m, s, 10, 1e-4, 1.0, &settings)));
    group.throughput(Throughput::Bytes((v * d * 4) as u64));
    group.bench_function("sum_of_squares", |b| b.iter(|| grad_norm::sum_of_squares(g)));
    group.bench_function("first_non_finite", |b| b.iter(|| grad_norm::first_non_finite(g.view())));
    let ids: Vec<u32> = (0..2048).map(|i| i * 37 % 32_000).collect();
    let dy = filled(device, &[ids.len(), d]);
    group.throughput(Throughput::Bytes((3 * dy.bytes()) as u64));
    group.bench_function("embedding backward", |b| b.iter(|| embedding::backward(&ids, dy.view(), dw.view_mut()).unwrap()));
}

fn main() {
    let device = Device::cpu().unwrap();
    device.install(|| {
        let mut c = Criterion::default()
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(500))
            .sample_size(10)
            .configure_from_args();
        products(&mut c, &device);
        decoding(&mut c, &device);
        rows(&mut c, &device);
        loss_and_optimizer(&mut c, &device);
        c.final_summary();
    });
}
