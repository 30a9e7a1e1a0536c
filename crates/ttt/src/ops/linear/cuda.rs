//! On a GPU: cuBLASLt, and for few rows kernels of our own.

use crate::device::cuda::{Cuda, Operand};
use crate::device::view::{View, ViewMut};
use crate::ops::step;

/// `y = x wᵀ`.
pub(crate) fn forward(cuda: &Cuda, x: View, w: View, y: &ViewMut) {
    if !step::cuda::few_rows(cuda, x, w, y.as_view()) {
        cuda.product(x.into(), Operand::from(w).transposed(), y.into(), false);
    }
}

/// `y = c + x wᵀ`.
pub(crate) fn forward_onto(cuda: &Cuda, x: View, w: View, y: &ViewMut, c: View) {
    cuda.product_onto(x.into(), Operand::from(w).transposed(), y.into(), c.into());
}

/// `dx += dy w`.
pub(crate) fn add_backward_input(cuda: &Cuda, dy: View, w: View, dx: &ViewMut) {
    cuda.product(dy.into(), w.into(), dx.into(), true);
}

/// `dx = dy w`.
pub(crate) fn backward_input(cuda: &Cuda, dy: View, w: View, dx: &ViewMut) {
    cuda.product(dy.into(), w.into(), dx.into(), false);
}

/// `dw += dyᵀ x`, in f32 whatever the operands are.
pub(crate) fn backward_weight(cuda: &Cuda, dy: View, x: View, dw: &ViewMut) {
    cuda.product(Operand::from(dy).transposed(), x.into(), dw.into(), true);
}
