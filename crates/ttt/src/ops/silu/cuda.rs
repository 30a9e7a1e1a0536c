//! On a GPU.

use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, blocks, width};
use crate::device::view::{View, ViewMut};
use crate::tensor::DType;

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "silu",
    file: "ops/silu/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "forward1", registers: 40 },
        Entry { name: "forward8", registers: 48 },
        Entry { name: "backward1", registers: 40 },
        Entry { name: "backward8", registers: 64 },
        Entry { name: "gate1", registers: 40 },
        Entry { name: "gate8", registers: 64 },
        Entry { name: "backward_gate1", registers: 48 },
        Entry { name: "backward_gate8", registers: 80 },
    ],
};

/// Writes `y`.
pub(crate) fn forward(cuda: &Cuda, x: View, y: &ViewMut) {
    let y = y.as_view();
    let ([rows, cols], wide) = (x.shape(), width(&[x, y]));
    let kernel = if wide == 8 { "forward8" } else { "forward1" };
    let list = args![y.address(), x.address(), x.stride(), rows, cols];
    // SAFETY: `y` is as `x`, contiguous and mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
}

/// Writes `dx`.
pub(crate) fn backward(cuda: &Cuda, dy: View, x: View, dx: &ViewMut) {
    let dx = dx.as_view();
    let ([rows, cols], wide) = (x.shape(), width(&[x, dy, dx]));
    let kernel = if wide == 8 { "backward8" } else { "backward1" };
    let list = args![dx.address(), dy.address(), dy.stride(), x.address(), x.stride(), rows, cols];
    // SAFETY: all have one shape (checked by the caller); `dx` is contiguous and mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
}

/// Writes `y`.
pub(crate) fn gate(cuda: &Cuda, gate: View, x: View, y: &ViewMut) {
    let y = y.as_view();
    let ([rows, cols], wide) = (x.shape(), width(&[gate, x, y]));
    let kernel = if wide == 8 { "gate8" } else { "gate1" };
    let list = args![y.address(), gate.address(), gate.stride(), x.address(), x.stride(), rows, cols];
    // SAFETY: as for `backward`.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
}

/// Writes `dgate` and `dx`.
pub(crate) fn backward_gate(cuda: &Cuda, dy: View, gate: View, x: View, dgate: &ViewMut, dx: &ViewMut) {
    let (dgate, dx) = (dgate.as_view(), dx.as_view());
    let ([rows, cols], wide) = (x.shape(), width(&[dy, gate, x, dgate, dx]));
    let kernel = if wide == 8 { "backward_gate8" } else { "backward_gate1" };
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
    // SAFETY: as for `backward`; `dgate` is mutably borrowed too.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
}
