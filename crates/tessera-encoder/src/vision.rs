//! The vision thread: one owner of the vision tower, fed through a bounded channel, packing the items that
//! wait into one variable-length forward pass.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tessera_types::GridThw;
use tokio::sync::{mpsc, oneshot};

use crate::error::{EncodeError, EncoderError};
use crate::metrics::EncoderMetrics;

/// Jobs between the service and the thread. Admission by pixels is the bound that matters; this one only
/// has to be larger than the number of the smallest items that admission lets through at once.
const QUEUE_JOBS: usize = 1024;

/// Patch rows of one media item, ready for the tower.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchItem {
    pub grid: GridThw,
    /// `[grid.num_patches(), patch values]` row-major, published patch order.
    pub values: Vec<f32>,
}

/// A vision tower on some device. It stays on the thread that made it.
pub trait VisionEncoder {
    /// Values per embedding row.
    fn num_cols(&self) -> u32;

    /// Embedding rows of each item, `[grid.num_patches() / 4, num_cols]`, in order. Items do not affect
    /// each other.
    ///
    /// # Errors
    /// The device failed; no item has a result.
    fn encode(
        &mut self,
        items: &[PatchItem],
    ) -> Result<Vec<Vec<f32>>, Box<dyn std::error::Error + Send + Sync>>;
}

impl VisionEncoder for Box<dyn VisionEncoder> {
    fn num_cols(&self) -> u32 {
        self.as_ref().num_cols()
    }

    fn encode(
        &mut self,
        items: &[PatchItem],
    ) -> Result<Vec<Vec<f32>>, Box<dyn std::error::Error + Send + Sync>> {
        self.as_mut().encode(items)
    }
}

/// Rows of one item and how long its forward pass took.
#[derive(Debug, Clone)]
pub struct Encoded {
    pub rows: Vec<f32>,
    pub num_cols: u32,
    pub forward: Duration,
}

struct Job {
    item: PatchItem,
    reply: oneshot::Sender<Result<Encoded, EncodeError>>,
}

/// Sends items to the vision thread. The thread ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct VisionHandle {
    jobs: mpsc::Sender<Job>,
    num_cols: u32,
    max_batch_patches: u32,
}

impl VisionHandle {
    /// Starts the thread; `make` runs on it, since some devices are bound to their thread. Returns once
    /// the tower is loaded.
    ///
    /// # Errors
    /// What `make` returns.
    pub async fn start<V: VisionEncoder>(
        make: impl FnOnce() -> Result<V, EncoderError> + Send + 'static,
        max_batch_patches: u32,
        metrics: EncoderMetrics,
    ) -> Result<Self, EncoderError> {
        let (jobs, queue) = mpsc::channel(QUEUE_JOBS);
        let (ready, loaded) = oneshot::channel();
        let body = move || match make() {
            Ok(tower) => {
                // A start that was given up drops the receiver; the thread then ends with its queue.
                let _ = ready.send(Ok(tower.num_cols()));
                serve(tower, queue, max_batch_patches, &metrics);
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        };
        thread::Builder::new()
            .name("vision".into())
            .spawn(body)
            .map_err(|source| EncoderError::Model(source.into()))?;
        let num_cols = loaded.await.map_err(|_| EncoderError::VisionThreadEnded)??;
        Ok(Self { jobs, num_cols, max_batch_patches })
    }

    /// Values per embedding row.
    pub fn num_cols(&self) -> u32 {
        self.num_cols
    }

    /// Largest item that is encoded.
    pub fn max_patches(&self) -> u32 {
        self.max_batch_patches
    }

    /// Encodes one item together with whatever else waits. Dropping the future before the thread took the
    /// item cancels it.
    ///
    /// # Errors
    /// The tower failed, or the thread is gone.
    pub async fn encode(&self, item: PatchItem) -> Result<Encoded, EncodeError> {
        let (reply, result) = oneshot::channel();
        self.jobs.send(Job { item, reply }).await.map_err(|_| EncodeError::ShuttingDown)?;
        result.await.map_err(|_| EncodeError::ShuttingDown)?
    }
}

fn serve<V: VisionEncoder>(
    mut tower: V,
    mut queue: mpsc::Receiver<Job>,
    max_batch_patches: u32,
    metrics: &EncoderMetrics,
) {
    let mut waiting: Option<Job> = None;
    while let Some(first) = waiting.take().or_else(|| queue.blocking_recv()) {
        let mut patches = first.item.grid.num_patches();
        let mut batch = vec![first];
        while let Ok(job) = queue.try_recv() {
            patches += job.item.grid.num_patches();
            if patches > u64::from(max_batch_patches) {
                waiting = Some(job);
                break;
            }
            batch.push(job);
        }
        batch.retain(|job| !job.reply.is_closed());
        if !batch.is_empty() {
            run(&mut tower, batch, metrics);
        }
    }
}

fn run<V: VisionEncoder>(tower: &mut V, batch: Vec<Job>, metrics: &EncoderMetrics) {
    let (items, replies): (Vec<_>, Vec<_>) =
        batch.into_iter().map(|job| (job.item, job.reply)).unzip();
    let started = Instant::now();
    let result = tower.encode(&items);
    let forward = started.elapsed();
    metrics.batches.inc();
    metrics.forward_seconds.observe(forward.as_secs_f64());
    metrics.patches.inc_by(items.iter().map(|item| item.grid.num_patches()).sum());
    let num_cols = tower.num_cols();
    // A requester that left meanwhile has dropped its receiver; its rows are dropped too.
    match result {
        Ok(rows) => rows.into_iter().zip(replies).for_each(|(rows, reply)| {
            let _ = reply.send(Ok(Encoded { rows, num_cols, forward }));
        }),
        Err(error) => {
            tracing::error!(%error, items = items.len(), "vision tower failed");
            let message: Arc<str> = error.to_string().into();
            for reply in replies {
                let _ = reply.send(Err(EncodeError::Vision(message.to_string())));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tessera_telemetry::Registry;

    /// Gives each row the item's first value; records batch sizes; fails on a negative value.
    struct Fake {
        batches: Arc<Mutex<Vec<usize>>>,
        gate: std::sync::mpsc::Receiver<()>,
    }

    impl VisionEncoder for Fake {
        fn num_cols(&self) -> u32 {
            2
        }

        fn encode(
            &mut self,
            items: &[PatchItem],
        ) -> Result<Vec<Vec<f32>>, Box<dyn std::error::Error + Send + Sync>> {
            self.gate.recv()?;
            self.batches.lock().expect("not poisoned").push(items.len());
            if items.iter().any(|item| item.values[0] < 0.0) {
                return Err("negative".into());
            }
            Ok(items.iter().map(|item| vec![item.values[0]; 2]).collect())
        }
    }

    fn item(value: f32) -> PatchItem {
        PatchItem { grid: GridThw { t: 1, h: 2, w: 2 }, values: vec![value; 4] }
    }

    async fn start(
        max: u32,
    ) -> (VisionHandle, Arc<Mutex<Vec<usize>>>, std::sync::mpsc::Sender<()>) {
        let batches = Arc::new(Mutex::new(Vec::new()));
        let (open, gate) = std::sync::mpsc::channel();
        let metrics = EncoderMetrics::register(&Registry::new()).expect("fresh names");
        let fake = Fake { batches: batches.clone(), gate };
        let handle = VisionHandle::start(move || Ok(fake), max, metrics).await.expect("a thread");
        (handle, batches, open)
    }

    #[tokio::test]
    async fn waiting_items_share_a_forward_pass_up_to_the_limit() {
        let (handle, batches, open) = start(12).await;
        let jobs: Vec<_> = (0..5)
            .map(|n| {
                let handle = handle.clone();
                tokio::spawn(async move { handle.encode(item(n as f32)).await })
            })
            .collect();
        tokio::task::yield_now().await;
        (0..5).for_each(|_| open.send(()).expect("the thread lives"));
        for (n, job) in jobs.into_iter().enumerate() {
            let encoded = job.await.expect("no panic").expect("encoded");
            assert_eq!(encoded.rows, [n as f32; 2]);
        }
        let batches = batches.lock().expect("not poisoned");
        assert_eq!(batches.iter().sum::<usize>(), 5);
        assert!(batches.iter().all(|&size| size <= 3), "{batches:?}");
        assert!(batches.iter().any(|&size| size > 1), "{batches:?}");
    }

    #[tokio::test]
    async fn a_failed_pass_is_reported_and_the_thread_goes_on() {
        let (handle, _, open) = start(4).await;
        open.send(()).expect("the thread lives");
        let error = handle.encode(item(-1.0)).await.expect_err("negative");
        assert!(matches!(error, EncodeError::Vision(_)), "{error}");
        open.send(()).expect("the thread lives");
        assert!(handle.encode(item(1.0)).await.is_ok());
    }

    #[tokio::test]
    async fn an_abandoned_item_is_not_encoded() {
        let (handle, batches, open) = start(4).await;
        let busy = tokio::spawn({
            let handle = handle.clone();
            async move { handle.encode(item(1.0)).await }
        });
        tokio::task::yield_now().await;
        let mut abandoned = Box::pin(handle.encode(item(2.0)));
        assert!(futures::poll!(&mut abandoned).is_pending());
        drop(abandoned);
        (0..2).for_each(|_| open.send(()).expect("the thread lives"));
        busy.await.expect("no panic").expect("encoded");
        handle.encode(item(3.0)).await.expect("encoded");
        assert_eq!(*batches.lock().expect("not poisoned"), [1, 1]);
    }
}
