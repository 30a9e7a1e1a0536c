//! Rotary positions, interleaved pairs (`(x_2i, x_2i+1)` turns by `p ω_i`, `ω_i = θ^(-2i/d)`), where the position p is taken
//! modulo the mini-batch size K: the paper's layer sees positions only within a mini-batch.

mod cpu;
pub(crate) mod cuda;
mod reference;

use crate::Result;
use crate::batch::Segment;
use crate::device::Device;
use crate::device::view::{View, ViewMut};
use crate::ops::{expect_segments, expect_shape, fast};
use crate::tensor::{DType, Tensor, with_dtype};

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// By `p ω`.
    Forward,
    /// By `−p ω`: the inverse, which is also the gradient.
    Backward,
}

/// Sines and cosines of all angles.
#[derive(Clone, Debug)]
pub struct Table {
    /// `[k, d]`: `cos(p ω_i)` at `2i` and `2i + 1`.
    cos: Tensor,
    /// `[k, d]`: `−sin(p ω_i)` at `2i`, `sin(p ω_i)` at `2i + 1`.
    sin: Tensor,
}

impl Table {
    /// The table of positions `0..mini_batch` for heads of `head_dim` channels; angles are computed in f64.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When `head_dim` is odd.
    pub fn new(device: &Device, dtype: DType, mini_batch: usize, head_dim: usize, theta: f64) -> Result<Table> {
        assert!(head_dim.is_multiple_of(2), "rotary positions need an even head size, not {head_dim}");
        if device.as_cuda().is_some() {
            return Table::new(&device.cpu_beside(), DType::F32, mini_batch, head_dim, theta)?.to(device);
        }
        let mut cos = Tensor::empty(device, &[mini_batch, head_dim], dtype)?;
        let mut sin = Tensor::empty(device, &[mini_batch, head_dim], dtype)?;
        with_dtype!(dtype, E => reference::fill::<E>(cos.view_mut().into_mat(), sin.view_mut().into_mat(), theta));
        Ok(Table { cos, sin })
    }

    /// A copy on another device.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn to(&self, device: &Device) -> Result<Table> {
        Ok(Table { cos: self.cos.to(device)?, sin: self.sin.to(device)? })
    }

    /// Cosines and sines, each `[K, d]`; sines are negative in even columns.
    pub(crate) fn parts(&self) -> [View<'_>; 2] {
        [self.cos.view(), self.sin.view()]
    }

    /// Number of positions K.
    pub fn mini_batch(&self) -> usize {
        self.cos.shape()[0]
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.cos.shape()[1]
    }
}

/// Turns each head of `x [n, heads·d]` in place; row i of a segment is at position `(phase + i) mod K`.
///
/// # Panics
/// When `x` has not `heads·d` columns, or `segments` do not cover its rows one behind the other; on a GPU, when there is no memory
/// for the segments.
pub fn rotate(x: ViewMut, table: &Table, segments: &[Segment], heads: usize, direction: Direction) {
    expect_segments(segments, x.rows());
    expect_shape("x", x.shape(), [x.rows(), heads * table.head_dim()]);
    if let Some(gpu) = x.device().as_cuda() {
        let tables = [table.cos.view(), table.sin.view()];
        cuda::rotate(gpu, &x, tables, segments, direction).expect("memory for the segments of a batch");
    } else if fast(x.device(), x.dtype()) {
        cpu::rotate(x.into_mat(), table.cos.view().as_mat(), table.sin.view().as_mat(), segments, direction);
    } else {
        with_dtype!(x.dtype(), E => {
            reference::rotate::<E>(x.into_mat(), table.cos.view().as_mat(), table.sin.view().as_mat(), segments, direction)
        });
    }
}
