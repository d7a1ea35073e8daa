//! Shared memory: an mmap of one of Xen's devices, or of a file, unmapped when dropped.

use crate::syscalls;
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::time::Duration;
use vm_memory::{Permissions, VolatileSlice};

/// How often memory is unmapped that the kernel has none to unmap with, and the wait between.
const MEMORY_TRIES: u32 = 100;
const MEMORY_WAIT: Duration = Duration::from_millis(5);

/// Memory of another domain, of Xen, or of a file, in this process.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes (whole pages, at least one) of `file` from `offset`, shared with whoever else maps
    /// them. The file may be closed afterwards.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new(file: &File, offset: i64, len: usize, permissions: Permissions) -> io::Result<Self> {
        let len = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let mut protection = ProtFlags::empty();
        protection.set(ProtFlags::PROT_READ, permissions.allow(Permissions::Read));
        protection.set(ProtFlags::PROT_WRITE, permissions.has_write());
        syscalls::count();
        // SAFETY: a new mapping at an address of the kernel's choosing disturbs none of ours.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self {
            start: start.cast(),
            len: len.get(),
        })
    }

    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// `len` bytes from `offset`, for copying while the other side may write them.
    ///
    /// # Panics
    ///
    /// If the range lies outside the mapping.
    pub fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: within the mapping, which lives as long as the slice; only volatile accesses are made.
        unsafe { VolatileSlice::new(self.start.as_ptr().add(offset), len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        for _ in 0..MEMORY_TRIES {
            syscalls::count();
            // SAFETY: made by `new` with this length, and whoever uses it borrows or owns `self`.
            match unsafe { munmap(self.start.cast(), self.len) } {
                // The kernel notes what is left in memory of its own.
                Err(Errno::ENOMEM) => std::thread::sleep(MEMORY_WAIT),
                unmapped => return unmapped.expect("munmap of a mapping of our own"),
            }
        }
        // It stays mapped until this process ends, which is better than ending it now.
    }
}
