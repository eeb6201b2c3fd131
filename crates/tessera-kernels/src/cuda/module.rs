//! The kernels, embedded in the program as one image per source file, and how one is launched.
//!
//! The build script compiles `cuda/*.cu` for sm_90a and, as PTX that the driver translates for other GPUs, for
//! compute capability 8.0; it also keeps what the assembler said of registers.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::{Context, DevicePtr, Gpu, failed};
use super::library::check;
use crate::cuda_check::{KernelFile, KernelResources};
use crate::cuda_error::CudaError;
use crate::error::Result;

/// The driver reads words out of images.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

// `FILES`: every source file; `IMAGES`: what each was compiled to, in the same order.
include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));

/// The kernels that this program carries, by source file.
pub fn kernels() -> &'static [KernelFile] {
    FILES
}

/// All kernels, loaded into one context.
#[derive(Debug)]
pub(super) struct Modules {
    context: Arc<Context>,
    raw: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, sys::CUfunction>,
}

impl Modules {
    /// Loads every kernel and lets each use as much shared memory as the GPU has.
    pub(super) fn load(context: &Arc<Context>, shared_bytes: u32) -> Result<Self, CudaError> {
        context.bind()?;
        let mut modules =
            Self { context: Arc::clone(context), raw: Vec::new(), functions: HashMap::new() };
        for (file, image) in FILES.iter().zip(IMAGES) {
            // SAFETY: a complete image, made by the compiler when this program was built.
            let raw = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
            let raw = check("cuModuleLoadData", raw)?;
            modules.raw.push(raw);
            for kernel in file.kernels {
                let function = find(raw, kernel, shared_bytes)?;
                let before = modules.functions.insert(kernel.name, function);
                assert!(before.is_none(), "two kernels are called {}", kernel.name);
            }
        }
        Ok(modules)
    }

    pub(super) fn function(&self, name: &str) -> sys::CUfunction {
        match self.functions.get(name) {
            Some(function) => *function,
            None => panic!("there is no kernel {name}"),
        }
    }
}

fn find(
    module: sys::CUmodule,
    kernel: &KernelResources,
    shared_bytes: u32,
) -> Result<sys::CUfunction, CudaError> {
    let name = CString::new(kernel.name).expect("a kernel's name is an identifier");
    // SAFETY: the module was just loaded.
    let function =
        check("cuModuleGetFunction", unsafe { result::module::get_function(module, name) })?;
    let dynamic = shared_bytes.saturating_sub(kernel.shared_bytes);
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function was just found.
    let set = unsafe {
        result::function::set_function_attribute(function, attribute, dynamic.cast_signed())
    };
    check("cuFuncSetAttribute", set)?;
    Ok(function)
}

impl Drop for Modules {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            for module in &self.raw {
                // SAFETY: loaded for this value and unloaded once.
                let _ = unsafe { result::module::unload(*module) };
            }
        }
    }
}

/// Most parameters that a kernel has.
const MAX_ARGUMENTS: usize = 32;

/// A launch in the making. Arguments are given in the order of the kernel's parameters and with their types: the
/// driver cannot check either.
#[must_use = "a launch happens at go()"]
pub(crate) struct Launch<'a> {
    gpu: &'a Gpu,
    name: &'static str,
    function: sys::CUfunction,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    /// Each in its lowest bytes. Those beyond `count` are 0, so that a kernel with more parameters than were given
    /// reads zeros and nothing of ours.
    arguments: [u64; MAX_ARGUMENTS],
    count: usize,
}

impl<'a> Launch<'a> {
    pub(super) fn new(gpu: &'a Gpu, name: &'static str, function: sys::CUfunction) -> Self {
        let (grid, block) = ([1; 3], [1; 3]);
        let arguments = [0; MAX_ARGUMENTS];
        Self { gpu, name, function, grid, block, shared_bytes: 0, arguments, count: 0 }
    }

    /// Blocks along x, y and z.
    pub(crate) fn grid(mut self, grid: [u32; 3]) -> Self {
        self.grid = grid;
        self
    }

    /// Threads of a block along x, y and z.
    pub(crate) fn block(mut self, block: [u32; 3]) -> Self {
        self.block = block;
        self
    }

    /// Shared memory per block, beside what the kernel declares.
    pub(crate) fn shared(mut self, bytes: u32) -> Self {
        self.shared_bytes = bytes;
        self
    }

    pub(crate) fn ptr(self, value: DevicePtr) -> Self {
        self.argument(value)
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        self.argument(value)
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.argument(u64::from(value))
    }

    pub(crate) fn f32(self, value: f32) -> Self {
        self.argument(u64::from(value.to_bits()))
    }

    fn argument(mut self, bits: u64) -> Self {
        assert!(self.count < MAX_ARGUMENTS, "{} has at most {MAX_ARGUMENTS} parameters", self.name);
        self.arguments[self.count] = bits;
        self.count += 1;
        self
    }

    /// Enqueues it. A grid without blocks is no work and enqueues nothing.
    ///
    /// # Errors
    /// The driver refuses the shape, or something that was enqueued before failed.
    pub(crate) fn go(mut self) -> Result<()> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        self.gpu.bind()?;
        let mut pointers = [std::ptr::null_mut::<c_void>(); MAX_ARGUMENTS];
        for (pointer, argument) in pointers.iter_mut().zip(&mut self.arguments) {
            *pointer = std::ptr::from_mut(argument).cast();
        }
        let ([gx, gy, gz], [bx, by, bz]) = (self.grid, self.block);
        // SAFETY: the function was loaded into this GPU's context and the stream lives. There is a valid pointer for
        // every parameter; addresses behind them are the device's to check.
        let launched = unsafe {
            result::launch_kernel(
                self.function,
                (gx, gy, gz),
                (bx, by, bz),
                self.shared_bytes,
                self.gpu.stream(),
                &mut pointers,
            )
        };
        check("cuLaunchKernel", launched).map_err(failed(self.name))
    }
}
