//! Places in the stream that the host can wait for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{DriverError, result, sys};

use super::device::{Context, failed};
use super::library::check;
use crate::cuda_error::CudaError;
use crate::error::{KernelError, Result};

/// How long a wait spins before it sleeps between looks; a decode step takes milliseconds.
const SPIN: Duration = Duration::from_micros(20);
const SLEEP: Duration = Duration::from_micros(20);

/// A place in the stream: done when everything enqueued before it is done.
#[derive(Debug)]
pub(crate) struct Event {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: handles of the driver may be used from any thread once the context is bound there.
unsafe impl Send for Event {}

impl Event {
    pub(super) fn record(context: &Arc<Context>, stream: sys::CUstream) -> Result<Self, CudaError> {
        context.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let raw = check("cuEventCreate", result::event::create(flags))?;
        let event = Self { context: Arc::clone(context), raw };
        // SAFETY: event and stream are of this context and live.
        check("cuEventRecord", unsafe { result::event::record(raw, stream) })?;
        Ok(event)
    }

    /// Whether all before it is done.
    ///
    /// # Errors
    /// Something that was enqueued before failed.
    pub(crate) fn is_done(&self) -> Result<bool> {
        self.context.bind().map_err(failed("wait"))?;
        // SAFETY: the event lives as long as this value.
        match unsafe { result::event::query(self.raw) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(failed("wait")(
                check::<()>("cuEventQuery", Err(error)).expect_err("an error stays one"),
            )),
        }
    }

    /// Waits until it is done. It looks again and again: a wait inside the driver has no deadline.
    ///
    /// # Errors
    /// Something that was enqueued before failed; [`KernelError::DeadlineExceeded`].
    pub(crate) fn wait(&self, deadline: Instant) -> Result<()> {
        let begin = Instant::now();
        while !self.is_done()? {
            let now = Instant::now();
            if now >= deadline {
                return Err(KernelError::DeadlineExceeded);
            }
            match now - begin < SPIN {
                true => std::hint::spin_loop(),
                false => std::thread::sleep(SLEEP),
            }
        }
        Ok(())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: created in `record` and destroyed once.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}
