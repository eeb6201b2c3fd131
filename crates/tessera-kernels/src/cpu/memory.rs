//! Large arrays straight from the kernel: zeroed, page aligned, in huge pages where they are offered.
//!
//! A stream of weights touches every page once per step; with 4-KiB pages the address translation alone
//! costs a good part of the bandwidth.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::error::{KernelError, Result};

const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Types of 32 bits for which all bit patterns are values.
pub(super) trait Plain: Copy + Send + Sync + 'static {}
impl Plain for u32 {}
impl Plain for f32 {}

/// A fixed number of elements that start out as 0. Pages are taken when they are first written.
pub(super) struct Buffer<T: Plain> {
    data: NonNull<T>,
    len: usize,
    map: NonNull<u8>,
    map_bytes: usize,
    elements: PhantomData<T>,
}

// SAFETY: the mapping is owned by this value alone, and its elements are plain numbers.
#[allow(unsafe_code)]
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: as above; shared access only reads.
#[allow(unsafe_code)]
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// An array of zeros.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] where the system has no room for it.
    pub(super) fn zeroed(len: usize) -> Result<Self> {
        let bytes = len * size_of::<T>();
        let align = if bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 64 };
        // Room to begin at a huge page wherever the mapping comes to lie.
        let map_bytes = (bytes + align).max(1);
        let (map, data) = map(map_bytes, bytes, align)?;
        Ok(Self { data: data.cast(), len, map, map_bytes, elements: PhantomData })
    }

    /// Makes room for at least `len` elements. What was in it is lost where it grows.
    pub(super) fn reserve(&mut self, len: usize) -> Result<()> {
        if self.len < len {
            *self = Self::zeroed(len.next_power_of_two())?;
        }
        Ok(())
    }
}

#[allow(unsafe_code)]
fn map(map_bytes: usize, bytes: usize, align: usize) -> Result<(NonNull<u8>, NonNull<u8>)> {
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: a new anonymous mapping at an address of the kernel's choice overlaps nothing.
    let map = unsafe { mmap_anonymous(std::ptr::null_mut(), map_bytes, protection, flags) };
    let map = map.map_err(|source| KernelError::OutOfMemory { bytes, source: source.into() })?;
    let map = NonNull::new(map.cast::<u8>()).expect("the kernel maps nothing at address 0");
    // SAFETY: the mapping holds `align` bytes more than are used, so the aligned start lies inside.
    let data = unsafe { map.add(map.align_offset(align)) };
    if align == HUGE_PAGE_BYTES {
        // SAFETY: the range lies inside the new mapping; the advice changes no contents. Where the system
        // has no huge pages it fails, and everything works with small ones.
        let _ = unsafe { madvise(data.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
    }
    Ok((map, data))
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    #[allow(unsafe_code)]
    fn deref(&self) -> &[T] {
        // SAFETY: `len` aligned elements lie in the mapping, zeroed by the kernel, and 0 is a value.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    #[allow(unsafe_code)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the mapping belongs to this value alone.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `zeroed` with this length, and nothing borrows it any more.
        let unmapped = unsafe { munmap(self.map.as_ptr().cast(), self.map_bytes) };
        debug_assert!(unmapped.is_ok(), "a whole mapping can always be given back");
    }
}

impl<T: Plain> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish_non_exhaustive()
    }
}

/// A place that several threads write, each its own elements.
#[derive(Clone, Copy)]
pub(super) struct SharedOut<'a, T: Plain> {
    data: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose callers promise ranges that are disjoint between threads.
#[allow(unsafe_code)]
unsafe impl<T: Plain> Send for SharedOut<'_, T> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl<T: Plain> Sync for SharedOut<'_, T> {}

impl<'a, T: Plain> SharedOut<'a, T> {
    pub(super) fn new(data: &'a mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// Elements `at..at + len`.
    ///
    /// # Safety
    /// No other thread may touch any of these elements while the slice is in use.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    #[inline(always)]
    pub(super) unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at + len <= self.len, "an output range lies inside of its slot");
        // SAFETY: inside of the borrowed slice, and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), len) }
    }
}
