//! The vision tower alone, one image at a time.

use std::time::{Duration, Instant};

use tessera_kernels::{Backend, CpuBackend, Device, ReferenceBackend, cuda};
use tessera_model::{VisionItem, VisionTower, Weights};
use tessera_types::GridThw;

use super::args::Plan;
use super::report::{Report, VisionRow};
use crate::bench::error::BenchError;
use crate::bench::limits::{LimitMeter, Pair, Paired};
use crate::bench::random::Random;
use crate::bench::size::ImageSize;
use crate::bench::work;

const DEADLINE: Duration = Duration::from_secs(1800);

pub fn run(plan: &Plan, meter: &LimitMeter, report: &mut Report<'_>) -> Result<(), BenchError> {
    if plan.vision.is_empty() {
        return Ok(());
    }
    match plan.device {
        Device::Reference => run_on(ReferenceBackend::new(), plan, meter, report),
        Device::Cpu(format) => {
            run_on(CpuBackend::new(plan.total_threads(), format)?, plan, meter, report)
        }
        Device::Cuda(device) => run_on(cuda::open(&device.options(0, false))?, plan, meter, report),
    }
}

fn run_on<B: Backend>(
    mut backend: B,
    plan: &Plan,
    meter: &LimitMeter,
    report: &mut Report<'_>,
) -> Result<(), BenchError> {
    let config = &plan.shape.config;
    let sizes = plan.vision.iter().map(|size| (*size, size.grid(&config.vision)));
    let sizes: Vec<(ImageSize, GridThw)> = sizes.collect();
    let max_patches = sizes.iter().map(|(_, grid)| grid.num_patches()).max().unwrap_or(0) as u32;
    let started = Instant::now();
    let mut weights = Weights::open(&plan.weight_source, config)?;
    let tower = VisionTower::load(&mut backend, &config.vision, max_patches, &mut weights)?;
    report.vision_loaded(started.elapsed());
    for (size, grid) in sizes {
        let mut random = Random::new(1);
        let num_values = grid.num_patches() as usize * config.vision.patch_len();
        let values: Vec<f32> = (0..num_values).map(|_| random.uniform() as f32 - 0.5).collect();
        let mut encode = || -> Result<f64, BenchError> {
            let started = Instant::now();
            let item = VisionItem { grid, pixel_values: &values };
            tower.encode(&mut backend, &[item], started + DEADLINE)?;
            Ok(started.elapsed().as_secs_f64())
        };
        encode()?;
        let mut pairs = Vec::with_capacity(plan.repeats);
        for _ in 0..plan.repeats {
            let (limits, seconds) = meter.around(&mut encode)?;
            pairs.push(Pair { seconds, limits });
        }
        let work = work::vision(&config.vision, plan.dtype(), grid);
        report.vision(VisionRow {
            size,
            patches: grid.num_patches(),
            visual_tokens: grid.num_visual_tokens(config.vision.spatial_merge_size as u32),
            paired: Paired::of(work, &pairs),
        });
    }
    Ok(())
}
