//! The definition, in plain loops. States are `[slots · N, c]`, or have no rows.

use super::{CHUNK, InputGradMats, Mats, ParamGradMats};
use crate::batch::Segment;
use crate::device::view::{Mat, MatMut};
use crate::ops::swiglu::reference::sigmoid;
use crate::tensor::Element;

/// `ln(1 + e^x)`, without overflow, and exact where it is small.
pub(crate) fn softplus<E: Element>(x: E) -> E {
    x.max(E::ZERO) + (-x.abs()).exp().ln_1p()
}

impl<E: Element> Mats<'_, E> {
    /// `dt + dt_bias`.
    fn step(&self, row: usize, channel: usize) -> E {
        self.dt.row(row)[channel] + self.dt_bias[channel]
    }

    fn a(&self, channel: usize, state: usize) -> E {
        -self.a_log.row(channel)[state].exp()
    }

    /// `h [N, c]`, moved on by one token.
    fn advance(&self, row: usize, h: &mut [E]) {
        let (channels, b) = (self.x.cols(), self.b.row(row));
        for c in 0..channels {
            let delta = softplus(self.step(row, c));
            for (s, &b) in b.iter().enumerate() {
                let h = &mut h[s * channels + c];
                *h = (delta * self.a(c, s)).exp() * *h + delta * self.x.row(row)[c] * b;
            }
        }
    }
}

/// What a segment's slot holds; zeros without states.
fn slot<E: Element>(states: &MatMut<E>, segment: &Segment, n: usize, channels: usize) -> Vec<E> {
    let mut h = vec![E::ZERO; n * channels];
    if states.rows() > 0 {
        for (s, h) in h.chunks_exact_mut(channels).enumerate() {
            h.copy_from_slice(states.row(segment.slot * n + s));
        }
    }
    h
}

fn put_rows<E: Element>(to: &mut MatMut<E>, first: usize, h: &[E]) {
    if to.rows() > 0 {
        for (s, h) in h.chunks_exact(to.cols()).enumerate() {
            to.row_mut(first + s).copy_from_slice(h);
        }
    }
}

/// Writes `y` and, when it has rows, `kept`; moves `state` on.
pub(crate) fn forward<E: Element>(m: Mats<E>, mut state: MatMut<E>, mut kept: MatMut<E>, mut y: MatMut<E>) {
    let (channels, n) = (m.x.cols(), m.a_log.cols());
    let mut chunk = 0;
    for segment in m.segments {
        let mut h = slot(&state, segment, n, channels);
        for (t, row) in segment.rows().enumerate() {
            if t % CHUNK == 0 {
                put_rows(&mut kept, chunk * n, &h);
                chunk += 1;
            }
            m.advance(row, &mut h);
            for (c, y) in y.row_mut(row).iter_mut().enumerate() {
                *y = m.d[c] * m.x.row(row)[c];
                for s in 0..n {
                    *y += m.c.row(row)[s] * h[s * channels + c];
                }
            }
        }
        put_rows(&mut state, segment.slot * n, &h);
    }
}

/// Gradients as [`super::backward`] says. Of the kept states only the first of each segment is read.
pub(crate) fn backward<E: Element>(
    m: Mats<E>,
    kept: Mat<E>,
    dy: Mat<E>,
    mut dstate: MatMut<E>,
    activations: InputGradMats<E>,
    parameters: ParamGradMats<E>,
) {
    let InputGradMats { mut dx, mut ddt, mut db, mut dc } = activations;
    let ParamGradMats { mut da_log, mut dd, mut ddt_bias } = parameters;
    let (channels, n) = (m.x.cols(), m.a_log.cols());
    let mut chunk = 0;
    for segment in m.segments.iter().filter(|segment| segment.len > 0) {
        // The states before each token, and after the last.
        let start = (0..n).flat_map(|s| kept.row(chunk * n + s).iter().copied());
        let mut states: Vec<Vec<E>> = vec![start.collect()];
        chunk += segment.len.div_ceil(CHUNK);
        for (t, row) in segment.rows().enumerate() {
            let mut h = states[t].clone();
            m.advance(row, &mut h);
            states.push(h);
        }
        let mut g = slot(&dstate, segment, n, channels);
        for (t, row) in segment.rows().enumerate().rev() {
            let (b, c_row) = (m.b.row(row), m.c.row(row));
            db.row_mut(row).fill(E::ZERO);
            dc.row_mut(row).fill(E::ZERO);
            for c in 0..channels {
                let (x, dy) = (m.x.row(row)[c], dy.row(row)[c]);
                let delta = softplus(m.step(row, c));
                let (mut ddelta, mut dinput) = (E::ZERO, E::ZERO);
                for s in 0..n {
                    let (before, after) = (states[t][s * channels + c], states[t + 1][s * channels + c]);
                    let g = &mut g[s * channels + c];
                    *g += c_row[s] * dy;
                    dc.row_mut(row)[s] += dy * after;
                    db.row_mut(row)[s] += *g * delta * x;
                    dinput += *g * b[s];
                    let a = m.a(c, s);
                    *g *= (delta * a).exp();
                    let w = *g * before;
                    ddelta += w * a;
                    // A = −exp(A_log) is its own derivative.
                    da_log.row_mut(c)[s] += w * delta * a;
                }
                dx.row_mut(row)[c] = delta * dinput + m.d[c] * dy;
                let d = (ddelta + x * dinput) * sigmoid(m.step(row, c));
                ddt.row_mut(row)[c] = d;
                ddt_bias.row_mut(0)[c] += d;
                dd.row_mut(0)[c] += dy * x;
            }
        }
        put_rows(&mut dstate, segment.slot * n, &g);
    }
}
