//! The driver's platform on the simulator.

use std::path::Path;
use vm_memory::VolatileSlice;
use xen_virtio_backend::StateArea;
use xen_virtio_backend::blk::{Blk, Disk};
use xen_virtio_dom0_tools::demo::{FIRST_DEVICE, SimMachine};
use xen_virtio_guest_io::{Driver, GrantedMemory, Platform};
use xen_virtio_guest_mapping::sim::SimMemory;
use xen_virtio_guest_mapping::{AddressMode, BusAddress, Gfn, Gref, GuestAddress, PAGE_SIZE, Page};
use xen_virtio_transport::Width;
use xen_virtio_transport::sim::SimGuest;

/// A simulated guest with one disk of `queues` queues for each of `paths`.
pub fn disk_of(paths: &[&Path], queues: u16, read_only: bool) -> (SimGuest, SimMachine) {
    let disks: Vec<Disk> = paths
        .iter()
        .map(|path| Disk::open(path, read_only).expect("a disk"))
        .collect();
    SimMachine::start(AddressMode::Grants, move || {
        let blk = |disk| {
            let kept = StateArea::private(8)?;
            Ok(Box::new(Blk::new(disk, *b"a serial of 20 bytes", queues, kept)?) as _)
        };
        disks.into_iter().map(blk).collect()
    })
    .expect("a simulated guest")
}

/// A driver of the guest's device number `index`.
pub fn driver(guest: &SimGuest, index: u64) -> Driver {
    Driver::new(SimDevice {
        guest: guest.clone(),
        base: FIRST_DEVICE.base + index * FIRST_DEVICE.len,
    })
}

struct SimDevice {
    guest: SimGuest,
    base: u64,
}

impl Platform for SimDevice {
    fn read(&self, offset: u64, width: Width) -> u64 {
        self.guest.read(self.base + offset, width)
    }

    fn write(&self, offset: u64, width: Width, value: u64) {
        self.guest.write(self.base + offset, width, value);
    }

    fn allocate(&self, len: usize, device_writes: bool) -> Box<dyn GrantedMemory> {
        allocate(self.guest.memory(), len, device_writes)
    }
}

/// Memory of a simulated guest that its devices may use.
pub fn allocate(memory: &SimMemory, len: usize, device_writes: bool) -> Box<dyn GrantedMemory> {
    let pages = len.div_ceil(PAGE_SIZE);
    let gfn = memory
        .allocate(pages)
        .expect("the simulated guest has memory");
    Box::new(SimBuffer {
        grant: memory.grant(gfn, pages, device_writes),
        memory: memory.clone(),
        gfn,
        pages,
    })
}

struct SimBuffer {
    memory: SimMemory,
    gfn: Gfn,
    grant: Gref,
    pages: usize,
}

fn address(page: Page) -> u64 {
    let GuestAddress(address) = BusAddress { page, offset: 0 }.into();
    address
}

impl GrantedMemory for SimBuffer {
    fn address(&self) -> u64 {
        address(Page::Grant(self.grant))
    }

    fn frame_address(&self) -> u64 {
        address(Page::Frame(self.gfn))
    }

    fn slice(&self, len: usize) -> VolatileSlice<'_> {
        self.memory.memory(self.gfn, len).expect("allocated")
    }

    fn revoke(self: Box<Self>) {
        self.memory.revoke(self.grant, self.pages);
    }
}
