//! On a GPU. At most 8 taps.

use crate::Result;
use crate::batch::Segment;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, blocks, width};
use crate::device::view::{View, ViewMut};
use crate::ops::add;
use crate::tensor::{DType, Tensor};

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "conv",
    file: "ops/conv/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "forward1", registers: 64 },
        Entry { name: "forward8", registers: 80 },
        Entry { name: "backward_input1", registers: 64 },
        Entry { name: "backward_input8", registers: 80 },
        Entry { name: "backward_weight", registers: 80 },
        Entry { name: "forward_taps4", registers: 128 },
        Entry { name: "backward_input_taps4", registers: 128 },
        Entry { name: "backward_weight_taps4", registers: 128 },
        Entry { name: "advance", registers: 64 },
        Entry { name: "backward_window", registers: 64 },
        Entry { name: "backward_advance", registers: 64 },
    ],
};

/// The most taps that the kernels take.
pub(crate) const MAX_TAPS: usize = 8;

/// Threads of a block of the kernels with a thread for each column, and of those of four taps.
const COLUMN_THREADS: usize = 128;

/// Rows of a thread of the kernels of four taps, and blocks for all threads: few rows are spread over more threads.
fn chunks(rows: usize, cols: usize, most: usize) -> (usize, [usize; 3]) {
    let per_thread = (rows * (cols / 8)).div_ceil(132 * 1024).clamp(1, most);
    (per_thread, [(rows.div_ceil(per_thread) * (cols / 8)).div_ceil(COLUMN_THREADS), 1, 1])
}

/// Whether the kernels of four taps cover these matrices.
fn four_taps(w: View, views: &[View]) -> bool {
    let contiguous = w.stride() == 4 && w.address().is_multiple_of(16);
    w.cols() == 4 && contiguous && width(views) == 8
}

/// Partial sums of the gradients of weights and bias, f32 numbers, where all views are aligned.
pub(crate) fn partials(rows: usize, cols: usize, taps: usize) -> usize {
    let count = match taps {
        4 if cols.is_multiple_of(8) => rows.div_ceil(chunks(rows, cols, 64).0),
        _ => rows.div_ceil(rows_of_block(rows)),
    };
    count * cols * (taps + 1)
}

/// Rows that a block of `backward_weight` adds up.
fn rows_of_block(rows: usize) -> usize {
    rows.div_ceil(256).max(16)
}

/// What all directions read.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) x: View<'a>,
    pub(crate) segments: &'a [Segment],
    pub(crate) window: Option<&'a Tensor>,
}

impl Inputs<'_> {
    fn window(&self) -> u64 {
        self.window.map_or(0, Tensor::address)
    }
}

/// Writes `y`.
pub(crate) fn forward(cuda: &Cuda, inputs: Inputs, w: View, bias: View, y: &ViewMut) -> Result<()> {
    let (x, y) = (inputs.x, y.as_view());
    let segments = cuda.segments(inputs.segments)?;
    let wide = width(&[x, y, bias]);
    let ([rows, cols], taps) = (x.shape(), w.cols());
    if four_taps(w, &[x, y, bias]) {
        let (per_thread, grid) = chunks(rows, cols, 32);
        let list = args![
            y.address(),
            x.address(),
            x.stride(),
            w.address(),
            bias.address(),
            inputs.window(),
            segments.segments(),
            segments.of_row(),
            rows,
            cols,
            per_thread
        ];
        // SAFETY: shapes, segments and windows were checked by the caller; `y` is contiguous and mutably borrowed.
        unsafe { cuda.launch(&SOURCE, (x.dtype(), "forward_taps4"), grid, COLUMN_THREADS, 0, list) };
        return Ok(());
    }
    let list = args![
        y.address(),
        x.address(),
        x.stride(),
        w.address(),
        w.stride(),
        bias.address(),
        inputs.window(),
        segments.segments(),
        segments.of_row(),
        rows,
        cols,
        taps
    ];
    let kernel = if wide == 8 { "forward8" } else { "forward1" };
    // SAFETY: shapes, segments and windows were checked by the caller; `y` is contiguous and mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
    Ok(())
}

/// Writes `dx`, adds to `dw` and `dbias`.
pub(crate) fn backward(cuda: &Cuda, dy: View, inputs: Inputs, w: View, [dw, dbias]: [&ViewMut; 2], dx: &ViewMut) -> Result<()> {
    let (x, dx) = (inputs.x, dx.as_view());
    let segments = cuda.segments(inputs.segments)?;
    let wide = width(&[dy, dx]);
    let ([rows, cols], taps) = (x.shape(), w.cols());
    assert!(taps <= MAX_TAPS, "{taps} taps; the kernels take {MAX_TAPS}");
    if four_taps(w, &[x, dy, dx]) {
        let (per_thread, grid) = chunks(rows, cols, 32);
        let list = args![
            dx.address(),
            dy.address(),
            dy.stride(),
            w.address(),
            segments.segments(),
            segments.of_row(),
            rows,
            cols,
            per_thread
        ];
        // SAFETY: shapes and segments were checked by the caller; `dx` is contiguous and mutably borrowed.
        unsafe { cuda.launch(&SOURCE, (x.dtype(), "backward_input_taps4"), grid, COLUMN_THREADS, 0, list) };
        let (per_thread, grid) = chunks(rows, cols, 64);
        let (count, width) = (rows.div_ceil(per_thread), 5 * cols);
        let partials = Tensor::empty(x.device(), &[count, width], DType::F32)?;
        let list = args![
            partials.address(),
            dy.address(),
            dy.stride(),
            x.address(),
            x.stride(),
            inputs.window(),
            segments.segments(),
            segments.of_row(),
            rows,
            cols,
            per_thread
        ];
        // SAFETY: as above; `partials` has a row for each chunk of rows.
        unsafe { cuda.launch(&SOURCE, (x.dtype(), "backward_weight_taps4"), grid, COLUMN_THREADS, 0, list) };
        add::cuda::add_up(cuda, dw, partials.address(), [count, width], 0);
        add::cuda::add_up(cuda, dbias, partials.address(), [count, width], 4 * cols);
        return Ok(());
    }
    let list = args![
        dx.address(),
        dy.address(),
        dy.stride(),
        w.address(),
        w.stride(),
        segments.segments(),
        segments.of_row(),
        rows,
        cols,
        taps
    ];
    let kernel = if wide == 8 { "backward_input8" } else { "backward_input1" };
    // SAFETY: shapes and segments were checked by the caller; `dx` is contiguous and mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };

    let per_block = rows_of_block(rows);
    let (count, width) = (rows.div_ceil(per_block), cols * (taps + 1));
    let partials = Tensor::empty(x.device(), &[count, width], DType::F32)?;
    let list = args![
        partials.address(),
        dy.address(),
        dy.stride(),
        x.address(),
        x.stride(),
        inputs.window(),
        segments.segments(),
        segments.of_row(),
        rows,
        cols,
        taps,
        per_block
    ];
    let grid = [cols.div_ceil(COLUMN_THREADS), count, 1];
    // SAFETY: as above; `partials` has a row for each block of rows.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), "backward_weight"), grid, COLUMN_THREADS, 0, list) };
    add::cuda::add_up(cuda, dw, partials.address(), [count, width], 0);
    add::cuda::add_up(cuda, dbias, partials.address(), [count, width], cols * taps);
    Ok(())
}

/// Moves the windows on.
pub(crate) fn advance(cuda: &Cuda, x: View, segments: &[Segment], window: &mut Tensor) -> Result<()> {
    let uploaded = cuda.segments(segments)?;
    let (cols, memory) = (x.cols(), window.shape()[1]);
    let list = args![window.view_mut().as_view().address(), x.address(), x.stride(), uploaded.segments(), cols, memory];
    // SAFETY: shapes and segments were checked by the caller; no two segments have the same slot; `window` is mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), "advance"), columns(cols, segments), COLUMN_THREADS, 0, list) };
    Ok(())
}

/// Writes the segments' slots of `dwindow`.
pub(crate) fn backward_window(cuda: &Cuda, dy: View, w: View, segments: &[Segment], dwindow: &mut Tensor) -> Result<()> {
    let uploaded = cuda.segments(segments)?;
    let cols = dy.cols();
    let to = dwindow.view_mut().as_view().address();
    let list = args![to, dy.address(), dy.stride(), w.address(), w.stride(), uploaded.segments(), cols, w.cols() - 1];
    // SAFETY: as for `advance`.
    unsafe { cuda.launch(&SOURCE, (dy.dtype(), "backward_window"), columns(cols, segments), COLUMN_THREADS, 0, list) };
    Ok(())
}

/// Adds to `dx` and `dwindow`.
pub(crate) fn backward_advance(
    cuda: &Cuda,
    dfinal: &Tensor,
    segments: &[Segment],
    dx: &ViewMut,
    dwindow: &mut Tensor,
) -> Result<()> {
    let uploaded = cuda.segments(segments)?;
    let (dx, memory) = (dx.as_view(), dwindow.shape()[1]);
    let to = dwindow.view_mut().as_view().address();
    let list = args![dx.address(), dx.stride(), to, dfinal.address(), uploaded.segments(), dx.cols(), memory];
    let grid = columns(dx.cols(), segments);
    // SAFETY: as for `advance`; `dx` is mutably borrowed too.
    unsafe { cuda.launch(&SOURCE, (dx.dtype(), "backward_advance"), grid, COLUMN_THREADS, 0, list) };
    Ok(())
}

fn columns(cols: usize, segments: &[Segment]) -> [usize; 3] {
    [cols.div_ceil(COLUMN_THREADS), segments.len(), 1]
}
