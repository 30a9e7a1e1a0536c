//! Rotary positions: pairs of channels turn by `p ω_i`, `ω_i = θ^(-2i/d)`, where p is the position of the token.
//!
//! A TTT layer's pairs are neighbours (`(x_2i, x_2i+1)`), and it sees positions only within a mini-batch, modulo its size K: one
//! table of K rows serves all passes. An attention layer's pairs are the two halves of a head (`(x_i, x_i+d/2)`, the convention of
//! Hugging Face's Llama, so that its weights are held and written as they are), and it sees every position: a pass has a table
//! with a row for each row of its batch, and no length is too long.

mod cpu;
pub(crate) mod cuda;
mod reference;

use crate::Result;
use crate::batch::Segment;
use crate::device::Device;
use crate::device::view::{View, ViewMut};
use crate::ops::{add, expect_segments, expect_shape, fast};
use crate::tensor::{DType, Tensor, with_dtype};

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// By `p ω`.
    Forward,
    /// By `−p ω`: the inverse, which is also the gradient.
    Backward,
}

/// Which channels of a head turn together, and which row of a table is whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Neighbours; row `(phase + i) mod K` is that of token i of a segment.
    MiniBatch,
    /// Halves; row i is that of row i of the batch.
    Halves,
    /// Neighbours; row i is that of row i of the batch.
    Neighbours,
}

/// Sines and cosines of all angles.
#[derive(Clone, Debug)]
pub struct Table {
    kind: Kind,
    /// `[rows, d]`: `cos(p ω_i)` at both channels of pair i.
    cos: Tensor,
    /// `[rows, d]`: `−sin(p ω_i)` at the first channel of pair i, `sin(p ω_i)` at the second.
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
        if device.as_cuda().is_some() {
            return Table::new(&device.cpu_beside(), DType::F32, mini_batch, head_dim, theta)?.to(device);
        }
        let positions: Vec<usize> = (0..mini_batch).collect();
        Table::filled(Kind::MiniBatch, device, dtype, &positions, head_dim, theta)
    }

    /// The table of a batch whose tokens are at positions `phase`, `phase + 1`, ... of each segment, for heads of halves.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When `head_dim` is odd.
    pub fn of_batch(device: &Device, dtype: DType, segments: &[Segment], head_dim: usize, theta: f64) -> Result<Table> {
        Table::of_rows(Kind::Halves, device, dtype, segments, head_dim, theta)
    }

    /// The same for heads of neighbours: a TTT layer whose mini-batch is the whole sequence.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When `head_dim` is odd.
    pub fn neighbours_of_batch(device: &Device, dtype: DType, segments: &[Segment], head_dim: usize, theta: f64) -> Result<Table> {
        Table::of_rows(Kind::Neighbours, device, dtype, segments, head_dim, theta)
    }

    /// A table with a row for each row of a batch. A GPU makes it itself from the segments that lie there, so that a recorded step
    /// does too.
    fn of_rows(kind: Kind, device: &Device, dtype: DType, segments: &[Segment], head_dim: usize, theta: f64) -> Result<Table> {
        if let Some(gpu) = device.as_cuda() {
            assert!(head_dim.is_multiple_of(2), "rotary positions need an even head size, not {head_dim}");
            let rows = segments.iter().map(|s| s.len).sum();
            let empty = || Tensor::empty(device, &[rows, head_dim], DType::F32);
            let (cos, sin) = (empty()?, empty()?);
            cuda::fill(gpu, [&cos, &sin], segments, kind.pairs(head_dim), theta)?;
            return Ok(Table { kind, cos, sin });
        }
        let positions: Vec<usize> = segments.iter().flat_map(|s| s.phase..s.phase + s.len).collect();
        Table::filled(kind, device, dtype, &positions, head_dim, theta)
    }

    fn filled(kind: Kind, device: &Device, dtype: DType, positions: &[usize], head_dim: usize, theta: f64) -> Result<Table> {
        assert!(head_dim.is_multiple_of(2), "rotary positions need an even head size, not {head_dim}");
        let mut cos = Tensor::empty(device, &[positions.len(), head_dim], dtype)?;
        let mut sin = Tensor::empty(device, &[positions.len(), head_dim], dtype)?;
        let pairs = kind.pairs(head_dim);
        with_dtype!(dtype, E => reference::fill::<E>(cos.view_mut().into_mat(), sin.view_mut().into_mat(), positions, pairs, theta));
        Ok(Table { kind, cos, sin })
    }

    /// Some rows of the table of a batch.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When a row does not exist, or the table is not one of a batch.
    pub fn gather(&self, rows: &[usize]) -> Result<Table> {
        assert_ne!(self.kind, Kind::MiniBatch, "rows of a table of a mini-batch");
        Ok(Table { kind: self.kind, cos: add::gather(self.cos.view(), rows)?, sin: add::gather(self.sin.view(), rows)? })
    }

    /// A copy on another device.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn to(&self, device: &Device) -> Result<Table> {
        Ok(Table { kind: self.kind, cos: self.cos.to(device)?, sin: self.sin.to(device)? })
    }

    /// Cosines and sines, each `[K, d]`; sines are negative in even columns.
    pub(crate) fn parts(&self) -> [View<'_>; 2] {
        [self.cos.view(), self.sin.view()]
    }

    /// Number of positions: K, or the rows of the batch.
    pub fn positions(&self) -> usize {
        self.cos.shape()[0]
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.cos.shape()[1]
    }
}

/// Where the two channels of pair i lie in a head: at `i · step` and `apart` behind it.
#[derive(Clone, Copy, Debug)]
struct Pairs {
    step: usize,
    apart: usize,
}

impl Kind {
    fn pairs(self, head_dim: usize) -> Pairs {
        match self {
            Kind::MiniBatch | Kind::Neighbours => Pairs { step: 2, apart: 1 },
            Kind::Halves => Pairs { step: 1, apart: head_dim / 2 },
        }
    }
}

/// Turns each head of `x [n, heads·d]` in place. With the table of a mini-batch row i of a segment is at position
/// `(phase + i) mod K`; with that of a batch, at the batch's own.
///
/// # Panics
/// When `x` has not `heads·d` columns, or `segments` do not cover its rows one behind the other; on a GPU, when there is no memory
/// for the segments.
pub fn rotate(x: ViewMut, table: &Table, segments: &[Segment], heads: usize, direction: Direction) {
    expect_segments(segments, x.rows());
    expect_shape("x", x.shape(), [x.rows(), heads * table.head_dim()]);
    let whole = [Segment { first_row: 0, len: x.rows(), slot: 0, phase: 0 }];
    let segments = match table.kind {
        Kind::MiniBatch => segments,
        Kind::Halves | Kind::Neighbours => {
            expect_shape("the table", [table.positions(), table.head_dim()], [x.rows(), table.head_dim()]);
            &whole
        }
    };
    let pairs = table.kind.pairs(table.head_dim());
    if let Some(gpu) = x.device().as_cuda() {
        let tables = [table.cos.view(), table.sin.view()];
        match table.kind {
            Kind::MiniBatch => {
                cuda::rotate(gpu, &x, tables, Some(segments), direction).expect("memory for the segments of a batch");
            }
            Kind::Neighbours => cuda::rotate(gpu, &x, tables, None, direction).expect("nothing is uploaded"),
            Kind::Halves => cuda::rotate_halves(gpu, &x, tables, direction),
        }
    } else if fast(x.device(), x.dtype()) {
        let (cos, sin) = (table.cos.view().as_mat(), table.sin.view().as_mat());
        match table.kind {
            Kind::MiniBatch | Kind::Neighbours => cpu::rotate(x.into_mat(), cos, sin, segments, direction),
            Kind::Halves => cpu::rotate_halves(x.into_mat(), cos, sin, direction),
        }
    } else {
        with_dtype!(x.dtype(), E => {
            let (cos, sin) = (table.cos.view().as_mat(), table.sin.view().as_mat());
            reference::rotate::<E>(x.into_mat(), cos, sin, segments, pairs, direction)
        });
    }
}
