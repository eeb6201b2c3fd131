//! A captured stretch of the stream, replayed with one call.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::{Context, Gpu, failed};
use super::library::check;
use crate::cuda_error::CudaError;
use crate::error::Result;

/// What [`Gpu::begin_capture`] to [`Gpu::end_capture`] enqueued. It names addresses, so the buffers it used must
/// outlive it.
#[derive(Debug)]
pub(crate) struct Graph {
    context: Arc<Context>,
    raw: sys::CUgraph,
    executable: sys::CUgraphExec,
}

impl Graph {
    /// Takes over `raw`, also when it fails.
    pub(super) fn new(context: &Arc<Context>, raw: sys::CUgraph) -> Result<Self, CudaError> {
        context.bind()?;
        let mut graph =
            Self { context: Arc::clone(context), raw, executable: std::ptr::null_mut() };
        // SAFETY: the graph was given by the driver and is destroyed with this value.
        let made = unsafe { result::graph::instantiate(raw, sys::CUgraphInstantiate_flags(0)) };
        graph.executable = check("cuGraphInstantiate", made)?;
        Ok(graph)
    }

    /// Enqueues it all.
    pub(crate) fn launch(&self, gpu: &Gpu) -> Result<()> {
        gpu.bind()?;
        // SAFETY: graph and stream live; the buffers it names are kept by the owner of the graph.
        let launched = unsafe { result::graph::launch(self.executable, gpu.stream()) };
        check("cuGraphLaunch", launched).map_err(failed("graph"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.bind().is_err() {
            return;
        }
        // SAFETY: both were made for this value and are destroyed once.
        unsafe {
            if !self.executable.is_null() {
                let _ = result::graph::exec_destroy(self.executable);
            }
            let _ = result::graph::destroy(self.raw);
        }
    }
}
