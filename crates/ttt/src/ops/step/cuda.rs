//! On a GPU: products of our own for few rows, which read the weights once at the memory's speed, cuBLASLt for more.

use crate::Result;
use crate::batch::Segment;
use crate::device::WeightView;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, Operand, width};
use crate::device::view::{View, ViewMut};
use crate::ops::step::{Conv, ConvNormLinear, FUSED_ROWS};
use crate::ops::{conv, expect_segments, expect_shape, linear, swiglu};
use crate::tensor::{DType, Tensor};

/// Products with what stands before and behind them.
pub(crate) static PRODUCTS: Source = Source {
    name: "step_product",
    file: "ops/step/product.cu",
    text: include_str!("product.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::Bf16],
    kernels: &[
        Entry { name: "conv_norm_product", registers: 128 },
        Entry { name: "norm_product", registers: 104 },
        Entry { name: "norm_product_swiglu", registers: 104 },
        Entry { name: "gated_product_add", registers: 128 },
        Entry { name: "product_bf16_8", registers: 80 },
        Entry { name: "product_f32_8", registers: 80 },
        Entry { name: "product_add_8", registers: 80 },
        Entry { name: "product_bf16_16", registers: 96 },
        Entry { name: "product_f32_16", registers: 96 },
        Entry { name: "product_add_16", registers: 96 },
        Entry { name: "product_swiglu_16", registers: 96 },
    ],
};

/// What stands between products.
pub(crate) static ROWS: Source = Source {
    name: "step_rows",
    file: "ops/step/rows.cu",
    text: include_str!("rows.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::Bf16],
    kernels: &[
        Entry { name: "pre_conv", registers: 96 },
        Entry { name: "gated_norm", registers: 80 },
        Entry { name: "rms_norm", registers: 64 },
    ],
};

/// The most rows of a product of our own, and of one with more outputs than `MANY`: with more, cuBLASLt is faster (docs/kernels.md).
const OWN_ROWS: usize = 16;
const OWN_ROWS_OF_MANY: usize = 8;
const MANY: usize = 8192;
/// Blocks on a multiprocessor.
const BLOCKS_PER_SM: usize = 3;

/// `Product` of step.cuh.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Product {
    x: u64,
    w: u64,
    y: u64,
    scale: u64,
    shift: u64,
    gate: u64,
    normed: u64,
    x_stride: u32,
    y_stride: u32,
    gate_stride: u32,
    rows: u32,
    n: u32,
    k: u32,
    eps: f32,
}

/// `ConvProduct` of step.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct ConvProduct {
    product: Product,
    conv_scale: u64,
    weight: u64,
    bias: u64,
    window: u64,
    segments: u64,
    residual: u64,
    now: u64,
}

/// `PreConv` of step.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct PreConv {
    x: u64,
    scale: u64,
    weight: u64,
    bias: u64,
    window: u64,
    segments: u64,
    cols: u32,
    taps: u32,
    eps: f32,
}

/// Whether rows are such as the kernels read.
pub(crate) fn aligned_rows(x: View<'_>) -> bool {
    x.dtype() == DType::Bf16 && width(&[x]) == 8
}

/// The GPU, when it multiplies such rows with such a matrix here.
pub(crate) fn gpu<'a>(x: View<'a>, w: &WeightView<'_>) -> Option<&'a Cuda> {
    let WeightView::Float(w) = w else { return None };
    let fits = w.dtype() == DType::Bf16 && w.cols() == x.cols() && w.stride() == w.cols() && width(&[*w]) == 8;
    x.device().as_cuda().filter(|_| fits && aligned_rows(x))
}

impl Product {
    fn new(x: View, w: View, y: View) -> Product {
        Product {
            x: x.address(),
            w: w.address(),
            y: y.address(),
            x_stride: x.stride() as u32,
            y_stride: y.stride() as u32,
            rows: x.rows() as u32,
            n: y.cols() as u32,
            k: x.cols() as u32,
            ..Product::default()
        }
    }

    fn norm(self, scale: View, eps: f64) -> Product {
        Product { scale: scale.address(), eps: eps as f32, ..self }
    }

    fn gated_norm(self, [scale, shift]: [View; 2], eps: f64, gate: Option<View>) -> Product {
        let (gate, gate_stride) = gate.map_or((0, 0), |gate| (gate.address(), gate.stride() as u32));
        Product { shift: shift.address(), gate, gate_stride, ..self.norm(scale, eps) }
    }

    /// Bytes of shared memory: of the sums of `tokens` rows, and of rows that something is done to first.
    fn shared(&self, tokens: usize, before: bool) -> usize {
        let pitch = (2 * self.k as usize).next_multiple_of(128) + 64;
        640 * tokens + usize::from(before) * (64 + self.rows as usize * pitch)
    }

    /// Queues a product.
    ///
    /// # Safety
    /// The matrices are as large as they say, and `y` is mutably borrowed.
    unsafe fn launch(&self, cuda: &Cuda, kernel: &'static str, tokens: usize, before: bool, overlap: bool) {
        // Outputs that a block makes at a time.
        let tile = if kernel.contains("swiglu") || kernel.contains("add") { 8 } else { 16 };
        let blocks = (self.n as usize).div_ceil(tile).min(BLOCKS_PER_SM * cuda.info().multiprocessors);
        let (kernel, shared) = ((DType::Bf16, kernel), self.shared(tokens, before));
        // SAFETY: the caller's promise; a block takes any number of tiles.
        unsafe {
            match overlap {
                true => cuda.launch_overlapped(&PRODUCTS, kernel, [blocks, 1, 1], 256, shared, self),
                false => cuda.launch_with(&PRODUCTS, kernel, [blocks, 1, 1], 256, shared, self),
            }
        }
    }
}

/// What follows a product.
#[derive(Clone, Copy)]
enum Behind {
    Bf16,
    F32,
    Add,
    Swiglu,
}

/// The kernel for so many rows, and the rows that it makes room for.
fn kernel(behind: Behind, rows: usize) -> (&'static str, usize) {
    let [few, more] = match behind {
        Behind::Bf16 => ["product_bf16_8", "product_bf16_16"],
        Behind::F32 => ["product_f32_8", "product_f32_16"],
        Behind::Add => ["product_add_8", "product_add_16"],
        // With fewer rows the norm is fused.
        Behind::Swiglu => ["product_swiglu_16"; 2],
    };
    if rows <= 8 && !matches!(behind, Behind::Swiglu) { (few, 8) } else { (more, 16) }
}

/// Whether a product of so many rows and outputs is faster by a kernel of our own.
fn own(rows: usize, outputs: usize) -> bool {
    rows <= if outputs > MANY { OWN_ROWS_OF_MANY } else { OWN_ROWS }
}

/// Whether norm and product of such rows run as one.
fn fuses(cuda: &Cuda, product: &Product) -> bool {
    product.rows as usize <= FUSED_ROWS && product.shared(8, true) <= cuda.info().shared_bytes
}

/// `y = x wᵀ` (bf16 or f32) by a kernel of our own, if one is for such matrices.
pub(crate) fn few_rows(cuda: &Cuda, x: View, w: View, y: View) -> bool {
    let ours = gpu(x, &w.into()).is_some() && own(x.rows(), w.rows()) && x.rows() > 0;
    if ours {
        let behind = if y.dtype() == DType::F32 { Behind::F32 } else { Behind::Bf16 };
        let (kernel, tokens) = kernel(behind, x.rows());
        // SAFETY: shapes were checked by the caller, who has borrowed `y` mutably. Not overlapped: weights may just be written.
        unsafe { Product::new(x, w, y).launch(cuda, kernel, tokens, false, false) };
    }
    ours
}

/// A row kernel of which a block does a row.
fn rows(cuda: &Cuda, kernel: &'static str, product: &Product) {
    let grid = [product.rows as usize, 1, 1];
    // SAFETY: the callers make `y` as large as `x`, and it is theirs.
    unsafe { cuda.launch_overlapped(&ROWS, (DType::Bf16, kernel), grid, 256, 64, product) };
}

fn norm(cuda: &Cuda, x: View, scale: View, eps: f64) -> Result<Tensor> {
    let y = Tensor::empty(x.device(), &x.shape(), DType::Bf16)?;
    rows(cuda, "rms_norm", &Product::new(x, x, y.view()).norm(scale, eps));
    Ok(y)
}

/// See [`super::norm_linear`].
pub(crate) fn norm_linear(cuda: &Cuda, x: View, scale: View, eps: f64, w: View) -> Result<(Tensor, Tensor)> {
    expect_shape("scale", scale.shape(), [1, x.cols()]);
    let y = Tensor::empty(x.device(), &[x.rows(), w.rows()], DType::Bf16)?;
    let product = Product::new(x, w, y.view()).norm(scale, eps);
    if x.rows() > 0 && fuses(cuda, &product) {
        let normed = Tensor::empty(x.device(), &x.shape(), DType::Bf16)?;
        // SAFETY: shapes were checked above and by the caller; `y` and `normed` were just made.
        unsafe { Product { normed: normed.address(), ..product }.launch(cuda, "norm_product", 8, true, true) };
        return Ok((y, normed));
    }
    let normed = norm(cuda, x, scale, eps)?;
    let (from, mut y) = (normed.view(), y);
    if own(x.rows(), w.rows()) {
        let (kernel, tokens) = kernel(Behind::Bf16, x.rows());
        // SAFETY: as above.
        unsafe { Product::new(from, w, y.view()).launch(cuda, kernel, tokens, false, true) };
    } else {
        cuda.product(from.into(), Operand::from(w).transposed(), (&y.view_mut()).into(), false);
    }
    Ok((y, normed))
}

/// Whether [`conv_norm_linear`] is for such rows and such a convolution.
pub(crate) fn fuses_conv(cuda: &Cuda, x: View, conv: &Conv) -> bool {
    let fits = conv.weight.cols() == 4 && conv.weight.stride() == 4 && x.rows() > 0 && width(&[conv.window.view()]) == 8;
    fits && fuses(cuda, &Product::new(x, x, x))
}

/// See [`super::conv_norm_linear`].
pub(crate) fn conv_norm_linear(cuda: &Cuda, x: View, conv: Conv, scale: View, eps: f64, w: View) -> Result<ConvNormLinear> {
    let cols = x.cols();
    expect_segments(conv.segments, x.rows());
    assert!(conv.segments.iter().all(|s| s.len == 1), "segments of more than one token in a step");
    [scale, conv.scale, conv.bias].iter().for_each(|part| expect_shape("a norm's weight or a bias", part.shape(), [1, cols]));
    expect_shape("the convolution's weight", conv.weight.shape(), [cols, 4]);
    conv::expect_window(conv.window, conv.segments, 3, cols);
    let [residual, normed, now] = [0; 3].map(|_| Tensor::empty(x.device(), &x.shape(), DType::Bf16));
    let (residual, normed, now) = (residual?, normed?, now?);
    let y = Tensor::empty(x.device(), &[x.rows(), w.rows()], DType::Bf16)?;
    let product = Product { normed: normed.address(), ..Product::new(x, w, y.view()).norm(scale, eps) };
    let uploaded = cuda.segments(conv.segments)?;
    let params = ConvProduct {
        product,
        conv_scale: conv.scale.address(),
        weight: conv.weight.address(),
        bias: conv.bias.address(),
        window: conv.window.address(),
        segments: uploaded.segments(),
        residual: residual.address(),
        now: now.address(),
    };
    let blocks = w.rows().div_ceil(16).min(BLOCKS_PER_SM * cuda.info().multiprocessors);
    let kernel = (DType::Bf16, "conv_norm_product");
    // SAFETY: shapes, segments and windows were checked above; what is written was just made.
    unsafe { cuda.launch_overlapped(&PRODUCTS, kernel, [blocks, 1, 1], 256, product.shared(8, true), &params) };
    Ok(ConvNormLinear { residual, product: (y, normed), now })
}

/// See [`super::norm_swiglu`].
pub(crate) fn norm_swiglu(cuda: &Cuda, x: View, scale: View, eps: f64, w: View) -> Result<Tensor> {
    expect_shape("scale", scale.shape(), [1, x.cols()]);
    assert!(w.rows().is_multiple_of(2), "gate and up have {} rows", w.rows());
    if own(x.rows(), w.rows() / 2) {
        let y = Tensor::empty(x.device(), &[x.rows(), w.rows() / 2], DType::Bf16)?;
        let product = Product::new(x, w, y.view()).norm(scale, eps);
        // SAFETY: shapes were checked above and by the caller; `y` was just made.
        unsafe {
            if fuses(cuda, &product) {
                product.launch(cuda, "norm_product_swiglu", 8, true, true);
            } else {
                let normed = norm(cuda, x, scale, eps)?;
                let (kernel, tokens) = kernel(Behind::Swiglu, x.rows());
                Product::new(normed.view(), w, y.view()).launch(cuda, kernel, tokens, false, true);
            }
        }
        return Ok(y);
    }
    let normed = norm(cuda, x, scale, eps)?;
    swiglu::forward(linear::forward(normed.view(), w)?.view())
}

/// See [`super::add_linear`].
pub(crate) fn add_linear(cuda: &Cuda, y: &ViewMut, x: View, w: View) {
    expect_shape("y", y.shape(), [x.rows(), w.rows()]);
    if !own(x.rows(), w.rows()) {
        return cuda.product(x.into(), Operand::from(w).transposed(), y.into(), true);
    }
    let (kernel, tokens) = kernel(Behind::Add, x.rows());
    // SAFETY: shapes were checked above and by the caller; `y` is mutably borrowed.
    unsafe { Product::new(x, w, y.as_view()).launch(cuda, kernel, tokens, false, true) };
}

/// See [`super::add_gated_linear`].
pub(crate) fn add_gated_linear(
    cuda: &Cuda,
    y: &ViewMut,
    x: View,
    norm: [View; 2],
    eps: f64,
    gate: Option<View>,
    w: View,
) -> Result<()> {
    expect_shape("y", y.shape(), [x.rows(), w.rows()]);
    norm.iter().for_each(|part| expect_shape("norm", part.shape(), [1, x.cols()]));
    if let Some(gate) = gate {
        expect_shape("gate", gate.shape(), x.shape());
        assert!(width(&[gate]) == 8, "a gate whose rows are not aligned");
    }
    let product = Product::new(x, w, y.as_view()).gated_norm(norm, eps, gate);
    if fuses(cuda, &product) {
        // SAFETY: shapes were checked above and by the caller; `y` is mutably borrowed.
        unsafe { product.launch(cuda, "gated_product_add", 8, true, true) };
        return Ok(());
    }
    let gated = Tensor::empty(x.device(), &x.shape(), DType::Bf16)?;
    rows(cuda, "gated_norm", &Product::new(x, x, gated.view()).gated_norm(norm, eps, gate));
    add_linear(cuda, y, gated.view(), w);
    Ok(())
}

/// See [`super::add_conv`].
pub(crate) fn add_conv(
    cuda: &Cuda,
    x: &mut Tensor,
    scale: View,
    eps: f64,
    [w, bias]: [View; 2],
    segments: &[Segment],
    window: &mut Tensor,
) -> Result<()> {
    let (rows, cols, taps) = (x.view().rows(), x.view().cols(), w.cols());
    expect_segments(segments, rows);
    assert!(segments.iter().all(|s| s.len == 1), "segments of more than one token in a step");
    expect_shape("scale", scale.shape(), [1, cols]);
    expect_shape("w", w.shape(), [cols, taps]);
    expect_shape("bias", bias.shape(), [1, cols]);
    conv::expect_window(window, segments, taps - 1, cols);
    assert!(taps <= conv::cuda::MAX_TAPS && w.stride() == taps, "{taps} taps; the kernels take {}", conv::cuda::MAX_TAPS);
    let uploaded = cuda.segments(segments)?;
    let params = PreConv {
        x: x.view_mut().as_view().address(),
        scale: scale.address(),
        weight: w.address(),
        bias: bias.address(),
        window: window.view_mut().as_view().address(),
        segments: uploaded.segments(),
        cols: cols as u32,
        taps: taps as u32,
        eps: eps as f32,
    };
    // SAFETY: shapes, segments and windows were checked above; x and the windows are mutably borrowed.
    unsafe { cuda.launch_overlapped(&ROWS, (DType::Bf16, "pre_conv"), [rows, 1, 1], 256, 32, &params) };
    Ok(())
}
