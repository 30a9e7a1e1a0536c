//! On a GPU; here also [`crate::ops::grad_norm`].

use std::ops::Range;

use super::Factors;
use crate::Result;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args, blocks};
use crate::device::memory::Buffer;
use crate::device::view::View;
use crate::ops::verdict::cuda::Verdict;
use crate::tensor::{DType, Tensor};

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "adamw",
    file: "ops/adamw/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[
        Entry { name: "adamw", registers: 64 },
        Entry { name: "sum_of_squares", registers: 48 },
        Entry { name: "first_non_finite", registers: 40 },
    ],
};

/// Blocks that share a sum of squares.
const SUMS: usize = 1024;

fn quarter(x: &Tensor) -> usize {
    assert!(x.len().is_multiple_of(4) && x.dtype() == DType::F32, "{x:?}: flat buffers are f32 and multiples of 4 long");
    x.len() / 4
}

/// One update of the elements `part`; `operands` gets the new parameters in bf16. With a verdict the gradient is scaled by what that
/// says, and where that is bad nothing is updated.
pub(crate) fn step(
    cuda: &Cuda,
    params: &mut Tensor,
    operands: Option<&mut Tensor>,
    grads: &Tensor,
    [m, v]: [&mut Tensor; 2],
    part: Range<usize>,
    f: Factors,
    verdict: Option<&Verdict>,
) {
    let inside = part.start <= part.end && part.end <= 4 * quarter(params);
    assert!(inside && part.start.is_multiple_of(4) && part.len().is_multiple_of(4), "{part:?} of {params:?}");
    let (quarter, first) = (part.len() / 4, part.start as u64);
    if quarter == 0 {
        return;
    }
    let operands = operands.map_or(0, |o| {
        assert!(o.len() == params.len() && o.dtype() == DType::Bf16, "{o:?} are no copies of {params:?}");
        o.view_mut().as_view().address() + 2 * first
    });
    let list = args![
        params.view_mut().as_view().address() + 4 * first,
        grads.address() + 4 * first,
        m.view_mut().as_view().address() + 4 * first,
        v.view_mut().as_view().address() + 4 * first,
        operands,
        quarter,
        f.beta1 as f32,
        (1.0 - f.beta1) as f32,
        f.beta2 as f32,
        (1.0 - f.beta2) as f32,
        f.unbias1 as f32,
        f.unbias2 as f32,
        f.eps as f32,
        f.weight_decay as f32,
        f.lr as f32,
        f.grad_scale as f32,
        verdict.map_or(0, Verdict::address)
    ];
    // SAFETY: all buffers have first + 4 * quarter elements (checked by the caller and above); all but `grads` are mutably borrowed.
    unsafe { cuda.launch(&SOURCE, (DType::F32, "adamw"), blocks(quarter), 256, 0, list) };
}

/// Sum of squares.
///
/// # Panics
/// When there is no memory for 8 KiB.
pub(crate) fn sum_of_squares(cuda: &Cuda, x: &Tensor) -> f64 {
    let (sums, count) = squares(cuda, x).expect("memory for sums of squares");
    let mut host = vec![0f64; count];
    cuda.context().download(&mut host, sums.address());
    host.iter().sum()
}

/// Sums of squares of parts of a tensor, in f64, and their number.
///
/// # Errors
/// [`crate::Error::OutOfGpuMemory`].
pub(crate) fn squares(cuda: &Cuda, x: &Tensor) -> Result<(Buffer, usize)> {
    let quarter = quarter(x);
    let count = quarter.div_ceil(256).clamp(1, SUMS);
    let sums = cuda.memory().take(8 * count)?;
    let list = args![sums.address(), x.address(), quarter];
    // SAFETY: `x` has 4 * quarter elements, `sums` a number for each block.
    unsafe { cuda.launch(&SOURCE, (DType::F32, "sum_of_squares"), [count, 1, 1], 256, 0, list) };
    Ok((sums, count))
}

/// Index of the first element that is infinite or not a number.
///
/// # Panics
/// When there is no memory for a number.
pub(crate) fn first_non_finite(cuda: &Cuda, x: View) -> Option<usize> {
    let first = cuda.upload(&[u32::MAX]).expect("memory for a number");
    let list = args![first.address(), x.address(), x.stride(), x.rows(), x.cols()];
    // SAFETY: `x` is borrowed; `first` is one number.
    unsafe { cuda.launch(&SOURCE, (x.dtype(), "first_non_finite"), blocks(x.rows() * x.cols()), 256, 0, list) };
    let mut host = [0u32];
    cuda.context().download(&mut host, first.address());
    (host[0] != u32::MAX).then_some(host[0] as usize)
}
