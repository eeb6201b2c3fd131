//! Planned activation slots: one f32 buffer each.

use crate::act::{Act, ActKind, SlotId, SlotSpec};
use crate::error::{KernelError, Result};

/// All activation memory of a backend.
#[derive(Debug)]
pub(crate) struct Slots {
    /// Name of the backend, for errors.
    backend: &'static str,
    /// Indexed by slot id.
    buffers: Vec<Option<Vec<f32>>>,
}

impl Slots {
    /// No slots yet.
    pub(crate) fn new(backend: &'static str) -> Self {
        Self { backend, buffers: Vec::new() }
    }

    /// Allocates every slot at its largest size, zeroed.
    pub(crate) fn plan(backend: &'static str, specs: &[SlotSpec]) -> Self {
        let mut slots = Self::new(backend);
        for spec in specs {
            let index = spec.slot.0 as usize;
            if slots.buffers.len() <= index {
                slots.buffers.resize(index + 1, None);
            }
            slots.buffers[index] = Some(vec![0.0; spec.max_rows as usize * spec.cols as usize]);
        }
        slots
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.buffers.iter().flatten().map(|buffer| size_of_val(buffer.as_slice()) as u64).sum()
    }

    /// The elements of `act`, for reading.
    pub(crate) fn get(&self, act: Act) -> Result<&[f32]> {
        let buffer = self.buffers.get(act.slot.0 as usize).and_then(Option::as_ref);
        let buffer = buffer.ok_or(KernelError::UnknownSlot(act.slot))?;
        check(self.backend, act, buffer.len())?;
        Ok(&buffer[..act.len()])
    }

    /// The elements of `act`, for writing.
    pub(crate) fn get_mut(&mut self, act: Act) -> Result<&mut [f32]> {
        let buffer = self.buffers.get_mut(act.slot.0 as usize).and_then(Option::as_mut);
        let buffer = buffer.ok_or(KernelError::UnknownSlot(act.slot))?;
        check(self.backend, act, buffer.len())?;
        Ok(&mut buffer[..act.len()])
    }

    /// Input and output of an operation, which must be different slots.
    pub(crate) fn pair(&mut self, input: Act, output: Act) -> Result<(&[f32], &mut [f32])> {
        let (input, output) = self.pair_mut(input, output)?;
        Ok((input, output))
    }

    /// Two outputs of an operation, which must be different slots.
    pub(crate) fn pair_mut(&mut self, input: Act, output: Act) -> Result<(&mut [f32], &mut [f32])> {
        let unknown = |slot: SlotId| KernelError::UnknownSlot(slot);
        let (i, o) = (input.slot.0 as usize, output.slot.0 as usize);
        let pair = self.buffers.get_disjoint_mut([i, o]);
        let [x, y] =
            pair.map_err(|_| KernelError::SlotOverlap { input: input.slot, output: output.slot })?;
        let x = x.as_mut().ok_or_else(|| unknown(input.slot))?;
        let y = y.as_mut().ok_or_else(|| unknown(output.slot))?;
        check(self.backend, input, x.len())?;
        check(self.backend, output, y.len())?;
        Ok((&mut x[..input.len()], &mut y[..output.len()]))
    }
}

fn check(backend: &'static str, act: Act, capacity: usize) -> Result<()> {
    if act.len() > capacity {
        return Err(KernelError::SlotTooSmall { act, capacity });
    }
    if act.kind != ActKind::Native {
        let what = format!("activations of kind {:?}", act.kind);
        return Err(KernelError::Unsupported { backend, what });
    }
    Ok(())
}
