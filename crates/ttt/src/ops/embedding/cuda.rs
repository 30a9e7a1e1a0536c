//! On a GPU.

use crate::Result;
use crate::device::cuda::kernels::{Entry, Source};
use crate::device::cuda::{Cuda, args};
use crate::device::view::{View, ViewMut};
use crate::ops::add;
use crate::ops::sample::cuda::Tokens;
use crate::tensor::{DType, Tensor};

/// The kernels.
pub(crate) static SOURCE: Source = Source {
    name: "embedding",
    file: "ops/embedding/kernel.cu",
    text: include_str!("kernel.cu"),
    defines: &[],
    untuned: &[],
    types: &[DType::F32, DType::Bf16],
    kernels: &[Entry { name: "pieces", registers: 48 }, Entry { name: "add_pieces", registers: 48 }],
};

/// Rows that one block adds up.
const PIECE: usize = 64;

/// `y[i] = table[ids[i]]`.
pub(crate) fn forward(cuda: &Cuda, ids: &[u32], table: View, y: &ViewMut) -> Result<()> {
    add::cuda::rows(cuda, y, table, ids, false)
}

/// [`forward`] for ids that lie in the GPU's memory.
///
/// # Panics
/// When they are of another vocabulary.
pub(crate) fn forward_of(cuda: &Cuda, tokens: &Tokens, table: View) -> Result<Tensor> {
    assert_eq!(tokens.vocab(), table.rows(), "vocabulary");
    let mut y = Tensor::empty(table.device(), &[tokens.rows(), table.cols()], table.dtype())?;
    add::cuda::rows_at(cuda, &y.view_mut(), table, (tokens.address(), tokens.rows()), false);
    Ok(y)
}

/// `dtable[ids[i]] += dy[i]`.
pub(crate) fn backward(cuda: &Cuda, ids: &[u32], dy: View, dtable: &ViewMut) -> Result<()> {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    // Stable: the rows of an id stay in order.
    order.sort_by_key(|i| ids[*i as usize]);
    // Pieces of rows, and for each id its first piece.
    let (mut bounds, mut present, mut first_piece) = (vec![0u32], Vec::new(), vec![0u32]);
    let mut at = 0;
    for same in order.chunk_by(|a, b| ids[*a as usize] == ids[*b as usize]) {
        for piece in same.chunks(PIECE) {
            at += piece.len();
            bounds.push(at as u32);
        }
        present.push(ids[same[0] as usize]);
        first_piece.push(bounds.len() as u32 - 1);
    }
    let (pieces, cols) = (bounds.len() - 1, dy.cols());
    let sums = Tensor::empty(dy.device(), &[pieces, cols], DType::F32)?;
    let [order, bounds, ids, first_piece] = [order, bounds, present.clone(), first_piece].map(|list| cuda.upload(&list));
    let (order, bounds, ids, first_piece) = (order?, bounds?, ids?, first_piece?);
    let list = args![sums.address(), dy.address(), dy.stride(), order.address(), bounds.address(), cols];
    // SAFETY: `order` holds rows of `dy`, `bounds` places in it, one more than there are pieces and rows of `sums`.
    unsafe { cuda.launch(&SOURCE, (dy.dtype(), "pieces"), [pieces, 1, 1], 256, 0, list) };
    let dtable = dtable.as_view();
    let list = args![dtable.address(), dtable.stride(), sums.address(), ids.address(), first_piece.address(), cols];
    // SAFETY: the ids are rows of `dtable` (checked by the caller), each named once; `first_piece` has one more.
    unsafe { cuda.launch(&SOURCE, (DType::F32, "add_pieces"), [present.len(), 1, 1], 256, 0, list) };
    Ok(())
}
