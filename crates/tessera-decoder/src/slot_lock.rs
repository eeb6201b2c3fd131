//! The lock of a slot on one host. While a process holds it no other instance of the slot runs there, so a
//! successor takes the slot without waiting for its predecessor's lease.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::time::Duration;

use crate::config::DecoderConfig;

/// How often a lock that is held is tried again.
const RETRY: Duration = Duration::from_millis(100);
/// Names a boot of this machine.
const BOOT_ID_FILE: &str = "/proc/sys/kernel/random/boot_id";

/// A lock held until it is dropped, or the process ends.
#[derive(Debug)]
pub(crate) struct SlotLock {
    /// The kernel frees the lock with the file.
    _file: File,
    host: String,
}

impl SlotLock {
    /// Takes the slot's lock in `config.state_dir`, waiting for a predecessor that is still there. `None`
    /// without a directory.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub(crate) async fn take(config: &DecoderConfig) -> io::Result<Option<Self>> {
        if config.state_dir.as_os_str().is_empty() {
            return Ok(None);
        }
        std::fs::create_dir_all(&config.state_dir)?;
        let name = format!("{}.{}.{}.lock", config.cluster.name, config.group, config.slot);
        let path = config.state_dir.join(name);
        let file = File::options().create(true).truncate(false).write(true).open(&path)?;
        let mut is_told = false;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {
                    if !std::mem::replace(&mut is_told, true) {
                        tracing::info!(path = %path.display(), "waiting for the slot's former process");
                    }
                    tokio::time::sleep(RETRY).await;
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Ok(Some(Self { _file: file, host: host_of(&config.state_dir)? }))
    }

    /// Names the host and directory whose lock this is: only instances with equal names exclude each other.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }
}

/// A boot of a machine and a directory on it.
fn host_of(directory: &Path) -> io::Result<String> {
    let boot = std::fs::read_to_string(BOOT_ID_FILE)?;
    let directory = directory.canonicalize()?;
    Ok(format!("{}:{}", boot.trim(), directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_slot_has_one_holder_and_slots_do_not_meet() {
        let directory = tempfile::tempdir().expect("a directory");
        let config =
            DecoderConfig { state_dir: directory.path().into(), ..DecoderConfig::default() };
        let held = SlotLock::take(&config).await.expect("usable").expect("a directory is set");
        let other_slot = DecoderConfig { slot: 1, ..config.clone() };
        let other = SlotLock::take(&other_slot).await.expect("usable").expect("another file");
        assert_eq!(held.host(), other.host());
        let second = tokio::spawn({
            let config = config.clone();
            async move { SlotLock::take(&config).await }
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished(), "two processes hold one slot");
        drop(held);
        assert!(second.await.expect("no panic").expect("usable").is_some());
    }

    #[tokio::test]
    async fn without_a_directory_there_is_no_lock() {
        assert!(SlotLock::take(&DecoderConfig::default()).await.expect("nothing to do").is_none());
    }
}
