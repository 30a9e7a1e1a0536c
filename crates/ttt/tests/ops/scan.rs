//! The selective scan: any cut gives the same, and it is linear in what a scan over time splits.

use ttt::batch::Segment;
use ttt::device::Device;
use ttt::device::view::View;
use ttt::ops::selective_scan::{self, CHUNK};
use ttt::tensor::{DType, Tensor};

use crate::case::{expect_close, fast, filled, placed, reference};
use crate::cases::{scan_gradients, scan_inputs, segments};

/// More channels than a block, not a multiple of any vector; more tokens than two chunks.
const CHANNELS: usize = 107;
const STATES: usize = 5;
const TOKENS: usize = 2 * CHUNK + 43;

/// The inputs of a scan over `n` rows, in the order of `SCAN`, without states.
fn inputs(device: &Device, n: usize, dtype: DType) -> Vec<Tensor> {
    let shapes = [[n, CHANNELS], [n, CHANNELS], [n, STATES], [n, STATES], [CHANNELS, STATES], [1, CHANNELS], [1, CHANNELS]];
    let fill = |(seed, shape): (usize, [usize; 2])| filled(device, &shape, seed).cast(dtype).unwrap();
    shapes.into_iter().enumerate().map(fill).collect()
}

/// The rows `from..to` of the inputs that have rows.
fn rows(all: &[Tensor], from: usize, to: usize) -> Vec<View<'_>> {
    all.iter().enumerate().map(|(i, t)| if i < 4 { t.view().row_range(from..to) } else { t.view() }).collect()
}

fn one(len: usize, slot: usize, phase: usize) -> [Segment; 1] {
    [Segment { first_row: 0, len, slot, phase }]
}

#[test]
fn a_scan_in_pieces_is_the_scan() {
    for device in [fast(2), reference()] {
        let all = inputs(&device, TOKENS, DType::F32);
        let start = filled(&device, &[2, STATES, CHANNELS], 9);
        let mut end = start.copy().unwrap();
        let whole = one(TOKENS, 1, 3);
        let (y, _) = selective_scan::forward(&scan_inputs(&rows(&all, 0, TOKENS), &whole), Some(&mut end), false).unwrap();
        let mut state = start.copy().unwrap();
        let mut at = 0;
        for len in [1, 0, 1, 62, 3, CHUNK, 15, TOKENS - 146] {
            let (views, segments) = (rows(&all, at, at + len), one(len, 1, at % 16));
            let (part, _) = selective_scan::forward(&scan_inputs(&views, &segments), Some(&mut state), false).unwrap();
            assert_eq!(part.as_slice::<f32>(), &y.as_slice::<f32>()[at * CHANNELS..(at + len) * CHANNELS], "rows from {at}");
            at += len;
        }
        assert_eq!(at, TOKENS);
        assert_eq!(state.as_slice::<f32>(), end.as_slice::<f32>());
        let slot = STATES * CHANNELS;
        assert_eq!(&state.as_slice::<f32>()[..slot], &start.as_slice::<f32>()[..slot], "the other slot");
    }
}

#[test]
fn a_token_of_many_sequences_is_that_of_each() {
    let device = fast(2);
    let slots = 37;
    let all = inputs(&device, slots, DType::F32);
    let start = filled(&device, &[slots, STATES, CHANNELS], 9);
    let mut together = start.copy().unwrap();
    let every = segments(&vec![1; slots]);
    let (y, _) = selective_scan::forward(&scan_inputs(&rows(&all, 0, slots), &every), Some(&mut together), false).unwrap();
    let mut alone = start;
    for s in &every {
        let (views, segments) = (rows(&all, s.first_row, s.first_row + 1), one(1, s.slot, 0));
        let (part, _) = selective_scan::forward(&scan_inputs(&views, &segments), Some(&mut alone), false).unwrap();
        assert_eq!(part.as_slice::<f32>(), &y.as_slice::<f32>()[s.first_row * CHANNELS..][..CHANNELS], "slot {}", s.slot);
    }
    assert_eq!(alone.as_slice::<f32>(), together.as_slice::<f32>());
}

#[test]
fn gradients_cross_a_cut() {
    for (device, dtype, ratio) in [(fast(2), DType::F32, 1e-6), (reference(), DType::F64, 1e-13)] {
        let all = inputs(&device, TOKENS, dtype);
        let dy = filled(&device, &[TOKENS, CHANNELS], 20).cast(dtype).unwrap();
        let dend = filled(&device, &[1, STATES, CHANNELS], 21).cast(dtype).unwrap();
        let start = filled(&device, &[1, STATES, CHANNELS], 9).cast(dtype).unwrap();
        let pass = |cuts: &[usize]| {
            let mut state = start.copy().unwrap();
            let mut saved = Vec::new();
            let pieces: Vec<(usize, usize)> = cuts.windows(2).map(|c| (c[0], c[1])).collect();
            for &(from, to) in &pieces {
                let (views, segments) = (rows(&all, from, to), one(to - from, 0, 0));
                saved.extend(selective_scan::forward(&scan_inputs(&views, &segments), Some(&mut state), true).unwrap().1);
            }
            let mut dstate = dend.copy().unwrap();
            // Of activations row by row, of parameters summed up.
            let mut sums: Vec<Vec<f64>> = vec![Vec::new(); 7];
            for (&(from, to), saved) in pieces.iter().zip(&saved).rev() {
                let (views, segments) = (rows(&all, from, to), one(to - from, 0, 0));
                let dy = dy.view().row_range(from..to);
                for (i, d) in scan_gradients(&views, &segments, saved, dy, Some(&mut dstate)).iter().enumerate() {
                    let d = d.to_f64_vec();
                    match i {
                        0..4 => sums[i].splice(0..0, d).for_each(drop),
                        _ if sums[i].is_empty() => sums[i] = d,
                        _ => sums[i].iter_mut().zip(d).for_each(|(sum, d)| *sum += d),
                    }
                }
            }
            sums.push(dstate.to_f64_vec());
            sums
        };
        let whole = pass(&[0, TOKENS]);
        let cut = pass(&[0, 1, CHUNK, CHUNK + 40, TOKENS]);
        for ((name, whole), cut) in crate::cases::SCAN.iter().zip(&whole).zip(&cut) {
            expect_close(&format!("d{name} {dtype:?}"), cut, whole, ratio);
        }
    }
}

/// What a scan in parallel over time rests on: the outputs from a state are those from zero, and those of the state's decay alone.
#[test]
fn inputs_and_states_superpose() {
    let device = reference();
    let all = inputs(&device, TOKENS, DType::F64);
    let zero_x = Tensor::zeros(&device, &[TOKENS, CHANNELS], DType::F64).unwrap();
    let segments = one(TOKENS, 0, 0);
    let run = |x: &Tensor, start: Option<&Tensor>| {
        let mut views = rows(&all, 0, TOKENS);
        views[0] = x.view();
        let zeros = || Tensor::zeros(&device, &[1, STATES, CHANNELS], DType::F64).unwrap();
        let mut state = start.map_or_else(zeros, |start| start.copy().unwrap());
        let (y, _) = selective_scan::forward(&scan_inputs(&views, &segments), Some(&mut state), false).unwrap();
        (y.to_f64_vec(), state.to_f64_vec())
    };
    let start = filled(&device, &[1, STATES, CHANNELS], 9).cast(DType::F64).unwrap();
    let (both, inputs, states) = (run(&all[0], Some(&start)), run(&all[0], None), run(&zero_x, Some(&start)));
    let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>();
    expect_close("y", &sum(&inputs.0, &states.0), &both.0, 1e-14);
    expect_close("state", &sum(&inputs.1, &states.1), &both.1, 1e-14);
}

/// A scan by hand: one channel, one state, two tokens.
#[test]
fn a_scan_by_hand() {
    for (device, dtype) in [(fast(1), DType::F32), (reference(), DType::F64)] {
        let tensor = |shape: [usize; 2], data: &[f64]| placed(&device, &shape, data, dtype);
        let ln_2 = std::f64::consts::LN_2;
        // softplus(ln(e^d − 1)) = d: the step sizes are ln 2 and 2 ln 2, and A is −1: decays of a half and a quarter.
        let step = |d: f64| (d.exp() - 1.0).ln();
        let all = [
            tensor([2, 1], &[3.0, -5.0]),
            tensor([2, 1], &[step(ln_2) - 0.5, step(2.0 * ln_2) - 0.5]),
            tensor([2, 1], &[2.0, 1.0]),
            tensor([2, 1], &[1.0, 4.0]),
            tensor([1, 1], &[0.0]),
            tensor([1, 1], &[10.0]),
            tensor([1, 1], &[0.5]),
        ];
        let views: Vec<View> = all.iter().map(Tensor::view).collect();
        let mut state = tensor([1, 1], &[8.0]).reshape(&[1, 1, 1]);
        let (y, _) = selective_scan::forward(&scan_inputs(&views, &one(2, 0, 0)), Some(&mut state), false).unwrap();
        let h = [0.5 * 8.0 + ln_2 * 2.0 * 3.0, 0.25 * (4.0 + ln_2 * 6.0) + 2.0 * ln_2 * -5.0];
        expect_close("h", &state.to_f64_vec(), &h[1..], 4e-7);
        expect_close("y", &y.to_f64_vec(), &[h[0] + 30.0, 4.0 * h[1] - 50.0], 4e-7);
    }
}

#[test]
#[should_panic(expected = "states are [1, 5, 107] and should be [at least 2, 5, 107]")]
fn a_slot_without_a_state_panics() {
    let device = reference();
    let all = inputs(&device, 3, DType::F32);
    let mut state = filled(&device, &[1, STATES, CHANNELS], 9);
    let _ = selective_scan::forward(&scan_inputs(&rows(&all, 0, 3), &one(3, 1, 0)), Some(&mut state), false);
}
