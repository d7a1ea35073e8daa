//! A virtqueue by hand: descriptors and rings as bytes in the guest's memory.

use vm_memory::{Bytes, VolatileSlice};
use xen_virtio_guest_mapping::sim::SimMemory;
use xen_virtio_guest_mapping::{BusAddress, Gfn, Gref, GuestAddress, PAGE_SIZE, Page};

/// Granted guest memory.
pub struct Buffer {
    memory: SimMemory,
    gfn: Gfn,
    pub grant: Gref,
    pub len: usize,
}

impl Buffer {
    pub fn new(memory: &SimMemory, len: usize, device_writes: bool) -> Self {
        let pages = len.div_ceil(PAGE_SIZE);
        let gfn = memory
            .allocate(pages)
            .expect("the simulated guest has memory");
        Self {
            memory: memory.clone(),
            gfn,
            grant: memory.grant(gfn, pages, device_writes),
            len,
        }
    }

    /// The address that the device knows it by.
    pub fn address(&self) -> u64 {
        let GuestAddress(address) = BusAddress {
            page: Page::Grant(self.grant),
            offset: 0,
        }
        .into();
        address
    }

    /// Its guest-physical address.
    pub fn frame_address(&self) -> u64 {
        let GuestAddress(address) = BusAddress {
            page: Page::Frame(self.gfn),
            offset: 0,
        }
        .into();
        address
    }

    fn slice(&self) -> VolatileSlice<'_> {
        self.memory.memory(self.gfn, self.len).expect("allocated")
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
    pub fn new(memory: &SimMemory, size: u16) -> Self {
        let entries = usize::from(size);
        Self {
            size,
            descriptors: Buffer::new(memory, 16 * entries, true),
            available: Buffer::new(memory, 6 + 2 * entries, true),
            used: Buffer::new(memory, 6 + 8 * entries, true),
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
        self.available
            .write_u16(4 + 2 * usize::from(self.offered % self.size), head);
        self.offered = self.offered.wrapping_add(1);
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

    pub fn used_index(&self) -> u16 {
        self.used.read_u16(2)
    }

    /// The used ring's entry `index`: a chain's head, and the bytes written to it.
    pub fn used(&self, index: u16) -> (u32, u32) {
        let at = 4 + 8 * usize::from(index % self.size);
        (self.used.read_u32(at), self.used.read_u32(at + 4))
    }
}
