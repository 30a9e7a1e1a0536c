//! On a GPU.

use super::Direction;
use crate::Result;
use crate::batch::Segment;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, blocks, width};
use crate::device::view::{View, ViewMut};
use crate::tensor::DType;

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "rope",
    file: "ops/rope/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[Entry { name: "turn2", registers: 48 }, Entry { name: "turn8", registers: 64 }],
};

/// Turns every row of `x` in place.
pub(crate) fn rotate(cuda: &Cuda, x: &ViewMut, [cos, sin]: [View; 2], segments: &[Segment], direction: Direction) -> Result<()> {
    let (x, [positions, head]) = (x.as_view(), cos.shape());
    let segments = cuda.segments(segments)?;
    let wide = if width(&[x]) == 8 && head.is_multiple_of(8) { 8 } else { 2 };
    let sign = match direction {
        Direction::Forward => 1.0f32,
        Direction::Backward => -1.0,
    };
    let [rows, cols] = x.shape();
    let list = args![
        x.address(),
        x.stride(),
        cos.address(),
        sin.address(),
        segments.segments(),
        segments.of_row(),
        rows,
        cols,
        head,
        positions,
        sign
    ];
    let kernel = if wide == 8 { "turn8" } else { "turn2" };
    // SAFETY: the segments cover the rows (checked by the caller), the tables are [positions, head], `x` is mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
    Ok(())
}
