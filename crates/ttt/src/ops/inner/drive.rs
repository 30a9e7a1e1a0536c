//! The loops around one mini-batch of one head, the same for both learners and for reference and fast code: sequences, heads,
//! chunks that start or end inside a mini-batch, checkpoints, groups, and the reduction of parameter gradients.

use rayon::prelude::*;

use super::wrap::Wrap;
use super::{FastWeights, InputGrads, Inputs, ParamGrads, Saved, Variant, row_widths};
use crate::Result;
use crate::batch::Segment;
use crate::config::Inner;
use crate::device::view::{Mat, MatMut, View};
use crate::tensor::{Element, Tensor};

/// Sizes of one head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dims {
    /// Width of the head, d.
    pub(crate) d: usize,
    /// Tokens of a full mini-batch, K.
    pub(crate) k: usize,
}

/// The tokens `first..first + n` of a mini-batch of one head. `q`, `k`, `v`, `lr` hold the n rows, `tok` all K positions.
#[derive(Clone, Copy)]
pub(crate) struct Chunk<'a, E> {
    pub(crate) q: Mat<'a, E>,
    pub(crate) k: Mat<'a, E>,
    pub(crate) v: Mat<'a, E>,
    pub(crate) lr: Mat<'a, E>,
    pub(crate) tok: &'a [E],
    pub(crate) gamma: &'a [E],
    pub(crate) beta: &'a [E],
    pub(crate) variant: Variant,
    pub(crate) first: usize,
}

impl<'a, E> Chunk<'a, E> {
    /// LayerNorm and residual.
    pub(crate) fn wrap(&self) -> Wrap<'a, E> {
        Wrap { gamma: self.gamma, beta: self.beta, variant: self.variant }
    }

    /// Number of its tokens, n.
    pub(crate) fn len(&self) -> usize {
        self.q.rows()
    }

    /// One past its last position in the mini-batch.
    pub(crate) fn end(&self) -> usize {
        self.first + self.q.rows()
    }
}

/// Where the gradients of a mini-batch go: rows are overwritten, `dtok` `[K]`, `dgamma`, `dbeta` `[d]` are added to.
pub(crate) struct ChunkGrads<'a, E> {
    pub(crate) dq: MatMut<'a, E>,
    pub(crate) dk: MatMut<'a, E>,
    pub(crate) dv: MatMut<'a, E>,
    pub(crate) dlr: MatMut<'a, E>,
    pub(crate) dtok: &'a mut [E],
    pub(crate) dgamma: &'a mut [E],
    pub(crate) dbeta: &'a mut [E],
}

/// One mini-batch of one head.
///
/// `tape` is scratch. It begins with the row tiles of [`row_widths`], each `[K, width]`, which [`Learner::learn`] fills for the
/// new tokens and which hold the earlier tokens of the mini-batch already. `w` is the state at the start of the mini-batch.
pub(crate) trait Learner<E: Element>: Copy + Sync {
    /// Elements of scratch for [`Learner::learn`], [`Learner::output`] and [`Learner::commit`], and for [`Learner::backward`].
    fn tape_lens(&self, dims: Dims) -> [usize; 2];

    /// Inner gradients of the new tokens.
    fn learn(&self, dims: Dims, x: &Chunk<'_, E>, w: &[E], tape: &mut [E]);

    /// Outputs of the new tokens, after [`Learner::learn`].
    fn output(&self, dims: Dims, x: &Chunk<'_, E>, w: &[E], tape: &mut [E], z: MatMut<'_, E>);

    /// Moves the weights by the K tokens of a full mini-batch.
    fn commit(&self, dims: Dims, tok: &[E], w: &mut [E], tape: &mut [E]);

    /// Gradients of a mini-batch that starts at position 0, from `dz` and, when it `commits`, from `dw`, the gradient of the
    /// weights after it. `dw` becomes the gradient of the weights before it.
    fn backward(
        &self,
        dims: Dims,
        x: &Chunk<'_, E>,
        w: &[E],
        dw: &mut [E],
        commits: bool,
        dz: Mat<'_, E>,
        tape: &mut [E],
        grads: ChunkGrads<'_, E>,
    );
}

/// Splits a scratch buffer into parts of the given lengths.
pub(crate) fn carve<const N: usize, E>(mut buffer: &mut [E], lens: [usize; N]) -> [&mut [E]; N] {
    lens.map(|len| {
        let (part, rest) = std::mem::take(&mut buffer).split_at_mut(len);
        buffer = rest;
        part
    })
}

/// The inputs with their element type.
#[derive(Clone, Copy)]
struct Typed<'a, E> {
    q: Mat<'a, E>,
    k: Mat<'a, E>,
    v: Mat<'a, E>,
    lr: Mat<'a, E>,
    tok: &'a [E],
    gamma: Mat<'a, E>,
    beta: Mat<'a, E>,
    variant: Variant,
    dims: Dims,
}

impl<'a, E: Element> Typed<'a, E> {
    fn new(inputs: &Inputs<'a>) -> Self {
        Typed {
            q: inputs.q.as_mat(),
            k: inputs.k.as_mat(),
            v: inputs.v.as_mat(),
            lr: inputs.lr.as_mat(),
            tok: inputs.tok.as_mat::<E>().row(0),
            gamma: inputs.gamma.as_mat(),
            beta: inputs.beta.as_mat(),
            variant: inputs.variant,
            dims: Dims { d: inputs.gamma.cols(), k: inputs.tok.cols() },
        }
    }

    fn of_head(&self, head: usize) -> Self {
        let columns = head * self.dims.d..(head + 1) * self.dims.d;
        let [q, k, v] = [self.q, self.k, self.v].map(|m| m.col_range(columns.clone()));
        let lr = self.lr.col_range(head..head + 1);
        let [gamma, beta] = [self.gamma, self.beta].map(|m| m.row_range(head..head + 1));
        Typed { q, k, v, lr, gamma, beta, ..*self }
    }

    /// Rows `row..row + n` of one head's inputs, at position `first` of their mini-batch.
    fn chunk(&self, row: usize, n: usize, first: usize) -> Chunk<'a, E> {
        let [q, k, v, lr] = [self.q, self.k, self.v, self.lr].map(|m| m.row_range(row..row + n));
        let [gamma, beta] = [self.gamma, self.beta].map(|m| m.row(0));
        Chunk { q, k, v, lr, tok: self.tok, gamma, beta, variant: self.variant, first }
    }
}

/// Tasks that one thread takes at once: enough of them that a fork, and one scratch buffer, pay. Depends on shapes alone.
fn tasks_per_job(tokens: usize, tasks: usize, state_len: usize) -> usize {
    const MULTIPLY_ADDS: usize = 1 << 18;
    (MULTIPLY_ADDS * tasks.max(1) / (tokens * state_len * 2).max(1)).clamp(1, 64)
}

/// `count` pieces of `len` elements each.
fn pieces<E>(mut slab: &mut [E], len: usize, count: usize) -> Vec<Option<&mut [E]>> {
    let mut out = Vec::with_capacity(count);
    for _ in 0..count {
        let (piece, rest) = slab.split_at_mut(len);
        slab = rest;
        out.push(Some(piece));
    }
    out
}

fn mini_batches(segment: &Segment, k: usize) -> usize {
    segment.len.div_ceil(k)
}

/// Checkpoints of all segments and one head.
fn checkpoints(segments: &[Segment], k: usize, group: usize) -> usize {
    segments.iter().map(|s| mini_batches(s, k).div_ceil(group)).sum()
}

pub(crate) fn check_state(inputs: &Inputs<'_>, state: &FastWeights, inner: Inner) {
    let (_, heads, d, k) = inputs.sizes();
    let has = (state.inner, state.heads, state.head_dim, state.mini_batch);
    assert_eq!(
        has,
        (inner, heads, d, k),
        "a state of (model, heads, head width, mini-batch) {has:?} for {:?}",
        (inner, heads, d, k)
    );
}

/// Checks a pass that is to be kept every so many mini-batches.
pub(crate) fn check_keep(inputs: &Inputs<'_>, keep: Option<usize>) {
    if let Some(group) = keep {
        assert!(group > 0, "checkpoints every 0 mini-batches");
        let whole = inputs.segments.iter().all(|s| s.phase == 0);
        assert!(whole, "a pass that is kept for a backward starts inside a mini-batch");
    }
}

/// See the public functions of both learners.
pub(crate) fn forward<E: Element, L: Learner<E>>(
    learner: L,
    inner: Inner,
    inputs: &Inputs<'_>,
    state: &mut FastWeights,
    keep: Option<usize>,
) -> Result<(Tensor, Option<Saved>)> {
    struct Task<'a, E> {
        segment: Segment,
        head: usize,
        w: &'a mut [E],
        rows: &'a mut [E],
        z: MatMut<'a, E>,
        saved: &'a mut [E],
    }
    check_state(inputs, state, inner);
    check_keep(inputs, keep);
    let (tokens, heads, d, k) = inputs.sizes();
    let (segments, typed, device) = (inputs.segments, Typed::<E>::new(inputs), inputs.q.device());
    let (state_len, row_len) = (FastWeights::state_len(inner, d), FastWeights::row_len(inner, d));

    let mut z = Tensor::empty(device, &[tokens, heads * d], E::DTYPE)?;
    let mut saved = match keep {
        Some(group) => Some(Tensor::empty(device, &[heads * checkpoints(segments, k, group), state_len], E::DTYPE)?),
        None => None,
    };

    let mut w = pieces(state.weights.as_mut_slice::<E>(), state_len, state.slots * heads);
    let mut rows = pieces(state.rows.as_mut_slice::<E>(), (k - 1) * row_len, state.slots * heads);
    let mut z_rest = z.view_mut().into_mat::<E>();
    let mut saved_rest = saved.as_mut().map(|s| s.as_mut_slice::<E>()).unwrap_or_default();
    let mut tasks = Vec::with_capacity(segments.len() * heads);
    for segment in segments {
        assert!(segment.slot < state.slots, "slot {} of {}", segment.slot, state.slots);
        let (mut z_rows, z_later) = z_rest.split_rows(segment.len);
        z_rest = z_later;
        let kept = keep.map_or(0, |group| mini_batches(segment, k).div_ceil(group)) * state_len;
        for head in 0..heads {
            let place = segment.slot * heads + head;
            let (z_head, z_others) = z_rows.split_cols(d);
            z_rows = z_others;
            let (saved_head, saved_later) = saved_rest.split_at_mut(kept);
            saved_rest = saved_later;
            tasks.push(Task {
                segment: *segment,
                head,
                w: w[place].take().expect("two segments of a batch name the same slot"),
                rows: rows[place].take().expect("two segments of a batch name the same slot"),
                z: z_head,
                saved: saved_head,
            });
        }
    }

    let tape_len = learner.tape_lens(typed.dims)[0];
    let job = tasks_per_job(tokens * heads, tasks.len(), state_len);
    tasks.par_chunks_mut(job).try_for_each(|tasks| -> Result<()> {
        let mut scratch = Tensor::empty(device, &[tape_len], E::DTYPE)?;
        let tape = scratch.as_mut_slice::<E>();
        for task in tasks {
            let x = typed.of_head(task.head);
            let Segment { first_row, len, phase, .. } = task.segment;
            let mut first = phase;
            restore_rows(inner, typed.dims, tape, task.rows, first);
            let (mut done, mut step) = (0, 0);
            while done < len {
                let n = (k - first).min(len - done);
                let chunk = x.chunk(first_row + done, n, first);
                if let Some(group) = keep
                    && step % group == 0
                {
                    task.saved[step / group * state_len..][..state_len].copy_from_slice(task.w);
                }
                learner.learn(typed.dims, &chunk, task.w, tape);
                learner.output(typed.dims, &chunk, task.w, tape, task.z.reborrow().row_range(done..done + n));
                if chunk.end() == k {
                    learner.commit(typed.dims, typed.tok, task.w, tape);
                    first = 0;
                } else {
                    keep_rows(inner, typed.dims, tape, task.rows, chunk.first..chunk.end());
                    first = chunk.end();
                }
                (done, step) = (done + n, step + 1);
            }
        }
        Ok(())
    })?;
    drop((tasks, w, rows));
    Ok((z, saved.map(|states| Saved { inner, group: keep.expect("saved"), states, ghat: None, sums: None, start: None })))
}

/// Copies the rows `0..n` of an open mini-batch `[n, R]` into the tiles of the tape.
fn restore_rows<E: Element>(inner: Inner, dims: Dims, tape: &mut [E], rows: &[E], n: usize) {
    let (mut tile, mut column, row_len) = (0, 0, FastWeights::row_len(inner, dims.d));
    for width in row_widths(inner, dims.d) {
        for j in 0..n {
            tape[tile + j * width..][..width].copy_from_slice(&rows[j * row_len + column..][..width]);
        }
        (tile, column) = (tile + dims.k * width, column + width);
    }
}

/// Copies the rows `range` of the tape's tiles into the slab of the open mini-batch.
fn keep_rows<E: Element>(inner: Inner, dims: Dims, tape: &[E], rows: &mut [E], range: std::ops::Range<usize>) {
    let (mut tile, mut column, row_len) = (0, 0, FastWeights::row_len(inner, dims.d));
    for width in row_widths(inner, dims.d) {
        for j in range.clone() {
            rows[j * row_len + column..][..width].copy_from_slice(&tape[tile + j * width..][..width]);
        }
        (tile, column) = (tile + dims.k * width, column + width);
    }
}

/// Checks the shapes of everything a backward pass reads and writes.
pub(crate) fn check_backward(
    inner: Inner,
    inputs: &Inputs<'_>,
    saved: &Saved,
    dz: View<'_>,
    dstate: &Tensor,
    d: &InputGrads<'_>,
    p: &ParamGrads<'_>,
) {
    let (tokens, heads, width, k) = inputs.sizes();
    let (segments, state_len, group) = (inputs.segments, FastWeights::state_len(inner, width), saved.group);
    let wide = [tokens, heads * width];
    for (name, shape) in [("dz", dz.shape()), ("dq", d.dq.shape()), ("dk", d.dk.shape()), ("dv", d.dv.shape())] {
        assert_eq!(shape, wide, "{name} {shape:?} beside q {wide:?}");
    }
    assert_eq!(d.dlr.shape(), [tokens, heads], "dlr {:?} for {tokens} tokens and {heads} heads", d.dlr.shape());
    assert_eq!(p.dtok.shape(), [1, k], "dtok {:?} for mini-batches of {k}", p.dtok.shape());
    for shape in [p.dgamma.shape(), p.dbeta.shape()] {
        assert_eq!(shape, [heads, width], "a LayerNorm gradient of {shape:?} for {heads} heads of {width}");
    }
    let expected = [segments.len(), heads, state_len];
    assert_eq!(dstate.shape(), expected, "a state gradient of {:?} instead of {expected:?}", dstate.shape());
    assert!(segments.iter().all(|s| s.phase == 0), "the backward of a segment that starts inside a mini-batch");
    let expected = (inner, [heads * checkpoints(segments, k, group), state_len]);
    assert!(
        saved.inner == expected.0 && saved.states.shape() == expected.1,
        "what was kept is {:?} {:?} instead of {expected:?}",
        saved.inner,
        saved.states.shape()
    );
}

/// See the public functions of both learners.
pub(crate) fn backward<E: Element, L: Learner<E>>(
    learner: L,
    inner: Inner,
    inputs: &Inputs<'_>,
    saved: &Saved,
    dz: View<'_>,
    dstate: &mut Tensor,
    d: InputGrads<'_>,
    p: ParamGrads<'_>,
) -> Result<()> {
    struct Task<'a, E> {
        segment: Segment,
        head: usize,
        dw: &'a mut [E],
        dq: MatMut<'a, E>,
        dk: MatMut<'a, E>,
        dv: MatMut<'a, E>,
        dlr: MatMut<'a, E>,
        params: &'a mut [E],
        saved: &'a [E],
    }
    check_backward(inner, inputs, saved, dz, dstate, &d, &p);
    let (tokens, heads, width, k) = inputs.sizes();
    let (segments, typed, device) = (inputs.segments, Typed::<E>::new(inputs), inputs.q.device());
    let (state_len, group) = (FastWeights::state_len(inner, width), saved.group);

    let params_len = k + 2 * width;
    let mut params = Tensor::zeros(device, &[segments.len() * heads, params_len], E::DTYPE)?;
    let mut params_rest = params.as_mut_slice::<E>();
    let mut dw_rest = dstate.as_mut_slice::<E>();
    let mut saved_rest = saved.states.as_slice::<E>();
    let [mut dq_rest, mut dk_rest, mut dv_rest, mut dlr_rest] = [d.dq, d.dk, d.dv, d.dlr].map(|m| m.into_mat::<E>());
    let mut tasks = Vec::with_capacity(segments.len() * heads);
    for segment in segments {
        let (mut dq_rows, mut dk_rows, mut dv_rows, mut dlr_rows);
        (dq_rows, dq_rest) = dq_rest.split_rows(segment.len);
        (dk_rows, dk_rest) = dk_rest.split_rows(segment.len);
        (dv_rows, dv_rest) = dv_rest.split_rows(segment.len);
        (dlr_rows, dlr_rest) = dlr_rest.split_rows(segment.len);
        let kept = mini_batches(segment, k).div_ceil(group) * state_len;
        for head in 0..heads {
            let (dw, dq, dk, dv, dlr, params, saved);
            (dw, dw_rest) = dw_rest.split_at_mut(state_len);
            (dq, dq_rows) = dq_rows.split_cols(width);
            (dk, dk_rows) = dk_rows.split_cols(width);
            (dv, dv_rows) = dv_rows.split_cols(width);
            (dlr, dlr_rows) = dlr_rows.split_cols(1);
            (params, params_rest) = params_rest.split_at_mut(params_len);
            (saved, saved_rest) = saved_rest.split_at(kept);
            tasks.push(Task { segment: *segment, head, dw, dq, dk, dv, dlr, params, saved });
        }
    }

    let dz = dz.as_mat::<E>();
    let tape_len = learner.tape_lens(typed.dims).into_iter().max().expect("two lengths");
    let job = tasks_per_job(3 * tokens * heads, tasks.len(), state_len);
    tasks.par_chunks_mut(job).try_for_each(|tasks| -> Result<()> {
        let longest = tasks.iter().map(|t| mini_batches(&t.segment, k)).max().unwrap_or(0);
        let mut scratch = Tensor::empty(device, &[tape_len + group.min(longest) * state_len], E::DTYPE)?;
        let (tape, states) = scratch.as_mut_slice::<E>().split_at_mut(tape_len);
        for task in tasks {
            let x = typed.of_head(task.head);
            let dz = dz.col_range(task.head * width..(task.head + 1) * width);
            let Segment { first_row, len, .. } = task.segment;
            let chunk_at = |m: usize| x.chunk(first_row + m * k, k.min(len - m * k), 0);
            let count = mini_batches(&task.segment, k);
            for start in (0..count).step_by(group).rev() {
                // The states of the group, by the arithmetic of the forward pass.
                let members = group.min(count - start);
                states[..state_len].copy_from_slice(&task.saved[start / group * state_len..][..state_len]);
                for i in 1..members {
                    let (before, after) = states.split_at_mut(i * state_len);
                    let (w, next) = (&before[(i - 1) * state_len..], &mut after[..state_len]);
                    learner.learn(typed.dims, &chunk_at(start + i - 1), w, tape);
                    next.copy_from_slice(w);
                    learner.commit(typed.dims, typed.tok, next, tape);
                }
                for i in (0..members).rev() {
                    let chunk = chunk_at(start + i);
                    let range = (start + i) * k..(start + i) * k + chunk.len();
                    let (dtok, norm) = task.params.split_at_mut(k);
                    let (dgamma, dbeta) = norm.split_at_mut(width);
                    let grads = ChunkGrads {
                        dq: task.dq.reborrow().row_range(range.clone()),
                        dk: task.dk.reborrow().row_range(range.clone()),
                        dv: task.dv.reborrow().row_range(range.clone()),
                        dlr: task.dlr.reborrow().row_range(range.clone()),
                        dtok,
                        dgamma,
                        dbeta,
                    };
                    let dz = dz.row_range(first_row + range.start..first_row + range.end);
                    let w = &states[i * state_len..][..state_len];
                    learner.backward(typed.dims, &chunk, w, task.dw, chunk.len() == k, dz, tape, grads);
                }
            }
        }
        Ok(())
    })?;
    drop(tasks);

    let (mut dtok, mut dgamma, mut dbeta) = (p.dtok.into_mat::<E>(), p.dgamma.into_mat::<E>(), p.dbeta.into_mat::<E>());
    for (task, part) in params.as_slice::<E>().chunks_exact(params_len).enumerate() {
        let head = task % heads;
        let sums = [dtok.row_mut(0), dgamma.row_mut(head), dbeta.row_mut(head)];
        for (sum, part) in sums.into_iter().flatten().zip(part) {
            *sum += *part;
        }
    }
    Ok(())
}

/// The squared error of `f(k) - v` summed over the head's columns, for one token under the weights `w`.
pub(crate) type SquaredError<E> = fn(k: &[E], v: &[E], wrap: Wrap<'_, E>, w: &[E]) -> f64;

/// See the public functions of both learners.
pub(crate) fn statistics<E: Element>(
    error: SquaredError<E>,
    inner: Inner,
    inputs: &Inputs<'_>,
    saved: &Saved,
    initial: &FastWeights,
    end: &FastWeights,
) -> Vec<[f64; 3]> {
    check_state(inputs, initial, inner);
    check_state(inputs, end, inner);
    let (_, heads, d, k) = inputs.sizes();
    let (typed, state_len) = (Typed::<E>::new(inputs), FastWeights::state_len(inner, d));
    assert_eq!(saved.group, 1, "statistics of a pass that kept a state every {} mini-batches", saved.group);
    let expected = [heads * checkpoints(inputs.segments, k, 1), state_len];
    assert_eq!(saved.states.shape(), expected, "what was kept is {:?} instead of {expected:?}", saved.states.shape());

    let mut kept = saved.states.as_slice::<E>().chunks_exact(state_len);
    let mut tasks = Vec::with_capacity(inputs.segments.len() * heads);
    for segment in inputs.segments {
        for head in 0..heads {
            let mut states: Vec<&[E]> = kept.by_ref().take(mini_batches(segment, k)).collect();
            states.push(&end.weights.as_slice::<E>()[(segment.slot * heads + head) * state_len..][..state_len]);
            tasks.push((segment, head, states));
        }
    }
    let errors: Vec<Vec<[f64; 3]>> = tasks
        .par_iter()
        .map(|(segment, head, states)| {
            let x = typed.of_head(*head);
            let first = &initial.weights.as_slice::<E>()[(segment.slot * heads + head) * state_len..][..state_len];
            let of_mini_batch = |m: usize| {
                let token = x.chunk(segment.first_row + (m + 1) * k - 1, 1, 0);
                [first, states[m], states[m + 1]].map(|w| error(token.k.row(0), token.v.row(0), token.wrap(), w))
            };
            (0..segment.len / k).map(of_mini_batch).collect()
        })
        .collect();

    let full = inputs.segments.iter().map(|s| s.len / k).max().unwrap_or(0);
    let mut sums = vec![[0.0; 3]; full];
    for (m, errors) in errors.iter().flat_map(|errors| errors.iter().enumerate()) {
        sums[m].iter_mut().zip(errors).for_each(|(sum, error)| *sum += error);
    }
    average(&mut sums, inputs);
    sums
}

/// Makes sums over the segments that have a mini-batch, over heads and columns, to means.
pub(crate) fn average(sums: &mut [[f64; 3]], inputs: &Inputs<'_>) {
    let (_, heads, d, k) = inputs.sizes();
    for (m, sum) in sums.iter_mut().enumerate() {
        let having = inputs.segments.iter().filter(|s| s.len / k > m).count();
        *sum = sum.map(|s| s / (having * heads * d) as f64);
    }
}
