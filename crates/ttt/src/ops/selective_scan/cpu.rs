//! f32 on the processor's cores: blocks of channels in parallel, neighbouring channels in the lanes of a vector.
//!
//! Along the channels nothing is summed up in the forward pass, and B and C are the same in all lanes; along the states (the other
//! choice) every token of every channel would end with a sum over lanes, and N would have to fill a vector. By count a vector of
//! (channel, state) pairs takes 13 instructions for its exponential and 5 for the rest, so that is what the forward pass costs.
//! The backward pass goes through the chunks from the last to the first: it computes the states of a chunk again from the kept one,
//! remembers them and their decays (64 KiB each for 16 lanes and 16 states), and walks back over them. The sums over channels, dB
//! and dC, stay in lanes until all channels of the block are through the chunk.

// Loops over indices: iterators that are not inlined would be compiled without the instructions of the vectors.
#![allow(clippy::needless_range_loop)]

use pulp::{Simd, WithSimd};

use super::math::{bounded_exp, decay, sigmoid, softplus};
use super::{CHUNK, InputGradMats, Mats, ParamGradMats};
use crate::Result;
use crate::batch::Segment;
use crate::device::Device;
use crate::device::par::{self, ColsPerUnit, RowsPerUnit};
use crate::device::view::{Mat, MatMut};
use crate::tensor::{DType, Tensor};

/// Channels of a unit of work: rows of four cache lines are read, and 24 units of a 130m model fill many cores. The backward pass
/// has `2 N` partial sums a token and unit, which take a tenth of what is kept for it at this size.
const BLOCK: usize = 64;
/// The same when few rows (decoding) make little work.
const WIDE_BLOCK: usize = 512;
/// Rows from which on blocks are narrow.
const MANY_ROWS: usize = 16;
/// Most lanes of a vector.
const MAX_LANES: usize = 16;

/// Moves `state` on, writes `y` and, when it has rows, `kept`.
pub(super) fn forward(device: &Device, m: Mats<f32>, state: MatMut<f32>, kept: MatMut<f32>, y: MatMut<f32>) -> Result<()> {
    let (rows, channels, n) = (m.x.rows(), m.x.cols(), m.a_log.cols());
    let block = forward_block(rows);
    let units = channels.div_ceil(block);
    let mut scratch = Tensor::empty(device, &[units, forward_scratch(rows, channels, n) / units.max(1)], DType::F32)?;
    let cols = |mat| ColsPerUnit { mat, cols: block };
    let parts = (cols(y), cols(state), cols(kept), RowsPerUnit { mat: scratch.view_mut().into_mat(), rows: 1 });
    type Part<'a> =
        (ColsPerUnit<MatMut<'a, f32>>, ColsPerUnit<MatMut<'a, f32>>, ColsPerUnit<MatMut<'a, f32>>, RowsPerUnit<MatMut<'a, f32>>);
    par::for_each(units, parts, &|unit, (y, state, kept, mut scratch): Part| {
        let scratch = scratch.mat.row_mut(0);
        let (y, state, kept) = (y.mat, state.mat, kept.mat);
        pulp::Arch::new().dispatch(Forward { m, first: unit * block, y, state, kept, scratch });
    });
    Ok(())
}

/// Gradients as [`super::backward`] says.
pub(super) fn backward(
    device: &Device,
    m: Mats<f32>,
    kept: Mat<f32>,
    dy: Mat<f32>,
    dstate: MatMut<f32>,
    activations: InputGradMats<f32>,
    parameters: ParamGradMats<f32>,
) -> Result<()> {
    let (rows, channels, n) = (m.x.rows(), m.x.cols(), m.a_log.cols());
    let InputGradMats { dx, ddt, db, dc } = activations;
    let ParamGradMats { mut da_log, mut dd, mut ddt_bias } = parameters;
    let units = channels.div_ceil(BLOCK);
    let mut scratch = Tensor::empty(device, &[units, backward_scratch(rows, channels, n)[0] / units.max(1)], DType::F32)?;
    let mut of_channels = Tensor::empty(device, &[n + 2, channels], DType::F32)?;
    let mut sums = Tensor::empty(device, &[units * rows, 2 * n], DType::F32)?;
    let cols = |mat| ColsPerUnit { mat, cols: BLOCK };
    let parts = (
        (cols(dx), cols(ddt)),
        (cols(dstate), cols(of_channels.view_mut().into_mat())),
        (RowsPerUnit { mat: sums.view_mut().into_mat(), rows }, RowsPerUnit { mat: scratch.view_mut().into_mat(), rows: 1 }),
    );
    type Cols<'a> = ColsPerUnit<MatMut<'a, f32>>;
    type Rows<'a> = RowsPerUnit<MatMut<'a, f32>>;
    par::for_each(units, parts, &|unit,
                                  ((dx, ddt), (dstate, of_channels), (sums, mut scratch)): (
        (Cols, Cols),
        (Cols, Cols),
        (Rows, Rows),
    )| {
        let (dx, ddt, dstate, of_channels, sums) = (dx.mat, ddt.mat, dstate.mat, of_channels.mat, sums.mat);
        let scratch = scratch.mat.row_mut(0);
        let first = unit * BLOCK;
        pulp::Arch::new().dispatch(Backward { m, first, kept, dy, dx, ddt, dstate, of_channels, sums, scratch });
    });
    let sums = sums.view();
    let sums = sums.as_mat::<f32>();
    let block = par::block_rows(2 * n);
    let parts = (RowsPerUnit { mat: db, rows: block }, RowsPerUnit { mat: dc, rows: block });
    par::for_each(rows.div_ceil(block), parts, &|at, (mut db, mut dc): (Rows, Rows)| {
        for i in 0..db.mat.rows() {
            let (db, dc) = (db.mat.row_mut(i), dc.mat.row_mut(i));
            db.fill(0.0);
            dc.fill(0.0);
            for unit in 0..units {
                let (b, c) = sums.row(unit * rows + at * block + i).split_at(n);
                db.iter_mut().zip(b).for_each(|(to, sum)| *to += sum);
                dc.iter_mut().zip(c).for_each(|(to, sum)| *to += sum);
            }
        }
    });
    let of_channels = of_channels.view();
    let of_channels = of_channels.as_mat::<f32>();
    for c in 0..channels {
        for (s, da_log) in da_log.row_mut(c).iter_mut().enumerate() {
            *da_log += of_channels.row(s)[c];
        }
    }
    for (to, row) in [(&mut dd, n), (&mut ddt_bias, n + 1)] {
        to.row_mut(0).iter_mut().zip(of_channels.row(row)).for_each(|(to, sum)| *to += sum);
    }
    Ok(())
}

fn forward_block(rows: usize) -> usize {
    if rows < MANY_ROWS { WIDE_BLOCK } else { BLOCK }
}

/// Numbers that the forward pass allocates for a moment: of every block of channels A and h.
pub(crate) fn forward_scratch(rows: usize, channels: usize, n: usize) -> usize {
    let block = forward_block(rows);
    channels.div_ceil(block) * 2 * n * block
}

/// Numbers that the backward pass allocates for a moment, tensor by tensor. What a unit remembers: A, g and dA of its channels, dD
/// and ddt_bias; of a chunk and a vector of channels the states before and after each token, decays, dB and dC, and δ, x and the
/// slope of the softplus. Of all channels dA_log of each state, dD and ddt_bias. Of each block and row `[dB | dC]`.
pub(crate) fn backward_scratch(rows: usize, channels: usize, n: usize) -> [usize; 3] {
    let units = channels.div_ceil(BLOCK);
    let of_unit = (3 * n + 2) * BLOCK + ((4 * CHUNK + 1) * n + 3 * CHUNK) * MAX_LANES;
    [units * of_unit, (n + 2) * channels, units * rows * 2 * n]
}

/// The lanes of some channels of a row.
#[inline(always)]
fn load<S: Simd>(simd: S, row: &[f32], at: usize, len: usize) -> S::f32s {
    if len == S::F32_LANES { S::as_simd_f32s(&row[at..at + len]).0[0] } else { simd.partial_load_f32s(&row[at..at + len]) }
}

#[inline(always)]
fn store<S: Simd>(simd: S, row: &mut [f32], at: usize, len: usize, x: S::f32s) {
    if len == S::F32_LANES {
        S::as_mut_simd_f32s(&mut row[at..at + len]).0[0] = x;
    } else {
        simd.partial_store_f32s(&mut row[at..at + len], x);
    }
}

/// A of a block of channels, `[vectors, N]`; lanes without a channel, whose x and gradients are 0, have −1.
#[inline(always)]
fn load_a<S: Simd>(simd: S, m: &Mats<f32>, first: usize, width: usize, a: &mut [S::f32s]) {
    let n = m.a_log.cols();
    let mut lanes = [0.0; MAX_LANES];
    for (v, a) in a.chunks_exact_mut(n).enumerate() {
        let at = v * S::F32_LANES;
        let len = (width - at).min(S::F32_LANES);
        for s in 0..n {
            for l in 0..len {
                lanes[l] = m.a_log.row(first + at + l)[s];
            }
            let minus_a = bounded_exp(simd, simd.partial_load_f32s(&lanes[..len]));
            a[s] = simd.sub_f32s(simd.splat_f32s(0.0), minus_a);
        }
    }
}

/// Reads the rows of a slot into h `[vectors, N]`; zeros when there are none.
#[inline(always)]
fn load_states<S: Simd>(simd: S, rows: Mat<f32>, first: usize, n: usize, width: usize, h: &mut [S::f32s]) {
    for (v, h) in h.chunks_exact_mut(n).enumerate() {
        let at = v * S::F32_LANES;
        let len = (width - at).min(S::F32_LANES);
        for s in 0..n {
            h[s] = if rows.rows() > 0 { load(simd, rows.row(first + s), at, len) } else { simd.splat_f32s(0.0) };
        }
    }
}

/// The opposite of [`load_states`].
#[inline(always)]
fn store_states<S: Simd>(simd: S, rows: &mut MatMut<f32>, first: usize, n: usize, width: usize, h: &[S::f32s]) {
    if rows.rows() == 0 {
        return;
    }
    for (v, h) in h.chunks_exact(n).enumerate() {
        let at = v * S::F32_LANES;
        let len = (width - at).min(S::F32_LANES);
        for s in 0..n {
            store(simd, rows.row_mut(first + s), at, len, h[s]);
        }
    }
}

/// A block of channels, forward.
struct Forward<'a> {
    m: Mats<'a, f32>,
    /// The block's first channel; what follows has the block's columns alone.
    first: usize,
    y: MatMut<'a, f32>,
    state: MatMut<'a, f32>,
    kept: MatMut<'a, f32>,
    scratch: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { m, first, mut y, mut state, mut kept, scratch } = self;
        let (n, width) = (m.a_log.cols(), y.cols());
        let vectors = width.div_ceil(S::F32_LANES);
        let (a, h) = S::as_mut_simd_f32s(scratch).0[..2 * vectors * n].split_at_mut(vectors * n);
        load_a(simd, &m, first, width, a);
        let mut chunk = 0;
        for segment in m.segments {
            load_states(simd, state.as_ref(), segment.slot * n, n, width, h);
            for start in (0..segment.len).step_by(CHUNK) {
                store_states(simd, &mut kept, chunk * n, n, width, h);
                chunk += 1;
                let rows = segment.first_row + start..segment.first_row + segment.len.min(start + CHUNK);
                for v in 0..vectors {
                    let at = v * S::F32_LANES;
                    let len = (width - at).min(S::F32_LANES);
                    let (a, h) = (&a[v * n..][..n], &mut h[v * n..][..n]);
                    let (bias, skip) = (load(simd, m.dt_bias, first + at, len), load(simd, m.d, first + at, len));
                    for row in rows.clone() {
                        let delta = softplus(simd, simd.add_f32s(load(simd, m.dt.row(row), first + at, len), bias));
                        let x = load(simd, m.x.row(row), first + at, len);
                        let input = simd.mul_f32s(delta, x);
                        let (b, c) = (&m.b.row(row)[..n], &m.c.row(row)[..n]);
                        let mut sum = simd.mul_f32s(skip, x);
                        for s in 0..n {
                            let decayed = simd.mul_f32s(decay(simd, simd.mul_f32s(delta, a[s])), h[s]);
                            h[s] = simd.mul_add_e_f32s(input, simd.splat_f32s(b[s]), decayed);
                            sum = simd.mul_add_e_f32s(simd.splat_f32s(c[s]), h[s], sum);
                        }
                        store(simd, y.row_mut(row), at, len, sum);
                    }
                }
            }
            store_states(simd, &mut state, segment.slot * n, n, width, h);
        }
    }
}

/// A block of channels, backward.
struct Backward<'a> {
    m: Mats<'a, f32>,
    /// The block's first channel; `kept` and `dy` have all channels, what follows has the block's columns alone.
    first: usize,
    kept: Mat<'a, f32>,
    dy: Mat<'a, f32>,
    dx: MatMut<'a, f32>,
    ddt: MatMut<'a, f32>,
    dstate: MatMut<'a, f32>,
    of_channels: MatMut<'a, f32>,
    /// `[n, 2 N]`.
    sums: MatMut<'a, f32>,
    scratch: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { m, first, kept, dy, mut dx, mut ddt, mut dstate, mut of_channels, mut sums, scratch } = self;
        let (n, width) = (m.a_log.cols(), dx.cols());
        let vectors = width.div_ceil(S::F32_LANES);
        let zero = simd.splat_f32s(0.0);
        let mut room = Room(S::as_mut_simd_f32s(scratch).0);
        let [a, g, da] = [vectors * n; 3].map(|len| room.take(len));
        let [dskip, dbias] = [vectors; 2].map(|len| room.take(len));
        let (states, decays) = (room.take((CHUNK + 1) * n), room.take(CHUNK * n));
        let [db, dc] = [CHUNK * n; 2].map(|len| room.take(len));
        let [deltas, xs, slopes] = [CHUNK; 3].map(|len| room.take(len));
        load_a(simd, &m, first, width, a);
        da.fill(zero);
        dskip.fill(zero);
        dbias.fill(zero);

        let mut chunks = 0;
        for segment in m.segments {
            load_states(simd, dstate.as_ref(), segment.slot * n, n, width, g);
            let first_chunk = chunks;
            chunks += segment.len.div_ceil(CHUNK);
            for chunk in (first_chunk..chunks).rev() {
                let rows = chunk_rows(segment, chunk - first_chunk);
                db[..rows.len() * n].fill(zero);
                dc[..rows.len() * n].fill(zero);
                for v in 0..vectors {
                    let at = v * S::F32_LANES;
                    let len = (width - at).min(S::F32_LANES);
                    let (a, g, da) = (&a[v * n..][..n], &mut g[v * n..][..n], &mut da[v * n..][..n]);
                    let (bias, skip) = (load(simd, m.dt_bias, first + at, len), load(simd, m.d, first + at, len));
                    for s in 0..n {
                        states[s] = load(simd, kept.row(chunk * n + s), first + at, len);
                    }
                    for (t, row) in rows.clone().enumerate() {
                        let step = simd.add_f32s(load(simd, m.dt.row(row), first + at, len), bias);
                        let (delta, x) = (softplus(simd, step), load(simd, m.x.row(row), first + at, len));
                        (deltas[t], xs[t], slopes[t]) = (delta, x, sigmoid(simd, step));
                        let input = simd.mul_f32s(delta, x);
                        let b = &m.b.row(row)[..n];
                        let (before, after) = states[t * n..][..2 * n].split_at_mut(n);
                        let decays = &mut decays[t * n..][..n];
                        for s in 0..n {
                            decays[s] = decay(simd, simd.mul_f32s(delta, a[s]));
                            after[s] = simd.mul_add_e_f32s(input, simd.splat_f32s(b[s]), simd.mul_f32s(decays[s], before[s]));
                        }
                    }
                    for (t, row) in rows.clone().enumerate().rev() {
                        let (delta, x, dy) = (deltas[t], xs[t], load(simd, dy.row(row), first + at, len));
                        let input = simd.mul_f32s(delta, x);
                        let (b, c) = (&m.b.row(row)[..n], &m.c.row(row)[..n]);
                        let (before, after) = states[t * n..][..2 * n].split_at(n);
                        let decays = &decays[t * n..][..n];
                        let (db, dc) = (&mut db[t * n..][..n], &mut dc[t * n..][..n]);
                        let (mut ddelta, mut dinput) = (zero, zero);
                        for s in 0..n {
                            let dh = simd.mul_add_e_f32s(simd.splat_f32s(c[s]), dy, g[s]);
                            dc[s] = simd.mul_add_e_f32s(dy, after[s], dc[s]);
                            db[s] = simd.mul_add_e_f32s(dh, input, db[s]);
                            dinput = simd.mul_add_e_f32s(dh, simd.splat_f32s(b[s]), dinput);
                            g[s] = simd.mul_f32s(dh, decays[s]);
                            let w = simd.mul_f32s(g[s], before[s]);
                            ddelta = simd.mul_add_e_f32s(w, a[s], ddelta);
                            da[s] = simd.mul_add_e_f32s(w, delta, da[s]);
                        }
                        store(simd, dx.row_mut(row), at, len, simd.mul_add_e_f32s(delta, dinput, simd.mul_f32s(skip, dy)));
                        let dstep = simd.mul_f32s(simd.mul_add_e_f32s(x, dinput, ddelta), slopes[t]);
                        store(simd, ddt.row_mut(row), at, len, dstep);
                        dbias[v] = simd.add_f32s(dbias[v], dstep);
                        dskip[v] = simd.mul_add_e_f32s(dy, x, dskip[v]);
                    }
                }
                for (t, row) in rows.enumerate() {
                    let sums = sums.row_mut(row);
                    for s in 0..n {
                        sums[s] = simd.reduce_sum_f32s(db[t * n + s]);
                        sums[n + s] = simd.reduce_sum_f32s(dc[t * n + s]);
                    }
                }
            }
            store_states(simd, &mut dstate, segment.slot * n, n, width, g);
        }
        // A = −exp(A_log) is its own derivative.
        for i in 0..vectors * n {
            da[i] = simd.mul_f32s(da[i], a[i]);
        }
        store_states(simd, &mut of_channels, 0, n, width, da);
        store_states(simd, &mut of_channels, n, 1, width, dskip);
        store_states(simd, &mut of_channels, n + 1, 1, width, dbias);
    }
}

/// Rows of a chunk of a segment.
#[inline(always)]
fn chunk_rows(segment: &Segment, chunk: usize) -> std::ops::Range<usize> {
    let start = chunk * CHUNK;
    segment.first_row + start..segment.first_row + segment.len.min(start + CHUNK)
}

/// Vectors to be given out.
struct Room<'a, V>(&'a mut [V]);

impl<'a, V> Room<'a, V> {
    #[inline(always)]
    fn take(&mut self, len: usize) -> &'a mut [V] {
        let (taken, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        taken
    }
}
