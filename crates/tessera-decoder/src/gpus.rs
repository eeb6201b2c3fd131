//! How much KV cache the GPUs of this process's ranks hold.

use tessera_kernels::{CudaDevice, cuda};

use crate::error::DecoderError;

/// A GPU keeps this part of its memory free of KV cache: captured graphs, the libraries' own buffers, a second set of
/// the communicator's while one epoch follows another, an encoder beside.
const RESERVED_DIVISOR: u64 = 10;

/// What each rank may take for its KV cache once all of this process are loaded: the least over its GPUs, each of which
/// is shared by the ranks that it holds.
///
/// # Errors
/// A GPU no longer answers.
pub(crate) fn kv_room(device: CudaDevice, num_ranks: u32) -> Result<u64, DecoderError> {
    let ordinals: Vec<u32> = (0..num_ranks as usize).map(|rank| device.ordinal(rank)).collect();
    let mut least = u64::MAX;
    for ordinal in &ordinals {
        let memory =
            cuda::memory(*ordinal).map_err(|error| DecoderError::Model(Box::new(error)))?;
        let sharing = ordinals.iter().filter(|other| *other == ordinal).count();
        least = least.min(share(memory.0 as u64, memory.1 as u64, sharing as u64));
    }
    Ok(least)
}

fn share(free_bytes: u64, total_bytes: u64, num_ranks: u64) -> u64 {
    free_bytes.saturating_sub(total_bytes / RESERVED_DIVISOR) / num_ranks.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_what_is_free_beyond_the_reserve() {
        assert_eq!(share(100, 200, 1), 80);
        assert_eq!(share(100, 200, 2), 40);
        assert_eq!(share(10, 200, 1), 0);
    }
}
