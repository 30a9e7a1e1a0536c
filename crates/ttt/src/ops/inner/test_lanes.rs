//! The fast code at other widths than this machine's: what another machine would run.

use pulp::{Arch, Scalar, WithSimd};

use super::drive::{self, Learner};
use super::{FastWeights, InputGrads, Inputs, ParamGrads, Variant};
use crate::batch::Segment;
use crate::config::Inner;
use crate::device::Device;
use crate::tensor::{DType, Tensor};

/// Lanes to test; 8 stands for the best that this machine has.
pub(crate) const LANES: [usize; 4] = [1, 4, 8, 16];

/// Runs `op` on vectors of so many numbers, composed of what the machine has.
pub(crate) fn with_lanes<Op: WithSimd>(lanes: usize, op: Op) -> Op::Output {
    #[cfg(target_arch = "x86_64")]
    if let Some(v3) = pulp::x86::V3::try_new() {
        match lanes {
            4 => return op.with_simd(pulp::x86::V3_128b(v3)),
            16 => return op.with_simd(pulp::x86::V3_512b(v3)),
            _ => {}
        }
    }
    if lanes == 1 { op.with_simd(Scalar) } else { Arch::new().dispatch(op) }
}

/// Fails unless two implementations agree in outputs, weights and gradients of a packed batch with tails.
pub(crate) fn agree<A: Learner<f32>, B: Learner<f32>>(inner: Inner, a: A, b: B) {
    let (device, heads, d, k) = (Device::cpu().unwrap(), 2, 32, 5);
    let segments = [0, 1, 2].map(|i| Segment { first_row: [0, 12, 13][i], len: [12, 1, 5][i], slot: i, phase: 0 });
    let (n, state_len) = (18, FastWeights::state_len(inner, d));
    let noise = |seed: u64, shape: &[usize], scale: f32, shift: f32| {
        let mut x = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed + 1);
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            ((x >> 40) as f32 / 8_388_608.0 - 1.0) * scale + shift
        };
        let data: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
        Tensor::from_slice(&device, shape, &data).unwrap()
    };
    let wide = [n, heads * d];
    let [q, k_rows, v, dz] = [1, 2, 3, 4].map(|seed| noise(seed, &wide, 1.0, 0.0));
    let (lr, tok) = (noise(5, &[n, heads], 0.01, 0.015), noise(6, &[1, k], 0.2, 0.5));
    let (gamma, beta) = (noise(7, &[heads, d], 0.3, 1.0), noise(8, &[heads, d], 0.3, 0.0));
    let inputs = Inputs {
        q: q.view(),
        k: k_rows.view(),
        v: v.view(),
        lr: lr.view(),
        tok: tok.view(),
        gamma: gamma.view(),
        beta: beta.view(),
        variant: Variant::default(),
        segments: &segments,
    };
    let results = |run: &dyn Fn(&mut FastWeights, &mut Tensor, InputGrads<'_>, ParamGrads<'_>) -> Tensor| {
        let mut state = FastWeights::zeros(&device, DType::F32, inner, 3, heads, d, k).unwrap();
        *state.weights_mut() = noise(9, &[3, heads, state_len], 0.2, 0.0);
        let mut dstate = noise(10, &[3, heads, state_len], 0.2, 0.0);
        let [mut dq, mut dk, mut dv] = [0; 3].map(|_| noise(0, &wide, f32::NAN, 0.0));
        let (mut dlr, mut dtok) = (noise(0, &[n, heads], f32::NAN, 0.0), noise(0, &[1, k], 0.0, 0.0));
        let [mut dgamma, mut dbeta] = [0; 2].map(|_| noise(0, &[heads, d], 0.0, 0.0));
        let grads = InputGrads { dq: dq.view_mut(), dk: dk.view_mut(), dv: dv.view_mut(), dlr: dlr.view_mut() };
        let params = ParamGrads { dtok: dtok.view_mut(), dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut() };
        let z = run(&mut state, &mut dstate, grads, params);
        [z, state.weights().copy().unwrap(), dq, dk, dv, dlr, dtok, dgamma, dbeta, dstate]
    };
    let [got, expected] = [
        results(&|state, dstate, grads, params| {
            let (z, saved) = drive::forward(a, inner, &inputs, state, Some(2)).unwrap();
            drive::backward(a, inner, &inputs, &saved.unwrap(), dz.view(), dstate, grads, params).unwrap();
            z
        }),
        results(&|state, dstate, grads, params| {
            let (z, saved) = drive::forward(b, inner, &inputs, state, Some(2)).unwrap();
            drive::backward(b, inner, &inputs, &saved.unwrap(), dz.view(), dstate, grads, params).unwrap();
            z
        }),
    ];
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let scale = expected.to_f64_vec().iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        for (x, y) in got.to_f64_vec().iter().zip(expected.to_f64_vec()) {
            assert!((x - y).abs() <= 4e-5 * scale, "result {i}: {x}, not {y}");
        }
    }
}
