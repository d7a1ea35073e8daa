//! The driver's platform on the simulator.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use tempfile::NamedTempFile;
use vm_memory::VolatileSlice;
use xen_virtio_backend::RingStock;
use xen_virtio_backend::blk::{Blk, Disk, SECTOR};
use xen_virtio_backend::{Activity, StateArea};
use xen_virtio_guest_io::{Driver, GrantedMemory, Platform};
use xen_virtio_guest_mapping::{
    AddressMode, BusAddress, Gfn, Gref, GuestAccess, GuestAddress, PAGE_SIZE, Page,
};
use xen_virtio_sim::{FIRST_DEVICE, FIRST_IRQ, SimGuest, SimHypervisor, SimMachine, SimMemory};
use xen_virtio_transport::{
    DeviceState, GuestDevices, Hypervisor, InterruptLine, MmioDevice, MmioRange, Trap, Width,
};

/// A simulated guest whose traps come as a test has it.
pub struct Staged<F> {
    hypervisor: SimHypervisor,
    next_trap: F,
}

impl<F: for<'a> FnMut(&'a mut SimHypervisor) -> Option<Trap<'a>>> Staged<F> {
    pub fn new(hypervisor: SimHypervisor, next_trap: F) -> Self {
        Self {
            hypervisor,
            next_trap,
        }
    }
}

impl<F: for<'a> FnMut(&'a mut SimHypervisor) -> Option<Trap<'a>>> Hypervisor for Staged<F> {
    fn next_trap(&mut self) -> Option<Trap<'_>> {
        (self.next_trap)(&mut self.hypervisor)
    }

    fn events(&self) -> BorrowedFd<'_> {
        self.hypervisor.events()
    }

    fn clear_events(&mut self) -> io::Result<()> {
        self.hypervisor.clear_events()
    }

    fn claim(&mut self, range: MmioRange) -> io::Result<()> {
        self.hypervisor.claim(range)
    }

    fn interrupt_line(&self, number: u32) -> Box<dyn InterruptLine> {
        self.hypervisor.interrupt_line(number)
    }

    fn guest_access(&self, mode: AddressMode) -> Box<dyn GuestAccess> {
        self.hypervisor.guest_access(mode)
    }
}

/// A simulated guest with one disk of `queues` queues for each of `paths`.
pub fn disk_of(paths: &[&Path], queues: u16, read_only: bool) -> (SimGuest, SimMachine) {
    let disks: Vec<Disk> = paths
        .iter()
        .map(|path| {
            let mut disk = Disk::open(path, read_only).expect("a disk");
            disk.set_erases(disk.can_erase());
            disk
        })
        .collect();
    SimMachine::start(AddressMode::Grants, move || {
        let blk = |disk| {
            let kept = StateArea::private(Blk::KEPT)?;
            let serial = *b"a serial of 20 bytes";
            Ok(Box::new(Blk::new(disk, serial, queues, kept, &RingStock::new(1))?) as _)
        };
        disks.into_iter().map(blk).collect()
    })
    .expect("a simulated guest")
}

/// A device with one queue for `disk`, that goes on from `state`, with [`FIRST_IRQ`].
pub fn disk_device(hypervisor: &mut SimHypervisor, disk: Disk, state: DeviceState) -> MmioDevice {
    let kept = StateArea::private(Blk::KEPT).expect("memory");
    let blk = Blk::new(disk, [0; 20], 1, kept, &RingStock::new(1)).expect("memory");
    MmioDevice::new(
        Box::new(blk),
        hypervisor,
        AddressMode::Grants,
        FIRST_IRQ,
        state,
    )
    .expect("registers of such a device")
}

/// Has the driver of the guest's first device do `what` while `machine` serves it.
pub fn drive<T: Send + 'static>(
    machine: &mut GuestDevices<SimHypervisor>,
    guest: &SimGuest,
    what: impl FnOnce(&Driver) -> T + Send + 'static,
) -> T {
    let guest = guest.clone();
    let driving = std::thread::spawn(move || what(&driver(&guest, 0)));
    while !driving.is_finished() {
        machine.step();
    }
    driving.join().expect("a driver that does not panic")
}

/// A file of `sectors` sectors, each of which has its number's lowest byte in every byte.
pub fn numbered_disk(sectors: u64) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a temporary file");
    let bytes: Vec<u8> = (0..sectors * SECTOR)
        .map(|place| (place / SECTOR).to_le_bytes()[0])
        .collect();
    std::fs::write(file.path(), bytes).expect("room for it");
    file
}

/// A driver of the guest's device number `index`, which names its memory by grants.
pub fn driver(guest: &SimGuest, index: u64) -> Driver {
    driver_by(AddressMode::Grants, guest, index)
}

/// … which names its memory as `mode` says.
pub fn driver_by(mode: AddressMode, guest: &SimGuest, index: u64) -> Driver {
    Driver::new(SimDevice {
        guest: guest.clone(),
        base: FIRST_DEVICE.base + index * FIRST_DEVICE.len,
        mode,
    })
}

struct SimDevice {
    guest: SimGuest,
    base: u64,
    mode: AddressMode,
}

impl Platform for SimDevice {
    fn read(&self, offset: u64, width: Width) -> u64 {
        self.guest.read(self.base + offset, width)
    }

    fn write(&self, offset: u64, width: Width, value: u64) {
        self.guest.write(self.base + offset, width, value);
    }

    fn allocate(&self, len: usize, device_writes: bool) -> Box<dyn GrantedMemory> {
        allocate_by(self.mode, self.guest.memory(), len, device_writes)
    }
}

/// Memory of a simulated guest that its devices may use.
pub fn allocate(memory: &SimMemory, len: usize, device_writes: bool) -> Box<dyn GrantedMemory> {
    allocate_by(AddressMode::Grants, memory, len, device_writes)
}

fn allocate_by(
    mode: AddressMode,
    memory: &SimMemory,
    len: usize,
    device_writes: bool,
) -> Box<dyn GrantedMemory> {
    let pages = len.div_ceil(PAGE_SIZE);
    let gfn = memory
        .allocate(pages)
        .expect("the simulated guest has memory");
    Box::new(SimBuffer {
        grant: memory.grant(gfn, pages, device_writes),
        memory: memory.clone(),
        gfn,
        pages,
        mode,
    })
}

struct SimBuffer {
    memory: SimMemory,
    gfn: Gfn,
    grant: Gref,
    pages: usize,
    mode: AddressMode,
}

fn address(page: Page) -> u64 {
    let GuestAddress(address) = BusAddress { page, offset: 0 }.into();
    address
}

impl GrantedMemory for SimBuffer {
    fn address(&self) -> u64 {
        match self.mode {
            AddressMode::Grants => address(Page::Grant(self.grant)),
            AddressMode::Frames => self.frame_address(),
        }
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

/// Has the worker do what there is to do.
///
/// # Panics
///
/// If that has no end.
pub fn come_to_rest(machine: &mut GuestDevices<SimHypervisor>) {
    let is_at_rest = |_| machine.prepare_sleep().expect("events") < Activity::Working;
    assert!((0..1000).any(is_at_rest), "it finds no rest");
}

/// Has the worker sleep, however many steps have found nothing before, with nothing to be tried again.
///
/// # Panics
///
/// If it does not.
pub fn sleeps(machine: &mut GuestDevices<SimHypervisor>) {
    for steps in 0..40 {
        for _ in 0..steps {
            machine.step();
        }
        assert!(
            machine.prepare_sleep().expect("events") < Activity::Working,
            "{steps}"
        );
    }
    assert_eq!(machine.try_again_at(), None);
}
