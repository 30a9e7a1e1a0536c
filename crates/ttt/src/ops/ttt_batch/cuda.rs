//! On a GPU: products and running sums of chunks ([`crate::ops::linear_attention`]'s), and LayerNorm and residual around the inner
//! model a warp a row and head. Heads of up to 128 columns.

use super::{Grads, Inputs};
use crate::Result;
use crate::config::TokenScale;
use crate::device::cuda::Cuda;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::view::View;
use crate::ops::add;
use crate::ops::linear_attention::Kind;
use crate::ops::linear_attention::cuda::{Attended, Chunks, Extent, Layout, Operand, Pair, Product};
use crate::tensor::{DType, Tensor};

/// The kernels.
pub(crate) static ROWS: Source = Source {
    name: "ttt_batch",
    file: "ops/ttt_batch/rows.cu",
    text: include_str!("rows.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "descent_gradients", registers: 80 },
        Entry { name: "descent_output", registers: 80 },
        Entry { name: "descent_output_backward", registers: 96 },
        Entry { name: "descent_gradients_backward", registers: 128 },
    ],
};

/// `DescentParams` of rows.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    layout: Layout,
    q: u64,
    k: u64,
    v: u64,
    dz: u64,
    lr: u64,
    gamma: u64,
    beta: u64,
    bias: Operand,
    z_inner: u64,
    z_bar: u64,
    sums: u64,
    ghat: u64,
    dghat: u64,
    dz_bar: u64,
    d_sums: u64,
    dq: u64,
    dk: u64,
    dlr: u64,
    z: u64,
    dv: u64,
    parameters: u64,
    q_stride: u32,
    k_stride: u32,
    v_stride: u32,
    dz_stride: u32,
    lr_stride: u32,
    dv_stride: u32,
    dlr_stride: u32,
    layer_norm: u32,
    residual: u32,
    mean: u32,
}

/// What both passes compute first.
struct Descent<'c> {
    c: Chunks<'c>,
    params: Params,
    /// W0, by slot or by segment.
    weight: Operand,
    attended: Attended,
    /// Read by the kernels through `params`.
    _rows: [Tensor; 4],
}

const WIDE: [Extent; 2] = [Extent::Tokens, Extent::Width];

impl<'c> Descent<'c> {
    /// `state` names `[W0 | b0 | SW | Sb]`, of which the sums move on.
    fn new(cuda: &'c Cuda, inputs: &Inputs<'c>, state: Operand) -> Result<Descent<'c>> {
        let (_, heads, d) = inputs.sizes();
        let c = Chunks::new(cuda, inputs.q, inputs.segments, [heads, d])?;
        let rows = [c.rows()?, c.rows()?, c.rows()?, c.rows()?];
        let [z_inner, ghat, sums, z_bar] = rows.each_ref().map(Tensor::address);
        let (q, k, v) = (inputs.q, inputs.k, inputs.v);
        let params = Params {
            layout: c.layout(),
            q: q.address(),
            k: k.address(),
            v: v.address(),
            dz: 0,
            lr: inputs.lr.address(),
            gamma: inputs.gamma.address(),
            beta: inputs.beta.address(),
            bias: state.at(d * d),
            z_inner,
            z_bar,
            sums,
            ghat,
            dghat: 0,
            dz_bar: 0,
            d_sums: 0,
            dq: 0,
            dk: 0,
            dlr: 0,
            z: 0,
            dv: 0,
            parameters: 0,
            q_stride: q.stride() as u32,
            k_stride: k.stride() as u32,
            v_stride: v.stride() as u32,
            dz_stride: 0,
            lr_stride: inputs.lr.stride() as u32,
            dv_stride: 0,
            dlr_stride: 0,
            layer_norm: u32::from(inputs.variant.layer_norm),
            residual: u32::from(inputs.variant.residual),
            mean: u32::from(inputs.token_scale == TokenScale::Mean),
        };
        assert!(inputs.gamma.stride() == d && inputs.beta.stride() == d, "the kernels read contiguous weights of a LayerNorm");
        let (q, k) = (Operand::rows(q), Operand::rows(k));
        let product = |y: &Tensor, x: Operand| {
            c.product(Product::of(Operand::rows(y.view()), WIDE, &[Pair::new(x, state, Extent::Width)]));
        };
        product(&rows[0], k);
        launch(&c, "descent_gradients", &params);
        product(&rows[3], q);
        let kind = if inputs.bias { Kind::Biased } else { Kind::Plain };
        let attended = Attended::new(&c, kind, [q, k, Operand::rows(rows[1].view())], state.at(d * d + d))?;
        attended.read(&c, Operand::rows(rows[2].view()));
        Ok(Descent { c, params, weight: state, attended, _rows: rows })
    }
}

fn launch(c: &Chunks, kernel: &'static str, params: &Params) {
    // SAFETY: matrices and rows are of these chunks and heads; what is written was made for it or is mutably borrowed by the caller.
    unsafe { c.cuda().launch_with(&ROWS, (c.dtype(), kernel), c.grid(1), 256, 0, params) };
}

/// Writes `z`, moves `state` on.
pub(super) fn forward(cuda: &Cuda, inputs: &Inputs, state: &mut Tensor, z: &mut Tensor) -> Result<()> {
    let (_, _, d) = inputs.sizes();
    state.view_mut();
    let descent = Descent::new(cuda, inputs, Operand::slots(state, d, 0))?;
    launch(&descent.c, "descent_output", &Params { z: z.view_mut().as_view().address(), ..descent.params });
    Ok(())
}

/// Writes gradients of activations, adds those of parameters, moves `dstate` to the beginning.
pub(super) fn backward(cuda: &Cuda, inputs: &Inputs, start: &Tensor, dz: View, dstate: &mut Tensor, grads: Grads) -> Result<()> {
    let (_, heads, d) = inputs.sizes();
    let moved = start.copy()?;
    let Descent { c, params, weight, attended, _rows: rows } = Descent::new(cuda, inputs, Operand::segments(&moved, d, 0))?;
    let [dghat, dz_bar, d_sums, dq, dk] = [c.rows()?, c.rows()?, c.rows()?, c.rows()?, c.rows()?];
    let parameters = Tensor::zeros(inputs.q.device(), &[c.places(), heads, 2 * d], DType::F32)?;
    let Grads { dq: dq_out, dk: dk_out, dv, dlr, dgamma, dbeta } = grads;
    let (dv, dlr) = (dv.as_view(), dlr.as_view());
    let params = Params {
        dz: dz.address(),
        dz_stride: dz.stride() as u32,
        dghat: dghat.address(),
        dz_bar: dz_bar.address(),
        d_sums: d_sums.address(),
        dq: dq.address(),
        dk: dk.address(),
        dlr: dlr.address(),
        dlr_stride: dlr.stride() as u32,
        dv: dv.address(),
        dv_stride: dv.stride() as u32,
        parameters: parameters.address(),
        ..params
    };
    launch(&c, "descent_output_backward", &params);

    // The sums are linear attention with the scaled inner gradients as values.
    dstate.view_mut();
    let dstate = Operand::segments(dstate, d, 0);
    let (d_o, dz_bar) = (Operand::rows(d_sums.view()), Operand::rows(dz_bar.view()));
    let dstates = attended.dstates(&c, d_o, None, dstate.at(d * d + d))?;
    let dweights = attended.dweights(&c, d_o, None)?;
    let dz_inner = Operand::rows(dghat.view());
    attended.dvalues(&c, d_o, &dstates, dz_inner);
    launch(&c, "descent_gradients_backward", &params);

    let [a, b] = attended.dq_pairs(&c, d_o, &dweights);
    let pairs = [a, b, Pair::new(dz_bar, weight.t(), Extent::Width)];
    let add = Some(Operand::rows(dq.view()));
    c.product(Product { add, ..Product::of(Operand::rows(dq_out.as_view()), WIDE, &pairs) });
    let [a, b] = attended.dk_pairs(&c, &dstates, &dweights);
    let pairs = [a, b, Pair::new(dz_inner, weight.t(), Extent::Width)];
    let add = Some(Operand::rows(dk.view()));
    c.product(Product { add, ..Product::of(Operand::rows(dk_out.as_view()), WIDE, &pairs) });

    // The initial weights: a part of each chunk, added up over the segment.
    let of = Operand::chunks(&dstates, d, 0);
    let pairs = [Pair::new(attended.q.t(), dz_bar, Extent::Tokens), Pair::new(attended.k.t(), dz_inner, Extent::Tokens)];
    c.product(Product::of(of, [Extent::Width, Extent::Width], &pairs));
    c.sum(&[dz_bar, dz_inner], None, of.at(d * d));
    c.running(of, dstate, d * d + d, true);
    drop(rows);
    for (to, first) in [(&dgamma, 0), (&dbeta, d)] {
        add::cuda::add_up_pieces(cuda, to, parameters.address(), [c.places(), heads * 2 * d], first, [d, 2 * d]);
    }
    Ok(())
}
