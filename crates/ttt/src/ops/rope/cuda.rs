//! On a GPU.

use super::{Direction, Pairs};
use crate::Result;
use crate::batch::Segment;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, blocks, width};
use crate::device::view::{View, ViewMut};
use crate::tensor::{DType, Tensor};

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "rope",
    file: "ops/rope/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "turn2", registers: 48 },
        Entry { name: "turn8", registers: 64 },
        Entry { name: "halves1", registers: 48 },
        Entry { name: "halves8", registers: 80 },
        Entry { name: "angles", registers: 64 },
    ],
};

fn sign(direction: Direction) -> f32 {
    match direction {
        Direction::Forward => 1.0,
        Direction::Backward => -1.0,
    }
}

/// Fills the tables `[rows, d]` of a batch with the angles of its positions, which lie on the GPU.
pub(super) fn fill(cuda: &Cuda, [cos, sin]: [&Tensor; 2], segments: &[Segment], pairs: Pairs, theta: f64) -> Result<()> {
    let [rows, head] = cos.view().shape();
    let segments = cuda.segments(segments)?;
    let speed = theta.log2();
    let [speed, rest] = [speed as f32, (speed - f64::from(speed as f32)) as f32];
    let (Pairs { step, apart }, of_row) = (pairs, segments.of_row());
    let list = args![cos.address(), sin.address(), segments.segments(), of_row, rows, head, step, apart, speed, rest];
    // SAFETY: the segments cover the rows (the caller made the tables as long as they are), and the tables are new.
    unsafe { cuda.launch(&SOURCE, (DType::F32, "angles"), blocks(rows * head / 2), 256, 0, list) };
    Ok(())
}

/// Turns the two halves of each head of every row of `x` in place, by the row of the tables with the same number.
pub(super) fn rotate_halves(cuda: &Cuda, x: &ViewMut, [cos, sin]: [View; 2], direction: Direction) {
    let (x, head) = (x.as_view(), cos.cols());
    let [rows, cols] = x.shape();
    let wide = if width(&[x]) == 8 && head.is_multiple_of(16) { 8 } else { 1 };
    let kernel = if wide == 8 { "halves8" } else { "halves1" };
    let list = args![x.address(), x.stride(), cos.address(), sin.address(), rows, cols, head, sign(direction)];
    // SAFETY: the tables are as long as `x` (checked by the caller), which is whole heads wide and mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / 2 / wide), 256, 0, list) };
}

/// Turns every row of `x` in place; without segments by the row of the tables with the same number.
pub(crate) fn rotate(
    cuda: &Cuda,
    x: &ViewMut,
    [cos, sin]: [View; 2],
    segments: Option<&[Segment]>,
    direction: Direction,
) -> Result<()> {
    let (x, [positions, head]) = (x.as_view(), cos.shape());
    let segments = segments.map(|segments| cuda.segments(segments)).transpose()?;
    let wide = if width(&[x]) == 8 && head.is_multiple_of(8) { 8 } else { 2 };
    let [rows, cols] = x.shape();
    let list = args![
        x.address(),
        x.stride(),
        cos.address(),
        sin.address(),
        segments.as_ref().map_or(0, |s| s.segments()),
        segments.as_ref().map_or(0, |s| s.of_row()),
        rows,
        cols,
        head,
        positions,
        sign(direction)
    ];
    let kernel = if wide == 8 { "turn8" } else { "turn2" };
    // SAFETY: the segments cover the rows (checked by the caller), the tables are [positions, head], `x` is mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
    Ok(())
}
