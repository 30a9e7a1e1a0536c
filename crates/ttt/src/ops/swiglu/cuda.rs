//! On a GPU.

use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, blocks, width};
use crate::device::view::{View, ViewMut};
use crate::tensor::DType;

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "swiglu",
    file: "ops/swiglu/kernel.cu",
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
pub(crate) fn forward(cuda: &Cuda, gate_up: View, y: &ViewMut) {
    let (x, y) = (gate_up, y.as_view());
    let [rows, cols] = y.shape();
    let wide = width(&[x, y]);
    let kernel = if wide == 8 { "forward8" } else { "forward1" };
    let list = args![y.address(), x.address(), x.stride(), rows, cols];
    // SAFETY: `gate_up` is twice as wide as `y`, which is contiguous and mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
}

/// Writes `dx = [dgate | dup]`.
pub(crate) fn backward(cuda: &Cuda, dy: View, gate_up: View, dx: &ViewMut) {
    let (x, dx) = (gate_up, dx.as_view());
    let [rows, cols] = dy.shape();
    let wide = width(&[x, dx, dy]);
    let kernel = if wide == 8 { "backward8" } else { "backward1" };
    let list = args![dx.address(), dy.address(), dy.stride(), x.address(), x.stride(), rows, cols];
    // SAFETY: `gate_up` and `dx` are twice as wide as `dy` (checked by the caller); `dx` is contiguous and mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), kernel), blocks(rows * cols / wide), 256, 0, list) };
}
