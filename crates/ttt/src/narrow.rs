//! Weights for reading only: the large matrices in bf16 or int8, everything else f32.

use std::sync::Arc;

use half::bf16;
use rayon::prelude::*;

use crate::device::view::{Mat, View};
use crate::device::{Device, WeightView};
use crate::params::{Entry, ParamId, ParamTable, Params};
use crate::tensor::{DType, Tensor};
use crate::weights::{Storage, Values};
use crate::{Error, Result};

/// Weights of which the large matrices ([`Entry::is_matrix`]) are stored in bf16 or int8.
#[derive(Debug)]
pub struct Narrow {
    table: Arc<ParamTable>,
    storage: Storage,
    /// Everything but the matrices, one behind the other.
    floats: Tensor,
    /// The matrices one behind the other; bf16 or i8 numbers in the memory of f32 ones.
    matrices: Tensor,
    /// Of int8 the value of 1 in each row of each matrix, one behind the other.
    scales: Tensor,
    places: Vec<Place>,
}

/// Where a parameter lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Its first element in `floats`, or in `matrices`.
    element: usize,
    /// Of a matrix, its first row in `scales`.
    row: usize,
}

/// Numbers that weights are made from.
pub(crate) trait Origin: Sync {
    /// The values of a parameter from element `first` on.
    fn read(&self, id: ParamId, first: usize, out: &mut [f32]) -> Result<()>;

    /// Integers and scales of a matrix that has them already.
    fn int8(&self, _: ParamId) -> Option<(&[i8], &[f32])> {
        None
    }

    /// The error about a parameter that cannot be stored.
    fn wrong(&self, id: ParamId, message: String) -> Error;
}

impl Origin for Params {
    fn read(&self, id: ParamId, first: usize, out: &mut [f32]) -> Result<()> {
        Values::read(self, id, first, out);
        Ok(())
    }

    fn wrong(&self, id: ParamId, message: String) -> Error {
        Error::Invalid(format!("`{}` {message}", self.table().entry(id).name))
    }
}

/// Elements that matrices are aligned to: 256 bytes of int8.
const ALIGN: usize = 256;

impl Narrow {
    /// Stores numbers as bf16 or int8, a few rows at a time.
    ///
    /// # Errors
    /// A number that is not finite, or not in bf16; what `origin` returns; [`Error::OutOfMemory`].
    ///
    /// # Panics
    /// When `storage` is not narrow.
    pub(crate) fn new(table: &Arc<ParamTable>, device: &Device, storage: Storage, origin: &impl Origin) -> Result<Narrow> {
        assert!(storage.is_narrow(), "{storage} is no narrow storage");
        let (mut floats, mut elements, mut rows) = (0usize, 0usize, 0);
        let mut places = Vec::with_capacity(table.entries().len());
        let mut end = None;
        for entry in table.entries() {
            if entry.is_matrix() {
                // What is one matrix in the table is one here.
                if end != Some(entry.offset) {
                    elements = elements.next_multiple_of(ALIGN);
                }
                places.push(Place { element: elements, row: rows });
                elements += entry.elements();
                rows += entry.matrix_shape()[0];
                end = Some(entry.range().end);
            } else {
                places.push(Place { element: floats, row: 0 });
                floats = (floats + entry.elements()).next_multiple_of(64);
            }
        }
        let (bytes, rows) = match storage {
            Storage::Bf16 => (2 * elements, 0),
            _ => (elements, rows),
        };
        let mut narrow = Narrow {
            table: table.clone(),
            storage,
            floats: Tensor::zeros(device, &[floats], DType::F32)?,
            matrices: Tensor::zeros(device, &[bytes.div_ceil(4)], DType::F32)?,
            scales: Tensor::zeros(device, &[rows], DType::F32)?,
            places,
        };
        for id in (0..table.entries().len()).map(ParamId) {
            narrow.fill(id, origin)?;
        }
        Ok(narrow)
    }

    fn fill(&mut self, id: ParamId, origin: &impl Origin) -> Result<()> {
        let entry = self.table.entry(id);
        let Place { element, row } = self.places[id.0];
        let range = element..element + entry.elements();
        if !entry.is_matrix() {
            return origin.read(id, 0, &mut self.floats.as_mut_slice()[range]);
        }
        let [rows, cols] = entry.matrix_shape();
        // Blocks of rows, so that forking pays.
        let block = (65_536 / cols).clamp(1, rows);
        let each = |i: usize, store: &mut dyn FnMut(usize, &[f32]) -> Result<(), String>| -> Result<()> {
            let count = block.min(rows - i * block);
            let mut wide = vec![0.0f32; count * cols];
            origin.read(id, i * block * cols, &mut wide)?;
            wide.chunks(cols).enumerate().try_for_each(|(r, wide)| store(r, wide)).map_err(|message| origin.wrong(id, message))
        };
        match self.storage {
            Storage::Bf16 => stored_mut::<bf16>(&mut self.matrices)[range]
                .par_chunks_mut(block * cols)
                .enumerate()
                .try_for_each(|(i, narrow)| each(i, &mut |r, wide| to_bf16(wide, &mut narrow[r * cols..(r + 1) * cols]))),
            _ => {
                let narrow = &mut stored_mut::<i8>(&mut self.matrices)[range];
                let scales = &mut self.scales.as_mut_slice::<f32>()[row..row + rows];
                if let Some((integers, given)) = origin.int8(id) {
                    narrow.copy_from_slice(integers);
                    scales.copy_from_slice(given);
                    return Ok(());
                }
                narrow.par_chunks_mut(block * cols).zip(scales.par_chunks_mut(block)).enumerate().try_for_each(
                    |(i, (narrow, scales))| {
                        each(i, &mut |r, wide| {
                            scales[r] = to_int8(wide, &mut narrow[r * cols..(r + 1) * cols])?;
                            Ok(())
                        })
                    },
                )
            }
        }
    }

    /// The list of parameters.
    pub fn table(&self) -> &Arc<ParamTable> {
        &self.table
    }

    /// Where they live.
    pub fn device(&self) -> &Device {
        self.floats.device()
    }

    /// Type of the matrices.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Bytes of all numbers.
    pub fn bytes(&self) -> usize {
        self.floats.bytes() + self.matrices.bytes() + self.scales.bytes()
    }

    /// A parameter that is no large matrix, as a matrix `[all axes but the last, last axis]`.
    ///
    /// # Panics
    /// When it is one.
    pub fn view(&self, id: ParamId) -> View<'_> {
        let entry = self.table.entry(id);
        assert!(!entry.is_matrix(), "`{}` is held as {}, not f32", entry.name, self.storage);
        let [rows, cols] = entry.matrix_shape();
        let values = &self.floats.as_slice::<f32>()[self.places[id.0].element..][..entry.elements()];
        View::new(Mat::new(values, rows, cols), self.device())
    }

    /// The values of a parameter that is no large matrix, to write.
    ///
    /// # Panics
    /// When it is one.
    pub fn values_mut(&mut self, id: ParamId) -> &mut [f32] {
        let entry = self.table.entry(id);
        assert!(!entry.is_matrix(), "`{}` is held as {}, not f32", entry.name, self.storage);
        &mut self.floats.as_mut_slice()[self.places[id.0].element..][..entry.elements()]
    }

    /// The large matrices from `first` to `last` as one, rows one below the other.
    ///
    /// # Panics
    /// When one is no large matrix, or does not lie behind the one before it with as many columns.
    pub fn matrices(&self, first: ParamId, last: ParamId) -> WeightView<'_> {
        let [_, cols] = self.table.entry(first).matrix_shape();
        let Place { element, row } = self.places[first.0];
        let (mut end, mut rows) = (element, 0);
        for id in first.0..=last.0 {
            let entry = self.table.entry(ParamId(id));
            let continues = self.places[id].element == end && entry.matrix_shape()[1] == cols;
            assert!(entry.is_matrix() && continues, "`{}` does not continue the matrix before it", entry.name);
            rows += entry.matrix_shape()[0];
            end += entry.elements();
        }
        let device = self.device();
        match self.storage {
            Storage::Bf16 => WeightView::Bf16 { rows: Mat::new(&stored::<bf16>(&self.matrices)[element..end], rows, cols), device },
            _ => WeightView::Int8 {
                rows: Mat::new(&stored::<i8>(&self.matrices)[element..end], rows, cols),
                scales: &self.scales.as_slice()[row..row + rows],
                device,
            },
        }
    }

    /// The values of a parameter from element `first` on.
    ///
    /// # Panics
    /// When it has fewer.
    pub fn read(&self, id: ParamId, first: usize, out: &mut [f32]) {
        let entry = self.table.entry(id);
        assert!(first + out.len() <= entry.elements(), "{} of {} elements from {first} on", out.len(), entry.elements());
        let [_, cols] = entry.matrix_shape();
        match entry.is_matrix().then(|| self.matrices(id, id)) {
            None => out.copy_from_slice(&self.view(id).as_mat::<f32>().slice()[first..first + out.len()]),
            Some(WeightView::Int8 { rows, scales, .. }) => {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = rows.slice()[first + i] as f32 * scales[(first + i) / cols];
                }
            }
            Some(WeightView::Bf16 { rows, .. }) => {
                out.iter_mut().zip(&rows.slice()[first..]).for_each(|(out, x)| *out = x.to_f32());
            }
            Some(WeightView::Float(_)) => unreachable!("matrices are narrow"),
        }
    }

    /// The matrix that storing it narrow changed most: its name, and `‖stored − origin‖ / ‖origin‖` (Frobenius norms).
    ///
    /// # Errors
    /// What `origin` returns.
    pub(crate) fn worst_error(&self, origin: &impl Origin) -> Result<(String, f64)> {
        let mut worst = (String::new(), 0.0);
        for id in (0..self.table.entries().len()).map(ParamId) {
            let entry: &Entry = self.table.entry(id);
            if !entry.is_matrix() {
                continue;
            }
            const PIECE: usize = 65_536;
            let sums = (0..entry.elements().div_ceil(PIECE)).into_par_iter().map(|piece| -> Result<[f64; 2]> {
                let first = piece * PIECE;
                let n = PIECE.min(entry.elements() - first);
                let (mut is, mut was) = (vec![0.0; n], vec![0.0; n]);
                self.read(id, first, &mut is);
                origin.read(id, first, &mut was)?;
                let each = is.iter().zip(&was).map(|(is, was)| [(*is as f64 - *was as f64).powi(2), (*was as f64).powi(2)]);
                Ok(each.fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d]))
            });
            let [error, norm] = sums.try_reduce(|| [0.0; 2], |[a, b], [c, d]| Ok([a + c, b + d]))?;
            let error = if error == 0.0 { 0.0 } else { (error / norm).sqrt() };
            if worst.0.is_empty() || error > worst.1 {
                worst = (entry.name.clone(), error);
            }
        }
        Ok(worst)
    }
}

fn stored<T: bytemuck::Pod>(matrices: &Tensor) -> &[T] {
    bytemuck::cast_slice(matrices.as_slice::<f32>())
}

fn stored_mut<T: bytemuck::Pod>(matrices: &mut Tensor) -> &mut [T] {
    bytemuck::cast_slice_mut(matrices.as_mut_slice::<f32>())
}

/// A row rounded to nearest even.
fn to_bf16(wide: &[f32], narrow: &mut [bf16]) -> Result<(), String> {
    for (narrow, wide) in narrow.iter_mut().zip(wide) {
        *narrow = bf16::from_f32(*wide);
        if !narrow.is_finite() {
            return Err(format!("holds {wide}, which is not finite as bf16"));
        }
    }
    Ok(())
}

/// A row in steps of a 127th of its largest magnitude: integers from -127 to 127. Returns the step, 0 for a row of zeros.
fn to_int8(wide: &[f32], narrow: &mut [i8]) -> Result<f32, String> {
    if let Some(x) = wide.iter().find(|x| !x.is_finite()) {
        return Err(format!("holds {x}, which is not finite"));
    }
    let largest = wide.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let mut step = largest / 127.0;
    if (127.0 * step).is_infinite() {
        step = step.next_down();
    }
    if step == 0.0 {
        // Zeros, or magnitudes that have no 127th part.
        narrow.fill(0);
        return Ok(0.0);
    }
    for (narrow, wide) in narrow.iter_mut().zip(wide) {
        *narrow = (wide / step).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    Ok(step)
}
