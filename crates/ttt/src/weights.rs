//! What a pass through the model reads: numbers in the type that training needs, or large matrices stored narrow.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::device::view::View;
use crate::device::{Device, WeightView};
use crate::narrow::Narrow;
use crate::params::{ParamId, ParamTable, Params};
use crate::tensor::{DType, with_dtype};
use crate::{Error, Result};

/// Type that a model's large matrices are stored in: the projections of the TTT layers and of the feed-forward parts, the
/// embedding and the output matrix. Everything else (initial fast weights, norms, gates, convolutions) is f32, or f64 with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// 32-bit floating point.
    F32,
    /// 64-bit floating point: a check mode that runs every operation's reference.
    F64,
    /// The upper half of an f32, rounded to nearest even. On a CPU half the memory, for inference only; on a GPU mixed precision:
    /// weights in f32 with a copy in bf16 for products, activations in bf16.
    Bf16,
    /// 8-bit integers with an f32 scale for each row (output): a quarter of the memory. Inference on the CPU only.
    Int8,
}

impl Storage {
    /// Type of everything but the large matrices, of activations and of states.
    pub fn dtype(self) -> DType {
        match self {
            Storage::F64 => DType::F64,
            Storage::F32 | Storage::Bf16 | Storage::Int8 => DType::F32,
        }
    }

    /// Whether matrices are narrower than activations: such a model cannot be trained.
    pub fn is_narrow(self) -> bool {
        matches!(self, Storage::Bf16 | Storage::Int8)
    }

    /// Bytes of a matrix `[rows, cols]`, its scales included.
    pub fn matrix_bytes(self, [rows, cols]: [usize; 2]) -> usize {
        match self {
            Storage::F32 => 4 * rows * cols,
            Storage::F64 => 8 * rows * cols,
            Storage::Bf16 => 2 * rows * cols,
            Storage::Int8 => rows * cols + 4 * rows,
        }
    }
}

impl From<DType> for Storage {
    fn from(dtype: DType) -> Storage {
        match dtype {
            DType::F32 => Storage::F32,
            DType::F64 => Storage::F64,
            DType::Bf16 => Storage::Bf16,
        }
    }
}

impl FromStr for Storage {
    type Err = Error;

    fn from_str(name: &str) -> Result<Storage> {
        match name {
            "f32" => Ok(Storage::F32),
            "f64" => Ok(Storage::F64),
            "bf16" => Ok(Storage::Bf16),
            "int8" => Ok(Storage::Int8),
            _ => Err(Error::Config(format!("weights cannot be held as `{name}`; there are f32, bf16, int8 and f64"))),
        }
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Storage::F32 => "f32",
            Storage::F64 => "f64",
            Storage::Bf16 => "bf16",
            Storage::Int8 => "int8",
        })
    }
}

/// The weights of a model.
#[derive(Debug)]
pub enum Weights {
    /// All of them in the type of the activations: what is trained.
    Float(Params),
    /// The large matrices narrow: what only predicts.
    Narrow(Narrow),
}

impl From<Params> for Weights {
    fn from(params: Params) -> Weights {
        Weights::Float(params)
    }
}

impl Weights {
    /// The list of parameters.
    pub fn table(&self) -> &Arc<ParamTable> {
        match self {
            Weights::Float(params) => params.table(),
            Weights::Narrow(narrow) => narrow.table(),
        }
    }

    /// Where they live.
    pub fn device(&self) -> &Device {
        match self {
            Weights::Float(params) => params.data().device(),
            Weights::Narrow(narrow) => narrow.device(),
        }
    }

    /// Type that the large matrices are stored in.
    pub fn storage(&self) -> Storage {
        match self {
            Weights::Float(params) => params.dtype().into(),
            Weights::Narrow(narrow) => narrow.storage(),
        }
    }

    /// Type of the activations of a model with these weights: that of the operands of its products.
    pub fn dtype(&self) -> DType {
        match self {
            Weights::Float(params) => params.dtype(),
            Weights::Narrow(narrow) => narrow.storage().dtype(),
        }
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> usize {
        match self {
            Weights::Float(params) => params.data().bytes(),
            Weights::Narrow(narrow) => narrow.bytes(),
        }
    }

    /// One parameter as a matrix `[all axes but the last, last axis]`.
    ///
    /// # Panics
    /// When it is stored narrow.
    pub fn view(&self, id: ParamId) -> View<'_> {
        match self {
            Weights::Float(params) => params.view(id),
            Weights::Narrow(narrow) => narrow.view(id),
        }
    }

    /// The parameters from `first` to `last` as one matrix, rows one below the other, as products read it: what a backward pass
    /// reads, and matrices that are never stored narrow ([`Params::operand`]).
    ///
    /// # Panics
    /// When they do not lie one behind the other with equal numbers of columns, or are stored narrow.
    pub fn operand(&self, first: ParamId, last: ParamId) -> View<'_> {
        match self {
            Weights::Narrow(narrow) if first == last => narrow.view(first),
            _ => self.float().operand(first, last),
        }
    }

    /// One of the large matrices.
    ///
    /// # Panics
    /// When a narrow model holds the parameter as f32.
    pub fn matrix(&self, id: ParamId) -> WeightView<'_> {
        self.matrices(id, id)
    }

    /// The large matrices from `first` to `last` as one, rows one below the other.
    ///
    /// # Panics
    /// As [`Weights::matrix`]; when they do not lie one behind the other with equal numbers of columns.
    pub fn matrices(&self, first: ParamId, last: ParamId) -> WeightView<'_> {
        match self {
            Weights::Float(params) => params.operand(first, last).into(),
            Weights::Narrow(narrow) => narrow.matrices(first, last),
        }
    }

    /// The flat buffer of weights that can be trained.
    ///
    /// # Panics
    /// When matrices are stored narrow.
    pub fn float(&self) -> &Params {
        match self {
            Weights::Float(params) => params,
            Weights::Narrow(narrow) => panic!("weights held as {} are not trained", narrow.storage()),
        }
    }

    /// The flat buffer of weights that can be trained, to write.
    ///
    /// # Panics
    /// When matrices are stored narrow.
    pub fn float_mut(&mut self) -> &mut Params {
        match self {
            Weights::Float(params) => params,
            Weights::Narrow(narrow) => panic!("weights held as {} are not trained", narrow.storage()),
        }
    }

    /// Replaces a parameter that is no large matrix.
    ///
    /// # Panics
    /// When it is one of a narrow model, or has another number of elements.
    pub fn set(&mut self, id: ParamId, values: &[f32]) {
        match self {
            Weights::Float(params) if params.data().device().as_cuda().is_some() => params.upload(id, values),
            Weights::Float(params) => with_dtype!(params.data().dtype(), E => {
                use crate::tensor::Element;
                let all = params.values_mut::<E>(id);
                assert_eq!(all.len(), values.len(), "numbers of a parameter");
                all.iter_mut().zip(values).for_each(|(x, value)| *x = E::from_f64(f64::from(*value)));
            }),
            Weights::Narrow(narrow) => narrow.values_mut(id).copy_from_slice(values),
        }
    }
}

/// Numbers of a model's parameters, whatever they are stored as.
pub trait Values: Sync {
    /// The list of parameters.
    fn table(&self) -> &Arc<ParamTable>;

    /// The values of a parameter from element `first` on, as f32.
    ///
    /// # Panics
    /// When it has fewer than `out` holds.
    fn read(&self, id: ParamId, first: usize, out: &mut [f32]);
}

impl Values for Params {
    fn table(&self) -> &Arc<ParamTable> {
        self.table()
    }

    fn read(&self, id: ParamId, first: usize, out: &mut [f32]) {
        if let Some(gpu) = self.data().device().as_cuda() {
            let at = self.view(id).address() + 4 * first as u64;
            return gpu.context().download(out, at);
        }
        with_dtype!(self.data().dtype(), E => {
            use crate::tensor::Element;
            let values = &self.values::<E>(id)[first..first + out.len()];
            out.iter_mut().zip(values).for_each(|(out, x)| *out = x.to_f64() as f32);
        });
    }
}

impl Values for Weights {
    fn table(&self) -> &Arc<ParamTable> {
        self.table()
    }

    fn read(&self, id: ParamId, first: usize, out: &mut [f32]) {
        match self {
            Weights::Float(params) => params.read(id, first, out),
            Weights::Narrow(narrow) => narrow.read(id, first, out),
        }
    }
}
