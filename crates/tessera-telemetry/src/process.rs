//! Size of this process, read when metrics are asked for: resident memory and open file descriptors.

use std::fs;

use prometheus::IntGauge;

/// The two gauges, under the names that Prometheus clients of all languages use.
pub(crate) struct ProcessGauges {
    resident: IntGauge,
    open_fds: IntGauge,
}

impl ProcessGauges {
    pub(crate) fn register(registry: &prometheus::Registry) -> Result<Self, prometheus::Error> {
        let resident =
            IntGauge::new("process_resident_memory_bytes", "Resident memory size in bytes.")?;
        let open_fds = IntGauge::new("process_open_fds", "Number of open file descriptors.")?;
        registry.register(Box::new(resident.clone()))?;
        registry.register(Box::new(open_fds.clone()))?;
        Ok(Self { resident, open_fds })
    }

    /// Reads `/proc`; where there is none the gauges stay 0.
    pub(crate) fn refresh(&self) {
        if let Ok(status) = fs::read_to_string("/proc/self/status") {
            self.resident.set(resident_bytes(&status).unwrap_or(0));
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            self.open_fds.set(entries.count() as i64);
        }
    }
}

fn resident_bytes(status: &str) -> Option<i64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read_in_bytes() {
        assert_eq!(resident_bytes("VmPeak:\t  99 kB\nVmRSS:\t  12 kB\n"), Some(12 * 1024));
        assert_eq!(resident_bytes("VmPeak:\t 1 kB\n"), None);
    }
}
