//! Matrices of each chunk and head, and the launches of products.cu on them.

use std::sync::Arc;

use super::{MAX_WIDTH, PRODUCTS};
use crate::Result;
use crate::batch::Segment;
use crate::device::Device;
use crate::device::cuda::{Cuda, Uploaded};
use crate::device::view::View;
use crate::tensor::{DType, Tensor};

/// Tokens of a chunk.
pub(crate) const CHUNK: usize = 64;

/// `Layout` of chunks.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    segments: u64,
    chunks: u32,
    heads: u32,
    width: u32,
}

/// `Operand` of chunks.cuh: a matrix of each chunk and head.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Operand {
    base: u64,
    kind: u32,
    stride: u32,
    size: u32,
    offset: u32,
    /// Whether a product reads it transposed; the kernels have that beside it.
    transposed: u32,
    unused: u32,
}

impl Operand {
    /// The columns of a head in activations, or in f32 rows.
    pub(crate) fn rows(view: View) -> Operand {
        let kind = u32::from(view.dtype() == DType::F32);
        Operand { base: view.address(), kind, stride: view.stride() as u32, ..Operand::default() }
    }

    fn of(tensor: &Tensor, kind: u32, stride: usize, offset: usize) -> Operand {
        let &[_, _, size] = tensor.shape() else { panic!("matrices of heads of shape {:?}", tensor.shape()) };
        Operand {
            base: tensor.address(),
            kind,
            stride: stride as u32,
            size: size as u32,
            offset: offset as u32,
            ..Operand::default()
        }
    }

    /// Of `[chunks, heads, size]` the matrix at `offset`.
    pub(crate) fn chunks(tensor: &Tensor, stride: usize, offset: usize) -> Operand {
        Operand::of(tensor, 2, stride, offset)
    }

    /// Of `[slots, heads, size]`.
    pub(crate) fn slots(tensor: &Tensor, stride: usize, offset: usize) -> Operand {
        Operand::of(tensor, 3, stride, offset)
    }

    /// Of `[segments, heads, size]`.
    pub(crate) fn segments(tensor: &Tensor, stride: usize, offset: usize) -> Operand {
        Operand::of(tensor, 4, stride, offset)
    }

    /// Products of a chunk's tokens.
    pub(crate) fn square(tensor: &Tensor) -> Operand {
        Operand::chunks(tensor, CHUNK, 0)
    }

    /// Another place among the same numbers.
    pub(crate) fn at(self, offset: usize) -> Operand {
        Operand { offset: self.offset + offset as u32, ..self }
    }

    /// Read transposed.
    pub(crate) fn t(self) -> Operand {
        Operand { transposed: 1 - self.transposed, ..self }
    }
}

/// An extent of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Tokens of the chunk.
    Tokens,
    /// Columns of a head.
    Width,
}

impl Extent {
    fn code(self) -> u32 {
        u32::from(self == Extent::Width)
    }
}

/// Two factors, and the extent that they share.
#[derive(Clone, Copy)]
pub(crate) struct Pair {
    a: Operand,
    b: Operand,
    k: Extent,
}

impl Pair {
    pub(crate) fn new(a: Operand, b: Operand, k: Extent) -> Pair {
        Pair { a, b, k }
    }
}

/// `y = Σ a b (+ add) (+ columns)`; where it is masked `one` and `rows` `[n, h]` are added and the upper triangle is 0.
pub(crate) struct Product<'p> {
    pub(crate) y: Operand,
    pub(crate) extents: [Extent; 2],
    pub(crate) pairs: Pairs<'p>,
    pub(crate) add: Option<Operand>,
    pub(crate) columns: Option<Operand>,
    pub(crate) rows: u64,
    pub(crate) one: f32,
    pub(crate) mask: bool,
}

/// One pair, or some.
pub(crate) enum Pairs<'p> {
    One([Pair; 1]),
    Some(&'p [Pair]),
}

impl<'p> Product<'p> {
    pub(crate) fn of(y: Operand, extents: [Extent; 2], pairs: &'p [Pair]) -> Product<'p> {
        Product { y, extents, pairs: Pairs::Some(pairs), add: None, columns: None, rows: 0, one: 0.0, mask: false }
    }

    /// Of tokens and tokens, lower triangle.
    pub(crate) fn masked(y: Operand, pair: Pair) -> Product<'static> {
        let extents = [Extent::Tokens, Extent::Tokens];
        Product { y, extents, pairs: Pairs::One([pair]), add: None, columns: None, rows: 0, one: 0.0, mask: true }
    }
}

/// `ProductParams` of products.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProductParams {
    layout: Layout,
    pairs: [[Operand; 2]; 3],
    y: Operand,
    add: Operand,
    columns: Operand,
    rows: u64,
    count: u32,
    m: u32,
    n: u32,
    k: [u32; 3],
    masked: u32,
    one: f32,
}

/// `SumParams` of products.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct SumParams {
    layout: Layout,
    x: [Operand; 2],
    y: Operand,
    weights: u64,
    count: u32,
}

/// `RunningParams` of products.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct RunningParams {
    layout: Layout,
    chunks: Operand,
    state: Operand,
    numbers: u32,
    reverse: u32,
}

/// The chunks of a batch.
pub(crate) struct Chunks<'c> {
    cuda: &'c Cuda,
    device: &'c Device,
    dtype: DType,
    segments: Arc<Uploaded>,
    /// Segments, chunks of the longest, all that there is room for, and rows.
    counts: [usize; 4],
    heads: usize,
    width: usize,
}

impl<'c> Chunks<'c> {
    /// Those of activations like `x`.
    pub(crate) fn new(cuda: &'c Cuda, x: View<'c>, segments: &[Segment], [heads, width]: [usize; 2]) -> Result<Chunks<'c>> {
        assert!(width <= MAX_WIDTH, "heads of {width} columns; the kernels take {MAX_WIDTH}");
        let longest = segments.iter().map(|s| s.len).max().unwrap_or(0).div_ceil(CHUNK);
        let counts = [segments.len(), longest, x.rows() / CHUNK + segments.len() + 1, x.rows()];
        Ok(Chunks { cuda, device: x.device(), dtype: x.dtype(), segments: cuda.segments(segments)?, counts, heads, width })
    }

    pub(crate) fn cuda(&self) -> &'c Cuda {
        self.cuda
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn layout(&self) -> Layout {
        let (chunks, heads, width) = (self.counts[1] as u32, self.heads as u32, self.width as u32);
        Layout { segments: self.segments.segments(), chunks, heads, width }
    }

    /// Blocks: `inner` for each chunk and head.
    pub(crate) fn grid(&self, inner: usize) -> [usize; 3] {
        [self.counts[0] * self.counts[1] * self.heads * inner, 1, 1]
    }

    /// Places for chunks, of which some are nobody's.
    pub(crate) fn places(&self) -> usize {
        self.counts[2]
    }

    /// `[chunks, heads, size]`.
    pub(crate) fn matrices(&self, size: usize) -> Result<Tensor> {
        Tensor::empty(self.device, &[self.counts[2], self.heads, size], DType::F32)
    }

    /// `[chunks, heads, CHUNK²]`.
    pub(crate) fn squares(&self) -> Result<Tensor> {
        self.matrices(CHUNK * CHUNK)
    }

    /// `[rows, heads * width]`.
    pub(crate) fn rows(&self) -> Result<Tensor> {
        Tensor::empty(self.device, &[self.counts[3], self.heads * self.width], DType::F32)
    }

    pub(crate) fn product(&self, product: Product) {
        let pairs = match &product.pairs {
            Pairs::One(one) => &one[..],
            Pairs::Some(some) => some,
        };
        let mut params = ProductParams {
            layout: self.layout(),
            pairs: Default::default(),
            y: product.y,
            add: product.add.unwrap_or_default(),
            columns: product.columns.unwrap_or_default(),
            rows: product.rows,
            count: pairs.len() as u32,
            m: product.extents[0].code(),
            n: product.extents[1].code(),
            k: [0; 3],
            masked: u32::from(product.mask),
            one: product.one,
        };
        for (i, pair) in pairs.iter().enumerate() {
            (params.pairs[i], params.k[i]) = ([pair.a, pair.b], pair.k.code());
        }
        let tiles = |extent: Extent| if extent == Extent::Width { self.width.div_ceil(64) } else { 1 };
        let grid = self.grid(product.extents.map(tiles).iter().product());
        // SAFETY: the operands are matrices of these chunks and heads (their constructors and the callers' shapes); what is written
        // is mutably borrowed by the caller or was made for this.
        unsafe { self.cuda.launch_with(&PRODUCTS, (self.dtype, "chunk_product"), grid, 256, 0, &params) };
    }

    /// `y` = sums over the rows of each chunk of one or two matrices, row by row times `weights` `[n, h]`.
    pub(crate) fn sum(&self, x: &[Operand], weights: Option<&Tensor>, y: Operand) {
        let both = [x[0], *x.last().expect("a matrix")];
        let weights = weights.map_or(0, Tensor::address);
        let params = SumParams { layout: self.layout(), x: both, y, weights, count: x.len() as u32 };
        // SAFETY: as for `product`.
        unsafe { self.cuda.launch_with(&PRODUCTS, (self.dtype, "chunk_sum"), self.grid(1), MAX_WIDTH, 0, &params) };
    }

    /// What chunks hold becomes the sum of `state` and all chunks before, or behind; the state becomes the sum of all.
    pub(crate) fn running(&self, chunks: Operand, state: Operand, numbers: usize, reverse: bool) {
        let params = RunningParams { layout: self.layout(), chunks, state, numbers: numbers as u32, reverse: u32::from(reverse) };
        let grid = [self.counts[0] * self.heads * numbers.div_ceil(256), 1, 1];
        // SAFETY: as for `product`.
        unsafe { self.cuda.launch_with(&PRODUCTS, (self.dtype, "running_sum"), grid, 256, 0, &params) };
    }
}
