//! Settings of one process of a decoder group.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tessera_cluster::{DrainConfig, FormationConfig, StreamConfig};
use tessera_engine::PlantedFaults;
use tessera_kernels::{Device, UnknownDevice};
use tessera_membership::ClusterAddress;
use tessera_model::ModelSource;
use tessera_telemetry::AdminConfig;

use crate::error::DecoderError;

/// What a decoder process needs to know. Times are in milliseconds, sizes in bytes unless the name says
/// otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecoderConfig {
    /// gRPC address; port 0 takes any free one.
    pub listen: SocketAddr,
    /// host:port under which routers and the group's other processes reach this one; default: the bound
    /// address.
    pub advertise: Option<String>,
    pub admin: AdminConfig,
    /// Name of the group.
    pub group: String,
    /// Which contiguous run of ranks this process holds; slot 0 leads.
    pub slot: u32,
    /// Tensor-parallel degree of the group.
    pub tp: u32,
    /// Ranks in each process of the group.
    pub ranks_per_process: u32,
    /// What computes: `reference` (f32, slow), `cpu` (SIMD, BF16 weights), `cpu-f32`, `cuda` (NVIDIA GPUs, BF16) or `cuda-f32`.
    /// The ranks of a process take GPUs in order, or those that are listed: `cuda:2,3`.
    pub device: String,
    /// Threads of each rank on a CPU device; 0: the cores divided by the ranks of this process.
    pub threads: usize,
    /// On GPUs: a sequence gets the same bits in every batch, at some cost in speed. CPU devices always give them.
    pub deterministic: bool,
    /// Directory of the slot's lock, shared by successive processes of a slot on one host. Holding it, a
    /// new process takes its predecessor's place without waiting for the lease to expire. Empty: no lock.
    pub state_dir: PathBuf,
    /// Tokens per KV block.
    pub block_size: u32,
    /// Memory for the KV cache of each rank. 0: of what is free once the weights are loaded, a quarter of the host's over the
    /// ranks of the process, or of a GPU all but a tenth of its memory; and no more than `max_sequences` of
    /// `max_model_len` can fill.
    pub kv_cache_bytes: u64,
    /// Prompt plus output of one sequence, in tokens; 0: the checkpoint's context.
    pub max_model_len: u32,
    /// Sequences in one step.
    pub max_sequences: u32,
    /// Sequences that may wait; one more is refused.
    pub max_waiting: u32,
    /// Of these, sequences of one tenant (of all requests that name none); one more is refused, whether or not others wait:
    /// who comes second must find room. 0: three quarters of `max_waiting`. Where nobody names tenants, set
    /// it to `max_waiting`.
    pub max_waiting_per_tenant: u32,
    /// Most tokens computed in one step; buffers are sized for it.
    pub max_tokens_per_step: u32,
    /// Longest that a step of prefill may take, which is how long running sequences wait beside it: before
    /// the first request a warm-up measures steps and lowers the tokens per step to meet it. 0: no limit.
    pub step_time_target_ms: u32,
    /// Steps in flight: 2 overlaps scheduling with computing, 1 does not.
    pub pipeline_depth: u32,
    /// Embeddings held by rank 0, those under way included.
    pub max_embedding_bytes: u64,
    /// Longest pull of one embedding; then it is asked for again.
    pub fetch_timeout_ms: u32,
    /// Pulls of one item before its request fails.
    pub max_fetches: u32,
    /// Lease of the member record.
    pub lease_ttl_seconds: u32,
    /// Address by which ranks of other processes reach this process's; default: that of `listen`, or what
    /// `advertise` resolves to where `listen` names no interface.
    pub collective_ip: Option<IpAddr>,
    /// A member of the group that says nothing for this long is frozen.
    pub silence_timeout_ms: u32,
    /// Ranks that make no progress for this long although they have work are stuck, unless a layer takes
    /// an eighth of it.
    pub stuck_timeout_ms: u32,
    /// From joining an epoch until it serves.
    pub forming_timeout_ms: u32,
    /// Longest that ranks may take to leave an epoch; past it the process ends.
    pub leave_timeout_ms: u32,
    /// An idle leader runs the canary this often.
    pub canary_interval_ms: u32,
    /// At shutdown, time until this process is gone; what still runs a little before is given up for
    /// other groups to go on with.
    pub drain_ms: u32,
    /// Where the cluster's records are. Shared by all roles; the binary fills it in.
    #[serde(skip)]
    pub cluster: ClusterAddress,
    /// What is served. Shared by all roles; the binary fills it in.
    #[serde(skip)]
    pub model: ModelSource,
    /// Bugs that tests plant. Not a setting.
    #[serde(skip)]
    pub planted: PlantedFaults,
}

impl Default for DecoderConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            admin: AdminConfig::default(),
            group: "g0".into(),
            slot: 0,
            tp: 1,
            ranks_per_process: 1,
            device: Device::default().to_string(),
            threads: 0,
            deterministic: false,
            state_dir: PathBuf::new(),
            block_size: 16,
            kv_cache_bytes: 0,
            max_model_len: 0,
            max_sequences: 32,
            max_waiting: 256,
            max_waiting_per_tenant: 0,
            max_tokens_per_step: 512,
            step_time_target_ms: 1500,
            pipeline_depth: 2,
            max_embedding_bytes: 1 << 30,
            fetch_timeout_ms: 10_000,
            max_fetches: 3,
            lease_ttl_seconds: 10,
            collective_ip: None,
            silence_timeout_ms: 3_000,
            stuck_timeout_ms: 3_000,
            forming_timeout_ms: 60_000,
            leave_timeout_ms: 5_000,
            canary_interval_ms: 2_000,
            drain_ms: 8_000,
            cluster: ClusterAddress::default(),
            model: ModelSource::default(),
            planted: PlantedFaults::default(),
        }
    }
}

impl DecoderConfig {
    /// Processes in the group.
    pub fn num_slots(&self) -> u32 {
        self.tp / self.ranks_per_process.max(1)
    }

    /// What computes.
    ///
    /// # Errors
    /// A name that is no device.
    pub fn parse_device(&self) -> Result<Device, DecoderError> {
        self.device.parse().map_err(|error: UnknownDevice| DecoderError::Config {
            field: "decoder.device",
            reason: error.to_string(),
        })
    }

    /// First rank of this process.
    pub fn first_rank(&self) -> u32 {
        self.slot * self.ranks_per_process
    }

    /// Timing of the plan streams.
    pub fn stream(&self) -> StreamConfig {
        StreamConfig {
            silence_timeout: Duration::from_millis(self.silence_timeout_ms.into()),
            stuck_timeout: Duration::from_millis(self.stuck_timeout_ms.into()),
            ..StreamConfig::default()
        }
    }

    /// Timing of formation.
    pub fn formation(&self) -> FormationConfig {
        FormationConfig {
            forming_timeout: Duration::from_millis(self.forming_timeout_ms.into()),
            ..FormationConfig::default()
        }
    }

    /// Timing of a drain.
    pub fn drain(&self) -> DrainConfig {
        DrainConfig { grace: Duration::from_millis(self.drain_ms.into()), ..DrainConfig::default() }
    }

    /// Refuses settings that contradict each other.
    ///
    /// # Errors
    /// Names the field.
    pub fn validate(&self) -> Result<(), DecoderError> {
        let check = |holds: bool, field: &'static str, reason: &str| match holds {
            true => Ok(()),
            false => Err(DecoderError::Config { field, reason: reason.into() }),
        };
        check(self.tp >= 1, "decoder.tp", "must be at least 1")?;
        let divides = self.ranks_per_process >= 1 && self.tp.is_multiple_of(self.ranks_per_process);
        check(divides, "decoder.ranks_per_process", "must divide decoder.tp")?;
        check(
            self.slot < self.num_slots(),
            "decoder.slot",
            "must be below tp / ranks_per_process",
        )?;
        let listed = match self.parse_device()? {
            Device::Cuda(device) => device.listed().len(),
            Device::Reference | Device::Cpu(_) => 0,
        };
        check(
            listed == 0 || listed == self.ranks_per_process as usize,
            "decoder.device",
            "must list one GPU for each of decoder.ranks_per_process",
        )?;
        check(self.block_size >= 1, "decoder.block_size", "must be at least 1")?;
        check(self.max_sequences >= 1, "decoder.max_sequences", "must be at least 1")?;
        check(self.max_tokens_per_step >= 1, "decoder.max_tokens_per_step", "must be at least 1")?;
        let depth = (1..=2).contains(&self.pipeline_depth);
        check(depth, "decoder.pipeline_depth", "must be 1 or 2")?;
        check(self.max_embedding_bytes >= 1, "decoder.max_embedding_bytes", "must be at least 1")?;
        check(self.fetch_timeout_ms >= 1, "decoder.fetch_timeout_ms", "must be at least 1")?;
        check(self.max_fetches >= 1, "decoder.max_fetches", "must be at least 1")?;
        check(self.lease_ttl_seconds >= 1, "decoder.lease_ttl_seconds", "must be at least 1")?;
        check(self.leave_timeout_ms >= 1, "decoder.leave_timeout_ms", "must be at least 1")?;
        check(self.canary_interval_ms >= 1, "decoder.canary_interval_ms", "must be at least 1")?;
        check(self.drain_ms >= 1, "decoder.drain_ms", "must be at least 1")?;
        self.stream().validate()?;
        Ok(self.formation().validate()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradictions_are_refused_by_name() {
        assert!(DecoderConfig::default().validate().is_ok());
        type Edit = fn(&mut DecoderConfig);
        let cases: [(&str, Edit); 5] = [
            ("decoder.tp", |c| c.tp = 0),
            ("decoder.ranks_per_process", |c| (c.tp, c.ranks_per_process) = (4, 3)),
            ("decoder.slot", |c| (c.tp, c.slot) = (2, 2)),
            ("decoder.pipeline_depth", |c| c.pipeline_depth = 3),
            ("decoder.device", |c| c.device = "cuda:0,1".into()),
        ];
        for (field, edit) in cases {
            let mut config = DecoderConfig::default();
            edit(&mut config);
            let error = config.validate().expect_err(field);
            assert!(error.to_string().starts_with(field), "{error}");
        }
    }
}
