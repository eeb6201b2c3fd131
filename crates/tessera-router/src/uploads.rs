//! Uploaded media, kept by content hash for later requests. Bounded in bytes and time: a full store
//! refuses new uploads instead of forgetting what was promised.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tessera_types::MediaId;
use tokio::time::Instant;

use crate::config::UploadConfig;
use crate::error::RequestError;

/// The store. Clones share it.
#[derive(Debug, Clone)]
pub struct Uploads {
    inner: Arc<Mutex<Inner>>,
    max_bytes: u64,
    ttl: Duration,
}

#[derive(Debug, Default)]
struct Inner {
    items: HashMap<MediaId, Item>,
    /// Bytes of all items and of uploads in progress.
    bytes: u64,
}

#[derive(Debug)]
struct Item {
    bytes: Bytes,
    expires: Instant,
}

/// Room for an upload in progress; given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    uploads: Uploads,
    bytes: u64,
}

impl Uploads {
    /// An empty store.
    pub fn new(config: &UploadConfig) -> Self {
        Self {
            inner: Arc::default(),
            max_bytes: config.max_bytes,
            ttl: Duration::from_millis(config.ttl_ms),
        }
    }

    /// Starts an upload.
    pub fn reserve(&self) -> Reservation {
        Reservation { uploads: self.clone(), bytes: 0 }
    }

    /// The item's bytes; its time starts anew.
    pub fn get(&self, id: MediaId, now: Instant) -> Option<Bytes> {
        let mut inner = self.lock();
        inner.expire(now);
        let item = inner.items.get_mut(&id)?;
        item.expires = now + self.ttl;
        Some(item.bytes.clone())
    }

    /// Bytes in use.
    pub fn bytes(&self) -> u64 {
        self.lock().bytes
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn expire(&mut self, now: Instant) {
        let bytes = &mut self.bytes;
        self.items.retain(|_, item| {
            let alive = item.expires > now;
            if !alive {
                *bytes -= item.bytes.len() as u64;
            }
            alive
        });
    }

    /// Time until the first item leaves.
    fn next_room(&self, now: Instant) -> Option<Duration> {
        let first = self.items.values().map(|item| item.expires).min()?;
        Some(first.saturating_duration_since(now))
    }
}

impl Reservation {
    /// Takes room for `more` bytes before they are read.
    ///
    /// # Errors
    /// [`RequestError::Overloaded`], with the time until the first item expires as the hint.
    pub fn grow(&mut self, more: usize, now: Instant) -> Result<(), RequestError> {
        let mut inner = self.uploads.lock();
        inner.expire(now);
        let bytes = inner.bytes + more as u64;
        if bytes > self.uploads.max_bytes {
            return Err(RequestError::Overloaded {
                what: "bytes of uploaded media",
                limit: self.uploads.max_bytes,
                retry_after: inner.next_room(now).unwrap_or(self.uploads.ttl),
            });
        }
        inner.bytes = bytes;
        self.bytes += more as u64;
        Ok(())
    }

    /// Keeps the uploaded item, for which exactly its length was reserved.
    pub fn keep(mut self, id: MediaId, bytes: Bytes, now: Instant) {
        debug_assert_eq!(self.bytes, bytes.len() as u64);
        let expires = now + self.uploads.ttl;
        let mut inner = self.uploads.lock();
        match inner.items.get_mut(&id) {
            // The same bytes again: only the time is new, and the reservation goes back on drop.
            Some(item) => item.expires = expires,
            None => {
                inner.items.insert(id, Item { bytes, expires });
                self.bytes = 0;
            }
        }
        drop(inner);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.uploads.lock().bytes -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uploads(max_bytes: u64) -> Uploads {
        Uploads::new(&UploadConfig { max_bytes, ttl_ms: 1000, ..UploadConfig::default() })
    }

    fn put(uploads: &Uploads, bytes: &'static [u8], now: Instant) -> Result<MediaId, RequestError> {
        let id = tessera_media::media_id(bytes);
        let mut reservation = uploads.reserve();
        reservation.grow(bytes.len(), now)?;
        reservation.keep(id, Bytes::from_static(bytes), now);
        Ok(id)
    }

    #[test]
    fn items_live_for_their_time_from_the_last_use() {
        let (uploads, start) = (uploads(100), Instant::now());
        let id = put(&uploads, b"abc", start).expect("fits");
        let later = |ms| start + Duration::from_millis(ms);
        assert_eq!(uploads.get(id, later(900)).as_deref(), Some(&b"abc"[..]));
        assert_eq!(uploads.get(id, later(1800)).as_deref(), Some(&b"abc"[..]));
        assert_eq!(uploads.get(id, later(2800)), None);
        assert_eq!(uploads.bytes(), 0);
    }

    #[test]
    fn a_full_store_refuses_and_says_when_there_is_room() {
        let (uploads, start) = (uploads(5), Instant::now());
        put(&uploads, b"abc", start).expect("fits");
        let at = start + Duration::from_millis(400);
        let error = put(&uploads, b"defg", at).expect_err("is full");
        assert_eq!(error.retry_after(), Some(Duration::from_millis(600)));
        put(&uploads, b"defg", start + Duration::from_millis(1000)).expect("there is room again");
        assert_eq!(uploads.bytes(), 4);
    }

    #[test]
    fn equal_bytes_are_kept_once_and_broken_uploads_leave_nothing() {
        let (uploads, now) = (uploads(100), Instant::now());
        put(&uploads, b"abc", now).expect("fits");
        put(&uploads, b"abc", now).expect("fits");
        assert_eq!(uploads.bytes(), 3);
        let mut broken = uploads.reserve();
        broken.grow(50, now).expect("fits");
        drop(broken);
        assert_eq!(uploads.bytes(), 3);
    }
}
