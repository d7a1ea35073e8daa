//! What a hostile or broken driver does to registers, rings and descriptors: each ends as this list says,
//! and the device works after a reset.

use std::time::Duration;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT;
use xen_virtio_guest_mapping::GRANT_BIT;
use xen_virtio_tests::{BlkRequest, Driver, NEXT, NO_STATUS, Negotiated, RawQueue, WRITE, disk_of};
use xen_virtio_transport::sim::SimGuest;
use xen_virtio_transport::{Register, Width};

const SIZE: u16 = 64;

fn disk_file() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

/// How a malformed thing ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The device says DEVICE_NEEDS_RESET, with a configuration interrupt.
    NeedsReset,
    /// The request ends with an error status.
    ErrorStatus,
}

/// A thing to do with a running queue and a good request at descriptor 0 that was not offered yet.
type Mischief = fn(&Driver, &mut RawQueue, &BlkRequest);

const INDIRECT: u16 = 4;
const _: () = assert!(INDIRECT as u32 == VRING_DESC_F_INDIRECT);

const LIST: &[(&str, End, Mischief)] = &[
    (
        "a chain begins beyond the table",
        End::NeedsReset,
        |_, queue, _| queue.offer(SIZE),
    ),
    (
        "a chain begins at the largest index",
        End::NeedsReset,
        |_, queue, _| queue.offer(u16::MAX),
    ),
    (
        "a chain goes on beyond the table",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 16, NEXT, SIZE);
            queue.offer(0);
        },
    ),
    (
        "a chain loops to its head",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 16, NEXT, 0);
            queue.offer(0);
        },
    ),
    (
        "a chain loops further on",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(2, request.status.address(), 1, NEXT | WRITE, 1);
            queue.offer(0);
        },
    ),
    (
        "the available index runs ahead",
        End::NeedsReset,
        |_, queue, _| queue.set_available_index(SIZE + 1),
    ),
    (
        "the available index goes backwards",
        End::NeedsReset,
        |_, queue, _| queue.set_available_index(u16::MAX),
    ),
    (
        "an indirect table was not negotiated",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 16, INDIRECT, 0);
            queue.offer(0);
        },
    ),
    (
        "an indirect descriptor within a chain",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(1, request.data.address(), 16, NEXT | INDIRECT, 2);
            queue.offer(0);
        },
    ),
    (
        "readable after writable",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.data.address(), 16, NEXT | WRITE, 1);
            queue.set_descriptor(1, request.header.address(), 16, NEXT, 2);
            queue.offer(0);
        },
    ),
    (
        "more than 2^32 bytes in a chain",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), u32::MAX, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "nowhere to put the status",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 16, 0, 0);
            queue.offer(0);
        },
    ),
    (
        "only empty descriptors",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 0, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the status lies in no grant",
        End::NeedsReset,
        |_, queue, _| {
            queue.set_descriptor(2, GRANT_BIT | 0xfff_f000, 1, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the status lies in a frame that was not granted",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(2, request.status.frame_address(), 1, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the status is granted read-only",
        End::NeedsReset,
        |_, queue, request| {
            queue.set_descriptor(2, request.header.address(), 1, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the header lies in no grant",
        End::ErrorStatus,
        |_, queue, _| {
            queue.set_descriptor(0, GRANT_BIT | 0xfff_f000, 16, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "the header lies in a frame that was not granted",
        End::ErrorStatus,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.frame_address(), 16, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "the header is at address 0",
        End::ErrorStatus,
        |_, queue, _| {
            queue.set_descriptor(0, 0, 16, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "the header is too short",
        End::ErrorStatus,
        |_, queue, request| {
            queue.set_descriptor(0, request.header.address(), 15, NEXT, 1);
            queue.offer(0);
        },
    ),
    (
        "there is no header",
        End::ErrorStatus,
        |_, queue, request| {
            queue.set_descriptor(0, request.status.address(), 1, WRITE, 0);
            queue.offer(0);
        },
    ),
    (
        "the data runs beyond its grants",
        End::ErrorStatus,
        |_, queue, request| {
            // The next reference is the status's, and the one after it nobody's.
            queue.set_descriptor(1, request.data.address(), 16 << 10, NEXT | WRITE, 2);
            queue.offer(0);
        },
    ),
    (
        "the data wraps around the address space",
        End::ErrorStatus,
        |_, queue, _| {
            queue.set_descriptor(1, u64::MAX - 100, 512, NEXT | WRITE, 2);
            queue.offer(0);
        },
    ),
    (
        "the data's reference has more than 32 bits",
        End::ErrorStatus,
        |_, queue, _| {
            queue.set_descriptor(1, GRANT_BIT | 1 << 44, 512, NEXT | WRITE, 2);
            queue.offer(0);
        },
    ),
    (
        "the data is 4 GiB long",
        End::ErrorStatus,
        |_, queue, request| {
            queue.set_descriptor(1, request.data.address(), u32::MAX - 512, NEXT | WRITE, 2);
            queue.offer(0);
        },
    ),
];

/// A good request, alone.
fn works(driver: &Driver) {
    let mut queue = driver.start(SIZE);
    let request = BlkRequest::new(driver, VIRTIO_BLK_T_IN, 0, 512, true);
    assert_eq!(request.perform(driver, &mut queue), (0, 513));
}

#[test]
fn every_malformed_ring_ends_as_listed_and_the_device_recovers() {
    let file = disk_file();
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = Driver::new(guest.clone(), 0);
    for (what, end, mischief) in LIST {
        let mut queue = driver.start(SIZE);
        let request = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 512, true);
        request.describe(&queue, 0);
        let interrupts = guest.interrupts(driver.irq);
        mischief(&driver, &mut queue, &request);
        driver.notify(0);
        match end {
            End::NeedsReset => {
                assert!(
                    driver.wait(|| driver.needs_reset()),
                    "{what}: no DEVICE_NEEDS_RESET"
                );
                assert!(
                    guest.wait_interrupt(driver.irq, interrupts, Duration::from_secs(5)),
                    "{what}"
                );
                let causes = driver.read(Register::InterruptStatus);
                assert!(causes & 2 != 0, "{what}: no configuration interrupt");
                assert_eq!(request.status.read(), [NO_STATUS], "{what}");
                // The broken queue is left alone, also when it is kicked again.
                driver.notify(0);
                assert_eq!(queue.used_index(), 0, "{what}");
            }
            End::ErrorStatus => {
                assert!(
                    driver.wait(|| queue.used_index() == 1),
                    "{what}: never completed"
                );
                assert_eq!(request.status.read(), [1], "{what}");
                assert_eq!(queue.used(0), (0, 1), "{what}");
                assert!(!driver.needs_reset(), "{what}");
            }
        }
        works(&driver);
    }
    driver.write(Register::Status, 0);
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!((report.grants_mapped, report.failure.clone()), (0, None));
}

/// Queues that cannot be, by what their registers hold.
#[test]
fn a_queue_that_cannot_be_needs_a_reset() {
    let file = disk_file();
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = Driver::new(guest.clone(), 0);
    let good = RawQueue::new(guest.memory(), SIZE);
    let [descriptors, available, used] = good.addresses();
    let read_only = guest
        .memory()
        .grant(guest.memory().allocate(1).unwrap(), 1, false);
    let read_only = GRANT_BIT | u64::from(read_only.0) << 12;
    for (what, size, addresses) in [
        ("no size", 0, [descriptors, available, used]),
        (
            "a size that is no power of two",
            48,
            [descriptors, available, used],
        ),
        (
            "a size beyond the offered one",
            1024,
            [descriptors, available, used],
        ),
        (
            "a size of more than 16 bits",
            0x1_0040,
            [descriptors, available, used],
        ),
        ("all areas at address 0", SIZE.into(), [0, 0, 0]),
        (
            "descriptors at address 0",
            SIZE.into(),
            [0, available, used],
        ),
        (
            "an available ring at address 0",
            SIZE.into(),
            [descriptors, 0, used],
        ),
        (
            "a used ring at address 0",
            SIZE.into(),
            [descriptors, available, 0],
        ),
        (
            "descriptors off their alignment",
            SIZE.into(),
            [descriptors + 8, available, used],
        ),
        (
            "an available ring off its alignment",
            SIZE.into(),
            [descriptors, available + 1, used],
        ),
        (
            "a used ring off its alignment",
            SIZE.into(),
            [descriptors, available, used + 2],
        ),
        (
            "a used ring that is granted read-only",
            SIZE.into(),
            [descriptors, available, read_only],
        ),
        (
            "a ring by its frame",
            SIZE.into(),
            [good.descriptors.frame_address(), available, used],
        ),
        (
            "a ring in no grant",
            SIZE.into(),
            [GRANT_BIT | 0xfff_f000, available, used],
        ),
        (
            "a ring at the end of the address space",
            SIZE.into(),
            [!0xf, available, used],
        ),
    ] {
        assert_eq!(
            driver.negotiate(driver.offered_features()),
            Negotiated::Accepted
        );
        driver.start_queue(0, size, addresses);
        assert!(driver.needs_reset(), "{what}");
        driver.driver_ok();
        driver.notify(0);
        works(&driver);
    }
    driver.write(Register::Status, 0);
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!(report.grants_mapped, 0);
}

/// A driver that does not accept what keeps its memory safe is told so at FEATURES_OK.
#[test]
fn features_are_all_or_nothing() {
    let file = disk_file();
    let (guest, _machine) = disk_of(&[file.path()], 1, false);
    let driver = Driver::new(guest, 0);
    let offered = driver.offered_features();
    for features in [
        0,
        offered & !(1 << 32),
        offered & !(1 << 33),
        offered | 1 << 34,
        u64::MAX,
    ] {
        assert_eq!(
            driver.negotiate(features),
            Negotiated::Refused,
            "{features:#x}"
        );
    }
    works(&driver);
}

/// Every offset of the page, at every width, read and written with several values, in every state: all is
/// answered, and the device works after a reset.
#[test]
fn every_register_at_every_width_is_answered() {
    let file = disk_file();
    let (guest, machine) = disk_of(&[file.path()], 2, false);
    let driver = Driver::new(guest.clone(), 0);
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
    let driver = Driver::new(guest, 0);
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
        let driver = Driver::new(guest, 0);
        let _queue = driver.start(SIZE);
        for _ in 0..20_000 {
            driver.notify(0);
        }
    };
    let stormer = std::thread::spawn({
        let guest = guest.clone();
        move || storm(guest)
    });
    let driver = Driver::new(guest, 1);
    for _ in 0..50 {
        works(&driver);
    }
    stormer.join().unwrap();
    drop(machine);
}
