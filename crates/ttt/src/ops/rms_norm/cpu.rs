//! f32 on the processor's cores: blocks of rows in parallel, vector code along a row.

use crate::Result;
use crate::device::Device;
use crate::device::par::{self, RowsPerUnit};
use crate::device::view::{Mat, MatMut};
use crate::ops::partials;
use crate::ops::simd::{map, sum, vectorise};
use crate::tensor::{DType, Tensor};

/// `y = x r ⊙ w`.
pub(crate) fn forward(x: Mat<f32>, w: Mat<f32>, eps: f64, y: MatMut<f32>) {
    par::for_row_blocks(y, par::block_rows(x.cols()), |first, y| {
        forward_rows(x.row_range(first..first + y.rows()), w.row(0), eps as f32, y);
    });
}

/// Writes `dx`, adds to `dw`.
pub(crate) fn backward(
    device: &Device,
    dy: Mat<f32>,
    x: Mat<f32>,
    w: Mat<f32>,
    eps: f64,
    mut dw: MatMut<f32>,
    dx: MatMut<f32>,
) -> Result<()> {
    let block = partials::block_rows(x.rows(), x.cols());
    let units = x.rows().div_ceil(block);
    let mut sums = Tensor::zeros(device, &[units, x.cols()], DType::F32)?;
    let parts = (RowsPerUnit { mat: dx, rows: block }, RowsPerUnit { mat: sums.view_mut().into_mat(), rows: 1 });
    par::for_each(units, parts, &|unit, (dx, mut dw): (RowsPerUnit<MatMut<f32>>, RowsPerUnit<MatMut<f32>>)| {
        let rows = unit * block..unit * block + dx.mat.rows();
        backward_rows(dy.row_range(rows.clone()), x.row_range(rows), w.row(0), eps as f32, dw.mat.row_mut(0), dx.mat);
    });
    partials::add_up(sums.view().as_mat(), 0..x.cols(), dw.row_mut(0));
    Ok(())
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum([x], |[x]| x * x) / x.len() as f32 + eps).sqrt()
}

vectorise! {
    fn forward_rows<'a>(x: Mat<'a, f32>, w: &'a [f32], eps: f32, y: MatMut<'a, f32>) {
        let mut y = y;
        for i in 0..x.rows() {
            let r = inverse_rms(x.row(i), eps);
            map(y.row_mut(i), [x.row(i), w], |[x, w], _| x * r * w);
        }
    }
}

vectorise! {
    fn backward_rows<'a>(dy: Mat<'a, f32>, x: Mat<'a, f32>, w: &'a [f32], eps: f32, dw: &'a mut [f32], dx: MatMut<'a, f32>) {
        let (mut dx, dw) = (dx, dw);
        for i in 0..x.rows() {
            let (dy, x) = (dy.row(i), x.row(i));
            let r = inverse_rms(x, eps);
            let mean = sum([dy, w, x], |[dy, w, x]| dy * w * x) * r / x.len() as f32;
            map(dx.row_mut(i), [dy, w, x], |[dy, w, x], _| r * (dy * w - x * (r * mean)));
            map(dw, [dy, x], |[dy, x], dw| dw + dy * (x * r));
        }
    }
}
