//! f32 on the processor's cores: blocks of rows in parallel, vector code along a row.

use crate::Result;
use crate::device::Device;
use crate::device::par::{self, RowsPerUnit};
use crate::device::view::{Mat, MatMut};
use crate::ops::partials;
use crate::ops::simd::{map, sum, vectorise};
use crate::tensor::{DType, Tensor};

/// `y = (x − mean) r ⊙ w + b`.
pub(crate) fn forward(x: Mat<f32>, w: Mat<f32>, b: Mat<f32>, eps: f64, y: MatMut<f32>) {
    par::for_row_blocks(y, par::block_rows(x.cols()), |first, y| {
        forward_rows(x.row_range(first..first + y.rows()), w.row(0), b.row(0), eps as f32, y);
    });
}

/// Writes `dx`, adds to `dw` and `db`.
pub(crate) fn backward(
    device: &Device,
    dy: Mat<f32>,
    x: Mat<f32>,
    w: Mat<f32>,
    eps: f64,
    mut dw: MatMut<f32>,
    mut db: MatMut<f32>,
    dx: MatMut<f32>,
) -> Result<()> {
    let width = x.cols();
    let block = partials::block_rows(x.rows(), width);
    let units = x.rows().div_ceil(block);
    let mut sums = Tensor::zeros(device, &[units, 2 * width], DType::F32)?;
    let parts = (RowsPerUnit { mat: dx, rows: block }, RowsPerUnit { mat: sums.view_mut().into_mat(), rows: 1 });
    par::for_each(units, parts, &|unit, (dx, mut sums): (RowsPerUnit<MatMut<f32>>, RowsPerUnit<MatMut<f32>>)| {
        let rows = unit * block..unit * block + dx.mat.rows();
        backward_rows(dy.row_range(rows.clone()), x.row_range(rows), w.row(0), eps as f32, sums.mat.row_mut(0), dx.mat);
    });
    partials::add_up(sums.view().as_mat(), 0..width, dw.row_mut(0));
    partials::add_up(sums.view().as_mat(), width..2 * width, db.row_mut(0));
    Ok(())
}

/// Mean and 1/√(var + eps) of a row.
#[inline(always)]
fn statistics(x: &[f32], eps: f32) -> (f32, f32) {
    let width = x.len() as f32;
    let mean = sum([x], |[x]| x) / width;
    let var = sum([x], |[x]| (x - mean) * (x - mean)) / width;
    (mean, 1.0 / (var + eps).sqrt())
}

vectorise! {
    fn forward_rows<'a>(x: Mat<'a, f32>, w: &'a [f32], b: &'a [f32], eps: f32, y: MatMut<'a, f32>) {
        let mut y = y;
        for i in 0..x.rows() {
            let (mean, r) = statistics(x.row(i), eps);
            map(y.row_mut(i), [x.row(i), w, b], |[x, w, b], _| (x - mean) * r * w + b);
        }
    }
}

vectorise! {
    /// `sums` is `[dw | db]`.
    fn backward_rows<'a>(dy: Mat<'a, f32>, x: Mat<'a, f32>, w: &'a [f32], eps: f32, sums: &'a mut [f32], dx: MatMut<'a, f32>) {
        let mut dx = dx;
        let width = w.len() as f32;
        let (dw, db) = sums.split_at_mut(w.len());
        for i in 0..x.rows() {
            let (dy, x) = (dy.row(i), x.row(i));
            let (mean, r) = statistics(x, eps);
            let mean_p = sum([dy, w], |[dy, w]| dy * w) / width;
            let mean_px = sum([dy, w, x], |[dy, w, x]| dy * w * ((x - mean) * r)) / width;
            map(dx.row_mut(i), [dy, w, x], |[dy, w, x], _| r * (dy * w - mean_p - (x - mean) * r * mean_px));
            map(dw, [dy, x], |[dy, x], dw| dw + dy * ((x - mean) * r));
            map(db, [dy], |[dy], db| db + dy);
        }
    }
}
