//! What the machine can do, measured with the backend's own threads and instructions: the two roofs under
//! which kernels are judged. Both move within minutes on shared machines, so a kernel is to be measured
//! right after them, several times, and its share taken from each pair.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::compute::{Compute, part_of};
use super::isa::{Isa, Path, Task};
use super::memory::{Buffer, SharedOut};
use super::word::{CpuFormat, Pairs, Singles, Word};
use crate::error::Result;

/// Independent sums, enough to hide the latency of one instruction.
const SUMS: usize = 12;

/// The two limits of one choice of threads, instructions and format.
#[derive(Debug)]
pub struct CpuLimits {
    compute: Compute,
    format: CpuFormat,
    data: Buffer<u32>,
}

impl CpuLimits {
    /// Prepares `bytes` to read, which should exceed the caches several times.
    ///
    /// # Errors
    /// No memory; threads that could not be started.
    pub fn new(threads: usize, format: CpuFormat, path: Path, bytes: usize) -> Result<Self> {
        let mut data = Buffer::zeroed(bytes / size_of::<u32>())?;
        // Pages that were never written are all the same one.
        data.fill(1);
        Ok(Self { compute: Compute::new(path, threads)?, format, data })
    }

    /// Bytes per second of reading everything once, one contiguous stream per thread.
    pub fn read_bytes_per_second(&self) -> f64 {
        let parts = self.compute.parts(self.data.len());
        let start = Instant::now();
        self.compute.pool.run(parts, &|_, part| {
            let data = &self.data[part_of(self.data.len(), parts, part)];
            self.compute.path.dispatch(Read { data });
        });
        size_of_val(&*self.data) as f64 / start.elapsed().as_secs_f64()
    }

    /// Bytes per second at which the system hands out new, cleared memory to all threads: what loading
    /// weights cannot be faster than.
    ///
    /// # Errors
    /// No memory.
    pub fn new_memory_bytes_per_second(&self) -> Result<f64> {
        /// Words of the smallest page.
        const PAGE_WORDS: usize = 1024;
        let mut fresh = Buffer::<u32>::zeroed(self.data.len())?;
        let parts = self.compute.parts(fresh.len());
        let (len, bytes) = (fresh.len(), size_of_val(&*fresh));
        let out = SharedOut::new(&mut fresh);
        let start = Instant::now();
        self.compute.pool.run(parts, &|_, part| {
            let range = part_of(len, parts, part);
            // SAFETY: parts are disjoint.
            #[allow(unsafe_code)]
            let words = unsafe { out.slice(range.start, range.len()) };
            words.iter_mut().step_by(PAGE_WORDS).for_each(|word| *word = 1);
        });
        black_box(&mut fresh);
        Ok(bytes as f64 / start.elapsed().as_secs_f64())
    }

    /// Floating point operations per second of multiplying and adding in registers, for about `time`.
    pub fn multiply_flops(&self, time: Duration) -> f64 {
        const ROUNDS: usize = 20_000;
        let threads = self.compute.pool.threads();
        let (format, mut done) = (self.format, 0usize);
        let start = Instant::now();
        while start.elapsed() < time {
            self.compute.pool.run(threads, &|_, _| {
                self.compute.path.dispatch(Multiply { format, rounds: ROUNDS });
            });
            done += threads * ROUNDS * SUMS;
        }
        let per_instruction = self.compute.path.lanes() * self.per_word() * 2;
        (done * per_instruction) as f64 / start.elapsed().as_secs_f64()
    }

    fn per_word(&self) -> usize {
        match self.format {
            CpuFormat::Bf16 => Pairs::PER_WORD,
            CpuFormat::F32 => Singles::PER_WORD,
        }
    }
}

struct Read<'a> {
    data: &'a [u32],
}

impl Task for Read<'_> {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let mut sums = [0u32; 64];
        for words in self.data.as_chunks::<64>().0 {
            sums.iter_mut().zip(words).for_each(|(sum, word)| *sum ^= word);
        }
        black_box(sums);
    }
}

struct Multiply {
    format: CpuFormat,
    rounds: usize,
}

impl Task for Multiply {
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise.
        match self.format {
            CpuFormat::Bf16 => unsafe { self.multiply::<I, Pairs>() },
            CpuFormat::F32 => unsafe { self.multiply::<I, Singles>() },
        }
    }
}

impl Multiply {
    /// # Safety
    /// That of [`Isa`].
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn multiply<I: Isa, W: Word>(self) {
        // SAFETY: the caller's promise; the sums are stored into an array that holds a vector.
        unsafe {
            let (a, b) = (I::splat_word(black_box(0)), I::splat_word(black_box(0)));
            let mut sums = [I::zero(); SUMS];
            for _ in 0..self.rounds {
                for sum in &mut sums {
                    *sum = W::mac::<I>(*sum, a, b);
                }
            }
            let mut out = [0f32; 16];
            for sum in sums {
                I::store(out.as_mut_ptr(), sum);
                black_box(&out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_has_limits() {
        for path in Path::ALL.into_iter().filter(|path| path.is_available()) {
            for format in [CpuFormat::Bf16, CpuFormat::F32] {
                let limits = CpuLimits::new(2, format, path, 1 << 16).unwrap();
                let measured =
                    [limits.read_bytes_per_second(), limits.multiply_flops(Duration::ZERO)];
                assert!(measured[0] > 0.0 && measured[1] >= 0.0, "{path:?} {format:?}");
                assert!(limits.new_memory_bytes_per_second().unwrap() > 0.0);
            }
        }
    }
}
