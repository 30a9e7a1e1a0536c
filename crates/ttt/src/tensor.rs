//! Tensors: typed, shaped, reference-counted pieces of a device's memory.

use std::ops::Range;
use std::sync::Arc;

use crate::Result;
use crate::device::Device;
use crate::device::memory::Buffer;
use crate::device::par;
use crate::device::view::{Mat, MatMut, View, ViewMut};

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit floating point: what everything runs in on a CPU.
    F32,
    /// 64-bit floating point: a check mode that runs every operation's reference.
    F64,
    /// 16-bit floating point with f32's range: activations and operands of products on a GPU.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F64 => 8,
            DType::Bf16 => 2,
        }
    }
}

/// A floating-point type that references and tensors are generic over: `f32` or `f64`.
pub trait Element:
    bytemuck::Pod
    + Send
    + Sync
    + PartialOrd
    + std::fmt::Debug
    + std::iter::Sum
    + std::ops::Neg<Output = Self>
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
{
    /// The run-time name of the type.
    const DTYPE: DType;
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// The nearest value of this type.
    fn from_f64(x: f64) -> Self;
    /// The value as f64.
    fn to_f64(self) -> f64;
    /// Square root.
    fn sqrt(self) -> Self;
    /// e to the power of the value.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Natural logarithm of 1 plus the value, exact where the value is small.
    fn ln_1p(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// The larger of two values.
    fn max(self, other: Self) -> Self;
}

macro_rules! element {
    ($t:ty, $dtype:expr) => {
        impl Element for $t {
            const DTYPE: DType = $dtype;
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn exp(self) -> Self {
                self.exp()
            }
            #[inline(always)]
            fn ln(self) -> Self {
                self.ln()
            }
            #[inline(always)]
            fn ln_1p(self) -> Self {
                self.ln_1p()
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                self.tanh()
            }
            #[inline(always)]
            fn abs(self) -> Self {
                self.abs()
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                self.max(other)
            }
        }
    };
}
element!(f32, DType::F32);
element!(f64, DType::F64);

/// Runs an expression with a type parameter bound to the Rust type of a [`DType`].
macro_rules! with_dtype {
    ($dtype:expr, $e:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::F32 => {
                type $e = f32;
                $body
            }
            $crate::tensor::DType::F64 => {
                type $e = f64;
                $body
            }
            $crate::tensor::DType::Bf16 => panic!("bf16 lives in a GPU's memory only; the CPU has no loops for it"),
        }
    };
}
pub(crate) use with_dtype;

/// A row-major, contiguous tensor. Cloning it clones a handle to the same memory; writing needs the only handle.
#[derive(Clone)]
pub struct Tensor {
    buffer: Arc<Buffer>,
    device: Device,
    shape: Vec<usize>,
    dtype: DType,
}

impl Tensor {
    /// A tensor whose contents are arbitrary (NaN in debug builds, so that an element nobody wrote is noticed).
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// For f64 on a GPU.
    pub fn empty(device: &Device, shape: &[usize], dtype: DType) -> Result<Tensor> {
        assert!(dtype != DType::F64 || device.as_cuda().is_none(), "f64 is computed on the CPU only");
        let elements: usize = shape.iter().product();
        let buffer = device.memory().take(elements * dtype.size())?;
        let mut tensor = Tensor { buffer: Arc::new(buffer), device: device.clone(), shape: shape.to_vec(), dtype };
        match device.as_cuda() {
            // All bits set is a NaN in every type.
            Some(cuda) if cuda.poisons() => cuda.context().fill(tensor.address(), 0xff, tensor.bytes()),
            Some(_) => {}
            None if cfg!(debug_assertions) => {
                with_dtype!(dtype, E => tensor.as_mut_slice::<E>().fill(E::from_f64(f64::NAN)));
            }
            None => {}
        }
        Ok(tensor)
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn zeros(device: &Device, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let mut tensor = Tensor::empty(device, shape, dtype)?;
        tensor.fill_zero();
        Ok(tensor)
    }

    /// A tensor with the elements of a slice.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When the slice's length is not the product of `shape`.
    pub fn from_slice<E: Element>(device: &Device, shape: &[usize], data: &[E]) -> Result<Tensor> {
        let mut tensor = Tensor::empty(device, shape, E::DTYPE)?;
        assert_eq!(tensor.len(), data.len(), "{} elements for a tensor of shape {shape:?}", data.len());
        match device.as_cuda() {
            Some(cuda) => cuda.context().upload(tensor.address(), data),
            None => tensor.as_mut_slice::<E>().copy_from_slice(data),
        }
        Ok(tensor)
    }

    /// Its own copy of another tensor's elements.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn copy(&self) -> Result<Tensor> {
        if let Some(cuda) = self.device.as_cuda() {
            let copy = Tensor::empty(&self.device, &self.shape, self.dtype)?;
            cuda.context().copy(copy.address(), self.address(), self.bytes());
            return Ok(copy);
        }
        with_dtype!(self.dtype, E => Tensor::from_slice::<E>(&self.device, &self.shape, self.as_slice::<E>()))
    }

    /// The elements in another type.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// For bf16 on a CPU, or f64 on a GPU.
    pub fn cast(&self, dtype: DType) -> Result<Tensor> {
        let mut out = Tensor::empty(&self.device, &self.shape, dtype)?;
        if self.device.as_cuda().is_some() {
            crate::ops::add::convert(out.view_mut(), self.view());
            return Ok(out);
        }
        with_dtype!(self.dtype, A => with_dtype!(dtype, B => {
            for (y, x) in out.as_mut_slice::<B>().iter_mut().zip(self.as_slice::<A>()) {
                *y = B::from_f64(x.to_f64());
            }
        }));
        Ok(out)
    }

    /// A copy on another device. To and from a GPU it waits for what is queued there.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn to(&self, device: &Device) -> Result<Tensor> {
        let copy = |bytes: &[u8]| -> Result<Tensor> {
            let mut tensor = Tensor::empty(device, &self.shape, self.dtype)?;
            match device.as_cuda() {
                Some(cuda) => cuda.context().upload(tensor.address(), bytes),
                None => with_dtype!(self.dtype, E => {
                    tensor.as_mut_slice::<E>().copy_from_slice(bytemuck::cast_slice(bytes));
                }),
            }
            Ok(tensor)
        };
        match self.device.as_cuda() {
            Some(cuda) => match self.dtype {
                DType::Bf16 if device.as_cuda().is_none() => self.cast(DType::F32)?.to(device),
                _ => {
                    // Eight bytes at a time, so that they are aligned for every type.
                    let mut bytes = vec![0u64; self.bytes().div_ceil(8)];
                    let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut bytes)[..self.bytes()];
                    cuda.context().download(bytes, self.address());
                    copy(bytes)
                }
            },
            None => with_dtype!(self.dtype, E => copy(bytemuck::cast_slice(self.as_slice::<E>()))),
        }
    }

    /// Address in the GPU's memory.
    ///
    /// # Panics
    /// When the tensor lies in main memory.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Number of elements.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the tensor lives.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The elements.
    ///
    /// # Panics
    /// When they are not `E`.
    pub fn as_slice<E: Element>(&self) -> &[E] {
        assert_eq!(self.dtype, E::DTYPE, "the tensor holds {:?}, not {:?}", self.dtype, E::DTYPE);
        self.buffer.slice(self.len())
    }

    /// The elements, to write.
    ///
    /// # Panics
    /// When they are not `E`, or when another handle to the tensor exists.
    pub fn as_mut_slice<E: Element>(&mut self) -> &mut [E] {
        assert_eq!(self.dtype, E::DTYPE, "the tensor holds {:?}, not {:?}", self.dtype, E::DTYPE);
        let len = self.len();
        match Arc::get_mut(&mut self.buffer) {
            Some(buffer) => buffer.slice_mut(len),
            None => panic!("writing to a tensor of shape {:?} that is shared", self.shape),
        }
    }

    /// The elements as f64, whatever their type and wherever they lie.
    ///
    /// # Panics
    /// When there is no memory for the copy of a GPU's elements.
    pub fn to_f64_vec(&self) -> Vec<f64> {
        if self.device.as_cuda().is_some() {
            return self.to(&self.device.cpu_beside()).expect("memory for a copy").to_f64_vec();
        }
        with_dtype!(self.dtype, E => self.as_slice::<E>().iter().map(|x| x.to_f64()).collect())
    }

    /// Sets every element to zero, in parallel on the current thread pool.
    ///
    /// # Panics
    /// When another handle to the tensor exists.
    pub fn fill_zero(&mut self) {
        if let Some(cuda) = self.device.as_cuda() {
            assert!(Arc::get_mut(&mut self.buffer).is_some(), "writing to a tensor of shape {:?} that is shared", self.shape);
            cuda.context().fill(self.buffer.address(), 0, self.bytes());
            return;
        }
        let len = self.len();
        with_dtype!(self.dtype, E => {
            par::for_row_blocks(MatMut::new(self.as_mut_slice::<E>(), len, 1), 1 << 18, |_, mut part| part.slice_mut().fill(E::ZERO));
        });
    }

    /// Sets the elements of `range` to zero.
    ///
    /// # Panics
    /// When they do not exist, or another handle to the tensor exists.
    pub fn fill_zero_range(&mut self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.len(), "elements {range:?} of {}", self.len());
        let size = self.dtype.size();
        match self.device.clone().as_cuda() {
            Some(cuda) => {
                let first = self.view_mut().as_view().address() + (range.start * size) as u64;
                cuda.context().fill(first, 0, range.len() * size);
            }
            None => with_dtype!(self.dtype, E => self.as_mut_slice::<E>()[range].fill(E::ZERO)),
        }
    }

    /// Copies the elements of `range` to those from `to` on.
    ///
    /// # Panics
    /// When they do not exist, another handle to the tensor exists or, on a GPU, the two ranges overlap and are not the same.
    pub fn copy_within(&mut self, range: Range<usize>, to: usize) {
        assert!(range.start <= range.end && range.end.max(to + range.len()) <= self.len(), "{range:?} to {to} of {}", self.len());
        let size = self.dtype.size();
        match self.device.clone().as_cuda() {
            Some(_) if to == range.start => {}
            Some(cuda) => {
                assert!(to.abs_diff(range.start) >= range.len(), "{range:?} to {to}: they overlap");
                let [from, to] = [range.start, to].map(|at| (at * size) as u64);
                let base = self.view_mut().as_view().address();
                cuda.context().copy(base + to, base + from, range.len() * size);
            }
            None => with_dtype!(self.dtype, E => self.as_mut_slice::<E>().copy_within(range, to)),
        }
    }

    /// Copies the elements of `range` of another tensor to those from `to` on.
    ///
    /// # Panics
    /// When they do not exist, type or device differ, or another handle to this tensor exists.
    pub fn copy_from(&mut self, to: usize, from: &Tensor, range: Range<usize>) {
        let fits = range.start <= range.end && range.end <= from.len() && to + range.len() <= self.len();
        assert!(fits && self.dtype == from.dtype, "{range:?} of {from:?} to {to} of {self:?}");
        let size = self.dtype.size();
        match self.device.clone().as_cuda() {
            Some(cuda) => {
                let [at, to] = [range.start, to].map(|at| (at * size) as u64);
                let base = self.view_mut().as_view().address();
                cuda.context().copy(base + to, from.address() + at, range.len() * size);
            }
            None => with_dtype!(self.dtype, E => {
                self.as_mut_slice::<E>()[to..][..range.len()].copy_from_slice(&from.as_slice::<E>()[range]);
            }),
        }
    }

    /// The first `rows` rows of slot `i` of a tensor `[slots, rows, ...]`, as a tensor of one slot.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Panics
    /// When they do not exist.
    pub(crate) fn slot(&self, i: usize, rows: usize) -> Result<Tensor> {
        let mut shape = self.shape.clone();
        let first = i * self.len() / shape[0];
        (shape[0], shape[1]) = (1, rows);
        let mut alone = Tensor::empty(&self.device, &shape, self.dtype)?;
        alone.copy_from(0, self, first..first + alone.len());
        Ok(alone)
    }

    /// As a matrix: all axes but the last are rows.
    pub fn view(&self) -> View<'_> {
        let [rows, cols] = self.matrix_shape();
        if self.device.as_cuda().is_some() {
            return View::on_gpu(self.address(), [rows, cols], self.dtype, &self.device);
        }
        with_dtype!(self.dtype, E => View::new(Mat::<E>::new(self.as_slice(), rows, cols), &self.device))
    }

    /// As a matrix, to write: all axes but the last are rows.
    ///
    /// # Panics
    /// When another handle to the tensor exists.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let [rows, cols] = self.matrix_shape();
        let len = rows * cols;
        let Some(buffer) = Arc::get_mut(&mut self.buffer) else {
            panic!("writing to a tensor of shape {:?} that is shared", self.shape);
        };
        if self.device.as_cuda().is_some() {
            return ViewMut::on_gpu(buffer.address(), [rows, cols], self.dtype, &self.device);
        }
        with_dtype!(self.dtype, E => ViewMut::new(MatMut::<E>::new(buffer.slice_mut(len), rows, cols), &self.device))
    }

    fn matrix_shape(&self) -> [usize; 2] {
        let cols = self.shape.last().copied().unwrap_or(1);
        [self.shape.iter().rev().skip(1).product(), cols]
    }

    /// The same elements in another shape.
    ///
    /// # Panics
    /// When the number of elements differs.
    pub fn reshape(mut self, shape: &[usize]) -> Tensor {
        let elements: usize = shape.iter().product();
        assert_eq!(self.len(), elements, "a tensor of shape {:?} has no shape {shape:?}", self.shape);
        self.shape = shape.to_vec();
        self
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({:?} {:?} on {:?})", self.dtype, self.shape, self.device)
    }
}
