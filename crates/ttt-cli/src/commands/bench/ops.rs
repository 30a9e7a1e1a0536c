//! Every operation on its own, at the model's sizes.

use anyhow::Result;
use ttt::batch::Segment;
use ttt::config::{Config, Inner, Mixer};
use ttt::device::Device;
use ttt::device::view::View;
use ttt::ops::inner::{FastWeights, InputGrads, Inputs, ParamGrads, Variant};
use ttt::ops::{adamw, conv, cross_entropy, gelu_gate, linear, rms_norm, selective_scan, silu, swiglu, ttt_linear, ttt_mlp};
use ttt::plan::flops;
use ttt::tensor::{DType, Tensor};

use super::{Measured, measure};
use crate::args::Bench;

/// Tensors as a model has them: on a GPU activations and operands of products in bf16.
struct Make<'d>(&'d Device);

impl Make<'_> {
    /// Activations, around 0.
    fn numbers(&self, shape: &[usize]) -> Result<Tensor> {
        let numbers = self.parameters(shape, small)?;
        if self.0.as_cuda().is_some() { Ok(numbers.cast(DType::Bf16)?) } else { Ok(numbers) }
    }

    /// Activations to be written.
    fn room(&self, shape: &[usize]) -> Result<Tensor> {
        let dtype = if self.0.as_cuda().is_some() { DType::Bf16 } else { DType::F32 };
        Ok(Tensor::zeros(self.0, shape, dtype)?)
    }

    fn parameters(&self, shape: &[usize], value: impl Fn(usize) -> f32) -> Result<Tensor> {
        let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
        Ok(Tensor::from_slice(self.0, shape, &values)?)
    }

    fn zeros(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::zeros(self.0, shape, DType::F32)?)
    }
}

/// Parameters around 0.
fn small(i: usize) -> f32 {
    0.1 * (i as f32 * 0.7).sin()
}

/// Measures all operations. The rates are tokens a second through that operation alone.
pub fn all(args: &Bench, config: &Config, device: &Device) -> Result<Vec<Measured>> {
    let make = Make(device);
    // Bytes of an activation.
    let size = if device.as_cuda().is_some() { 2 } else { 4 };
    let (d, wide, taps) = (config.hidden_size, config.intermediate_size, config.conv_kernel);
    let n = (args.batch * args.length) as usize;
    let length = args.length as usize;
    let segments: Vec<Segment> =
        (0..args.batch as usize).map(|slot| Segment { first_row: slot * length, len: length, slot, phase: 0 }).collect();
    let [x, dy] = [make.numbers(&[n, d])?, make.numbers(&[n, d])?];
    let row = (size * d) as f64;
    let mut all = Vec::new();
    let mut time = |name: &str, cost: [f64; 2], work: &mut (dyn FnMut() -> Result<()> + Send)| -> Result<()> {
        all.push(measure(name, device, args.repeat, n as f64, cost, || device.install(&mut *work))?);
        Ok(())
    };

    for (name, inputs, outputs) in [("D to D", d, d), ("D to 2 I", d, 2 * wide), ("I to D", wide, d)] {
        let [x, w, dy] = [make.numbers(&[n, inputs])?, make.numbers(&[outputs, inputs])?, make.numbers(&[n, outputs])?];
        let mut dw = make.zeros(&[outputs, inputs])?;
        let cost = [2.0 * (inputs * outputs) as f64, 4.0 * (inputs + outputs) as f64];
        time(&format!("linear {name}"), cost, &mut || Ok(linear::forward(x.view(), w.view()).map(drop)?))?;
        let both = [2.0 * cost[0], 2.0 * cost[1]];
        time(&format!("linear {name}, backward"), both, &mut || {
            linear::backward_input(dy.view(), w.view())?;
            linear::backward_weight(dy.view(), x.view(), dw.view_mut());
            Ok(())
        })?;
    }

    let weight = make.parameters(&[1, d], small)?;
    let mut dweight = make.zeros(&[1, d])?;
    time("rms_norm", [4.0 * d as f64, 2.0 * row], &mut || Ok(rms_norm::forward(x.view(), weight.view(), 1e-6).map(drop)?))?;
    time("rms_norm, backward", [10.0 * d as f64, 3.0 * row], &mut || {
        Ok(rms_norm::backward(dy.view(), x.view(), weight.view(), 1e-6, dweight.view_mut()).map(drop)?)
    })?;

    let [kernel, bias] = [make.parameters(&[d, taps], small)?, make.parameters(&[1, d], small)?];
    let [mut dkernel, mut dbias] = [make.zeros(&[d, taps])?, make.zeros(&[1, d])?];
    time("conv", [2.0 * (taps * d) as f64, 2.0 * row], &mut || {
        Ok(conv::forward(x.view(), kernel.view(), bias.view(), &segments, None).map(drop)?)
    })?;
    time("conv, backward", [4.0 * (taps * d) as f64, 3.0 * row], &mut || {
        let (dw, db) = (dkernel.view_mut(), dbias.view_mut());
        Ok(conv::backward(dy.view(), x.view(), kernel.view(), &segments, None, dw, db, None).map(drop)?)
    })?;

    let [gate_up, dhidden] = [make.numbers(&[n, 2 * wide])?, make.numbers(&[n, wide])?];
    time("swiglu", [5.0 * wide as f64, 12.0 * wide as f64], &mut || Ok(swiglu::forward(gate_up.view()).map(drop)?))?;
    time("swiglu, backward", [10.0 * wide as f64, 20.0 * wide as f64], &mut || {
        Ok(swiglu::backward(dhidden.view(), gate_up.view()).map(drop)?)
    })?;
    time("gelu_gate", [10.0 * d as f64, 3.0 * row], &mut || Ok(gelu_gate::forward(x.view(), dy.view()).map(drop)?))?;

    match config.mixer {
        Mixer::Ttt => inner(config, &make, &segments, n, &mut time)?,
        Mixer::Attention => attention(config, &make, &segments, n, &mut time)?,
        Mixer::Mamba => mamba(config, &make, &segments, n, &mut time)?,
    }

    let head = make.numbers(&[config.vocab_size, d])?;
    let mut dhead = make.zeros(&[config.vocab_size, d])?;
    let targets: Vec<u32> = (0..n).map(|i| (i % config.vocab_size) as u32).collect();
    let weights = vec![1.0 / n as f64; n];
    let product = 2.0 * (d * config.vocab_size) as f64;
    time("cross_entropy, both directions", [3.0 * product, 2.0 * row], &mut || {
        Ok(cross_entropy::forward_backward(x.view(), head.view(), &targets, &weights, dhead.view_mut()).map(drop)?)
    })?;

    // As many parameters as two layers' matrices; the rate is per token of the batch, as everywhere.
    let parameters = 2 * (5 * d * d + 3 * d * wide);
    let [mut p, g] = [make.parameters(&[parameters], small)?, make.parameters(&[parameters], small)?];
    let [mut m, mut v] = [make.zeros(&[parameters])?, make.zeros(&[parameters])?];
    let settings = adamw::Settings { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let per_token = parameters as f64 / n as f64;
    time("adamw of two layers", [12.0 * per_token, 28.0 * per_token], &mut || {
        adamw::step(&mut p, &g, &mut m, &mut v, 0, 1e-3, 1.0, &settings);
        Ok(())
    })?;
    Ok(all)
}

/// Measures one operation: its name, its cost per token and its work.
type Time<'t> = dyn FnMut(&str, [f64; 2], &mut (dyn FnMut() -> Result<()> + Send)) -> Result<()> + 't;

/// The attention of one layer.
fn attention(config: &Config, make: &Make<'_>, segments: &[Segment], n: usize, time: &mut Time<'_>) -> Result<()> {
    let (d, kv, head_dim) = (config.hidden_size, config.key_value_size(), config.head_dim());
    let [q, dout] = [make.numbers(&[n, d])?, make.numbers(&[n, d])?];
    let [k, v] = [make.numbers(&[n, kv])?, make.numbers(&[n, kv])?];
    let inputs = ttt::ops::attention::Inputs { q: q.view(), k: k.view(), v: v.view(), head_dim, past: None, segments };
    let cost = flops(config, n / segments.len()).mixing / config.num_hidden_layers as f64;
    let row = (4 * (2 * d + 2 * kv)) as f64;
    time("attention", [cost, row], &mut || Ok(ttt::ops::attention::forward(&inputs).map(drop)?))?;
    let [o, log_sum] = ttt::ops::attention::forward(&inputs)?;
    let [mut dq, mut dk, mut dv] = [make.room(&[n, d])?, make.room(&[n, kv])?, make.room(&[n, kv])?];
    // Scores are computed again: five products where the forward pass has two.
    time("attention, backward", [2.5 * cost, 2.0 * row], &mut || {
        let grads = ttt::ops::attention::Grads { dq: dq.view_mut(), dk: dk.view_mut(), dv: dv.view_mut() };
        Ok(ttt::ops::attention::backward(&inputs, [&o, &log_sum], dout.view(), None, grads)?)
    })
}

/// Scan, activation and gate of one Mamba layer.
fn mamba(config: &Config, make: &Make<'_>, segments: &[Segment], n: usize, time: &mut Time<'_>) -> Result<()> {
    let (inner, states) = (config.inner_size(), config.state_size);
    let row = (if make.0.as_cuda().is_some() { 2 * inner } else { 4 * inner }) as f64;
    let [x, dt, dy] = [make.numbers(&[n, inner])?, make.numbers(&[n, inner])?, make.numbers(&[n, inner])?];
    time("silu", [4.0 * inner as f64, 2.0 * row], &mut || Ok(silu::forward(x.view()).map(drop)?))?;
    time("silu gate", [5.0 * inner as f64, 3.0 * row], &mut || Ok(silu::gate(dt.view(), x.view()).map(drop)?))?;
    let [b, c] = [make.numbers(&[n, states])?, make.numbers(&[n, states])?];
    let a_log = make.parameters(&[inner, states], |i| ((i % states + 1) as f32).ln())?;
    // Steps of about 0.01, as a model starts with.
    let [d, dt_bias] = [make.parameters(&[1, inner], small)?, make.parameters(&[1, inner], |_| -4.6)?];
    let inputs = selective_scan::Inputs {
        x: x.view(),
        dt: dt.view(),
        b: b.view(),
        c: c.view(),
        a_log: a_log.view(),
        d: d.view(),
        dt_bias: dt_bias.view(),
        segments,
    };
    let cost = (9 * inner * states) as f64;
    time("selective_scan", [cost, 3.0 * row], &mut || Ok(selective_scan::forward(&inputs, None, false).map(drop)?))?;
    let (_, saved) = selective_scan::forward(&inputs, None, true)?;
    let saved = saved.expect("a pass that keeps states");
    let [mut dx, mut ddt] = [make.room(&[n, inner])?, make.room(&[n, inner])?];
    let [mut db, mut dc] = [make.room(&[n, states])?, make.room(&[n, states])?];
    let mut da_log = make.zeros(&[inner, states])?;
    let [mut dd, mut ddt_bias] = [make.zeros(&[1, inner])?, make.zeros(&[1, inner])?];
    time("selective_scan, backward", [2.0 * cost, 6.0 * row], &mut || {
        let (dx, ddt, db, dc) = (dx.view_mut(), ddt.view_mut(), db.view_mut(), dc.view_mut());
        let activations = selective_scan::InputGrads { dx, ddt, db, dc };
        let (da_log, dd, ddt_bias) = (da_log.view_mut(), dd.view_mut(), ddt_bias.view_mut());
        let parameters = selective_scan::ParamGrads { da_log, dd, ddt_bias };
        Ok(selective_scan::backward(&inputs, &saved, dy.view(), None, activations, parameters)?)
    })
}

/// The inner loop of one layer.
fn inner(config: &Config, make: &Make<'_>, segments: &[Segment], n: usize, time: &mut Time<'_>) -> Result<()> {
    // Batch descent and linear attention are not mini-batches.
    let Some(k) = config.mini_batch() else { return Ok(()) };
    let (heads, width) = (config.num_attention_heads, config.head_dim());
    let (d, kind) = (config.hidden_size, config.ttt_layer_type);
    let [q, keys, v, dz] = [&[n, d][..]; 4].map(|shape| make.numbers(shape));
    let (q, keys, v, dz) = (q?, keys?, v?, dz?);
    let lr = make.parameters(&[n, heads], |_| config.ttt_base_lr as f32 / width as f32 / 2.0)?;
    let tok = make.parameters(&[1, k], |i| 1.0 / (i + 1) as f32)?;
    let gamma = make.parameters(&[heads, width], |_| 1.0)?;
    let beta = make.zeros(&[heads, width])?;
    let inputs = Inputs {
        q: q.view(),
        k: keys.view(),
        v: v.view(),
        lr: lr.view(),
        tok: tok.view(),
        gamma: gamma.view(),
        beta: beta.view(),
        variant: Variant::default(),
        segments,
    };
    let slots = segments.len();
    let start: Vec<Tensor> = match kind {
        Inner::Linear => vec![make.parameters(&[heads * width, width], small)?, make.zeros(&[heads, width])?],
        Inner::Mlp => vec![
            make.parameters(&[heads * width, 4 * width], small)?,
            make.zeros(&[heads, 4 * width])?,
            make.parameters(&[heads * 4 * width, width], small)?,
            make.zeros(&[heads, width])?,
        ],
    };
    let initial: Vec<View<'_>> = start.iter().map(Tensor::view).collect();
    let mut state = FastWeights::zeros(make.0, DType::F32, kind, slots, heads, width, k)?;
    let cost = flops(config, n).mixing / config.num_hidden_layers as f64;
    let row = (if make.0.as_cuda().is_some() { 2 * d } else { 4 * d }) as f64;
    let group = config.checkpoint_group();
    let forward = match kind {
        Inner::Linear => ttt_linear::forward,
        Inner::Mlp => ttt_mlp::forward,
    };
    let begin = |state: &mut FastWeights| (0..slots).for_each(|slot| state.start(slot, &initial));
    time("ttt", [cost, 4.0 * row], &mut || {
        begin(&mut state);
        Ok(forward(&inputs, &mut state, None).map(drop)?)
    })?;
    begin(&mut state);
    let (_, saved) = forward(&inputs, &mut state, Some(group))?;
    let saved = saved.expect("a pass with a group keeps states");
    let [mut dq, mut dk, mut dv] = [make.room(&[n, d])?, make.room(&[n, d])?, make.room(&[n, d])?];
    let mut dlr = make.zeros(&[n, heads])?;
    let mut dtok = make.zeros(&[1, k])?;
    let [mut dgamma, mut dbeta] = [make.zeros(&[heads, width])?, make.zeros(&[heads, width])?];
    let mut dstate = make.zeros(&[slots, heads, FastWeights::state_len(kind, width)])?;
    time("ttt, backward", [2.0 * cost, 8.0 * row], &mut || {
        dstate.fill_zero();
        let d = InputGrads { dq: dq.view_mut(), dk: dk.view_mut(), dv: dv.view_mut(), dlr: dlr.view_mut() };
        let p = ParamGrads { dtok: dtok.view_mut(), dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut() };
        match kind {
            Inner::Linear => ttt_linear::backward(&inputs, &saved, dz.view(), &mut dstate, d, p)?,
            Inner::Mlp => ttt_mlp::backward(&inputs, &saved, dz.view(), &mut dstate, d, p)?,
        }
        Ok(())
    })
}
