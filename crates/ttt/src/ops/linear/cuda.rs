//! On a GPU: cuBLASLt.

use crate::device::cuda::{Cuda, Operand};
use crate::device::view::{View, ViewMut};

/// `y = x wᵀ`.
pub(crate) fn forward(cuda: &Cuda, x: View, w: View, y: &ViewMut) {
    cuda.product(x.into(), Operand::from(w).transposed(), y.into(), false);
}

/// `dx = dy w`.
pub(crate) fn backward_input(cuda: &Cuda, dy: View, w: View, dx: &ViewMut) {
    cuda.product(dy.into(), w.into(), dx.into(), false);
}

/// `dw += dyᵀ x`, in f32 whatever the operands are.
pub(crate) fn backward_weight(cuda: &Cuda, dy: View, x: View, dw: &ViewMut) {
    cuda.product(Operand::from(dy).transposed(), x.into(), dw.into(), true);
}
