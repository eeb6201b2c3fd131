//! Where tokens are drawn: on the device for a rank without peers, on the host for ranks that agree through a
//! communicator of the host.

use tessera_types::{SequenceSlot, TokenId};

use super::DevicePtr;
use super::device::Gpu;
use super::host_sampler::HostSampler;
use super::sampler::{DeviceSampler, Drawn};
use crate::error::{KernelError, Result};
use crate::inputs::{Readback, SamplerSequence, StepLimits};

/// The table of running sequences, wherever it lies.
#[derive(Debug)]
pub(super) enum Drawing {
    Host(HostSampler),
    Device(Box<DeviceSampler>),
}

/// What a submitted step drew.
#[derive(Debug)]
pub(super) enum StepDraws {
    Known(Readback),
    /// Known when the step is done.
    Pending(Drawn),
}

impl Drawing {
    /// An empty table for a rank of `world_size`.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn new(gpu: &Gpu, limits: &StepLimits, world_size: u32) -> Result<Self> {
        Ok(match world_size {
            1 => Self::Device(Box::new(DeviceSampler::new(gpu, limits)?)),
            _ => Self::Host(HostSampler::new(limits)),
        })
    }

    /// Forgets all sequences and draws, for a rank of `world_size` from here on.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn reset(&mut self, gpu: &Gpu, limits: &StepLimits, world_size: u32) -> Result<()> {
        match self {
            Self::Device(sampler) if world_size == 1 => sampler.clear(),
            _ => *self = Self::new(gpu, limits, world_size)?,
        }
        Ok(())
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Host(_) => 0,
            Self::Device(sampler) => sampler.bytes(),
        }
    }

    /// u32 per slot, its last token; nothing where the host tells tokens with the inputs.
    pub(super) fn last_sampled(&self) -> DevicePtr {
        match self {
            Self::Host(_) => 0,
            Self::Device(sampler) => sampler.last_sampled(),
        }
    }

    /// The last token of a slot, where the host knows it.
    pub(super) fn last_token(&self, slot: SequenceSlot) -> Option<TokenId> {
        match self {
            Self::Host(sampler) => sampler.last_token(slot),
            Self::Device(_) => None,
        }
    }

    pub(super) fn is_held(&self, slot: SequenceSlot) -> bool {
        match self {
            Self::Host(sampler) => sampler.last_token(slot).is_some(),
            Self::Device(sampler) => sampler.is_held(slot),
        }
    }

    pub(super) fn admit(&mut self, gpu: &Gpu, sequence: SamplerSequence<'_>) -> Result<()> {
        match self {
            Self::Host(sampler) => sampler.admit(sequence),
            Self::Device(sampler) => sampler.admit(gpu, &sequence),
        }
    }

    pub(super) fn release(&mut self, slot: SequenceSlot) {
        match self {
            Self::Host(sampler) => sampler.release(slot),
            Self::Device(sampler) => sampler.release(slot),
        }
    }

    /// Ends what was drawn for a step.
    ///
    /// # Errors
    /// What the device reports.
    pub(super) fn submit(&mut self, gpu: &Gpu) -> Result<StepDraws> {
        Ok(match self {
            Self::Host(sampler) => StepDraws::Known(sampler.take()),
            Self::Device(sampler) => StepDraws::Pending(sampler.submit(gpu)?),
        })
    }

    /// What a step drew that is done.
    ///
    /// # Errors
    /// A row from which nothing could be drawn; a step of another epoch.
    pub(super) fn read(&self, draws: StepDraws) -> Result<Readback> {
        match (self, draws) {
            (_, StepDraws::Known(readback)) => Ok(readback),
            (Self::Device(sampler), StepDraws::Pending(drawn)) => sampler.read(&drawn),
            (Self::Host(_), StepDraws::Pending(_)) => {
                let reason = "the step belongs to an epoch that has ended".to_owned();
                Err(KernelError::Input { field: "ticket", reason })
            }
        }
    }
}
