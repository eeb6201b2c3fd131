//! Encodes blank items before the worker registers, so that the first request pays for nothing that is
//! done once, and a device that cannot encode never serves.
//!
//! Items double in size up to the largest one that is allowed, as long as the next fits the time that is
//! left: a fast device proves its largest item, a slow one tells how long that would take.

use std::time::{Duration, Instant};

use tessera_media::PixelRecipe;
use tessera_types::GridThw;

use crate::error::EncoderError;
use crate::vision::{PatchItem, VisionHandle};

/// Rows and columns of the first item, in patches.
const FIRST_SIDE: u32 = 8;
/// Twice the patches take more than twice the time, since attention grows with their square.
const GROWTH: u32 = 3;

/// What warming up showed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WarmUp {
    /// Patches of the largest item that was encoded; 0 if there was no time for any.
    pub patches: u64,
    /// Its forward pass.
    pub forward: Duration,
}

impl WarmUp {
    /// Time of an item of `patches` at the pace of the largest one encoded: a lower bound, and none if
    /// nothing was encoded.
    pub fn estimate(&self, patches: u64) -> Option<Duration> {
        let ratio = patches as f64 / self.patches as f64;
        (self.patches > 0).then(|| self.forward.mul_f64(ratio))
    }
}

/// Warms the tower up within about `budget`; zero skips it.
///
/// # Errors
/// The tower failed.
pub async fn warm_up(
    vision: &VisionHandle,
    recipe: &PixelRecipe,
    budget: Duration,
) -> Result<WarmUp, EncoderError> {
    let begun = Instant::now();
    let mut done = WarmUp { patches: 0, forward: Duration::ZERO };
    let (mut h, mut w) = (FIRST_SIDE, FIRST_SIDE);
    while u64::from(h) * u64::from(w) <= u64::from(vision.max_patches())
        && begun.elapsed() + done.forward * GROWTH < budget
    {
        let grid = GridThw { t: 1, h, w };
        let values = vec![0.0; grid.num_patches() as usize * recipe.patch.row_len()];
        let encoded = vision.encode(PatchItem { grid, values }).await;
        let encoded = encoded.map_err(EncoderError::WarmUp)?;
        done = WarmUp { patches: grid.num_patches(), forward: encoded.forward };
        (h, w) = (w, 2 * h);
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tessera_telemetry::Registry;

    use super::*;
    use crate::metrics::EncoderMetrics;
    use crate::vision::VisionEncoder;

    /// Records patches per item; fails on items of more than `limit`.
    struct Fake {
        seen: Arc<Mutex<Vec<u64>>>,
        limit: u64,
    }

    impl VisionEncoder for Fake {
        fn num_cols(&self) -> u32 {
            1
        }

        fn encode(
            &mut self,
            items: &[PatchItem],
        ) -> Result<Vec<Vec<f32>>, Box<dyn std::error::Error + Send + Sync>> {
            let patches = items[0].grid.num_patches();
            assert_eq!(items[0].values.len() % patches as usize, 0);
            self.seen.lock().expect("not poisoned").push(patches);
            match patches <= self.limit {
                true => Ok(vec![vec![0.0; patches as usize / 4]]),
                false => Err("too large".into()),
            }
        }
    }

    async fn warm(
        max_patches: u32,
        limit: u64,
        budget: Duration,
    ) -> (Result<WarmUp, EncoderError>, Vec<u64>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let fake = Fake { seen: Arc::clone(&seen), limit };
        let metrics = EncoderMetrics::register(&Registry::new()).expect("fresh names");
        let vision = VisionHandle::start(move || Ok(fake), max_patches, metrics);
        let vision = vision.await.expect("a thread");
        let warm = warm_up(&vision, &PixelRecipe::default(), budget).await;
        let seen = seen.lock().expect("not poisoned").clone();
        (warm, seen)
    }

    #[tokio::test]
    async fn items_double_up_to_the_largest() {
        let (warm, seen) = warm(300, u64::MAX, Duration::from_secs(600)).await;
        assert_eq!(seen, [64, 128, 256]);
        assert_eq!(warm.expect("a working tower").patches, 256);
    }

    #[tokio::test]
    async fn without_time_nothing_is_encoded() {
        let (warm, seen) = warm(300, 0, Duration::ZERO).await;
        assert!(seen.is_empty());
        assert_eq!(warm.expect("nothing failed").estimate(100), None);
    }

    #[tokio::test]
    async fn a_tower_that_fails_never_serves() {
        let (warm, _) = warm(300, 100, Duration::from_secs(600)).await;
        assert!(matches!(warm, Err(EncoderError::WarmUp(_))), "{warm:?}");
    }

    #[test]
    fn larger_items_are_estimated_in_proportion() {
        let warm = WarmUp { patches: 100, forward: Duration::from_millis(50) };
        assert_eq!(warm.estimate(400), Some(Duration::from_millis(200)));
    }
}
