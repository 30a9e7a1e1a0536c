//! Causal depthwise convolution along time: `y[t, c] = bias[c] + Σ_j w[c, j] x[t − (taps − 1) + j, c]`; tap `taps − 1` meets the
//! current token. What lies before a segment's first token comes from its slot's *window* (its last `taps − 1` inputs, oldest
//! first), or is zero.
//!
//! Letters: n rows, c channels. A window tensor is `[slots, taps − 1, c]`; each segment has a slot of its own.

mod cpu;
pub(crate) mod cuda;
mod reference;

use crate::Result;
use crate::batch::Segment;
use crate::device::view::{View, ViewMut};
use crate::ops::{expect_segments, expect_shape, fast};
use crate::tensor::{Tensor, with_dtype};

/// `y [n, c]` of `x [n, c]`, w `[c, taps]`, bias `[1, c]`. Without windows every segment starts after zeros.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When a shape is not as above, or `segments` do not cover the rows one behind the other.
pub fn forward(x: View, w: View, bias: View, segments: &[Segment], window: Option<&Tensor>) -> Result<Tensor> {
    expect_segments(segments, x.rows());
    expect_shape("w", w.shape(), [x.cols(), w.cols()]);
    expect_shape("bias", bias.shape(), [1, x.cols()]);
    if let Some(window) = window {
        expect_window(window, segments, w.cols() - 1, x.cols());
    }
    let mut y = Tensor::empty(x.device(), &x.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::forward(gpu, cuda::Inputs { x, segments, window }, w, bias, &y.view_mut())?;
    } else if fast(x.device(), x.dtype()) {
        let inputs = cpu::Inputs { x: x.as_mat(), segments, window: window.map(|t| t.view().as_mat()) };
        cpu::forward(x.device(), inputs, w.as_mat(), bias.as_mat(), y.view_mut().into_mat())?;
    } else {
        with_dtype!(x.dtype(), E => {
            let window = window.map(|t| t.view().as_mat());
            reference::forward::<E>(x.as_mat(), w.as_mat(), bias.as_mat(), segments, window, y.view_mut().into_mat())
        });
    }
    Ok(y)
}

/// Moves the window of each segment's slot on over the segment's rows of `x [n, c]`.
///
/// # Panics
/// When a shape is not as above, or `segments` do not cover the rows one behind the other.
pub fn advance(x: View, segments: &[Segment], window: &mut Tensor) {
    expect_segments(segments, x.rows());
    let memory = window_rows(window);
    expect_window(window, segments, memory, x.cols());
    if let Some(gpu) = x.device().as_cuda() {
        return cuda::advance(gpu, x, segments, window).expect("memory for the segments of a batch");
    }
    with_dtype!(x.dtype(), E => reference::advance::<E>(x.as_mat(), segments, memory, window.view_mut().into_mat()));
}

/// Returns `dx [n, c]`, adds to `dw [c, taps]` and `dbias [1, c]`, and writes the gradient of the windows that the segments
/// started from into their slots of `dwindow`.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
///
/// # Panics
/// When a shape is not as above, or `segments` do not cover the rows one behind the other.
pub fn backward(
    dy: View,
    x: View,
    w: View,
    segments: &[Segment],
    window: Option<&Tensor>,
    dw: ViewMut,
    dbias: ViewMut,
    dwindow: Option<&mut Tensor>,
) -> Result<Tensor> {
    expect_segments(segments, x.rows());
    expect_shape("dy", dy.shape(), x.shape());
    expect_shape("w", w.shape(), [x.cols(), w.cols()]);
    expect_shape("dw", dw.shape(), w.shape());
    expect_shape("dbias", dbias.shape(), [1, x.cols()]);
    for window in window.into_iter().chain(dwindow.as_deref()) {
        expect_window(window, segments, w.cols() - 1, x.cols());
    }
    let mut dx = Tensor::empty(x.device(), &x.shape(), x.dtype())?;
    if let Some(gpu) = x.device().as_cuda() {
        cuda::backward(gpu, dy, cuda::Inputs { x, segments, window }, w, [&dw, &dbias], &dx.view_mut())?;
        if let Some(dwindow) = dwindow {
            cuda::backward_window(gpu, dy, w, segments, dwindow)?;
        }
        return Ok(dx);
    }
    if fast(x.device(), x.dtype()) {
        let inputs = cpu::Inputs { x: x.as_mat(), segments, window: window.map(|t| t.view().as_mat()) };
        let (dw, dbias, dx) = (dw.into_mat(), dbias.into_mat(), dx.view_mut().into_mat());
        cpu::backward(x.device(), dy.as_mat(), inputs, w.as_mat(), dw, dbias, dx)?;
    } else {
        with_dtype!(x.dtype(), E => {
            let window = window.map(|t| t.view().as_mat());
            reference::backward_weight::<E>(dy.as_mat(), x.as_mat(), segments, window, dw.into_mat(), dbias.into_mat());
            reference::backward_input::<E>(dy.as_mat(), w.as_mat(), segments, dx.view_mut().into_mat());
        });
    }
    if let Some(dwindow) = dwindow {
        with_dtype!(x.dtype(), E => {
            reference::backward_window::<E>(dy.as_mat(), w.as_mat(), segments, dwindow.view_mut().into_mat())
        });
    }
    Ok(dx)
}

/// The backward of [`advance`]: adds the gradient of the windows after it, `dwindow_final`, to `dx [n, c]` and, for the rows of
/// the old windows that survived, to `dwindow`.
///
/// # Panics
/// When a shape is not as above, or `segments` do not cover the rows one behind the other.
pub fn backward_advance(dwindow_final: &Tensor, segments: &[Segment], dx: ViewMut, dwindow: &mut Tensor) {
    expect_segments(segments, dx.rows());
    let memory = window_rows(dwindow);
    expect_window(dwindow_final, segments, memory, dx.cols());
    expect_window(dwindow, segments, memory, dx.cols());
    if let Some(gpu) = dwindow_final.device().as_cuda() {
        let done = cuda::backward_advance(gpu, dwindow_final, segments, &dx, dwindow);
        return done.expect("memory for the segments of a batch");
    }
    with_dtype!(dx.dtype(), E => {
        let (from, to) = (dwindow_final.view().as_mat(), dwindow.view_mut().into_mat());
        reference::backward_advance::<E>(from, segments, memory, dx.into_mat(), to)
    });
}

fn window_rows(window: &Tensor) -> usize {
    assert!(window.shape().len() == 3, "a window tensor is [slots, taps - 1, channels], not {:?}", window.shape());
    window.shape()[1]
}

pub(crate) fn expect_window(window: &Tensor, segments: &[Segment], memory: usize, channels: usize) {
    let slots = segments.iter().map(|s| s.slot + 1).max().unwrap_or(0);
    let fits = matches!(*window.shape(), [s, m, c] if s >= slots && m == memory && c == channels);
    assert!(fits, "a window tensor is {:?} and should be [at least {slots}, {memory}, {channels}]", window.shape());
}
