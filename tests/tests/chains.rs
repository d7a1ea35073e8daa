//! Descriptor chains of any shape: long ones, large ones, odd ones.

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use xen_virtio_tests::{BlkRequest, NEXT, WRITE, disk_of, driver, numbered_disk};

const SIZE: u16 = 512;
/// Requests, which share all descriptors but their first ones.
const HEADS: u16 = 16;
/// Descriptors of data, each of [`LEN`] bytes: fifteen sectors in all.
const DATA: u16 = 480;
const LEN: u32 = 16;
/// What one copy call has at most: as many as make it large, and those of one request more.
const MOST: u64 = 255 + SIZE as u64;

/// Requests made available together are copied apart, so that no call takes long.
#[test]
fn many_long_requests_are_copied_a_few_at_a_time() {
    for (kind, data_flags, bytes_written) in [
        (VIRTIO_BLK_T_IN, WRITE, u32::from(DATA) * LEN + 1),
        (VIRTIO_BLK_T_OUT, 0, 1),
    ] {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let (guest, machine) = disk_of(&[file.path()], 1, false);
        let driver = driver(&guest, 0);
        let mut queue = driver.start(SIZE);
        let header = driver.buffer(16, false);
        header.write(0, &kind.to_le_bytes());
        let data = driver.buffer(4096, true);
        let status = driver.buffer(1, true);
        for head in 0..HEADS {
            queue.set_descriptor(head, header.address(), 16, NEXT, HEADS);
        }
        for index in HEADS..HEADS + DATA {
            queue.set_descriptor(index, data.address(), LEN, NEXT | data_flags, index + 1);
        }
        queue.set_descriptor(HEADS + DATA, status.address(), 1, WRITE, 0);
        queue.offer_together(&(0..HEADS).collect::<Vec<_>>());
        driver.notify(0);
        assert!(driver.wait(|| queue.used_index() == HEADS));
        for entry in 0..HEADS {
            assert_eq!(queue.used(entry).1, bytes_written, "{kind}");
        }
        assert_eq!(status.read(), [0]);
        let [report] = &machine.stop().unwrap()[..] else {
            panic!("one device")
        };
        let (segments, calls) = (report.copy_segments, report.copy_batches);
        assert!(segments >= u64::from(HEADS * DATA), "{kind}: {segments}");
        assert!(
            segments <= calls * MOST,
            "{kind}: {segments} in {calls} calls"
        );
    }
}

/// A request that is larger than the device's buffer, in odd pieces, arrives whole.
#[test]
fn a_request_larger_than_the_buffer_is_served_in_parts() {
    let file = numbered_disk(4096);
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(64);
    let bytes: Vec<u8> = (0..1_600_000u32 / 512 * 512)
        .map(|place| (place * 7 / 5).to_le_bytes()[0])
        .collect();
    for (kind, reads) in [(VIRTIO_BLK_T_OUT, false), (VIRTIO_BLK_T_IN, true)] {
        let request = BlkRequest::new(&driver, kind, 3, bytes.len(), reads);
        if !reads {
            request.data.write(0, &bytes);
        }
        // Header and data in one descriptor would do as well as in many: the device may not care.
        let written = if reads {
            u32::try_from(bytes.len()).unwrap() + 1
        } else {
            1
        };
        assert_eq!(request.perform(&driver, &mut queue), (0, written));
        if reads {
            assert!(
                request.data.read() == bytes,
                "what was read back is not what was written"
            );
        }
    }
    let on_disk = std::fs::read(file.path()).unwrap();
    assert!(on_disk[3 * 512..3 * 512 + bytes.len()] == bytes[..]);
    drop(machine);
}

/// Junk that fills the round's buffer leaves no room for the answer in the first round.
#[test]
fn a_serial_is_whole_however_much_is_sent_with_the_question() {
    let file = numbered_disk(4096);
    let (guest, _machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(64);
    let request = BlkRequest::new(&driver, VIRTIO_BLK_T_GET_ID, 0, 20, true);
    for junk in [1 << 20, (1 << 20) - 30, 3 << 20] {
        let sent = driver.buffer(junk, false);
        queue.set_descriptor(30, request.header.address(), 16, NEXT, 31);
        queue.set_descriptor(31, sent.address(), junk.try_into().unwrap(), NEXT, 32);
        queue.set_descriptor(32, request.data.address(), 20, NEXT | WRITE, 33);
        queue.set_descriptor(33, request.status.address(), 1, WRITE, 0);
        let used = queue.used_index();
        queue.offer(30);
        driver.notify(0);
        assert!(driver.wait(|| queue.used_index() != used));
        assert_eq!(queue.used(used), (30, 21));
        assert_eq!(request.data.read(), b"a serial of 20 bytes");
        request.data.write(0, &[0; 20]);
    }
}

/// A request's parts may lie in descriptors however the driver likes (virtio 1.3, 2.7.4.1).
#[test]
fn descriptor_boundaries_mean_nothing() {
    let file = numbered_disk(4096);
    let (guest, machine) = disk_of(&[file.path()], 1, false);
    let driver = driver(&guest, 0);
    let mut queue = driver.start(64);
    let request = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 5, 512, true);
    // The header in three pieces, one of them empty; the data's last part and the status in one.
    let together = driver.buffer(101, true);
    let header = request.header.address();
    queue.set_descriptor(10, header, 7, NEXT, 11);
    queue.set_descriptor(11, header, 0, NEXT, 12);
    queue.set_descriptor(12, header + 7, 9, NEXT, 13);
    queue.set_descriptor(13, request.data.address(), 412, NEXT | WRITE, 14);
    queue.set_descriptor(14, together.address(), 101, WRITE, 0);
    queue.offer(10);
    driver.notify(0);
    assert!(driver.wait(|| queue.used_index() == 1));
    assert_eq!(queue.used(0), (10, 513));
    assert!(request.data.read()[..412].iter().all(|byte| *byte == 5));
    assert_eq!(together.read(), [vec![5; 100], vec![0]].concat());
    drop(machine);
}
