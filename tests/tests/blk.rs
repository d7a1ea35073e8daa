//! The block device, from the driver's registers to the file, on the simulator.

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_drivers::device::blk::VirtIOBlk;
use xen_virtio_backend::RingStock;
use xen_virtio_backend::blk::{Blk, Disk, Topology};
use xen_virtio_backend::{
    Device, Limits, QueueIndex, QueueJournal, QueueLayout, QueueStart, StateArea,
};
use xen_virtio_guest_mapping::{AddressMode, GuestAddress};
use xen_virtio_sim::{FIRST_DEVICE, FIRST_IRQ, SimHal, SimMachine, SimTransport, simulate};
use xen_virtio_tests::{
    BlkRequest, NEXT, NO_STATUS, Negotiated, RawQueue, WRITE, disk_of, driver, numbered_disk,
};
use xen_virtio_transport::{MmioRange, Register, TrapRequest, Width};

const SECTORS: u64 = 4096;

/// What Linux's virtio_mmio and virtio_blk do from probe to the first read, register by register.
#[test]
fn linux_probes_the_device_and_reads() {
    let file = numbered_disk(SECTORS);
    let (guest, machine) = disk_of(&[file.path()], 2, false);
    let driver = driver(&guest, 0);
    assert_eq!(driver.read(Register::MagicValue), 0x7472_6976);
    assert_eq!(driver.read(Register::Version), 2);
    assert_eq!(driver.read(Register::DeviceId), 2);
    driver.read(Register::VendorId);
    let offered = driver.offered_features();
    for bit in [
        VIRTIO_F_VERSION_1,
        VIRTIO_F_ACCESS_PLATFORM,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_MQ,
        VIRTIO_RING_F_EVENT_IDX,
    ] {
        assert!(offered & 1 << bit != 0, "feature {bit}");
    }
    assert_eq!(driver.negotiate(offered), Negotiated::Accepted);
    let generation = driver.read(Register::ConfigGeneration);
    let capacity = driver.raw_read(0x100, Width::Four) | driver.raw_read(0x104, Width::Four) << 32;
    assert_eq!(capacity, SECTORS);
    assert_eq!(driver.read(Register::ConfigGeneration), generation);
    assert_eq!(driver.raw_read(0x100 + 34, Width::Two), 2, "num_queues");
    let mut queues = Vec::new();
    for index in 0..2 {
        driver.write(Register::QueueSel, index);
        assert_eq!(driver.read(Register::QueueReady), 0);
        let size = driver.read(Register::QueueSizeMax);
        assert!(size >= 128);
        let queue = RawQueue::new(&driver, 128);
        driver.start_queue(index, 128, queue.addresses());
        assert_eq!(driver.read(Register::QueueReady), 1);
        queues.push(queue);
    }
    driver.write(Register::QueueSel, 2);
    assert_eq!(driver.read(Register::QueueSizeMax), 0);
    driver.driver_ok();
    let request = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 9, 1024, true);
    let interrupts = guest.interrupts(FIRST_IRQ);
    assert_eq!(request.perform(&driver, &mut queues[0]), (0, 1025));
    assert_eq!(request.data.read(), [vec![9; 512], vec![10; 512]].concat());
    assert!(guest.wait_interrupt(FIRST_IRQ, interrupts, Duration::from_secs(5)));
    assert_eq!(driver.read(Register::InterruptStatus), 1);
    driver.write(Register::InterruptAck, 1);
    assert_eq!(driver.read(Register::InterruptStatus), 0);
    driver.write(Register::Status, 0);
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!(
        (report.requests, report.request_errors, report.grants_mapped),
        (1, 0, 0)
    );
}

/// Two drivers at once, each a thread, each with a disk of its own.
#[test]
fn two_drivers_at_once_keep_to_their_disks() {
    let files = [numbered_disk(SECTORS), numbered_disk(SECTORS)];
    let (guest, machine) = disk_of(&[files[0].path(), files[1].path()], 1, false);
    let drive = |number: u8| {
        let range = MmioRange {
            base: FIRST_DEVICE.base + u64::from(number) * 0x200,
            ..FIRST_DEVICE
        };
        let guest = guest.clone();
        std::thread::spawn(move || {
            SimHal::install(guest.memory().clone(), AddressMode::Grants);
            let mut driver = VirtIOBlk::<SimHal, _>::new(SimTransport::new(guest, range)).unwrap();
            for sector in 0..200 {
                driver
                    .write_blocks(sector * 8, &[number + 1; 4096])
                    .unwrap();
                let mut back = [0; 4096];
                driver.read_blocks(sector * 8, &mut back).unwrap();
                assert_eq!(back, [number + 1; 4096]);
            }
        })
    };
    for thread in [drive(0), drive(1)] {
        thread.join().unwrap();
    }
    for (number, file) in files.iter().enumerate() {
        let bytes = std::fs::read(file.path()).unwrap();
        assert!(
            bytes[..200 * 4096]
                .iter()
                .all(|byte| usize::from(*byte) == number + 1)
        );
    }
    for report in machine.stop().unwrap() {
        assert_eq!(
            (report.requests, report.request_errors, report.grants_mapped),
            (400, 0, 0)
        );
    }
    assert_eq!(
        (
            guest.memory().grants(),
            guest.memory().revoked_while_mapped()
        ),
        (0, 0)
    );
}

/// What the block device answers to one request, by its kind and place.
#[test]
fn requests_end_with_the_status_that_fits() {
    let file = numbered_disk(SECTORS);
    let size = std::fs::metadata(file.path()).unwrap().len();
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(64);
    let (ok, io_error, unsupported) = (0, 1, 2);
    // virtio 1.3, 2.7.8.2: the length is that of what was written from the first byte on without a gap.
    for (what, kind, sector, len, reads, expected) in [
        (
            "the last sector is read",
            VIRTIO_BLK_T_IN,
            SECTORS - 1,
            512,
            true,
            (ok, 513),
        ),
        (
            "beyond the end nothing is read",
            VIRTIO_BLK_T_IN,
            SECTORS,
            512,
            true,
            (io_error, 0),
        ),
        (
            "across the end nothing is read",
            VIRTIO_BLK_T_IN,
            SECTORS - 1,
            1024,
            true,
            (io_error, 0),
        ),
        (
            "no part of a sector is read",
            VIRTIO_BLK_T_IN,
            0,
            100,
            true,
            (io_error, 0),
        ),
        (
            "a sector that overflows is not read",
            VIRTIO_BLK_T_IN,
            u64::MAX,
            512,
            true,
            (io_error, 0),
        ),
        (
            "beyond the end nothing is written",
            VIRTIO_BLK_T_OUT,
            SECTORS,
            512,
            false,
            (io_error, 1),
        ),
        (
            "across the end nothing is written",
            VIRTIO_BLK_T_OUT,
            SECTORS - 1,
            1024,
            false,
            (io_error, 1),
        ),
        (
            "a sector that overflows is not written",
            VIRTIO_BLK_T_OUT,
            u64::MAX / 512 + 1,
            512,
            false,
            (io_error, 1),
        ),
        (
            "the last sector is written",
            VIRTIO_BLK_T_OUT,
            SECTORS - 1,
            512,
            false,
            (ok, 1),
        ),
        ("a flush is done", VIRTIO_BLK_T_FLUSH, 0, 1, false, (ok, 1)),
        (
            "the serial is given",
            VIRTIO_BLK_T_GET_ID,
            0,
            20,
            true,
            (ok, 21),
        ),
        (
            "behind the serial there is a gap",
            VIRTIO_BLK_T_GET_ID,
            0,
            30,
            true,
            (ok, 20),
        ),
        (
            "an unknown kind is unsupported",
            99,
            0,
            512,
            true,
            (unsupported, 0),
        ),
    ] {
        let request = BlkRequest::new(&driver, kind, sector, len, reads);
        assert_eq!(request.perform(&driver, &mut queue), expected, "{what}");
        if kind == VIRTIO_BLK_T_GET_ID {
            assert_eq!(request.data.read()[..20], *b"a serial of 20 bytes");
        }
        if expected.0 != ok && reads {
            assert!(
                request.data.read().iter().all(|byte| *byte == 0),
                "{what}: data came with the error"
            );
        }
    }
    assert_eq!(
        std::fs::metadata(file.path()).unwrap().len(),
        size,
        "the file has grown"
    );
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!(report.request_errors, 8);
}

/// Reads, writes and flushes under way together, each kind ending in its own time, do not get mixed up.
#[test]
fn sixteen_requests_at_once_keep_apart() {
    const SLOTS: u16 = 16;
    const ROUNDS: u16 = 200;
    struct Slot {
        write: BlkRequest,
        flush: BlkRequest,
        read: BlkRequest,
        steps: u16,
    }
    impl Slot {
        fn offer(&mut self, slot: u16, queue: &mut RawQueue) {
            let request = match self.steps % 3 {
                0 => {
                    let value = (slot * 31 + self.steps).to_le_bytes()[0];
                    self.write.data.write(0, &[value; 4096]);
                    &self.write
                }
                1 => &self.flush,
                _ => &self.read,
            };
            request.status.write(0, &[NO_STATUS]);
            request.describe(queue, slot * 3);
            queue.offer(slot * 3);
        }
        fn check(&mut self) {
            let request = match self.steps % 3 {
                0 => &self.write,
                1 => &self.flush,
                _ => &self.read,
            };
            assert_eq!(request.status.read(), [0], "step {}", self.steps);
            if self.steps % 3 == 2 {
                assert!(
                    self.read.data.read() == self.write.data.read(),
                    "step {}",
                    self.steps
                );
            }
            self.steps += 1;
        }
    }

    let file = numbered_disk(SECTORS);
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(64);
    let request = |kind, slot, len, reads| BlkRequest::new(&driver, kind, slot * 8, len, reads);
    let mut slots: Vec<Slot> = (0..u64::from(SLOTS))
        .map(|slot| Slot {
            write: request(VIRTIO_BLK_T_OUT, slot, 4096, false),
            flush: request(VIRTIO_BLK_T_FLUSH, slot, 1, false),
            read: request(VIRTIO_BLK_T_IN, slot, 4096, true),
            steps: 0,
        })
        .collect();
    for (number, slot) in (0..).zip(&mut slots) {
        slot.offer(number, &mut queue);
    }
    driver.notify(0);
    let mut seen = 0;
    while slots.iter().any(|slot| slot.steps < ROUNDS) {
        assert!(
            driver.wait(|| queue.used_index() != seen),
            "{seen} were completed"
        );
        let number = u16::try_from(queue.used(seen).0 / 3).unwrap();
        let slot = &mut slots[usize::from(number)];
        seen = seen.wrapping_add(1);
        slot.check();
        if slot.steps < ROUNDS {
            slot.offer(number, &mut queue);
            driver.notify(0);
        }
    }
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!(report.requests, u64::from(SLOTS * ROUNDS));
    assert_eq!((report.request_errors, report.kicks > 0), (0, true));
}

/// A queue that always has more to do than one step takes does not keep the others from theirs.
#[test]
fn queues_have_their_turns() {
    let file = numbered_disk(SECTORS);
    let disk = Disk::open(file.path(), false).unwrap();
    let kept = StateArea::private(Blk::KEPT).unwrap();
    let mut blk = Blk::new(disk, [0; 20], 2, kept, &RingStock::new(1)).unwrap();
    // Nobody answers this guest's traps: only its memory is used.
    let (_, guest) = simulate(256).unwrap();
    let driver = driver(&guest, 0);
    let mut access = guest.memory().access(AddressMode::Grants);
    let mut queues = [0, 1].map(|index| {
        let queue = RawQueue::new(&driver, 512);
        let [descriptors, available, used] = queue.addresses().map(GuestAddress);
        let layout = QueueLayout {
            size: 512,
            descriptors,
            available,
            used,
        };
        let features = 1 << VIRTIO_BLK_F_FLUSH;
        let index = QueueIndex::new(index, 2).unwrap();
        blk.start_queue(
            index,
            QueueStart {
                layout,
                features,
                journal: QueueJournal::private().unwrap(),
                latencies: Rc::default(),
                trace: Rc::default(),
            },
            &mut access,
        )
        .unwrap();
        queue
    });
    let request = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 512, true);
    let [busy, other] = &mut queues;
    // More than the device takes on at once.
    for head in (0..510).step_by(3) {
        request.describe(busy, head);
        busy.offer(head);
    }
    request.describe(other, 0);
    other.offer(0);
    let mut seen = 0;
    while other.used_index() == 0 {
        assert!(
            seen < 2000,
            "the busy queue was served {seen} times, the other never"
        );
        let _ = blk.step(&mut access).unwrap();
        while busy.used_index() != seen {
            busy.offer(u16::try_from(busy.used(seen).0).unwrap());
            seen += 1;
        }
    }
}

#[test]
fn a_read_only_disk_is_offered_and_kept_so() {
    let file = numbered_disk(SECTORS);
    let before = std::fs::read(file.path()).unwrap();
    let (guest, _machine) = disk_of(&[file.path()], 1, true);
    let driver = driver(&guest, 0);
    assert!(driver.offered_features() & 1 << VIRTIO_BLK_F_RO != 0);
    let mut queue = driver.start(64);
    let request = BlkRequest::new(&driver, VIRTIO_BLK_T_OUT, 0, 512, false);
    assert_eq!(request.perform(&driver, &mut queue), (1, 1));
    assert_eq!(std::fs::read(file.path()).unwrap(), before);
}

/// What a request to erase has as its data (virtio 1.3, 5.2.6).
fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let numbers = [sectors, flags].map(u32::to_le_bytes).concat();
    [&sector.to_le_bytes()[..], &numbers].concat()
}

#[test]
fn what_is_discarded_or_zeroed_is_zeros_and_takes_no_room() {
    let file = numbered_disk(SECTORS);
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let offered = driver.offered_features();
    assert!(offered & 1 << VIRTIO_BLK_F_DISCARD != 0);
    // Not every file system keeps the room of what it zeroes.
    let zeroes = offered & 1 << VIRTIO_BLK_F_WRITE_ZEROES != 0;
    // Sectors, segments, and that what is zeroed may be given back.
    let if_zeroes = |number| if zeroes { number } else { 0 };
    for (place, expected) in [
        (36, 1 << 21),
        (40, 1),
        (44, 1),
        (48, if_zeroes(1 << 17)),
        (52, if_zeroes(1)),
    ] {
        assert_eq!(driver.raw_read(0x100 + place, Width::Four), expected);
    }
    assert_eq!(driver.raw_read(0x100 + 56, Width::One), if_zeroes(1));
    let mut queue = driver.start(64);
    let mut erase = |kind, bytes: &[u8]| {
        let request = BlkRequest::new(&driver, kind, 0, bytes.len(), false);
        request.data.write(0, bytes);
        request.perform(&driver, &mut queue)
    };
    let before = std::fs::read(file.path()).unwrap();
    let room = || std::fs::metadata(file.path()).unwrap().blocks();
    let room_before = room();
    let (ok, io_error, unsupported) = (0, 1, 2);
    for (kind, bytes, status) in [
        (VIRTIO_BLK_T_DISCARD, segment(SECTORS - 1, 2, 0), io_error),
        (VIRTIO_BLK_T_DISCARD, segment(0, 8, 1), unsupported),
        (
            VIRTIO_BLK_T_DISCARD,
            segment(0, 8, 0)[..8].to_vec(),
            io_error,
        ),
        (VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 8, 4), unsupported),
        (VIRTIO_BLK_T_DISCARD, segment(u64::MAX, 8, 0), io_error),
        (VIRTIO_BLK_T_DISCARD, segment(8, 0, 0), ok),
    ] {
        assert_eq!(erase(kind, &bytes), (status, 1), "{bytes:?}");
    }
    assert!(
        std::fs::read(file.path()).unwrap() == before,
        "it has changed"
    );
    let half = u32::try_from(SECTORS / 2).unwrap();
    assert_eq!(erase(VIRTIO_BLK_T_DISCARD, &segment(8, half, 0)), (ok, 1));
    assert!(room() < room_before, "{} of {room_before} blocks", room());
    let mut zeroed = vec![(8, 8 + SECTORS / 2)];
    let expected = if zeroes { ok } else { unsupported };
    for (sector, flags) in [(SECTORS - 8, 1), (SECTORS - 4, 0)] {
        let (status, _) = erase(VIRTIO_BLK_T_WRITE_ZEROES, &segment(sector, 4, flags));
        assert_eq!(status, expected);
        zeroed.extend(zeroes.then_some((sector, sector + 4)));
    }
    let after = std::fs::read(file.path()).unwrap();
    let sector = |number: u64| usize::try_from(number * 512).unwrap();
    let mut expected = before;
    for (first, end) in zeroed {
        expected[sector(first)..sector(end)].fill(0);
    }
    assert!(after == expected, "not what was asked for is zeros");
    machine.stop().unwrap();
}

/// With EVENT_IDX the driver names the entry that it wants to be interrupted for; without, a flag.
#[test]
fn interrupts_come_when_the_driver_wants_them() {
    let file = numbered_disk(SECTORS);
    for event_idx in [true, false] {
        let (guest, machine) = disk_of(&[file.path()], 1, false);
        let driver = driver(&guest, 0);
        let features =
            driver.offered_features() & !(u64::from(!event_idx) << VIRTIO_RING_F_EVENT_IDX);
        assert_eq!(driver.negotiate(features), Negotiated::Accepted);
        let mut queue = RawQueue::new(&driver, 64);
        driver.start_queue(0, 64, queue.addresses());
        driver.driver_ok();
        if event_idx {
            queue.set_used_event(2)
        } else {
            queue.set_flags(1)
        }
        for _ in 0..2 {
            BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 512, true).perform(&driver, &mut queue);
        }
        driver.settle();
        assert_eq!(guest.interrupts(FIRST_IRQ), 0, "event_idx {event_idx}");
        if !event_idx {
            queue.set_flags(0);
        }
        // A kick with nothing behind it is no reason for an interrupt.
        driver.notify(0);
        driver.settle();
        assert_eq!(guest.interrupts(FIRST_IRQ), 0, "event_idx {event_idx}");
        BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 512, true).perform(&driver, &mut queue);
        assert!(
            guest.wait_interrupt(FIRST_IRQ, 0, Duration::from_secs(5)),
            "event_idx {event_idx}"
        );
        machine.stop().unwrap();
    }
}

/// A reset lets go of everything, and the next driver starts from the beginning.
#[test]
fn a_driver_comes_and_goes_ten_times() {
    let file = numbered_disk(SECTORS);
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    for round in 0..10 {
        let mut queue = driver.start(64);
        for index in 0..20 {
            let request = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, round, 512, true);
            request.describe(&queue, index * 3);
            queue.offer(index * 3);
            driver.notify(0);
        }
        // Some of these are in flight still.
        driver.write(Register::Status, 0);
        assert_eq!(driver.read(Register::Status), 0);
        let used = queue.used_index();
        for area in [&queue.descriptors, &queue.available, &queue.used] {
            guest.memory().revoke(area.grant(), 1);
        }
        assert_eq!(guest.memory().revoked_while_mapped(), 0);
        driver.settle();
        assert_eq!(
            queue.used_index(),
            used,
            "a request was completed after the reset"
        );
    }
    let [report] = &machine.stop().unwrap()[..] else {
        panic!("one device")
    };
    assert_eq!(report.grants_mapped, 0);
}

/// A grant that goes away while its request is on the way fails that request, and no other.
#[test]
fn a_revoked_grant_fails_its_own_request_only() {
    let file = numbered_disk(SECTORS);
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(64);
    let good = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 1, 512, true);
    for (kind, reads) in [(VIRTIO_BLK_T_IN, true), (VIRTIO_BLK_T_OUT, false)] {
        let bad = BlkRequest::new(&driver, kind, 0, 512, reads);
        guest.memory().revoke(bad.data.grant(), 1);
        assert_eq!(bad.perform(&driver, &mut queue), (1, u32::from(!reads)));
        assert_eq!(good.perform(&driver, &mut queue), (0, 513));
    }
    let bad = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 512, false);
    // Its data is granted read-only, and is to be written.
    queue.set_descriptor(20, bad.header.address(), 16, NEXT, 21);
    queue.set_descriptor(21, bad.data.address(), 512, NEXT | WRITE, 22);
    queue.set_descriptor(22, bad.status.address(), 1, WRITE, 0);
    let used = queue.used_index();
    queue.offer(20);
    driver.notify(0);
    assert!(driver.wait(|| queue.used_index() != used));
    assert_eq!(bad.status.read(), [1]);
    assert_eq!(bad.data.read(), vec![0; 512]);
    drop(machine);
}

#[test]
fn an_invalidate_is_answered() {
    let file = numbered_disk(SECTORS);
    let (guest, _machine) = disk_of(&[file.path()], 1, false);
    assert_eq!(guest.trap(TrapRequest::Invalidate), Some(0));
    assert_eq!(guest.trap(TrapRequest::Unknown), Some(0));
    assert_eq!(guest.read(FIRST_DEVICE.base + 0x10_0000, Width::Eight), 0);
}

/// Where the driver sets whether there is a write cache (virtio 1.3, 5.2.4).
const WRITE_BACK: u64 = 0x100 + 32;

#[test]
fn a_write_is_stable_when_it_is_done_if_the_driver_has_turned_the_cache_off() {
    let calls = |is_on: bool| {
        let file = numbered_disk(SECTORS);
        let (guest, machine) = disk_of(&[file.path()], 1, false);
        let driver = driver(&guest, 0);
        assert!(driver.offered_features() & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0);
        let mut queue = driver.start(64);
        assert_eq!(driver.raw_read(WRITE_BACK, Width::One), 1);
        driver.raw_write(WRITE_BACK, Width::One, is_on.into());
        assert_eq!(driver.raw_read(WRITE_BACK, Width::One), u64::from(is_on));
        for sector in 0..8 {
            let write = BlkRequest::new(&driver, VIRTIO_BLK_T_OUT, sector, 512, false);
            assert_eq!(write.perform(&driver, &mut queue), (0, 1));
        }
        driver.write(Register::Status, 0);
        assert_eq!(driver.raw_read(WRITE_BACK, Width::One), 1, "a reset");
        machine.stop().unwrap()[0].metrics["submissions"]
    };
    // A write, and what makes it stable.
    assert_eq!((calls(true), calls(false)), (8, 16));
}

#[test]
fn a_driver_is_told_which_sizes_suit_the_disk() {
    let file = numbered_disk(SECTORS);
    let mut disk = Disk::open(file.path(), false).unwrap();
    let block = u32::try_from(file.as_file().metadata().unwrap().blksize()).unwrap();
    let measured = disk.measure_topology().unwrap();
    assert_eq!((measured.physical_block, measured.least), (block, block));
    disk.set_topology(Some(Topology {
        physical_block: 4096,
        least: 65536,
        best: 1 << 20,
    }));
    let kept = StateArea::private(Blk::KEPT_BEFORE).unwrap();
    let blk = Blk::new(disk, [0; 20], 1, kept, &RingStock::new(1)).unwrap();
    let features = blk.identity().features;
    assert!(features & 1 << VIRTIO_BLK_F_TOPOLOGY != 0);
    assert!(
        features & 1 << VIRTIO_BLK_F_CONFIG_WCE == 0,
        "no room for it"
    );
    // physical_block_exp, alignment_offset, min_io_size, opt_io_size; then writeback, which there is not.
    let mut sizes = [0xff; 9];
    blk.read_config(24, &mut sizes);
    assert_eq!(sizes, [3, 0, 128, 0, 0, 8, 0, 0, 0]);
}

#[test]
fn a_disk_holds_its_guest_to_a_rate_after_a_burst() {
    let file = numbered_disk(SECTORS);
    let path = file.path().to_owned();
    let (guest, machine) = SimMachine::start(AddressMode::Grants, move || {
        let disk = Disk::open(&path, false).unwrap();
        let kept = StateArea::private(Blk::KEPT)?;
        let mut blk = Blk::new(disk, [0; 20], 1, kept, &RingStock::new(1))?;
        blk.limit(Limits {
            operations: NonZeroU64::new(100),
            bytes: None,
            burst_seconds: 1,
        });
        Ok(vec![Box::new(blk) as Box<dyn Device>])
    })
    .unwrap();
    let driver = driver(&guest, 0);
    let mut queue = driver.start(64);
    let read = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 3, 512, true);
    let mut times = Vec::new();
    let began = Instant::now();
    for _ in 0..131 {
        assert_eq!(read.perform(&driver, &mut queue), (0, 513));
        times.push(began.elapsed());
    }
    assert!(times[99] < Duration::from_millis(900), "{:?}", times[99]);
    let rest = times[130] - times[99];
    assert!(rest > Duration::from_millis(250), "{rest:?}");
    drop(machine.stop().unwrap());
}

/// Has a disk's transfers not be direct, as those of a disk that takes none.
fn go_through_cache(disk: &Disk) {
    let flags = fcntl_getfl(disk.file()).unwrap();
    fcntl_setfl(disk.file(), flags - OFlags::DIRECT).unwrap();
}

#[test]
fn the_page_cache_keeps_nothing_of_a_disk_that_goes_through_it() {
    // Not tmpfs, which is the page cache.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let disk = Disk::open(file.path(), false).unwrap();
    go_through_cache(&disk);
    if !disk.can_keep_nothing_cached() {
        println!("not shown: this kernel has no RWF_DONTCACHE, or not for this file system");
        return;
    }
    let cached = |passes_cache: bool| {
        let path = file.path().to_owned();
        let (guest, machine) = SimMachine::start(AddressMode::Grants, move || {
            let mut disk = Disk::open(&path, false).unwrap();
            go_through_cache(&disk);
            if passes_cache {
                disk.keep_nothing_cached();
            }
            let kept = StateArea::private(Blk::KEPT)?;
            let blk = Blk::new(disk, [0; 20], 1, kept, &RingStock::new(1))?;
            Ok(vec![Box::new(blk) as Box<dyn Device>])
        })
        .unwrap();
        let driver = driver(&guest, 0);
        let mut queue = driver.start(64);
        for sector in (0..8192).step_by(128) {
            let write = BlkRequest::new(&driver, VIRTIO_BLK_T_OUT, sector, 65536, false);
            assert_eq!(write.perform(&driver, &mut queue), (0, 1));
            let read = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, sector, 65536, true);
            assert_eq!(read.perform(&driver, &mut queue), (0, 65537));
        }
        let flush = BlkRequest::new(&driver, VIRTIO_BLK_T_FLUSH, 0, 1, false);
        flush.perform(&driver, &mut queue);
        drop(machine.stop().unwrap());
        let resident = std::process::Command::new("fincore")
            .args(["--bytes", "--noheadings", "--output", "RES"])
            .arg(file.path())
            .output();
        let resident = String::from_utf8(resident.unwrap().stdout).unwrap();
        resident.trim().parse::<u64>().unwrap()
    };
    let passing = cached(true);
    assert!(passing < 1 << 20, "{passing} bytes");
    assert_eq!(cached(false), 4 << 20);
}
