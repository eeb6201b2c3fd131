//! How large the KV cache of this process's ranks is.

use std::path::Path;

use tessera_scheduler::SchedulerConfig;

use crate::error::DecoderError;

/// Without a setting, the ranks of one process take this part of the memory that is free once their weights
/// are in place: other processes of the machine do the same, and prompts, media and buffers need room too.
const FREE_MEMORY_DIVISOR: u64 = 4;

/// The KV cache of each rank of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KvMemory {
    /// Bytes of one block over all layers of the rank.
    pub block_bytes: u64,
    pub num_blocks: u32,
}

impl KvMemory {
    /// What a setting of `kv_cache_bytes` per rank gives, or without one (0) what the room of `room_bytes` per rank
    /// allows, but no more than all running sequences at full length could fill.
    ///
    /// # Errors
    /// Not even two blocks fit: one is the canary's.
    pub fn plan(
        kv_cache_bytes: u64,
        room_bytes: Option<u64>,
        block_bytes: u64,
        scheduler: &SchedulerConfig,
    ) -> Result<Self, DecoderError> {
        let block_bytes = block_bytes.max(1);
        let whole = u64::from(scheduler.max_blocks_per_sequence());
        let useful =
            u64::from(scheduler.max_running) * whole + u64::from(scheduler.reserved_blocks);
        let blocks = match (kv_cache_bytes, room_bytes) {
            (0, Some(room)) => useful.min(room / block_bytes),
            (0, None) => useful,
            (bytes, _) => bytes / block_bytes,
        };
        match u32::try_from(blocks).unwrap_or(u32::MAX) {
            0 | 1 => Err(DecoderError::Config {
                field: "decoder.kv_cache_bytes",
                reason: format!("must hold at least two blocks of {block_bytes} bytes"),
            }),
            num_blocks => Ok(Self { block_bytes, num_blocks }),
        }
    }

    /// Longest sequence that fits, beside the canary's block.
    pub fn longest_sequence(&self, scheduler: &SchedulerConfig) -> u32 {
        scheduler.max_model_len.min(self.num_tokens(scheduler))
    }

    fn num_tokens(&self, scheduler: &SchedulerConfig) -> u32 {
        (self.num_blocks - scheduler.reserved_blocks.min(self.num_blocks))
            .saturating_mul(scheduler.block_size)
    }

    /// Says what it holds.
    pub fn log(&self, scheduler: &SchedulerConfig) {
        let tokens = self.num_tokens(scheduler);
        tracing::info!(
            block_bytes = self.block_bytes,
            num_blocks = self.num_blocks,
            bytes_per_rank = self.block_bytes * u64::from(self.num_blocks),
            context_tokens = tokens,
            max_model_len = scheduler.max_model_len,
            sequences_at_max_model_len =
                f64::from(tokens) / f64::from(scheduler.max_model_len.max(1)),
            "KV cache"
        );
    }
}

/// What each of `num_ranks` ranks on the host may take; `None` where the system does not say what is free.
pub(crate) fn host_room(num_ranks: u32) -> Option<u64> {
    Some(free_bytes()? / FREE_MEMORY_DIVISOR / u64::from(num_ranks.max(1)))
}

/// Memory that can be had without swapping: the machine's, or what the control group leaves of its limit.
/// `None` where the system does not say.
fn free_bytes() -> Option<u64> {
    let machine = meminfo_available(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    let number = |name: &str| {
        let text = std::fs::read_to_string(Path::new("/sys/fs/cgroup").join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let group = match (number("memory.max"), number("memory.current")) {
        (Some(max), Some(current)) => max.saturating_sub(current),
        _ => u64::MAX,
    };
    Some(machine.min(group))
}

/// `MemAvailable` of `/proc/meminfo` in bytes (proc(5)).
fn meminfo_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheduler() -> SchedulerConfig {
        SchedulerConfig {
            block_size: 16,
            max_running: 4,
            max_model_len: 1000,
            reserved_blocks: 1,
            ..SchedulerConfig::default()
        }
    }

    #[test]
    fn a_setting_is_kept_and_without_one_the_room_is_taken() {
        let plan = |bytes, room| KvMemory::plan(bytes, room, 1 << 20, &scheduler());
        let num_blocks = |bytes, room| plan(bytes, room).map(|kv| kv.num_blocks).ok();
        assert_eq!(num_blocks(7 << 20, Some(1)), Some(7));
        assert_eq!(num_blocks(0, Some(100 << 20)), Some(100));
        // Four sequences of 63 blocks, and the canary's block.
        assert_eq!(num_blocks(0, Some(1 << 40)), Some(253));
        assert_eq!(num_blocks(0, None), Some(253));
        assert_eq!(num_blocks(1 << 20, None), None);
        assert_eq!(num_blocks(0, Some(1 << 20)), None);
        let small = plan(3 << 20, None).expect("three blocks");
        assert_eq!(small.longest_sequence(&scheduler()), 32);
    }

    #[test]
    fn the_kernel_is_understood() {
        let text = "MemTotal:       24000000 kB\nMemFree:  1 kB\nMemAvailable:   20000000 kB\n";
        assert_eq!(meminfo_available(text), Some(20_000_000 << 10));
        assert_eq!(meminfo_available("MemTotal: 5 kB\n"), None);
    }
}
