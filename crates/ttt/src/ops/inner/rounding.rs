//! Where a GPU rounds in mixed precision: the operands of its products. One mode of the references, which its kernels are tested
//! against; the other is the definition.

use std::borrow::Cow;

use crate::device::{Device, Kernels};
use crate::tensor::Element;

/// What the references round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// Nothing: the definition.
    Exact,
    /// Fast weights, scaled inner gradients, activations, attention and gradients, where they are operands of products, to bf16.
    Operands,
}

impl Rounding {
    /// That of a device's references.
    pub(crate) fn of(device: &Device) -> Rounding {
        if device.kernels() == Kernels::Rounded { Rounding::Operands } else { Rounding::Exact }
    }

    /// A number as an operand.
    pub(crate) fn one<E: Element>(self, x: E) -> E {
        match self {
            Rounding::Exact => x,
            // Through f32, because the conversion from f64 drops sticky bits.
            Rounding::Operands => E::from_f64(half::bf16::from_f32(x.to_f64() as f32).to_f64()),
        }
    }

    /// Numbers as operands, in place.
    pub(crate) fn put<E: Element>(self, x: &mut [E]) {
        if self == Rounding::Operands {
            x.iter_mut().for_each(|x| *x = self.one(*x));
        }
    }

    /// Numbers as operands.
    pub(crate) fn all<E: Element>(self, x: &[E]) -> Cow<'_, [E]> {
        match self {
            Rounding::Exact => Cow::Borrowed(x),
            Rounding::Operands => x.iter().map(|x| self.one(*x)).collect(),
        }
    }

    /// Two factors whose product is that of `scale` and `x` as one operand: so is the update of the fast weights rounded.
    pub(crate) fn scaled<E: Element>(self, scale: E, x: &[E]) -> (E, Cow<'_, [E]>) {
        match self {
            Rounding::Exact => (scale, Cow::Borrowed(x)),
            Rounding::Operands => (E::ONE, x.iter().map(|x| self.one(scale * *x)).collect()),
        }
    }
}
