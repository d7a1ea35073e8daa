//! A page that the data of small requests passes through.

use super::copy::{copy, first_fault};
use crate::virtqueue::Buffers;
use std::io;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use xen_virtio_guest_mapping::{CopyFault, CopyOp, Direction, GuestAccess, PAGE_SIZE};

/// Memory for the data of one request at a time.
pub struct Scratch {
    /// What is copied from and to the guest.
    memory: MmapRegion<()>,
    /// What was read last.
    bytes: Vec<u8>,
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
            bytes: Vec::with_capacity(Self::BYTES),
            operations: Vec::new(),
        })
    }

    /// The bytes of `from`, of which the first [`Scratch::BYTES`] are read.
    ///
    /// # Errors
    ///
    /// [`CopyFault`]: one that is dom0's, if there is any.
    pub fn read(
        &mut self,
        from: &Buffers,
        access: &mut dyn GuestAccess,
    ) -> Result<&[u8], CopyFault> {
        self.read_part(from, 0, Self::BYTES, access)
    }

    /// At most `len` bytes of `from`, from byte `skip` on, and [`Scratch::BYTES`] at most.
    ///
    /// # Errors
    ///
    /// As [`Scratch::read`].
    pub fn read_part(
        &mut self,
        from: &Buffers,
        skip: usize,
        len: usize,
        access: &mut dyn GuestAccess,
    ) -> Result<&[u8], CopyFault> {
        let len = from.len().saturating_sub(skip).min(len).min(Self::BYTES);
        self.copy(Direction::FromGuest, from, skip, len, access)?;
        self.bytes.resize(len, 0);
        let memory = self.memory.as_volatile_slice();
        let read = memory.read_slice(&mut self.bytes, 0);
        read.expect("no more than a page");
        Ok(&self.bytes)
    }

    /// Copies `bytes` to the beginning of `to`, as many as find room there, and [`Scratch::BYTES`] at most. How many those
    /// are.
    ///
    /// # Errors
    ///
    /// As [`Scratch::read`].
    pub fn write(
        &mut self,
        bytes: &[u8],
        to: &Buffers,
        access: &mut dyn GuestAccess,
    ) -> Result<usize, CopyFault> {
        let len = bytes.len().min(to.len()).min(Self::BYTES);
        let memory = self.memory.as_volatile_slice();
        let written = memory.write_slice(&bytes[..len], 0);
        written.expect("no more than a page");
        self.copy(Direction::ToGuest, to, 0, len, access)?;
        Ok(len)
    }

    fn copy(
        &mut self,
        direction: Direction,
        buffers: &Buffers,
        skip: usize,
        len: usize,
        access: &mut dyn GuestAccess,
    ) -> Result<(), CopyFault> {
        self.operations.clear();
        buffers.copies(direction, skip, len, 0, &mut self.operations);
        let memory = self.memory.as_volatile_slice();
        copy(access, &memory, &mut self.operations)?;
        first_fault(&self.operations).map_or(Ok(()), Err)
    }
}
