//! What the targets share: a device in this thread, and a driver of it.

use std::cell::RefCell;
use std::rc::Rc;
use vm_memory::MmapRegion;
use xen_virtio_backend::RingStock;
use xen_virtio_backend::blk::{Blk, Disk};
use xen_virtio_backend::{
    Activity, DeviceType, QueueIndex, QueueJournal, QueueLayout, QueueStart, StateArea,
};
use xen_virtio_dom0_tools::guest_state::{Backing, GuestState, GuestStateError, Name};
use xen_virtio_dom0_tools::toolstack::libxl::{EntryForm, EntryKey};
use xen_virtio_guest_io::{Buffer, Driver, GrantedMemory, Platform, RawQueue};
use xen_virtio_guest_mapping::{AddressMode, GuestAddress};
use xen_virtio_sim::{SimGuest, SimHypervisor, SimMemory, simulate};
use xen_virtio_transport::{DeviceState, MmioDevice, Width};

/// What `xen-sys` would make hypercalls through in a guest of its own. Nothing here calls that; but the linker keeps all of
/// an instrumented program (ld 2.44), and wants to find it.
#[cfg(target_arch = "x86_64")]
#[used]
#[unsafe(no_mangle)]
pub static HYPERCALL_PAGE: [u8; 4096] = [0; 4096];

/// The device's key and page, as libxl would give them.
pub const KEY: EntryKey = EntryKey {
    form: EntryForm::Disk,
    devid: 51712,
};
pub const BASE: u64 = 0x0200_0000;
const LINE: u32 = 33;
/// Bytes of the guest's state file.
pub const BYTES: usize = 64 << 10;
const DISK_BYTES: u64 = 1 << 16;
/// More turns than the device takes for what a driver can make available at once.
const MAX_TURNS: u32 = 100_000;

/// A guest that nobody answers, of which one queue and some buffers are used.
pub struct QueueGuest {
    pub guest: SimGuest,
    pub queue: RawQueue,
    pub buffers: Vec<Buffer>,
}

impl QueueGuest {
    /// One with a queue of `size` entries, and buffers of so many bytes, which the device may write or not.
    pub fn new(size: u16, buffers: &[(usize, bool)]) -> Self {
        let (_, guest) = simulate(64).expect("memory");
        let driver = xen_virtio_tests::driver(&guest, 0);
        let buffers = buffers.iter();
        Self {
            queue: RawQueue::new(&driver, size),
            buffers: buffers
                .map(|(len, device_writes)| driver.buffer(*len, *device_writes))
                .collect(),
            guest,
        }
    }

    /// The only queue, as a driver that has accepted `features` begins with it.
    pub fn start(&self, size: u16, features: u64) -> QueueStart {
        for area in [&self.queue.available, &self.queue.used] {
            area.write(0, &[0; 6 + 8]);
        }
        let [descriptors, available, used] = self.queue.addresses().map(GuestAddress);
        QueueStart {
            layout: QueueLayout {
                size,
                descriptors,
                available,
                used,
            },
            features,
            journal: QueueJournal::private().expect("memory"),
            latencies: Rc::default(),
            trace: Rc::default(),
        }
    }

    /// Its only queue.
    pub fn index() -> QueueIndex {
        QueueIndex::new(0, 1).expect("the first queue")
    }
}

struct World {
    hypervisor: SimHypervisor,
    memory: SimMemory,
    device: Option<MmioDevice>,
    disk: tempfile::NamedTempFile,
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

fn with_world<T>(use_it: impl FnOnce(&mut World) -> T) -> T {
    WORLD.with_borrow_mut(|world| {
        use_it(world.get_or_insert_with(|| {
            let (hypervisor, guest) = simulate(512).expect("memory");
            let disk = tempfile::NamedTempFile::new().expect("a temporary file");
            disk.as_file().set_len(DISK_BYTES).expect("room for a disk");
            World {
                memory: guest.memory().clone(),
                hypervisor,
                device: None,
                disk,
            }
        }))
    })
}

fn with_device<T>(use_it: impl FnOnce(&mut MmioDevice) -> T) -> T {
    with_world(|world| use_it(world.device.as_mut().expect("a device")))
}

/// Memory for a state file.
pub fn state_area() -> StateArea {
    area_of(BYTES)
}

/// As [`state_area`], of `bytes`.
pub fn area_of(bytes: usize) -> StateArea {
    let memory: MmapRegion<()> = MmapRegion::new(bytes).expect("memory");
    StateArea::new(Rc::new(memory), bytes)
}

/// The device as its guest's state names it.
fn name() -> Name {
    let backing = with_world(|world| Backing::of(world.disk.as_file()).expect("an open file"));
    Name {
        key: KEY,
        base: BASE,
        backing: Some(backing),
        device_type: DeviceType::BLOCK.0,
    }
}

/// What the device keeps in `area`.
fn kept(area: StateArea) -> Result<(StateArea, DeviceState), GuestStateError> {
    let bytes = area.len();
    let state = GuestState::new(area, bytes)?;
    let records = state.device(&name(), false)?;
    Ok((
        records.own(0, Blk::KEPT)?,
        records.device_state(&[Blk::QUEUE_SIZE; 2])?,
    ))
}

/// Puts a disk of two queues there that goes on from `area`, a whole state file. False if it says that it cannot.
pub fn make_device(area: StateArea) -> bool {
    let kept = kept(area);
    with_world(|world| {
        world.device = None;
        let mut disk = Disk::open(world.disk.path(), false).expect("a disk");
        disk.set_erases(disk.can_erase());
        let Ok((own, state)) = kept else {
            return false;
        };
        let blk = Blk::new(disk, [0; 20], 2, own, &RingStock::new(1)).expect("memory");
        let hypervisor = &world.hypervisor;
        let mode = AddressMode::Grants;
        world.device = MmioDevice::new(Box::new(blk), hypervisor, mode, LINE, state).ok();
        world.device.is_some()
    })
}

/// Lets the device do all that there is to do, as a worker does before it sleeps.
pub fn run_device() {
    let mut turns = 0;
    while turns < MAX_TURNS {
        let activity = with_device(|device| match device.step() {
            Activity::Idle => device.prepare_sleep(),
            activity => activity,
        });
        match activity {
            Activity::Idle => return,
            // For the disk, which another program may keep busy.
            Activity::Waiting => std::thread::yield_now(),
            Activity::Working => turns += 1,
        }
    }
    panic!("the device never rests");
}

/// Resets the device. Nothing of the guest is mapped then.
pub fn reset_device() {
    with_device(|device| {
        device.write(0x70, Width::Four, 0);
        let report = device.report();
        assert_eq!((report.status, report.grants_mapped), (0, 0));
    });
}

/// A driver of the device in this thread.
pub fn driver() -> Driver {
    Driver::new(InThread)
}

struct InThread;

impl Platform for InThread {
    fn read(&self, offset: u64, width: Width) -> u64 {
        with_device(|device| device.read(offset, width))
    }

    fn write(&self, offset: u64, width: Width, value: u64) {
        with_device(|device| device.write(offset, width, value));
    }

    fn allocate(&self, len: usize, device_writes: bool) -> Box<dyn GrantedMemory> {
        with_world(|world| xen_virtio_tests::allocate(&world.memory, len, device_writes))
    }
}

/// Numbers from a target's input; zeros after its end.
pub struct Numbers<'a>(pub &'a [u8]);

impl Numbers<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn take<const COUNT: usize>(&mut self) -> [u8; COUNT] {
        let mut bytes = [0; COUNT];
        let count = COUNT.min(self.0.len());
        let (here, rest) = self.0.split_at(count);
        bytes[..count].copy_from_slice(here);
        self.0 = rest;
        bytes
    }
}
