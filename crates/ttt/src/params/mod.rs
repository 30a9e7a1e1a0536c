//! The table of a model's parameters, and flat buffers laid out by it.
//!
//! [`ParamTable`] is the only list of parameters: counts, initial values, files, the optimizer and the memory plan walk it.
//! [`Params`] is one flat buffer over it; weights, gradients and both moments of the optimizer are four of them.

mod init;
mod model;
mod table;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

pub use init::Init;
pub use model::{AttentionIds, BlockIds, FeedForwardIds, LrIds, MambaIds, MixerIds, ModelIds, TttIds};
pub use table::{Entry, ParamId, ParamTable};

use crate::Result;
use crate::device::Device;
use crate::device::view::{View, ViewMut};
use crate::ops::add;
use crate::tensor::{DType, Tensor, with_dtype};

/// One number for every parameter of a model, in one flat buffer.
#[derive(Clone, Debug)]
pub struct Params {
    table: Arc<ParamTable>,
    data: Tensor,
    /// In mixed precision on a GPU, the same numbers in bf16 for products.
    operands: Option<Tensor>,
}

impl Params {
    /// All zeros. `Bf16` means mixed precision: numbers in f32, and copies in bf16 for products.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn zeros(table: &Arc<ParamTable>, device: &Device, dtype: DType) -> Result<Params> {
        let zeros = |dtype| Tensor::zeros(device, &[table.len()], dtype);
        Ok(match dtype {
            DType::Bf16 => Params { table: table.clone(), data: zeros(DType::F32)?, operands: Some(zeros(dtype)?) },
            _ => Params { table: table.clone(), data: zeros(dtype)?, operands: None },
        })
    }

    /// A copy on another device, in another precision (see [`Params::zeros`]).
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn to(&self, device: &Device, dtype: DType) -> Result<Params> {
        let mut data = self.data.to(device)?;
        let stored = if dtype == DType::Bf16 { DType::F32 } else { dtype };
        if data.dtype() != stored {
            data = data.cast(stored)?;
        }
        let operands = if dtype == DType::Bf16 { Some(data.cast(dtype)?) } else { None };
        Ok(Params { table: self.table.clone(), data, operands })
    }

    /// A copy on the CPU when they lie in a GPU's memory, otherwise themselves: what files are written from.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn on_cpu(&self) -> Result<Cow<'_, Params>> {
        let device = self.data.device();
        match device.as_cuda() {
            Some(_) => Ok(Cow::Owned(self.to(&device.cpu_beside(), self.data.dtype())?)),
            None => Ok(Cow::Borrowed(self)),
        }
    }

    /// Type of the activations of a model with these weights: that of the products' operands.
    pub fn dtype(&self) -> DType {
        self.operands.as_ref().unwrap_or(&self.data).dtype()
    }

    /// Initial values. Each parameter's depend on the seed and its name alone.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn init(table: &Arc<ParamTable>, device: &Device, dtype: DType, seed: u64) -> Result<Params> {
        if device.as_cuda().is_some() {
            return Params::init(table, &device.cpu_beside(), DType::F32, seed)?.to(device, dtype);
        }
        let mut params = Params::zeros(table, device, dtype)?;
        let ids: Vec<ParamId> = (0..table.entries().len()).map(ParamId).collect();
        let values: Vec<Vec<f64>> = ids.par_iter().map(|id| init::initial_values(table.entry(*id), seed)).collect();
        for (id, values) in ids.into_iter().zip(values) {
            with_dtype!(dtype, E => {
                use crate::tensor::Element;
                for (x, v) in params.values_mut::<E>(id).iter_mut().zip(&values) {
                    // Rounding through f32 makes an f64 model start from the same numbers as an f32 one.
                    *x = E::from_f64(*v as f32 as f64);
                }
            });
        }
        Ok(params)
    }

    /// The table that lays the buffer out.
    pub fn table(&self) -> &Arc<ParamTable> {
        &self.table
    }

    /// Whether there is room for a parameter: in a table of gradients those that nobody wants have no elements.
    pub fn holds(&self, id: ParamId) -> bool {
        self.table.entry(id).elements() > 0
    }

    /// Copies every parameter that both have, by name.
    ///
    /// # Panics
    /// When one that both have differs in its shape, or the types of the elements or the devices differ.
    pub fn copy_shared(&mut self, from: &Params) {
        let table = self.table.clone();
        for (index, entry) in table.entries().iter().enumerate() {
            if let Some(id) = from.table.find(&entry.name) {
                add::copy_to(self.view_mut(ParamId(index)), from.view(id));
            }
        }
    }

    /// The whole buffer.
    pub fn data(&self) -> &Tensor {
        &self.data
    }

    /// The whole buffer, to write. In mixed precision the copies for products must be written too
    /// ([`Params::data_and_operands_mut`]).
    pub fn data_mut(&mut self) -> &mut Tensor {
        &mut self.data
    }

    /// The whole buffer and, in mixed precision, its copy for products, both to write.
    pub fn data_and_operands_mut(&mut self) -> (&mut Tensor, Option<&mut Tensor>) {
        (&mut self.data, self.operands.as_mut())
    }

    /// Elements of one parameter.
    ///
    /// # Panics
    /// When they are not `E`.
    pub fn values<E: crate::tensor::Element>(&self, id: ParamId) -> &[E] {
        &self.data.as_slice()[self.table.entry(id).range()]
    }

    /// Elements of one parameter, to write.
    ///
    /// # Panics
    /// When they are not `E`.
    pub fn values_mut<E: crate::tensor::Element>(&mut self, id: ParamId) -> &mut [E] {
        let range = self.table.entry(id).range();
        &mut self.data.as_mut_slice()[range]
    }

    /// Replaces a parameter in a GPU's memory that products do not read.
    pub(crate) fn upload(&mut self, id: ParamId, values: &[f32]) {
        assert_eq!(self.table.entry(id).elements(), values.len(), "numbers of a parameter");
        let to = self.view(id).address();
        self.data.device().as_cuda().expect("a GPU").context().upload(to, values);
    }

    /// One parameter as a matrix `[all axes but the last, last axis]`.
    pub fn view(&self, id: ParamId) -> View<'_> {
        self.fused(id, id)
    }

    /// One parameter as a matrix, to write.
    pub fn view_mut(&mut self, id: ParamId) -> ViewMut<'_> {
        self.fused_mut(id, id)
    }

    /// The parameters from `first` to `last` as one matrix, rows one below the other.
    ///
    /// # Panics
    /// When they do not lie one behind the other with equal numbers of columns.
    pub fn fused(&self, first: ParamId, last: ParamId) -> View<'_> {
        self.matrix(&self.data, first, last)
    }

    /// [`Params::fused`] as products read it: in bf16 in mixed precision.
    ///
    /// # Panics
    /// When they do not lie one behind the other with equal numbers of columns.
    pub fn operand(&self, first: ParamId, last: ParamId) -> View<'_> {
        self.matrix(self.operands.as_ref().unwrap_or(&self.data), first, last)
    }

    fn matrix<'a>(&self, buffer: &'a Tensor, first: ParamId, last: ParamId) -> View<'a> {
        let (range, [rows, cols]) = self.span(first, last);
        buffer.view().reshape(buffer.len(), 1).row_range(range).reshape(rows, cols)
    }

    /// The parameters from `first` to `last` as one matrix, to write.
    ///
    /// # Panics
    /// When they do not lie one behind the other with equal numbers of columns.
    pub fn fused_mut(&mut self, first: ParamId, last: ParamId) -> ViewMut<'_> {
        let (range, [rows, cols]) = self.span(first, last);
        self.data.view_mut().reshape_range(range, rows, cols)
    }

    /// Several parameters at once, to write.
    ///
    /// # Panics
    /// When the ids are not ascending.
    pub fn views_mut<const N: usize>(&mut self, ids: [ParamId; N]) -> [ViewMut<'_>; N] {
        assert!(ids.is_sorted_by(|a, b| a < b), "parameters to borrow at once must ascend: {ids:?}");
        let mut at = 0;
        let flat = self.data.len();
        let mut rest = Some(self.data.view_mut().reshape(flat, 1));
        ids.map(|id| {
            let entry = self.table.entry(id);
            let [rows, cols] = entry.matrix_shape();
            let (_, tail) = rest.take().expect("one remainder").split_rows(entry.offset - at);
            let (own, tail) = tail.split_rows(entry.elements());
            at = entry.offset + entry.elements();
            rest = Some(tail);
            own.reshape(rows, cols)
        })
    }

    fn span(&self, first: ParamId, last: ParamId) -> (Range<usize>, [usize; 2]) {
        let [_, cols] = self.table.entry(first).matrix_shape();
        let mut rows = 0;
        let mut end = self.table.entry(first).offset;
        for id in first.0..=last.0 {
            let entry = self.table.entry(ParamId(id));
            assert!(
                entry.offset == end && entry.matrix_shape()[1] == cols,
                "`{}` does not continue the matrix before it",
                entry.name
            );
            rows += entry.matrix_shape()[0];
            end += entry.elements();
        }
        (self.table.entry(first).offset..end, [rows, cols])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Inner};

    #[test]
    fn several_parameters_are_borrowed_at_once() {
        let config = Config::preset("tiny", Inner::Linear).unwrap();
        let (table, ids) = ParamTable::new(&config);
        let mut params = Params::zeros(&Arc::new(table), &Device::cpu().unwrap(), DType::F32).unwrap();
        let MixerIds::Ttt(ttt) = &ids.blocks[1].mixer else { panic!("a TTT layer") };
        let gamma_id = ttt.ttt_norm.unwrap().0;
        let [mut gamma, mut w1] = params.views_mut([gamma_id, ttt.initial[0]]);
        gamma.as_mat::<f32>().row_mut(3)[5] = 1.0;
        w1.as_mat::<f32>().row_mut(47)[47] = 2.0;
        assert_eq!(params.values::<f32>(gamma_id)[3 * 48 + 5], 1.0);
        assert_eq!(params.values::<f32>(ttt.initial[0])[47 * 48 + 47], 2.0);
    }
}
