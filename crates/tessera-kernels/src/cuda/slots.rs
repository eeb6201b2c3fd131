//! Planned activation slots: one array of the device's memory each.

use super::device::Gpu;
use super::memory::DeviceBuffer;
use super::{DevicePtr, NAME};
use crate::act::{Act, ActKind, DType, SlotSpec};
use crate::error::{KernelError, Result};

/// All activation memory of a backend, indexed by slot id.
#[derive(Debug, Default)]
pub(super) struct Slots(Vec<Option<DeviceBuffer>>);

impl Slots {
    /// Allocates every slot at its largest size, zeroed.
    pub(super) fn plan(gpu: &Gpu, specs: &[SlotSpec]) -> Result<Self> {
        let len = specs.iter().map(|spec| spec.slot.0 as usize + 1).max().unwrap_or(0);
        let mut slots: Vec<Option<DeviceBuffer>> = (0..len).map(|_| None).collect();
        for spec in specs {
            let elements = spec.max_rows as usize * spec.cols as usize;
            let buffer = gpu.alloc(elements * spec.dtype.size_bytes())?;
            slots[spec.slot.0 as usize] = Some(buffer);
        }
        Ok(Self(slots))
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.iter().flatten().map(|buffer| buffer.bytes() as u64).sum()
    }

    /// Where `act` lies.
    pub(super) fn get(&self, act: Act) -> Result<DevicePtr> {
        let buffer = self.0.get(act.slot.0 as usize).and_then(Option::as_ref);
        let buffer = buffer.ok_or(KernelError::UnknownSlot(act.slot))?;
        let capacity = buffer.bytes() / act.dtype.size_bytes();
        if act.len() > capacity {
            return Err(KernelError::SlotTooSmall { act, capacity });
        }
        if act.kind != ActKind::Native {
            let what = format!("activations of kind {:?}", act.kind);
            return Err(KernelError::Unsupported { backend: NAME, what });
        }
        Ok(buffer.ptr())
    }

    /// Where input and output of an operation lie, which must be different slots.
    pub(super) fn pair(&self, input: Act, output: Act) -> Result<(DevicePtr, DevicePtr)> {
        if input.slot == output.slot {
            return Err(KernelError::SlotOverlap { input: input.slot, output: output.slot });
        }
        Ok((self.get(input)?, self.get(output)?))
    }
}

/// Checks the element type of an operand.
pub(super) fn expect_dtype(operation: &'static str, act: Act, dtype: DType) -> Result<()> {
    if act.dtype == dtype {
        return Ok(());
    }
    let (found, wanted) = (act.dtype.name(), dtype.name());
    let what = format!("{operation} of {found} activations where {wanted} is computed");
    Err(KernelError::Unsupported { backend: NAME, what })
}
