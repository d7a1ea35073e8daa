//! What a hostile or broken driver does: on the simulator, what the board does too, and more.

use std::time::Duration;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use xen_virtio_sim::{FIRST_IRQ, SimGuest};
use xen_virtio_tests::{BlkRequest, Driver, disk_of, driver, malformed};
use xen_virtio_transport::{Register, Width};

const SIZE: u16 = 64;

fn disk_file() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

fn works(driver: &Driver) {
    malformed::works(driver).unwrap();
}

#[test]
fn everything_listed_ends_as_listed_and_the_device_recovers() {
    let file = disk_file();
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    assert_eq!(malformed::do_all(&driver).unwrap(), 51);
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!((report.grants_mapped, report.failure.clone()), (0, None));
}

#[test]
fn a_broken_queue_interrupts_the_driver() {
    let file = disk_file();
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(SIZE);
    let interrupts = guest.interrupts(FIRST_IRQ);
    queue.offer(SIZE);
    driver.notify(0);
    assert!(guest.wait_interrupt(FIRST_IRQ, interrupts, Duration::from_secs(5)));
    assert!(driver.needs_reset());
    drop(machine);
}

/// Every offset of the page, at every width, read and written with several values, in every state: all is
/// answered, and the device works after a reset.
#[test]
fn every_register_at_every_width_is_answered() {
    let file = disk_file();
    let (guest, machine) = disk_of(&[file.path()], 2, false);
    let driver = driver(&guest, 0);
    let mut accesses = 0;
    for running in [false, true] {
        for width in [Width::One, Width::Two, Width::Four, Width::Eight] {
            for offset in 0..0x200u64 {
                if running && offset % 0x40 == 0 {
                    driver.start(SIZE);
                }
                for value in [0, 1, 0x7fff_ffff, u64::MAX] {
                    driver.raw_write(offset, width, value);
                    driver.raw_read(offset, width);
                    accesses += 2;
                }
            }
        }
    }
    assert_eq!(accesses, 2 * 4 * 0x200 * 8);
    // Past the configuration space, and past the page.
    assert_eq!(driver.raw_read(0x1fc, Width::Eight), 0);
    assert_eq!(driver.raw_read(0x200, Width::Four), 0);
    works(&driver);
    drop(machine);
}

/// Registers of a queue that is not there, and QueueReady written twice.
#[test]
fn queue_registers_beyond_the_last_queue_have_no_effect() {
    let file = disk_file();
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(SIZE);
    for index in [1, 15, 0xffff, u32::MAX] {
        driver.start_queue(index, 64, queue.addresses());
        assert_eq!(driver.read(Register::QueueReady), 0);
        driver.notify(index);
    }
    driver.write(Register::QueueSel, 0);
    driver.write(Register::QueueReady, 1);
    assert!(!driver.needs_reset());
    let request = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 512, true);
    assert_eq!(request.perform(&driver, &mut queue), (0, 513));
    drop(machine);
}

/// A driver that keeps one device busy does not keep another from being served.
#[test]
fn a_kick_storm_on_one_device_leaves_the_other_alone() {
    let files = [disk_file(), disk_file()];
    let (guest, machine) = disk_of(&[files[0].path(), files[1].path()], 1, false);
    let storm = |guest: SimGuest| {
        let driver = driver(&guest, 0);
        let _queue = driver.start(SIZE);
        for _ in 0..20_000 {
            driver.notify(0);
        }
    };
    let stormer = std::thread::spawn({
        let guest = guest.clone();
        move || storm(guest)
    });
    let driver = driver(&guest, 1);
    for _ in 0..50 {
        works(&driver);
    }
    stormer.join().unwrap();
    drop(machine);
}
