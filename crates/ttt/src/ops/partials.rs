//! Sums over rows (parameter gradients) that are the same for any number of threads: one partial sum for each block of rows,
//! added up in order.

use std::ops::Range;

use crate::device::par;
use crate::device::view::Mat;

/// At most this many blocks, so that adding them up costs little beside making them.
const MAX_BLOCKS: usize = 64;

/// Rows of a block when each of `rows` rows is work on `cols` elements.
pub(crate) fn block_rows(rows: usize, cols: usize) -> usize {
    par::block_rows(cols).max(rows.div_ceil(MAX_BLOCKS))
}

/// Adds the columns `cols` of all partial sums to `to`.
pub(crate) fn add_up(sums: Mat<f32>, cols: Range<usize>, to: &mut [f32]) {
    for block in 0..sums.rows() {
        for (to, sum) in to.iter_mut().zip(&sums.row(block)[cols.clone()]) {
            *to += sum;
        }
    }
}

/// On a GPU: rows of a block, and the number of blocks, so that few partial sums are to be added up and the GPU is full.
pub(crate) fn gpu_rows(rows: usize) -> [usize; 2] {
    let per_block = rows.div_ceil(1056).max(1);
    [per_block, rows.div_ceil(per_block)]
}

/// On a GPU: threads of a block that works on a row of `cols` elements, `width` a thread.
pub(crate) fn gpu_threads(cols: usize, width: usize) -> usize {
    (cols / width).next_multiple_of(32).clamp(32, 256)
}
