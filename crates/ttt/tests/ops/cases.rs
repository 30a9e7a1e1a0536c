//! A case of every operation.

use ttt::batch::Segment;
use ttt::device::view::View;
use ttt::ops::rope::{Direction, Table};
use ttt::ops::*;
use ttt::tensor::Tensor;

use crate::case::{Case, added, placed, tensor_of};

/// Packed segments of the given lengths with phases and slots that differ.
pub fn segments(lengths: &[usize]) -> Vec<Segment> {
    let mut first_row = 0;
    let segment = |(i, &len): (usize, &usize)| {
        first_row += len;
        Segment { first_row: first_row - len, len, slot: lengths.len() - 1 - i, phase: (7 * i + 3) % 16 }
    };
    lengths.iter().enumerate().map(segment).collect()
}

const LENGTHS: [usize; 7] = [0, 1, 2, 15, 17, 0, 3];

pub fn linear_case(n: usize, i: usize, o: usize) -> Case {
    Case::new("linear", &[("x", &[n, i]), ("w", &[o, i])]).forward(|v| vec![linear::forward(v[0], v[1]).unwrap()]).backward(
        |v, dy| {
            let dx = linear::backward_input(dy[0].view(), v[1]).unwrap();
            vec![dx, added(v[1], |dw| linear::backward_weight(dy[0].view(), v[0], dw.view_mut()))]
        },
    )
}

pub fn linear_onto_case(n: usize, i: usize, o: usize) -> Case {
    Case::new("linear_onto", &[("x", &[n, i]), ("w", &[o, i]), ("c", &[n, o])])
        .forward(|v| vec![linear::forward_onto(v[0], v[1], v[2]).unwrap()])
        .backward(|v, dy| {
            let dx = linear::backward_input(dy[0].view(), v[1]).unwrap();
            vec![dx, added(v[1], |dw| linear::backward_weight(dy[0].view(), v[0], dw.view_mut())), dy[0].clone()]
        })
}

/// `y = x + norm(x)`, whose two gradients are one call.
pub fn rms_norm_residual_case(n: usize, d: usize) -> Case {
    Case::new("rms_norm_residual", &[("x", &[n, d]), ("w", &[1, d])])
        .in_f32(&[1])
        .forward(|v| {
            let mut y = rms_norm::forward(v[0], v[1], 1e-6).unwrap();
            add::add_to(y.view_mut(), v[0]);
            vec![y]
        })
        .backward(|v, dy| {
            let (mut dx, dy) = (None, dy[0].view());
            let dw = added(v[1], |dw| {
                dx = Some(rms_norm::backward_onto(dy, v[0], v[1], 1e-6, dw.view_mut(), Some(dy)).unwrap());
            });
            vec![dx.unwrap(), dw]
        })
}

pub fn embedding_case(n: usize, v: usize, d: usize) -> Case {
    let ids: Vec<u32> = (0..n).map(|i| (i * i % v) as u32).collect();
    let again = ids.clone();
    Case::new("embedding", &[("table", &[v, d])])
        .forward(move |v| vec![embedding::forward(&ids, v[0]).unwrap()])
        .backward(move |v, dy| vec![added(v[0], |d| embedding::backward(&again, dy[0].view(), d.view_mut()).unwrap())])
}

pub fn rms_norm_case(n: usize, d: usize) -> Case {
    Case::new("rms_norm", &[("x", &[n, d]), ("w", &[1, d])])
        .in_f32(&[1])
        .forward(|v| vec![rms_norm::forward(v[0], v[1], 1e-6).unwrap()])
        .backward(|v, dy| {
            let mut dx = None;
            let dw = added(v[1], |dw| dx = Some(rms_norm::backward(dy[0].view(), v[0], v[1], 1e-6, dw.view_mut()).unwrap()));
            vec![dx.unwrap(), dw]
        })
}

pub fn layer_norm_case(n: usize, d: usize) -> Case {
    Case::new("layer_norm", &[("x", &[n, d]), ("w", &[1, d]), ("b", &[1, d])])
        .in_f32(&[1, 2])
        .forward(|v| vec![layer_norm::forward(v[0], v[1], v[2], 1e-6).unwrap()])
        .backward(|v, dy| {
            let (mut dx, mut dw) = (None, None);
            let db = added(v[2], |db| {
                dw = Some(added(v[1], |dw| {
                    let (dw, db) = (dw.view_mut(), db.view_mut());
                    dx = Some(layer_norm::backward(dy[0].view(), v[0], v[1], 1e-6, dw, db).unwrap());
                }));
            });
            vec![dx.unwrap(), dw.unwrap(), db]
        })
}

/// Outputs: y and the windows afterwards.
pub fn conv_case(channels: usize, taps: usize) -> Case {
    let n = LENGTHS.iter().sum();
    let slots = LENGTHS.len();
    let shape = [slots, taps - 1, channels];
    let window = &[slots * (taps - 1), channels];
    Case::new("conv", &[("x", &[n, channels]), ("w", &[channels, taps]), ("bias", &[1, channels]), ("window", window)])
        .in_f32(&[1, 2])
        .forward(move |v| {
            let mut window = tensor_of(v[3]).reshape(&shape);
            let y = conv::forward(v[0], v[1], v[2], &segments(&LENGTHS), Some(&window)).unwrap();
            conv::advance(v[0], &segments(&LENGTHS), &mut window);
            vec![y, window]
        })
        .backward(move |v, dy| {
            let segments = segments(&LENGTHS);
            let window = tensor_of(v[3]).reshape(&shape);
            // Not zero: the slots must be overwritten.
            let mut dwindow = window.copy().unwrap();
            let (mut dx, mut dw) = (None, None);
            let dbias = added(v[2], |dbias| {
                dw = Some(added(v[1], |dw| {
                    let (dw, dbias) = (dw.view_mut(), dbias.view_mut());
                    let dy = dy[0].view();
                    let (window, dwindow) = (Some(&window), Some(&mut dwindow));
                    dx = Some(conv::backward(dy, v[0], v[1], &segments, window, dw, dbias, dwindow).unwrap());
                }));
            });
            let mut dx = dx.unwrap();
            conv::backward_advance(&dy[1], &segments, dx.view_mut(), &mut dwindow);
            vec![dx, dw.unwrap(), dbias, dwindow]
        })
}

pub fn conv_case_without_window(channels: usize, taps: usize) -> Case {
    let n = LENGTHS.iter().sum();
    Case::new("conv without window", &[("x", &[n, channels]), ("w", &[channels, taps]), ("bias", &[1, channels])])
        .in_f32(&[1, 2])
        .forward(move |v| vec![conv::forward(v[0], v[1], v[2], &segments(&LENGTHS), None).unwrap()])
        .backward(move |v, dy| {
            let (mut dx, mut dw) = (None, None);
            let dbias = added(v[2], |dbias| {
                dw = Some(added(v[1], |dw| {
                    let (dw, dbias) = (dw.view_mut(), dbias.view_mut());
                    dx = Some(conv::backward(dy[0].view(), v[0], v[1], &segments(&LENGTHS), None, dw, dbias, None).unwrap());
                }));
            });
            vec![dx.unwrap(), dw.unwrap(), dbias]
        })
}

pub fn rope_case(heads: usize, head_dim: usize) -> Case {
    let rotate = move |x: &mut Tensor, direction| {
        let table = Table::new(x.device(), x.dtype(), 16, head_dim, 10_000.0).unwrap();
        rope::rotate(x.view_mut(), &table, &segments(&LENGTHS), heads, direction);
    };
    Case::new("rope", &[("x", &[LENGTHS.iter().sum(), heads * head_dim])])
        .forward(move |v| {
            let mut y = tensor_of(v[0]);
            rotate(&mut y, Direction::Forward);
            vec![y]
        })
        .backward(move |_, dy| {
            let mut dx = dy[0].copy().unwrap();
            rotate(&mut dx, Direction::Backward);
            vec![dx]
        })
}

pub fn gelu_gate_case(n: usize, d: usize) -> Case {
    Case::new("gelu_gate", &[("gate", &[n, d]), ("x", &[n, d])])
        .forward(|v| vec![gelu_gate::forward(v[0], v[1]).unwrap()])
        .backward(|v, dy| {
            let mut dgate = tensor_of(v[0]);
            let dx = gelu_gate::backward(dy[0].view(), v[0], v[1], dgate.view_mut()).unwrap();
            vec![dgate, dx]
        })
}

pub fn swiglu_case(n: usize, width: usize) -> Case {
    Case::new("swiglu", &[("gate_up", &[n, 2 * width])])
        .forward(|v| vec![swiglu::forward(v[0]).unwrap()])
        .backward(|v, dy| vec![swiglu::backward(dy[0].view(), v[0]).unwrap()])
}

pub fn silu_case(n: usize, d: usize) -> Case {
    Case::new("silu", &[("x", &[n, d])])
        .forward(|v| vec![silu::forward(v[0]).unwrap()])
        .backward(|v, dy| vec![silu::backward(dy[0].view(), v[0]).unwrap()])
}

pub fn silu_gate_case(n: usize, d: usize) -> Case {
    Case::new("silu gate", &[("gate", &[n, d]), ("x", &[n, d])]).forward(|v| vec![silu::gate(v[0], v[1]).unwrap()]).backward(
        |v, dy| {
            let mut dgate = tensor_of(v[0]);
            let dx = silu::backward_gate(dy[0].view(), v[0], v[1], dgate.view_mut()).unwrap();
            vec![dgate, dx]
        },
    )
}

/// Inputs of the selective scan, and the states that it starts from.
pub const SCAN: [&str; 8] = ["x", "dt", "b", "c", "a_log", "d", "dt_bias", "state"];

pub fn scan_inputs<'a>(v: &[View<'a>], segments: &'a [Segment]) -> selective_scan::Inputs<'a> {
    let &[x, dt, b, c, a_log, d, dt_bias, ..] = v else { panic!("{} inputs of a scan", v.len()) };
    selective_scan::Inputs { x, dt, b, c, a_log, d, dt_bias, segments }
}

/// Gradients of a scan's inputs and of the states it started from, which `dstate` becomes.
pub fn scan_gradients(
    v: &[View],
    segments: &[Segment],
    saved: &selective_scan::Saved,
    dy: View,
    mut dstate: Option<&mut Tensor>,
) -> Vec<Tensor> {
    let inputs = scan_inputs(v, segments);
    // Not zero: they must be overwritten.
    let [mut dx, mut ddt, mut db, mut dc] = [v[0], v[1], v[2], v[3]].map(tensor_of);
    let (mut dd, mut ddt_bias) = (None, None);
    let da_log = added(v[4], |da_log| {
        dd = Some(added(v[5], |dd| {
            ddt_bias = Some(added(v[6], |ddt_bias| {
                let (dx, ddt, db, dc) = (dx.view_mut(), ddt.view_mut(), db.view_mut(), dc.view_mut());
                let activations = selective_scan::InputGrads { dx, ddt, db, dc };
                let (da_log, dd, ddt_bias) = (da_log.view_mut(), dd.view_mut(), ddt_bias.view_mut());
                let parameters = selective_scan::ParamGrads { da_log, dd, ddt_bias };
                selective_scan::backward(&inputs, saved, dy, dstate.take(), activations, parameters).unwrap();
            }));
        }));
    });
    vec![dx, ddt, db, dc, da_log, dd.unwrap(), ddt_bias.unwrap()]
}

/// Outputs: y and the states afterwards.
pub fn scan_case(lengths: &'static [usize], channels: usize, states: usize) -> Case {
    let (n, slots) = (lengths.iter().sum(), lengths.len());
    let shape = [slots, states, channels];
    let (wide, narrow) = ([n, channels], [n, states]);
    let of_channels = [1, channels];
    let shapes: [&[usize]; 8] =
        [&wide, &wide, &narrow, &narrow, &[channels, states], &of_channels, &of_channels, &[slots * states, channels]];
    let inputs: Vec<(&str, &[usize])> = SCAN.into_iter().zip(shapes).collect();
    Case::new("selective_scan", &inputs)
        .forward(move |v| {
            let mut state = tensor_of(v[7]).reshape(&shape);
            let (y, none) = selective_scan::forward(&scan_inputs(v, &segments(lengths)), Some(&mut state), false).unwrap();
            assert!(none.is_none(), "what nobody asked for");
            vec![y, state]
        })
        .backward(move |v, dy| {
            let segments = segments(lengths);
            let mut state = tensor_of(v[7]).reshape(&shape);
            let (_, saved) = selective_scan::forward(&scan_inputs(v, &segments), Some(&mut state), true).unwrap();
            let mut dstate = dy[1].copy().unwrap();
            let mut gradients = scan_gradients(v, &segments, &saved.unwrap(), dy[0].view(), Some(&mut dstate));
            gradients.push(dstate);
            gradients
        })
}

pub fn scan_case_without_states(channels: usize, states: usize) -> Case {
    let n = LENGTHS.iter().sum();
    let (wide, narrow) = ([n, channels], [n, states]);
    let of_channels = [1, channels];
    let shapes: [&[usize]; 7] = [&wide, &wide, &narrow, &narrow, &[channels, states], &of_channels, &of_channels];
    let inputs: Vec<(&str, &[usize])> = SCAN.into_iter().zip(shapes).collect();
    Case::new("selective_scan without states", &inputs)
        .forward(move |v| vec![selective_scan::forward(&scan_inputs(v, &segments(&LENGTHS)), None, false).unwrap().0])
        .backward(move |v, dy| {
            let segments = segments(&LENGTHS);
            let (_, saved) = selective_scan::forward(&scan_inputs(v, &segments), None, true).unwrap();
            scan_gradients(v, &segments, &saved.unwrap(), dy[0].view(), None)
        })
}

pub fn inner_lr_case(n: usize, d: usize, h: usize, scale: f64) -> Case {
    Case::new("inner_lr", &[("x", &[n, d]), ("w", &[h, d]), ("bias", &[1, h])])
        .in_f32(&[2])
        .forward(move |v| vec![inner_lr::forward(v[0], v[1], v[2], scale).unwrap()])
        .backward(move |v, dy| {
            let lr = inner_lr::forward(v[0], v[1], v[2], scale).unwrap();
            let (mut dx, mut dw) = (Tensor::zeros(v[0].device(), &v[0].shape(), v[0].dtype()).unwrap(), None);
            let dbias = added(v[2], |dbias| {
                dw = Some(added(v[1], |dw| {
                    let (dw, dbias) = (dw.view_mut(), dbias.view_mut());
                    inner_lr::backward(dy[0].view(), lr.view(), v[0], v[1], scale, dw, dbias, dx.view_mut()).unwrap();
                }));
            });
            vec![dx, dw.unwrap(), dbias]
        })
}

pub fn token_scale_case(k: usize) -> Case {
    Case::new("token_scale", &[("idx", &[1, k])])
        .in_f32(&[0])
        .forward(|v| vec![token_scale::forward(v[0]).unwrap()])
        .backward(|v, dy| vec![added(v[0], |d| token_scale::backward(dy[0].view(), v[0], d.view_mut()))])
}

pub fn add_case(n: usize, d: usize) -> Case {
    Case::new("add", &[("y", &[n, d]), ("x", &[n, d])])
        .forward(|v| {
            let mut y = tensor_of(v[0]);
            add::add_to(y.view_mut(), v[1]);
            vec![y]
        })
        .backward(|_, dy| vec![dy[0].clone(), dy[0].clone()])
}

pub fn cross_entropy_case(n: usize, d: usize, v: usize) -> Case {
    let targets: Vec<u32> = (0..n).map(|i| ((5 * i + 1) % v) as u32).collect();
    let again = targets.clone();
    let to_tensor = |like: View, nll: Vec<f64>| placed(like.device(), &[nll.len(), 1], &nll, like.dtype());
    Case::new("cross_entropy", &[("hidden", &[n, d]), ("w", &[v, d])])
        .forward(move |v| vec![to_tensor(v[0], cross_entropy::forward(v[0], v[1], &targets).unwrap())])
        .backward(move |v, dy| {
            let mut out = None;
            let weights = dy[0].to_f64_vec();
            let dw = added(v[1], |dw| {
                out = Some(cross_entropy::forward_backward(v[0], v[1], &again, &weights, dw.view_mut()).unwrap());
            });
            vec![out.unwrap().1, dw]
        })
}

/// Sizes that no vector width or block size divides, and some that cross every threshold between code paths.
pub fn odd_cases() -> Vec<Case> {
    let decoding = [1, 2, 3, 5, 8, 9].map(|n| linear_case(n, 259, 83));
    let mut cases = vec![
        linear_case(1, 771, 1030),
        linear_case(7, 1027, 517),
        linear_case(33, 67, 29),
        linear_case(190, 203, 331),
        linear_case(17, 1, 1),
        embedding_case(300, 37, 131),
        rms_norm_case(61, 771),
        rms_norm_case(1, 3),
        rms_norm_residual_case(61, 771),
        linear_onto_case(33, 67, 29),
        layer_norm_case(61, 771),
        layer_norm_case(1, 13),
        conv_case(771, 4),
        conv_case(37, 3),
        conv_case(5, 1),
        conv_case_without_window(771, 4),
        rope_case(3, 64),
        rope_case(5, 10),
        gelu_gate_case(61, 771),
        swiglu_case(61, 771),
        silu_case(61, 771),
        silu_gate_case(61, 771),
        scan_case(&[0, 64, 3, 193, 0, 65, 1], 131, 16),
        scan_case(&[1, 1, 1, 1, 1], 771, 5),
        scan_case(&[9], 7, 3),
        scan_case_without_states(83, 16),
        inner_lr_case(61, 771, 11, 0.75).scaled(1, 0.05),
        inner_lr_case(5, 7, 3, 0.0),
        token_scale_case(16),
        add_case(61, 771),
        cross_entropy_case(61, 67, 1003),
        cross_entropy_case(1, 5, 3),
    ];
    cases.extend(decoding);
    cases
}
