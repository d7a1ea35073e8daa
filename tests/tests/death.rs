//! The process that serves a guest dies at every step of what it does, and another one takes over: nothing
//! is lost, nothing is done twice, and the driver notices nothing.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};
use xen_virtio_backend::blk::{Blk, Disk, RingStock};
use xen_virtio_backend::{DeviceType, StateArea, StateMemory};
use xen_virtio_dom0_tools::demo::{FIRST_DEVICE, FIRST_IRQ};
use xen_virtio_dom0_tools::event_loop::EventLoop;
use xen_virtio_dom0_tools::guest_state::{Backing, GuestState, Name};
use xen_virtio_dom0_tools::libxl::{EntryForm, EntryKey};
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_guest_mapping::sim::SimMemory;
use xen_virtio_tests::{BlkRequest, Driver, Random, RawQueue, driver};
use xen_virtio_transport::sim::{SimGuest, SimHypervisor, simulate};
use xen_virtio_transport::{Hypervisor, MmioDevice, Register};

const SIZE: u16 = 32;
const BLOCK: usize = 4096;
/// Bytes of the guest's state file.
const BYTES: usize = 64 << 10;
/// Requests that are made available at once.
const TOGETHER: u16 = 3;
const LIMIT: Duration = Duration::from_secs(10);

/// A state file whose every access is a step of the process.
struct SteppedMemory {
    file: Arc<MmapRegion<()>>,
    guest: SimMemory,
}

impl StateMemory for SteppedMemory {
    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        self.guest.lifeline().step();
        self.file.get_slice(offset, len).expect("within the state")
    }
}

/// Serves the guest with one disk, as a worker does, until `over`.
fn serve(
    hypervisor: SimHypervisor,
    guest: &SimGuest,
    file: Arc<MmapRegion<()>>,
    disk: &Path,
    over: &AtomicBool,
) {
    let memory = SteppedMemory {
        file,
        guest: guest.memory().clone(),
    };
    let state = GuestState::new(StateArea::new(Rc::new(memory), BYTES), BYTES).unwrap();
    let key = EntryKey {
        form: EntryForm::Disk,
        devid: 51712,
    };
    let disk = Disk::open(disk, false).unwrap();
    let backing = Backing::of(disk.file()).unwrap();
    let name = Name {
        key,
        base: FIRST_DEVICE.base,
        backing: Some(backing),
        device_type: DeviceType::BLOCK.0,
    };
    let records = state.device(&name, false).unwrap();
    let kept = records.own(0, Blk::KEPT).unwrap();
    let state = records.device_state(&[Blk::QUEUE_SIZE]).unwrap();
    let blk = Blk::new(disk, [0; 20], 1, kept, &RingStock::new(1)).unwrap();
    let access = hypervisor.guest_access(AddressMode::Grants);
    let line = hypervisor.interrupt_line(FIRST_IRQ);
    let mode = AddressMode::Grants;
    let device = MmioDevice::new(Box::new(blk), mode, access, line, state).unwrap();
    let mut server = EventLoop::new(hypervisor, Duration::from_micros(20), 100).unwrap();
    server.add(FIRST_DEVICE, device).unwrap();
    while !over.load(Ordering::SeqCst) {
        server.serve(Some(Duration::from_millis(1))).unwrap();
    }
}

/// Waits as a driver does: for interrupts, and for as many used elements as were offered. Each head comes
/// back once.
fn wait_for_all(guest: &SimGuest, queue: &RawQueue, offered: u16, heads: &mut BTreeSet<u32>) {
    let mut seen = offered - u16::try_from(heads.len()).unwrap();
    while seen != offered {
        queue.set_used_event(seen);
        let interrupts = guest.interrupts(FIRST_IRQ);
        if queue.used_index() == seen {
            assert!(
                guest.wait_interrupt(FIRST_IRQ, interrupts, LIMIT),
                "no interrupt for the used element {seen} of {offered}"
            );
        }
        while seen != queue.used_index() {
            let (head, _) = queue.used(seen);
            assert!(heads.remove(&head), "head {head} came back twice");
            seen = seen.wrapping_add(1);
            assert!(seen <= offered, "more came back than was offered");
        }
    }
}

/// Offers `requests` together, and waits for all of them.
fn perform(
    guest: &SimGuest,
    driver: &Driver,
    queue: &mut RawQueue,
    offered: &mut u16,
    requests: &[BlkRequest],
) {
    let mut heads = BTreeSet::new();
    for (request, head) in requests.iter().zip((0..).step_by(3)) {
        request.describe(queue, head);
        queue.offer(head);
        heads.insert(head.into());
        *offered += 1;
    }
    driver.notify(0);
    wait_for_all(guest, queue, *offered, &mut heads);
    for request in requests {
        assert_eq!(request.status.read(), [0]);
    }
}

fn content(round: u8, index: u16) -> Vec<u8> {
    vec![round * 16 + u8::try_from(index).unwrap() + 1; BLOCK]
}

/// What the driver does: everything that happens between a device and its driver, twice.
fn drive(guest: &SimGuest, disk: &Path) {
    let driver = driver(guest, 0);
    for round in 0..2 {
        let mut queue = driver.start(SIZE);
        let mut offered = 0;
        let request = |kind, index: u16, len, reads| {
            BlkRequest::new(&driver, kind, u64::from(index) * 8, len, reads)
        };
        let writes: Vec<_> = (0..TOGETHER)
            .map(|index| {
                let write = request(VIRTIO_BLK_T_OUT, index, BLOCK, false);
                write.data.write(0, &content(round, index));
                write
            })
            .collect();
        perform(guest, &driver, &mut queue, &mut offered, &writes);
        let flush = [request(VIRTIO_BLK_T_FLUSH, 0, 0, false)];
        perform(guest, &driver, &mut queue, &mut offered, &flush);
        let on_disk = std::fs::read(disk).unwrap();
        for index in 0..TOGETHER {
            let start = usize::from(index) * BLOCK;
            assert_eq!(on_disk[start..start + BLOCK], content(round, index));
        }
        let reads: Vec<_> = (0..TOGETHER)
            .map(|index| request(VIRTIO_BLK_T_IN, index, BLOCK, true))
            .collect();
        perform(guest, &driver, &mut queue, &mut offered, &reads);
        for (read, index) in reads.iter().zip(0..) {
            assert_eq!(read.data.read(), content(round, index));
        }
        assert!(!driver.needs_reset());
        driver.write(Register::Status, 0);
        assert_eq!(driver.read(Register::Status), 0);
    }
}

/// Drives a device whose process dies at the first step of `deaths`, the process that follows it at the second of them,
/// counted from its own beginning, and so on. How many have died.
fn dies_at(deaths: &[u64]) -> usize {
    dies_without_memory_at(deaths, 0)
}

/// As [`dies_at`], and dom0 has no memory for the first `maps` mappings of rings of each process that follows.
fn dies_without_memory_at(deaths: &[u64], maps: u32) -> usize {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let (hypervisor, guest) = simulate(64).unwrap();
    let state = Arc::new(MmapRegion::new(BYTES).unwrap());
    let over = Arc::new(AtomicBool::new(false));
    let process = |hypervisor: SimHypervisor| {
        let (guest, state) = (guest.clone(), Arc::clone(&state));
        let (disk, over) = (disk.path().to_owned(), Arc::clone(&over));
        thread::spawn(move || serve(hypervisor, &guest, state, &disk, &over))
    };
    let driving = {
        let (guest, path) = (guest.clone(), disk.path().to_owned());
        thread::spawn(move || drive(&guest, &path))
    };
    let lifeline = guest.memory().lifeline();
    let (mut died, mut next) = (0, hypervisor);
    let serving = loop {
        // Zero is no step.
        lifeline.cut_at(deaths.get(died).copied().unwrap_or(0));
        let serving = process(next);
        while !driving.is_finished() && !lifeline.is_cut() {
            thread::sleep(Duration::from_micros(50));
        }
        if !lifeline.is_cut() {
            break serving;
        }
        // The thread stays where it is for ever, as nothing of a killed process goes on.
        died += 1;
        guest.memory().run_out_of_memory(0, maps);
        next = guest.take_over();
    };
    let driven = driving.join();
    over.store(true, Ordering::SeqCst);
    assert!(driven.is_ok(), "after deaths at the steps {deaths:?}");
    // One that dies after its driver was done has nobody to follow it.
    while !serving.is_finished() && !lifeline.is_cut() {
        thread::sleep(Duration::from_micros(50));
    }
    died + usize::from(lifeline.is_cut())
}

/// Dies at step `first` and every other one after it. The last one that there was.
fn die_at_every_other(first: u64) -> u64 {
    // How many steps there are depends on how the threads meet: until it ends well without a death, often.
    let (mut step, mut without) = (first, 0);
    while without < 10 {
        without = if dies_at(&[step]) > 0 { 0 } else { without + 1 };
        step += 2;
    }
    step
}

/// Each dead process keeps its descriptors.
fn allow_descriptors() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}

#[test]
fn a_death_at_any_step_is_not_noticed() {
    allow_descriptors();
    // One thread for the odd steps, and one for the even.
    let halves = [1, 2].map(|first| thread::spawn(move || die_at_every_other(first)));
    for half in halves {
        let last = half.join().unwrap();
        assert!(last > 300, "only {last} steps");
    }
}

/// What the dead process completed and did not show is shown when there is memory, and the driver is told.
#[test]
fn a_takeover_without_memory_is_not_noticed() {
    allow_descriptors();
    // Before those a device's state is set up.
    let died: usize = (400..1100)
        .step_by(3)
        .map(|step| dies_without_memory_at(&[step], 2))
        .sum();
    assert!(died > 150, "only {died} deaths");
}

/// The process that takes over dies too, at each of its first steps, after a death at some step of the first.
#[test]
fn a_second_death_in_the_takeover_is_not_noticed() {
    /// Steps from a process's beginning to the end of a few requests.
    const TAKEOVER: u64 = 120;
    allow_descriptors();
    let seed = 0x6465_6174;
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    let mut both = 0;
    for second in 1..=TAKEOVER {
        // Most of those before 400 set up a device's state.
        let first = 300 + random.below(700) as u64;
        both += u32::from(dies_at(&[first, second]) == 2);
    }
    assert!(both > 100, "only {both} second deaths");
}
