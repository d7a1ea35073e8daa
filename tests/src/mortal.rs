//! Processes that serve a simulated guest, and die at chosen steps, each followed by another one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};
use xen_virtio_backend::{Device, StateArea, StateMemory};
use xen_virtio_dom0_tools::guest_state::{DeviceRecords, GuestState, Name};
use xen_virtio_dom0_tools::toolstack::libxl::{EntryForm, EntryKey};
use xen_virtio_dom0_tools::worker::event_loop::EventLoop;
use xen_virtio_guest_io::RawQueue;
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{
    FIRST_DEVICE, FIRST_IRQ, Fault, SimGuest, SimHypervisor, SimMemory, simulate,
};
use xen_virtio_transport::MmioDevice;

/// Bytes of the guest's state file.
const BYTES: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(10);
/// Frames of the guest, of which a driver gives none back.
const FRAMES: usize = 4096;

/// Makes the device that a process serves, from what an earlier process has left.
pub type MakeDevice = dyn Fn(&DeviceRecords<'_>) -> Box<dyn Device> + Send + Sync;

/// A state file whose every access is a step of the process.
struct SteppedMemory {
    file: Arc<MmapRegion<()>>,
    guest: SimMemory,
}

impl StateMemory for SteppedMemory {
    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        self.guest.faults().step();
        self.file.get_slice(offset, len).expect("within the state")
    }
}

/// Serves the guest with one device, as a worker does, until `over`.
fn serve(
    hypervisor: SimHypervisor,
    guest: &SimGuest,
    file: Arc<MmapRegion<()>>,
    mode: AddressMode,
    make: &MakeDevice,
    over: &AtomicBool,
) {
    let memory = SteppedMemory {
        file,
        guest: guest.memory().clone(),
    };
    let area = StateArea::new(Rc::new(memory), BYTES);
    let state = GuestState::new(area, BYTES).expect("a state file");
    let name = Name {
        key: EntryKey {
            form: EntryForm::Disk,
            devid: 51712,
        },
        base: FIRST_DEVICE.base,
        backing: None,
        device_type: 2,
    };
    let records = state.device(&name, false).expect("room");
    let device = make(&records);
    let state = records.device_state(&device.identity().queue_sizes);
    let state = state.expect("room");
    let device = MmioDevice::new(device, &hypervisor, mode, FIRST_IRQ, state);
    let mut device = device.expect("registers of such a device");
    // The driver may have been told otherwise by an earlier process.
    device.update();
    let mut server = EventLoop::new(hypervisor, Duration::from_micros(20), 100).expect("memory");
    server.add(FIRST_DEVICE, device).expect("a free page");
    while !over.load(Ordering::SeqCst) {
        server
            .serve(Some(Duration::from_millis(1)))
            .expect("events");
    }
}

/// Has `drive` drive a device whose process dies at the first step of `deaths`, the process that follows it at the second
/// of them, counted from its own beginning, and so on. dom0 has no memory for the first `maps` mappings of rings of each
/// process that follows. How many have died.
///
/// # Panics
///
/// If `drive` does.
pub fn drive_over_deaths(
    deaths: &[u64],
    maps: u32,
    make: &Arc<MakeDevice>,
    drive: impl FnOnce(&SimGuest) + Send + 'static,
) -> usize {
    drive_over_deaths_by(AddressMode::Grants, deaths, maps, make, drive)
}

/// As [`drive_over_deaths`], of a device whose driver names its memory as `mode` says.
///
/// # Panics
///
/// As there.
pub fn drive_over_deaths_by(
    mode: AddressMode,
    deaths: &[u64],
    maps: u32,
    make: &Arc<MakeDevice>,
    drive: impl FnOnce(&SimGuest) + Send + 'static,
) -> usize {
    let (hypervisor, guest) = simulate(FRAMES).expect("memory");
    let state = Arc::new(MmapRegion::new(BYTES).expect("memory"));
    let over = Arc::new(AtomicBool::new(false));
    let process = |hypervisor: SimHypervisor| {
        let (guest, state) = (guest.clone(), Arc::clone(&state));
        let (make, over) = (Arc::clone(make), Arc::clone(&over));
        thread::spawn(move || serve(hypervisor, &guest, state, mode, &*make, &over))
    };
    let driving = {
        let guest = guest.clone();
        thread::spawn(move || drive(&guest))
    };
    let faults = guest.memory().faults();
    let (mut died, mut next) = (0, hypervisor);
    let serving = loop {
        // Zero is no step.
        faults.die_at(deaths.get(died).copied().unwrap_or(0));
        let serving = process(next);
        while !driving.is_finished() && !faults.has_died() {
            thread::sleep(Duration::from_micros(50));
        }
        if !faults.has_died() {
            break serving;
        }
        // The thread stays where it is for ever, as nothing of a killed process goes on.
        died += 1;
        guest.memory().faults().order(Fault::MapRing, maps);
        next = guest.take_over();
    };
    let driven = driving.join();
    over.store(true, Ordering::SeqCst);
    assert!(driven.is_ok(), "after deaths at the steps {deaths:?}");
    // One that dies after its driver was done has nobody to follow it.
    while !serving.is_finished() && !faults.has_died() {
        thread::sleep(Duration::from_micros(50));
    }
    died + usize::from(faults.has_died())
}

/// Waits as a driver does: for interrupts, and for as many used elements as were `offered` since the queue began, of which
/// those at `heads` are not back yet. Each comes back once: with how many bytes were written.
///
/// # Panics
///
/// If one does not, or comes back twice.
pub fn wait_for_all(
    guest: &SimGuest,
    queue: &RawQueue,
    offered: u16,
    heads: &[u16],
) -> BTreeMap<u16, u32> {
    let mut seen = offered - u16::try_from(heads.len()).expect("few heads");
    let mut back = BTreeMap::new();
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
            let (head, written) = queue.used(seen);
            let head = u16::try_from(head).expect("a head");
            assert!(heads.contains(&head), "head {head} was not offered");
            assert!(
                back.insert(head, written).is_none(),
                "head {head} came back twice"
            );
            seen = seen.wrapping_add(1);
            assert!(seen <= offered, "more came back than was offered");
        }
    }
    back
}

/// Allows this process as many descriptors as it can have: those of dead processes stay open.
pub fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let _ = setrlimit(Resource::Nofile, all);
}
