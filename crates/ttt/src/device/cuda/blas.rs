//! Matrix products through cuBLASLt.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::{result, sys};

use crate::device::cuda::context::Context;
use crate::device::cuda::libraries::libraries;
use crate::tensor::DType;
use crate::{Error, Result};

/// Bytes of scratch for the products.
pub(crate) const WORKSPACE: usize = 32 << 20;

/// A row-major matrix in the GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Operand {
    pub(crate) pointer: u64,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
    pub(crate) dtype: DType,
    /// Whether the product reads it transposed.
    pub(crate) transposed: bool,
}

impl Operand {
    fn shape(&self) -> [usize; 2] {
        if self.transposed { [self.cols, self.rows] } else { [self.rows, self.cols] }
    }

    /// Largest power of two up to 256 that divides its address.
    fn alignment(&self) -> u32 {
        1 << self.pointer.trailing_zeros().min(8)
    }
}

/// Everything about a product that the choice of its algorithm depends on.
type Key = ([Part; 3], Option<Part>);

/// Of an operand: rows, columns, stride, type, whether it is read transposed, alignment.
type Part = (usize, usize, usize, DType, bool, u32);

/// A product's descriptors and the algorithm that the library's heuristic prefers.
struct Planned {
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The library's handle, its scratch and the algorithms chosen so far: by shape, never by timing.
pub(crate) struct Blas {
    context: Arc<Context>,
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    planned: Mutex<HashMap<Key, Planned>>,
}

// SAFETY: the handle and the descriptors may be used from any thread; the plans are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// Version of the library that was found, as `13.1.0`.
pub fn version() -> Option<String> {
    libraries().cublaslt.as_ref()?;
    // SAFETY: the library is there (checked).
    let version = unsafe { sys::cublasLtGetVersion() };
    Some(format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100))
}

impl Blas {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Blas> {
        if libraries().cublaslt.is_none() {
            return Err(Error::Device(
                "cuBLASLt was not found; install it (`pip install nvidia-cublas`) or name its folder with TTT_CUDA_LIBS (`ttt \
                 doctor` shows where it was looked for)"
                    .into(),
            ));
        }
        context.bind();
        let handle = result::create_handle().map_err(|e| Error::Device(format!("cuBLASLt does not start: {e}")))?;
        let workspace = context.allocate(WORKSPACE);
        let workspace = workspace.ok_or_else(|| {
            let (free, total) = context.memory();
            Error::out_of_gpu_memory(WORKSPACE, 0, free, total)
        })?;
        Ok(Blas { context: context.clone(), handle, workspace, planned: Mutex::default() })
    }

    /// `y = a b`, or `y = c + a b`, where c may be y; sums in f32.
    ///
    /// # Panics
    /// When the shapes do not fit, or the library cannot multiply such matrices.
    pub(crate) fn product(&self, a: Operand, b: Operand, y: Operand, c: Option<Operand>) {
        let ([m, k], [k2, n]) = (a.shape(), b.shape());
        assert!(k == k2 && [m, n] == [y.rows, y.cols] && !y.transposed, "{:?} x {:?} into {:?}", a.shape(), b.shape(), y.shape());
        let fits = |c: Operand| c.shape() == y.shape() && c.dtype == y.dtype && !c.transposed;
        assert!(c.is_none_or(fits), "{c:?} is added to {y:?}");
        assert!(k > 0 || c == Some(y) || m * n == 0, "a product of {:?} and {:?}", a.shape(), b.shape());
        if m == 0 || n == 0 || k == 0 {
            return;
        }
        self.context.bind();
        let part = |x: &Operand| (x.rows, x.cols, x.stride, x.dtype, x.transposed, x.alignment());
        let key = ([part(&a), part(&b), part(&y)], c.as_ref().map(part));
        let mut planned = self.planned.lock().expect("cuBLASLt plans");
        let plan = planned.entry(key).or_insert_with(|| {
            self.plan(a, b, y, c.unwrap_or(y))
                .unwrap_or_else(|e| panic!("cuBLASLt has no product of {a:?} and {b:?} into {y:?}: {e}"))
        });
        let (alpha, beta) = (1.0f32, if c.is_some() { 1.0f32 } else { 0.0 });
        let pointer = |x: &Operand| x.pointer as *const c_void;
        // The library is column-major: yᵀ = bᵀ aᵀ.
        // SAFETY: descriptors are those of these shapes, which lie inside borrowed matrices; alpha and beta are read at once.
        let status = unsafe {
            result::matmul(
                self.handle,
                plan.description,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointer(&b),
                plan.layouts[1],
                pointer(&a),
                plan.layouts[0],
                pointer(&c.unwrap_or(y)),
                plan.layouts[3],
                y.pointer as *mut c_void,
                plan.layouts[2],
                &plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                self.context.stream().cast(),
            )
        };
        status.unwrap_or_else(|e| panic!("cuBLASLt cannot multiply {a:?} and {b:?} into {y:?}: {e}"));
    }

    fn plan(&self, a: Operand, b: Operand, y: Operand, c: Operand) -> std::result::Result<Planned, result::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let kind = |dtype: DType| match dtype {
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            DType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            DType::F64 => panic!("products on a GPU are of f32 or bf16, not f64"),
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let description = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)?;
        let layout = |x: &Operand| result::create_matrix_layout(kind(x.dtype), x.cols as u64, x.rows as u64, x.stride as i64);
        let layouts = [layout(&a)?, layout(&b)?, layout(&y)?, layout(&c)?];
        let preference = result::create_matmul_pref()?;
        let size = size_of::<u32>();
        // SAFETY: the descriptors were just made; every attribute is a u32 (an operation, an alignment) or a size.
        unsafe {
            for (attribute, x) in [(D::CUBLASLT_MATMUL_DESC_TRANSA, &b), (D::CUBLASLT_MATMUL_DESC_TRANSB, &a)] {
                let operation = u32::from(x.transposed);
                result::set_matmul_desc_attribute(description, attribute, std::ptr::from_ref(&operation).cast(), size)?;
            }
            let bytes = WORKSPACE;
            let attribute = P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(preference, attribute, std::ptr::from_ref(&bytes).cast(), size_of::<usize>())?;
            let alignments = [
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b.alignment()),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a.alignment()),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c.alignment()),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, y.alignment()),
            ];
            for (attribute, alignment) in alignments {
                result::set_matmul_pref_attribute(preference, attribute, std::ptr::from_ref(&alignment).cast(), size)?;
            }
            let [a, b, y, c] = layouts;
            let chosen = result::get_matmul_algo_heuristic(self.handle, description, b, a, c, y, preference);
            result::destroy_matmul_pref(preference)?;
            Ok(Planned { description, layouts, algorithm: chosen?.algo })
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.context.free(self.workspace);
        // SAFETY: nobody uses the handle and the descriptors any more.
        unsafe {
            for plan in self.planned.get_mut().expect("cuBLASLt plans").values() {
                let _ = result::destroy_matmul_desc(plan.description);
                for layout in plan.layouts {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
            let _ = result::destroy_handle(self.handle);
        }
    }
}
