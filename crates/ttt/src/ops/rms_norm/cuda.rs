//! On a GPU.

use crate::Result;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, width};
use crate::device::view::{View, ViewMut};
use crate::ops::add;
use crate::ops::partials::{gpu_rows, gpu_threads};
use crate::tensor::{DType, Tensor};

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "rms_norm",
    file: "ops/rms_norm/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "forward1", registers: 48 },
        Entry { name: "forward8", registers: 64 },
        Entry { name: "backward1", registers: 64 },
        Entry { name: "backward8", registers: 96 },
    ],
};

/// Writes `y`.
pub(crate) fn forward(cuda: &Cuda, x: View, w: View, eps: f64, y: &ViewMut) {
    let ([rows, cols], y) = (x.shape(), y.as_view());
    let kernel = if width(&[x, y, w]) == 8 { "forward8" } else { "forward1" };
    let args = args![y.address(), x.address(), x.stride(), w.address(), rows, cols, eps as f32];
    // SAFETY: the shapes were checked by the caller; `y` is contiguous and mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), [rows.div_ceil(8), 1, 1], 256, 0, args) };
}

/// Writes `dx`, to which `residual` is added; adds to `dw`.
pub(crate) fn backward(
    cuda: &Cuda,
    dy: View,
    x: View,
    w: View,
    eps: f64,
    dw: &ViewMut,
    dx: &ViewMut,
    residual: Option<View>,
) -> Result<()> {
    let ([rows, cols], dx) = (x.shape(), dx.as_view());
    let wide = width(&[dy, x, dx, w, residual.unwrap_or(dx)]);
    let kernel = if wide == 8 { "backward8" } else { "backward1" };
    let [rows_per_block, count] = gpu_rows(rows);
    let partials = Tensor::empty(x.device(), &[count, cols], DType::F32)?;
    let args = args![
        dx.address(),
        dy.address(),
        dy.stride(),
        x.address(),
        x.stride(),
        w.address(),
        residual.map_or(0, |r| r.address()),
        residual.map_or(0, |r| r.stride()),
        partials.address(),
        rows,
        cols,
        rows_per_block,
        eps as f32
    ];
    let threads = gpu_threads(cols, wide);
    // SAFETY: the shapes were checked by the caller; `dx` is contiguous and mutably borrowed, `partials` has a row for each block.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), [count, 1, 1], threads, 4 * cols, args) };
    add::cuda::add_up(cuda, dw, partials.address(), [count, cols], 0);
    Ok(())
}
