//! Products with weights by cuBLASLt: y `[M, N]` = x `[M, K]` · Wᵀ, W `[N, K]`, all row-major.
//!
//! To cuBLASLt, whose matrices are column-major, this is yᵀ = op(A) · B with A = Wᵀ `[K, N]` transposed and B = xᵀ
//! `[K, M]`. Sums run in f32; in f32 there is no TF32. One workspace of a fixed size serves all products, since they
//! follow each other on one stream; so a captured graph finds it again.
//!
//! An algorithm is chosen once for each (N, K, output type, bias) and number of rows rounded up to a power of two. In
//! deterministic mode one algorithm without a split of K serves every number of rows, so that the bits of a row do
//! not depend on how many others there are.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;

use cudarc::cublaslt::{result, sys};

use super::DevicePtr;
use super::device::Gpu;
use super::memory::DeviceBuffer;
use crate::act::DType;
use crate::cuda_error::CudaError;
use crate::error::{KernelError, Result};

/// What NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// `CUBLAS_OP_T`, which cudarc has only with cuBLAS.
const TRANSPOSED: i32 = 1;
/// Rows for which the one algorithm of deterministic mode is chosen: between decoding and prefill.
const DETERMINISTIC_ROWS: u32 = 128;

/// The operands of one product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    /// `[N, K]` of `dtype`.
    pub(super) weight: DevicePtr,
    /// `[N]` of `output`.
    pub(super) bias: Option<DevicePtr>,
    /// `[M, K]` of `dtype`.
    pub(super) x: DevicePtr,
    /// `[M, N]` of `output`.
    pub(super) y: DevicePtr,
    pub(super) rows: u32,
    pub(super) outputs: u32,
    pub(super) inputs: u32,
    pub(super) dtype: DType,
    pub(super) output: DType,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PlanKey {
    outputs: u32,
    inputs: u32,
    dtype: DType,
    output: DType,
    has_bias: bool,
    /// Rows that the algorithm was chosen for.
    rows: u32,
}

/// cuBLASLt as one rank uses it.
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuffer,
    is_deterministic: bool,
    /// At most one for each shape of a linear and power of two of rows.
    plans: HashMap<PlanKey, Plan>,
}

impl Gemm {
    /// # Errors
    /// What cuBLASLt reports; no memory for its workspace.
    pub(super) fn new(gpu: &Gpu, is_deterministic: bool) -> Result<Self> {
        let workspace = gpu.alloc(WORKSPACE_BYTES)?;
        let handle = result::create_handle().map_err(cublas_error("cublasLtCreate"))?;
        Ok(Self { handle, workspace, is_deterministic, plans: HashMap::new() })
    }

    /// Enqueues one product. Rows that are none are no work.
    ///
    /// # Errors
    /// A shape for which cuBLASLt has no algorithm; what it reports otherwise.
    pub(super) fn multiply(&mut self, gpu: &Gpu, product: &Product) -> Result<()> {
        if product.rows == 0 || product.outputs == 0 {
            return Ok(());
        }
        let key = self.key(product);
        if !self.plans.contains_key(&key) {
            let plan = Plan::new(self.handle, &key, self.is_deterministic)?;
            self.plans.insert(key, plan);
        }
        let plan = self.plans.get(&key).expect("a missing plan was just made");
        plan.set_rows(product.rows)?;
        if let Some(bias) = product.bias {
            plan.operation.set(
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                &bias,
            )?;
        }
        self.launch(gpu, plan, product)
    }

    fn key(&self, product: &Product) -> PlanKey {
        let rows = match self.is_deterministic {
            true => DETERMINISTIC_ROWS,
            false => product.rows.next_power_of_two(),
        };
        let Product { outputs, inputs, dtype, output, bias, .. } = *product;
        PlanKey { outputs, inputs, dtype, output, has_bias: bias.is_some(), rows }
    }

    fn launch(&self, gpu: &Gpu, plan: &Plan, product: &Product) -> Result<()> {
        let (one, zero) = (1.0f32, 0.0f32);
        let pointer = |address: DevicePtr| address as *mut c_void;
        gpu.bind()?;
        // SAFETY: handle, descriptor, layouts and algorithm are alive and belong together; the pointers are device
        // memory of the sizes that the layouts say, which the caller keeps until the stream has come past this
        // product; alpha and beta are host memory that is read before the call returns.
        let status = unsafe {
            result::matmul(
                self.handle,
                plan.operation.0,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&zero).cast(),
                pointer(product.weight),
                plan.weight.0,
                pointer(product.x),
                plan.x.0,
                pointer(product.y),
                plan.y.0,
                pointer(product.y),
                plan.y.0,
                &plan.algorithm,
                pointer(self.workspace.ptr()),
                self.workspace.bytes(),
                gpu.stream().cast(),
            )
        };
        status.map_err(cublas_error("cublasLtMatmul"))
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: the handle was made in `new` and is used no more. That it cannot be destroyed concerns no one.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// One algorithm with the descriptors it was chosen for.
struct Plan {
    operation: Operation,
    /// `[K, N]`
    weight: Layout,
    /// `[K, M]`
    x: Layout,
    /// `[N, M]`
    y: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, key: &PlanKey, is_deterministic: bool) -> Result<Self> {
        let operation = Operation::new(key.has_bias)?;
        let weight = Layout::new(key.dtype, key.inputs, key.outputs)?;
        let x = Layout::new(key.dtype, key.inputs, key.rows)?;
        let y = Layout::new(key.output, key.outputs, key.rows)?;
        let preference = Preference::new(is_deterministic)?;
        // SAFETY: all descriptors are alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                handle,
                operation.0,
                weight.0,
                x.0,
                y.0,
                y.0,
                preference.0,
            )
        };
        let found = found.map_err(cublas_error("cublasLtMatmulAlgoGetHeuristic"))?;
        Ok(Self { operation, weight, x, y, algorithm: found.algo })
    }

    /// Sets M of the product that comes next.
    fn set_rows(&self, rows: u32) -> Result<()> {
        self.x.set_cols(rows)?;
        self.y.set_cols(rows)
    }
}

struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    fn new(has_bias: bool) -> Result<Self> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let (compute, scale) =
            (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let created = result::create_matmul_desc(compute, scale);
        let operation = Self(created.map_err(cublas_error("cublasLtMatmulDescCreate"))?);
        operation.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        let epilogue = match has_bias {
            true => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            false => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
        };
        operation.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if has_bias {
            // The algorithm is asked for before a bias is at hand: any aligned address will do.
            let aligned: DevicePtr = 256;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &aligned)?;
        }
        Ok(operation)
    }

    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<()> {
        // SAFETY: the descriptor is alive, and the value has the size that is told.
        let set = unsafe {
            let value = ptr::from_ref(value).cast();
            result::set_matmul_desc_attribute(self.0, attribute, value, size_of::<T>())
        };
        set.map_err(cublas_error("cublasLtMatmulDescSetAttribute"))
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made in `new`, used no more.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// A dense column-major matrix.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: DType, rows: u32, cols: u32) -> Result<Self> {
        let dtype = match dtype {
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            DType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let created =
            result::create_matrix_layout(dtype, rows.into(), cols.into(), i64::from(rows));
        Ok(Self(created.map_err(cublas_error("cublasLtMatrixLayoutCreate"))?))
    }

    fn set_cols(&self, cols: u32) -> Result<()> {
        let attribute = sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS;
        let cols = u64::from(cols);
        // SAFETY: the layout is alive, and a number of columns is 64 bits.
        let set = unsafe {
            let value = ptr::from_ref(&cols).cast();
            result::set_matrix_layout_attribute(self.0, attribute, value, size_of::<u64>())
        };
        set.map_err(cublas_error("cublasLtMatrixLayoutSetAttribute"))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made in `new`, used no more.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(is_deterministic: bool) -> Result<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let created = result::create_matmul_pref();
        let preference = Self(created.map_err(cublas_error("cublasLtMatmulPreferenceCreate"))?);
        let bytes = WORKSPACE_BYTES as u64;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes)?;
        if is_deterministic {
            let none = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE;
            preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &none)?;
        }
        Ok(preference)
    }

    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<()> {
        // SAFETY: the preference is alive, and the value has the size that is told.
        let set = unsafe {
            let value = ptr::from_ref(value).cast();
            result::set_matmul_pref_attribute(self.0, attribute, value, size_of::<T>())
        };
        set.map_err(cublas_error("cublasLtMatmulPreferenceSetAttribute"))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made in `new`, used no more.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// Turns a status of cuBLASLt into an error that names the call.
fn cublas_error(call: &'static str) -> impl Fn(result::CublasError) -> KernelError {
    move |error| {
        let (name, code) = (format!("{:?}", error.0), error.0 as u32);
        KernelError::Cuda { operation: "gemm", source: CudaError::Call { call, name, code } }
    }
}
