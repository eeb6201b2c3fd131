//! What the figures were measured on.

use serde::Serialize;
use tessera_kernels::cpu::Path;

/// The machine and the build.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// As the operating system names it.
    pub cpu: String,
    pub cores: usize,
    pub memory_bytes: u64,
    /// Instructions that the `cpu` backend uses here.
    pub instructions: &'static str,
    pub version: &'static str,
    /// A development build: kernels are optimised, the rest less so.
    pub is_dev_build: bool,
}

impl Machine {
    /// Reads what the operating system tells.
    pub fn read() -> Self {
        let read = |file| std::fs::read_to_string(file).unwrap_or_default();
        let cpu = value_of(&read("/proc/cpuinfo"), "model name");
        let memory = value_of(&read("/proc/meminfo"), "MemTotal");
        let kib = memory.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok());
        Self {
            cpu: if cpu.is_empty() { std::env::consts::ARCH.to_owned() } else { cpu },
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib.unwrap_or(0) * 1024,
            instructions: Path::detect().name(),
            version: env!("CARGO_PKG_VERSION"),
            is_dev_build: cfg!(debug_assertions),
        }
    }

    /// On one line.
    pub fn describe(&self) -> String {
        format!(
            "{}, {} cores, {} GiB, {}; tessera {}{}",
            self.cpu,
            self.cores,
            self.memory_bytes >> 30,
            self.instructions,
            self.version,
            if self.is_dev_build { ", development build" } else { "" }
        )
    }
}

/// The first value of `key` in lines of `key : value`.
fn value_of(text: &str, key: &str) -> String {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    let found =
        pairs.map(|(name, value)| (name.trim(), value.trim())).find(|(name, _)| *name == key);
    found.map_or_else(String::new, |(_, value)| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_key() {
        let text = "processor\t: 0\nmodel name\t: Some CPU\nmodel name\t: Another\n";
        assert_eq!(value_of(text, "model name"), "Some CPU");
        assert_eq!(value_of(text, "MemTotal"), "");
    }
}
