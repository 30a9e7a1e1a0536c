//! The definition, in plain loops. Windows are `[slots · memory, c]`, memory = taps − 1.

use crate::batch::Segment;
use crate::device::view::{Mat, MatMut};
use crate::tensor::Element;

/// What tap `tap` meets at token `t` of a segment: a row of `x`, of the window, or nothing (zeros).
fn input<'a, E: Element>(
    x: Mat<'a, E>,
    window: Option<Mat<'a, E>>,
    segment: &Segment,
    memory: usize,
    t: usize,
    tap: usize,
) -> Option<&'a [E]> {
    match (t + tap).checked_sub(memory) {
        Some(t) => Some(x.row(segment.first_row + t)),
        None => window.map(|window| window.row(segment.slot * memory + t + tap)),
    }
}

/// Writes `y`.
pub(crate) fn forward<E: Element>(
    x: Mat<E>,
    w: Mat<E>,
    bias: Mat<E>,
    segments: &[Segment],
    window: Option<Mat<E>>,
    mut y: MatMut<E>,
) {
    for segment in segments {
        for t in 0..segment.len {
            let y = y.row_mut(segment.first_row + t);
            y.copy_from_slice(bias.row(0));
            for tap in 0..w.cols() {
                if let Some(input) = input(x, window, segment, w.cols() - 1, t, tap) {
                    for (c, y) in y.iter_mut().enumerate() {
                        *y += w.row(c)[tap] * input[c];
                    }
                }
            }
        }
    }
}

/// Adds to `dw` and `dbias`.
pub(crate) fn backward_weight<E: Element>(
    dy: Mat<E>,
    x: Mat<E>,
    segments: &[Segment],
    window: Option<Mat<E>>,
    mut dw: MatMut<E>,
    mut dbias: MatMut<E>,
) {
    for segment in segments {
        for t in 0..segment.len {
            let dy = dy.row(segment.first_row + t);
            for (dbias, &dy) in dbias.row_mut(0).iter_mut().zip(dy) {
                *dbias += dy;
            }
            for tap in 0..dw.cols() {
                if let Some(input) = input(x, window, segment, dw.cols() - 1, t, tap) {
                    for (c, &dy) in dy.iter().enumerate() {
                        dw.row_mut(c)[tap] += dy * input[c];
                    }
                }
            }
        }
    }
}

/// Writes `dx`: input t was met by tap `taps − 1 − ahead` at token `t + ahead`.
pub(crate) fn backward_input<E: Element>(dy: Mat<E>, w: Mat<E>, segments: &[Segment], mut dx: MatMut<E>) {
    let memory = w.cols() - 1;
    for segment in segments {
        for t in 0..segment.len {
            let dx = dx.row_mut(segment.first_row + t);
            dx.fill(E::ZERO);
            for ahead in 0..w.cols().min(segment.len - t) {
                let dy = dy.row(segment.first_row + t + ahead);
                for (c, dx) in dx.iter_mut().enumerate() {
                    *dx += w.row(c)[memory - ahead] * dy[c];
                }
            }
        }
    }
}

/// Writes the segments' slots of `dwindow`: window row i was met by tap `i − t` at token t.
pub(crate) fn backward_window<E: Element>(dy: Mat<E>, w: Mat<E>, segments: &[Segment], mut dwindow: MatMut<E>) {
    let memory = w.cols() - 1;
    for segment in segments {
        for i in 0..memory {
            let dwindow = dwindow.row_mut(segment.slot * memory + i);
            dwindow.fill(E::ZERO);
            for t in 0..segment.len.min(i + 1) {
                let dy = dy.row(segment.first_row + t);
                for (c, dwindow) in dwindow.iter_mut().enumerate() {
                    *dwindow += w.row(c)[i - t] * dy[c];
                }
            }
        }
    }
}

/// Moves the windows on: the last `memory` rows of the old window followed by the segment's rows.
pub(crate) fn advance<E: Element>(x: Mat<E>, segments: &[Segment], memory: usize, mut window: MatMut<E>) {
    for segment in segments {
        let first = segment.slot * memory;
        for i in 0..memory {
            match (i + segment.len).checked_sub(memory) {
                Some(t) => window.row_mut(first + i).copy_from_slice(x.row(segment.first_row + t)),
                None => {
                    let (mut to, from) = window.reborrow().split_rows(first + i + segment.len);
                    // A segment without tokens leaves the window where it is.
                    if segment.len > 0 {
                        to.row_mut(first + i).copy_from_slice(from.row(0));
                    }
                }
            }
        }
    }
}

/// Adds to `dx` and `dwindow`.
pub(crate) fn backward_advance<E: Element>(
    dwindow_final: Mat<E>,
    segments: &[Segment],
    memory: usize,
    mut dx: MatMut<E>,
    mut dwindow: MatMut<E>,
) {
    for segment in segments {
        let first = segment.slot * memory;
        for i in 0..memory {
            let to = match (i + segment.len).checked_sub(memory) {
                Some(t) => dx.row_mut(segment.first_row + t),
                None => dwindow.row_mut(first + i + segment.len),
            };
            for (to, &d) in to.iter_mut().zip(dwindow_final.row(first + i)) {
                *to += d;
            }
        }
    }
}
