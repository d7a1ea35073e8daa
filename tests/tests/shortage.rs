//! What dom0 lacks for a moment its guests see as a pause, and never as an error.

use std::thread;
use std::time::Duration;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use xen_virtio_backend::blk::Disk;
use xen_virtio_sim::{FIRST_DEVICE, FIRST_IRQ, Fault, SimGuest, SimHypervisor, simulate};
use xen_virtio_tests::{
    BlkRequest, Driver, RawQueue, disk_device, disk_of, drive, driver, numbered_disk,
};
use xen_virtio_transport::{DeviceState, GuestDevices, MmioDevice, Register};

const SECTORS: u64 = 4096;
const SIZE: u16 = 64;

fn order(guest: &SimGuest, fault: Fault, times: u32) {
    guest.memory().faults().order(fault, times);
}

fn left(guest: &SimGuest, fault: Fault) -> u32 {
    guest.memory().faults().left(fault)
}

/// Writes and reads back a few sectors, while dom0 runs out of memory before each.
fn io_without_memory(driver: &Driver, queue: &mut RawQueue, run_out: impl Fn()) {
    for sector in 0..10u8 {
        run_out();
        let write = BlkRequest::new(driver, VIRTIO_BLK_T_OUT, sector.into(), 512, false);
        write.data.write(0, &[sector ^ 0x5a; 512]);
        assert_eq!(write.perform(driver, queue), (0, 1));
        run_out();
        let read = BlkRequest::new(driver, VIRTIO_BLK_T_IN, sector.into(), 512, true);
        assert_eq!(read.perform(driver, queue), (0, 513));
        assert_eq!(read.data.read(), [sector ^ 0x5a; 512]);
    }
}

#[test]
fn copies_that_fail_for_want_of_memory_are_made_again() {
    let file = numbered_disk(SECTORS);
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(SIZE);
    io_without_memory(&driver, &mut queue, || {
        order(&guest, Fault::CopyCall, 3);
    });
    assert!(!driver.needs_reset());
    assert_eq!(left(&guest, Fault::CopyCall), 0);
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!(
        (report.request_errors, &report.failure, &report.warning),
        (0, &None, &None)
    );
}

#[test]
fn a_queue_that_cannot_be_mapped_for_want_of_memory_is_mapped_later() {
    let file = numbered_disk(SECTORS);
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    order(&guest, Fault::MapRing, 4);
    let mut queue = driver.start(SIZE);
    io_without_memory(&driver, &mut queue, || {});
    assert!(!driver.needs_reset());
    assert_eq!(left(&guest, Fault::MapRing), 0);
    // One that is stopped before it could be mapped is not mapped any more.
    order(&guest, Fault::MapRing, u32::MAX);
    driver.start(SIZE);
    driver.negotiate(driver.offered_features());
    order(&guest, Fault::MapRing, 0);
    thread::sleep(Duration::from_millis(50));
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!(
        (report.grants_mapped, &report.failure, &report.warning),
        (0, &None, &None)
    );
}

/// The tries before it were dom0's for certain, and count for nothing.
#[test]
fn one_doubtful_try_after_many_without_memory_is_no_fault_of_the_guests() {
    let file = numbered_disk(SECTORS);
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    order(&guest, Fault::MapRing, u32::MAX);
    let mut queue = driver.start(SIZE);
    // Longer than a doubtful one is tried again.
    thread::sleep(Duration::from_secs(7));
    order(&guest, Fault::DoubtfulMap, 3);
    order(&guest, Fault::MapRing, 0);
    io_without_memory(&driver, &mut queue, || {});
    assert_eq!(left(&guest, Fault::DoubtfulMap), 0);
    assert!(!driver.needs_reset());
    machine.stop().unwrap();
}

#[test]
fn a_ring_that_can_never_be_mapped_is_the_guests_fault_in_the_end() {
    let file = numbered_disk(SECTORS);
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    order(&guest, Fault::DoubtfulMap, u32::MAX);
    driver.start(SIZE);
    assert!(driver.wait(|| driver.needs_reset()));
    order(&guest, Fault::DoubtfulMap, 0);
    let mut queue = driver.start(SIZE);
    io_without_memory(&driver, &mut queue, || {});
    machine.stop().unwrap();
}

#[test]
fn an_interrupt_that_could_not_be_raised_is_raised_later() {
    let file = numbered_disk(SECTORS);
    let (guest, _machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(SIZE);
    order(&guest, Fault::Interrupt, 3);
    BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 512, true).describe(&queue, 0);
    queue.offer(0);
    driver.notify(0);
    assert!(guest.wait_interrupt(FIRST_IRQ, 0, Duration::from_secs(10)));
    assert_eq!(left(&guest, Fault::Interrupt), 0);
}

#[test]
fn a_range_that_xen_refuses_leaves_the_guest_its_other_devices() {
    let file = numbered_disk(SECTORS);
    let (hypervisor, guest) = simulate(256).unwrap();
    let mut machine = GuestDevices::new(hypervisor);
    let kept = DeviceState::private().unwrap();
    order(&guest, Fault::Claim, 1);
    let device = device(&mut machine, &file, &kept);
    let refused = machine.add(FIRST_DEVICE, device).unwrap_err();
    assert!(refused.to_string().contains("0x2000000"), "{refused}");
    let device = self::device(&mut machine, &file, &kept);
    machine.add(FIRST_DEVICE, device).unwrap();
    drive(&mut machine, &guest, |driver| {
        let mut queue = driver.start(SIZE);
        io_without_memory(driver, &mut queue, || {});
    });
}

/// A driver that gives up while dom0 lacks memory leaves nothing to be tried again: nobody looks for it for ever.
#[test]
fn a_reset_ends_the_wait() {
    let file = numbered_disk(SECTORS);
    let (hypervisor, guest) = simulate(256).unwrap();
    let mut machine = GuestDevices::new(hypervisor);
    let kept = DeviceState::private().unwrap();
    let device = device(&mut machine, &file, &kept);
    machine.add(FIRST_DEVICE, device).unwrap();
    drive(&mut machine, &guest, |driver| {
        driver.write(Register::Status, 0)
    });
    for fault in [Fault::CopyCall, Fault::MapRing] {
        order(&guest, fault, u32::MAX);
        drive(&mut machine, &guest, |driver| {
            let mut queue = driver.start(SIZE);
            BlkRequest::new(driver, VIRTIO_BLK_T_IN, 0, 512, true).describe(&queue, 0);
            queue.offer(0);
            driver.notify(0);
            driver.settle();
        });
        assert!(machine.try_again_at().is_some());
        drive(&mut machine, &guest, |driver| {
            driver.write(Register::Status, 0)
        });
        assert_eq!(machine.try_again_at(), None);
        order(&guest, fault, 0);
    }
}

/// A worker that takes a guest over while dom0 has no memory for its rings.
#[test]
fn a_takeover_waits_for_memory() {
    let file = numbered_disk(SECTORS);
    let (hypervisor, guest) = simulate(256).unwrap();
    let mut machine = GuestDevices::new(hypervisor);
    let kept = DeviceState::private().unwrap();
    let device = device(&mut machine, &file, &kept);
    let slot = machine.add(FIRST_DEVICE, device).unwrap();
    let mut queue = drive(&mut machine, &guest, |driver| driver.start(SIZE));
    machine.remove(slot);
    order(&guest, Fault::MapRing, 5);
    let device = self::device(&mut machine, &file, &kept);
    let slot = machine.add(FIRST_DEVICE, device).unwrap();
    let warning = machine.device(slot).unwrap().report().warning;
    assert!(warning.unwrap().contains("waits for dom0"));
    drive(&mut machine, &guest, move |driver| {
        io_without_memory(driver, &mut queue, || {});
        assert!(!driver.needs_reset());
    });
    assert_eq!(left(&guest, Fault::MapRing), 0);
}

fn device(
    machine: &mut GuestDevices<SimHypervisor>,
    file: &NamedTempFile,
    kept: &DeviceState,
) -> MmioDevice {
    let disk = Disk::open(file.path(), false).unwrap();
    disk_device(machine.hypervisor(), disk, kept.clone())
}
