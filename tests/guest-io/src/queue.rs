//! A virtqueue by hand: descriptors and rings as bytes in the guest's memory.

use crate::driver::Driver;
use crate::platform::GrantedMemory;
use std::sync::atomic::{Ordering, fence};
use vm_memory::{Bytes, VolatileSlice};
use xen_virtio_guest_mapping::{GRANT_BIT, Gref};

/// Granted guest memory.
pub struct Buffer {
    memory: Box<dyn GrantedMemory>,
    pub len: usize,
}

impl Buffer {
    pub fn new(memory: Box<dyn GrantedMemory>, len: usize) -> Self {
        Self { memory, len }
    }

    /// The address that the device knows it by.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// A guest-physical address that was not granted.
    pub fn frame_address(&self) -> u64 {
        self.memory.frame_address()
    }

    /// Ends its grants.
    pub fn revoke(self) {
        self.memory.revoke();
    }

    /// The first of its grants.
    pub fn grant(&self) -> Gref {
        let page = (self.address() & !GRANT_BIT) >> 12;
        Gref(page.try_into().expect("an address of a grant"))
    }

    fn slice(&self) -> VolatileSlice<'_> {
        self.memory.slice(self.len)
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.slice()
            .write_slice(bytes, offset)
            .expect("within the buffer");
    }

    pub fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.slice()
            .read_slice(&mut bytes, 0)
            .expect("within the buffer");
        bytes
    }

    fn write_u16(&self, offset: usize, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }

    fn read_u16(&self, offset: usize) -> u16 {
        self.slice()
            .read_obj::<u16>(offset)
            .expect("within the buffer")
    }

    fn read_u32(&self, offset: usize) -> u32 {
        self.slice()
            .read_obj::<u32>(offset)
            .expect("within the buffer")
    }
}

/// The three areas of a split virtqueue (virtio 1.3, 2.7).
pub struct RawQueue {
    size: u16,
    pub descriptors: Buffer,
    pub available: Buffer,
    pub used: Buffer,
    offered: u16,
}

impl RawQueue {
    pub fn new(driver: &Driver, size: u16) -> Self {
        let entries = usize::from(size);
        Self {
            size,
            descriptors: driver.buffer(16 * entries, true),
            available: driver.buffer(6 + 2 * entries, true),
            used: driver.buffer(6 + 8 * entries, true),
            offered: 0,
        }
    }

    pub fn addresses(&self) -> [u64; 3] {
        [
            self.descriptors.address(),
            self.available.address(),
            self.used.address(),
        ]
    }

    pub fn set_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = 16 * usize::from(index);
        self.descriptors.write(at, &address.to_le_bytes());
        self.descriptors.write(at + 8, &len.to_le_bytes());
        self.descriptors.write(at + 12, &flags.to_le_bytes());
        self.descriptors.write(at + 14, &next.to_le_bytes());
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, head: u16) {
        self.offer_together(&[head]);
    }

    /// Makes the chains at `heads` available at once.
    pub fn offer_together(&mut self, heads: &[u16]) {
        for head in heads {
            self.available
                .write_u16(4 + 2 * usize::from(self.offered % self.size), *head);
            self.offered = self.offered.wrapping_add(1);
        }
        self.set_available_index(self.offered);
    }

    pub fn set_available_index(&self, index: u16) {
        self.available.write_u16(2, index);
    }

    /// With EVENT_IDX: the used index after which the driver wants an interrupt.
    pub fn set_used_event(&self, index: u16) {
        self.available
            .write_u16(4 + 2 * usize::from(self.size), index);
    }

    /// Without EVENT_IDX: 1 to have no interrupt.
    pub fn set_flags(&self, flags: u16) {
        self.available.write_u16(0, flags);
    }

    /// Without EVENT_IDX: whether the device is to be kicked for what was offered (virtio 1.3, 2.7.10).
    pub fn wants_kick(&self) -> bool {
        // The device sees what was offered before we look.
        fence(Ordering::SeqCst);
        self.used.read_u16(0) & 1 == 0
    }

    pub fn used_index(&self) -> u16 {
        self.used.read_u16(2)
    }

    /// The used ring's entry `index`: a chain's head, and the bytes written to it.
    pub fn used(&self, index: u16) -> (u32, u32) {
        let at = 4 + 8 * usize::from(index % self.size);
        (self.used.read_u32(at), self.used.read_u32(at + 4))
    }
}
