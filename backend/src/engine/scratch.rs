//! A page that the data of small requests passes through.

use super::copy::{copy, first_fault};
use crate::virtqueue::Buffers;
use std::io;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use xen_virtio_guest_mapping::{CopyFault, CopyOp, Direction, GuestAccess, PAGE_SIZE};

/// Memory for the data of one request at a time.
pub struct Scratch {
    memory: MmapRegion<()>,
    operations: Vec<CopyOp>,
}

impl Scratch {
    /// The most bytes of one copy.
    pub const BYTES: usize = PAGE_SIZE;

    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            memory: MmapRegion::new(Self::BYTES).map_err(io::Error::other)?,
            operations: Vec::new(),
        })
    }

    /// Copies from the beginning of `from` to `bytes`, as many as there are, at most [`Scratch::BYTES`].
    ///
    /// # Errors
    ///
    /// [`CopyFault`]: one that is dom0's, if there is any.
    pub fn read(
        &mut self,
        from: &Buffers,
        bytes: &mut [u8],
        access: &mut dyn GuestAccess,
    ) -> Result<(), CopyFault> {
        self.copy(Direction::FromGuest, from, bytes.len(), access)?;
        let copied = self.memory.as_volatile_slice().read_slice(bytes, 0);
        copied.expect("no more than a page");
        Ok(())
    }

    /// Copies `bytes`, at most [`Scratch::BYTES`], to the beginning of `to`.
    ///
    /// # Errors
    ///
    /// As [`Scratch::read`].
    pub fn write(
        &mut self,
        bytes: &[u8],
        to: &Buffers,
        access: &mut dyn GuestAccess,
    ) -> Result<(), CopyFault> {
        let copied = self.memory.as_volatile_slice().write_slice(bytes, 0);
        copied.expect("no more than a page");
        self.copy(Direction::ToGuest, to, bytes.len(), access)
    }

    fn copy(
        &mut self,
        direction: Direction,
        buffers: &Buffers,
        len: usize,
        access: &mut dyn GuestAccess,
    ) -> Result<(), CopyFault> {
        self.operations.clear();
        buffers.copies(direction, 0, len, 0, &mut self.operations);
        let memory = self.memory.as_volatile_slice();
        copy(access, &memory, &mut self.operations)?;
        first_fault(&self.operations).map_or(Ok(()), Err)
    }
}
