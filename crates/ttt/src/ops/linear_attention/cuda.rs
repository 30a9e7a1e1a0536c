//! On a GPU: products, sums and running sums over the matrices of each chunk and head (`chunks.cuh`), in f32, and what linear
//! attention and batch descent make of them. Heads of up to 128 columns.

mod chunks;

pub(crate) use chunks::{Chunks, Extent, Layout, Operand, Pair, Product};

use super::{EPS, Grads, Inputs, Kind, state_len};
use crate::Result;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, blocks};
use crate::device::view::View;
use crate::tensor::{DType, Tensor};

/// Products and sums of chunks.
pub(crate) static PRODUCTS: Source = Source {
    name: "chunk_products",
    file: "ops/linear_attention/products.cu",
    text: include_str!("products.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "chunk_product", registers: 128 },
        Entry { name: "chunk_sum", registers: 64 },
        Entry { name: "running_sum", registers: 64 },
    ],
};

/// Feature map and normaliser.
pub(crate) static ROWS: Source = Source {
    name: "linear_attention_rows",
    file: "ops/linear_attention/rows.cu",
    text: include_str!("rows.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "features", registers: 40 },
        Entry { name: "normalise", registers: 64 },
        Entry { name: "feature_gradients", registers: 64 },
    ],
};

/// The widest head.
pub(crate) const MAX_WIDTH: usize = 128;
/// Blocks of the kernels of a warp a row: groups of 8 rows of a chunk.
const ROW_GROUPS: usize = chunks::CHUNK / 8;

/// `FeatureParams` of rows.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct FeatureParams {
    q: u64,
    k: u64,
    q_features: u64,
    k_features: u64,
    q_stride: u32,
    k_stride: u32,
    rows: u32,
    columns: u32,
}

/// `NormaliseParams` of rows.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct NormaliseParams {
    layout: Layout,
    numerators: u64,
    q_features: u64,
    sums: Operand,
    weights: Operand,
    y: u64,
    dy: u64,
    dnumerators: u64,
    dtotals: u64,
    dy_stride: u32,
    eps: f32,
}

/// `FeatureGradParams` of rows.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct FeatureGradParams {
    layout: Layout,
    q_features: u64,
    k_features: u64,
    dq_features: u64,
    dk_features: u64,
    dtotals: u64,
    sums: Operand,
    dq: u64,
    dk: u64,
    dq_stride: u32,
    dk_stride: u32,
}

/// What all passes begin with: queries and keys as they are multiplied, S before each chunk, products of queries and keys.
pub(crate) struct Attended {
    pub(crate) q: Operand,
    pub(crate) k: Operand,
    pub(crate) v: Operand,
    /// `[chunks, h, d² + d]`: S and, of some kinds, its sum.
    pub(crate) states: Tensor,
    /// `[chunks, h, CHUNK²]`, lower triangle.
    pub(crate) weights: Tensor,
    kind: Kind,
}

impl Attended {
    /// `state` names S and its sum and moves on.
    pub(crate) fn new(c: &Chunks, kind: Kind, [q, k, v]: [Operand; 3], state: Operand) -> Result<Attended> {
        let d = c.width();
        let states = c.matrices(state_len(d))?;
        let of = Operand::chunks(&states, d, 0);
        c.product(Product::of(of, [Extent::Width, Extent::Width], &[Pair::new(k.t(), v, Extent::Tokens)]));
        match kind {
            Kind::Plain => {}
            Kind::Biased => c.sum(&[v], None, of.at(d * d)),
            Kind::Normalised => c.sum(&[k], None, of.at(d * d)),
        }
        c.running(of, state, if kind == Kind::Plain { d * d } else { state_len(d) }, false);
        let weights = c.squares()?;
        let one = if kind == Kind::Biased { 1.0 } else { 0.0 };
        let y = Operand::square(&weights);
        c.product(Product { one, ..Product::masked(y, Pair::new(q, k.t(), Extent::Width)) });
        Ok(Attended { q, k, v, states, weights, kind })
    }

    /// S of a chunk.
    fn s(&self, c: &Chunks) -> Operand {
        Operand::chunks(&self.states, c.width(), 0)
    }

    /// Beside S.
    fn sum(&self, c: &Chunks) -> Operand {
        self.s(c).at(c.width() * c.width())
    }

    /// What is read for every token into `o`, without a normaliser.
    pub(crate) fn read(&self, c: &Chunks, o: Operand) {
        let pairs =
            [Pair::new(self.q, self.s(c), Extent::Width), Pair::new(Operand::square(&self.weights), self.v, Extent::Tokens)];
        let columns = (self.kind == Kind::Biased).then(|| self.sum(c));
        c.product(Product { columns, ..Product::of(o, [Extent::Tokens, Extent::Width], &pairs) });
    }

    /// The gradients of S behind each chunk from those of what was read; `dstate` moves to the beginning. `dtotals` `[n, h]` are those
    /// of normalisers.
    pub(crate) fn dstates(&self, c: &Chunks, d_o: Operand, dtotals: Option<&Tensor>, dstate: Operand) -> Result<Tensor> {
        let d = c.width();
        let dstates = c.matrices(state_len(d))?;
        let of = Operand::chunks(&dstates, d, 0);
        c.product(Product::of(of, [Extent::Width, Extent::Width], &[Pair::new(self.q.t(), d_o, Extent::Tokens)]));
        match self.kind {
            Kind::Plain => {}
            Kind::Biased => c.sum(&[d_o], None, of.at(d * d)),
            Kind::Normalised => c.sum(&[self.q], dtotals, of.at(d * d)),
        }
        c.running(of, dstate, if self.kind == Kind::Plain { d * d } else { state_len(d) }, true);
        Ok(dstates)
    }

    /// Gradient of the products of queries and keys.
    pub(crate) fn dweights(&self, c: &Chunks, d_o: Operand, dtotals: Option<&Tensor>) -> Result<Tensor> {
        let dweights = c.squares()?;
        let rows = dtotals.map_or(0, Tensor::address);
        c.product(Product { rows, ..Product::masked(Operand::square(&dweights), Pair::new(d_o, self.v.t(), Extent::Width)) });
        Ok(dweights)
    }

    /// Gradient of the values.
    pub(crate) fn dvalues(&self, c: &Chunks, d_o: Operand, dstates: &Tensor, dv: Operand) {
        let d = c.width();
        let ds = Operand::chunks(dstates, d, 0);
        let pairs = [Pair::new(Operand::square(&self.weights).t(), d_o, Extent::Tokens), Pair::new(self.k, ds, Extent::Width)];
        let columns = (self.kind == Kind::Biased).then(|| ds.at(d * d));
        c.product(Product { columns, ..Product::of(dv, [Extent::Tokens, Extent::Width], &pairs) });
    }

    /// What gradients of queries are made of.
    pub(crate) fn dq_pairs(&self, c: &Chunks, d_o: Operand, dweights: &Tensor) -> [Pair; 2] {
        [Pair::new(Operand::square(dweights), self.k, Extent::Tokens), Pair::new(d_o, self.s(c).t(), Extent::Width)]
    }

    /// What gradients of keys are made of.
    pub(crate) fn dk_pairs(&self, c: &Chunks, dstates: &Tensor, dweights: &Tensor) -> [Pair; 2] {
        let ds = Operand::chunks(dstates, c.width(), 0);
        [Pair::new(Operand::square(dweights).t(), self.q, Extent::Tokens), Pair::new(self.v, ds.t(), Extent::Width)]
    }
}

/// Feature maps of queries and keys, `[n, h*d]`.
fn features(c: &Chunks, inputs: &Inputs) -> Result<[Tensor; 2]> {
    let all = [c.rows()?, c.rows()?];
    let (q, k) = (inputs.q, inputs.k);
    let params = FeatureParams {
        q: q.address(),
        k: k.address(),
        q_features: all[0].address(),
        k_features: all[1].address(),
        q_stride: q.stride() as u32,
        k_stride: k.stride() as u32,
        rows: q.rows() as u32,
        columns: q.cols() as u32,
    };
    // SAFETY: the matrices have these rows and columns; what is written was just made.
    unsafe { c.cuda().launch_with(&ROWS, (c.dtype(), "features"), blocks(q.rows() * q.cols()), 256, 0, &params) };
    Ok(all)
}

/// Numerators, and the launch of `normalise` on them with what it writes.
fn normalise(
    c: &Chunks,
    attended: &Attended,
    q_features: &Tensor,
    write: impl FnOnce(NormaliseParams) -> NormaliseParams,
) -> Result<()> {
    let numerators = c.rows()?;
    attended.read(c, Operand::rows(numerators.view()));
    let params = NormaliseParams {
        layout: c.layout(),
        numerators: numerators.address(),
        q_features: q_features.address(),
        sums: attended.sum(c),
        weights: Operand::square(&attended.weights),
        y: 0,
        dy: 0,
        dnumerators: 0,
        dtotals: 0,
        dy_stride: 0,
        eps: EPS as f32,
    };
    // SAFETY: all are of these chunks; what is written was just made or is mutably borrowed.
    unsafe { c.cuda().launch_with(&ROWS, (c.dtype(), "normalise"), c.grid(ROW_GROUPS), 256, 0, &write(params)) };
    Ok(())
}

/// Writes `o`, moves `state` on.
pub(super) fn forward(cuda: &Cuda, inputs: &Inputs, state: &mut Tensor, o: &mut Tensor) -> Result<()> {
    let (_, d) = inputs.sizes();
    state.view_mut();
    let c = Chunks::new(cuda, inputs.q, inputs.segments, [inputs.heads, d])?;
    let state = Operand::slots(state, 0, 0);
    let v = Operand::rows(inputs.v);
    if inputs.kind != Kind::Normalised {
        let attended = Attended::new(&c, inputs.kind, [Operand::rows(inputs.q), Operand::rows(inputs.k), v], state)?;
        attended.read(&c, Operand::rows(o.view()));
        return Ok(());
    }
    let [q, k] = features(&c, inputs)?;
    let attended = Attended::new(&c, inputs.kind, [Operand::rows(q.view()), Operand::rows(k.view()), v], state)?;
    let y = o.view_mut().as_view().address();
    normalise(&c, &attended, &q, |params| NormaliseParams { y, ..params })
}

/// Writes the gradients, moves `dstate` to the beginning.
pub(super) fn backward(cuda: &Cuda, inputs: &Inputs, start: &Tensor, dout: View, dstate: &mut Tensor, grads: Grads) -> Result<()> {
    let (_, d) = inputs.sizes();
    let c = Chunks::new(cuda, inputs.q, inputs.segments, [inputs.heads, d])?;
    let moved = start.copy()?;
    dstate.view_mut();
    let (state, dstate) = (Operand::segments(&moved, 0, 0), Operand::segments(dstate, 0, 0));
    let v = Operand::rows(inputs.v);
    let wide = [Extent::Tokens, Extent::Width];
    let [dq, dk, dv] = [&grads.dq, &grads.dk, &grads.dv].map(|d| Operand::rows(d.as_view()));
    if inputs.kind != Kind::Normalised {
        let attended = Attended::new(&c, inputs.kind, [Operand::rows(inputs.q), Operand::rows(inputs.k), v], state)?;
        let d_o = Operand::rows(dout);
        let dstates = attended.dstates(&c, d_o, None, dstate)?;
        let dweights = attended.dweights(&c, d_o, None)?;
        c.product(Product::of(dq, wide, &attended.dq_pairs(&c, d_o, &dweights)));
        c.product(Product::of(dk, wide, &attended.dk_pairs(&c, &dstates, &dweights)));
        attended.dvalues(&c, d_o, &dstates, dv);
        return Ok(());
    }
    let [q, k] = features(&c, inputs)?;
    let attended = Attended::new(&c, inputs.kind, [Operand::rows(q.view()), Operand::rows(k.view()), v], state)?;
    let dnumerators = c.rows()?;
    let dtotals = Tensor::empty(inputs.q.device(), &[inputs.q.rows(), inputs.heads], DType::F32)?;
    normalise(&c, &attended, &q, |params| NormaliseParams {
        dy: dout.address(),
        dy_stride: dout.stride() as u32,
        dnumerators: dnumerators.address(),
        dtotals: dtotals.address(),
        ..params
    })?;
    let d_o = Operand::rows(dnumerators.view());
    let dstates = attended.dstates(&c, d_o, Some(&dtotals), dstate)?;
    let dweights = attended.dweights(&c, d_o, Some(&dtotals))?;
    attended.dvalues(&c, d_o, &dstates, dv);
    let (dq_features, dk_features) = (c.rows()?, c.rows()?);
    c.product(Product::of(Operand::rows(dq_features.view()), wide, &attended.dq_pairs(&c, d_o, &dweights)));
    let columns = Some(Operand::chunks(&dstates, d, 0).at(d * d));
    let of = Operand::rows(dk_features.view());
    c.product(Product { columns, ..Product::of(of, wide, &attended.dk_pairs(&c, &dstates, &dweights)) });
    let (dq, dk) = (grads.dq.as_view(), grads.dk.as_view());
    let params = FeatureGradParams {
        layout: c.layout(),
        q_features: q.address(),
        k_features: k.address(),
        dq_features: dq_features.address(),
        dk_features: dk_features.address(),
        dtotals: dtotals.address(),
        sums: attended.sum(&c),
        dq: dq.address(),
        dk: dk.address(),
        dq_stride: dq.stride() as u32,
        dk_stride: dk.stride() as u32,
    };
    // SAFETY: as for `normalise`.
    unsafe { cuda.launch_with(&ROWS, (c.dtype(), "feature_gradients"), c.grid(ROW_GROUPS), 256, 0, &params) };
    Ok(())
}
