//! On a GPU.

use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, blocks, width};
use crate::device::view::{View, ViewMut};
use crate::tensor::DType;

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "gelu_gate",
    file: "ops/gelu_gate/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "forward1", registers: 40 },
        Entry { name: "forward8", registers: 64 },
        Entry { name: "backward1", registers: 48 },
        Entry { name: "backward8", registers: 80 },
    ],
};

/// Writes `y`.
pub(crate) fn forward(cuda: &Cuda, gate: View, x: View, y: &ViewMut) {
    let ([rows, cols], y) = (x.shape(), y.as_view());
    let wide = width(&[gate, x, y]);
    let kernel = if wide == 8 { "forward8" } else { "forward1" };
    let list = args![y.address(), gate.address(), gate.stride(), x.address(), x.stride(), rows, cols];
    // SAFETY: the shapes were checked by the caller; `y` is contiguous and mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
}

/// Writes `dx` and `dgate`.
pub(crate) fn backward(cuda: &Cuda, dy: View, gate: View, x: View, dgate: &ViewMut, dx: &ViewMut) {
    let ([rows, cols], dgate, dx) = (x.shape(), dgate.as_view(), dx.as_view());
    let wide = width(&[dy, gate, x, dgate, dx]);
    let kernel = if wide == 8 { "backward8" } else { "backward1" };
    let list = args![
        dx.address(),
        dgate.address(),
        dgate.stride(),
        dy.address(),
        dy.stride(),
        gate.address(),
        gate.stride(),
        x.address(),
        x.stride(),
        rows,
        cols
    ];
    // SAFETY: the shapes were checked by the caller; `dx` is contiguous, it and `dgate` are mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
}
