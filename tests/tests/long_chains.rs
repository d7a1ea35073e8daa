//! Requests of as many descriptors as a queue has.

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use xen_virtio_tests::{NEXT, WRITE, disk_of, driver};

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
