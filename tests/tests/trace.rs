//! Whoever looks on at a device is told of each of its requests.

use std::cell::RefCell;
use std::rc::Rc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use xen_virtio_backend::blk::Disk;
use xen_virtio_backend::{TraceSink, TracedRequest};
use xen_virtio_sim::{FIRST_DEVICE, simulate};
use xen_virtio_tests::{BlkRequest, disk_device, drive, numbered_disk};
use xen_virtio_transport::{DeviceState, GuestDevices};

const SECTORS: u64 = 64;

#[derive(Clone, Default)]
struct Kept(Rc<RefCell<Vec<TracedRequest>>>);

impl TraceSink for Kept {
    fn request(&mut self, request: &TracedRequest) {
        self.0.borrow_mut().push(*request);
    }

    fn flush(&mut self) -> bool {
        true
    }

    fn replaced(&mut self) {}
}

#[test]
fn a_disks_requests_are_told_of_with_what_they_ask_for() {
    let file = numbered_disk(SECTORS);
    let (hypervisor, guest) = simulate(64).unwrap();
    let mut machine = GuestDevices::new(hypervisor);
    let mut disk = Disk::open(file.path(), false).unwrap();
    disk.set_erases(disk.can_erase());
    let device = disk_device(machine.hypervisor(), disk, DeviceState::private().unwrap());
    let kept = Kept::default();
    device.trace().begin(Box::new(kept.clone()));
    machine.add(FIRST_DEVICE, device).unwrap();
    // What is asked for, from which sector on, with how much data, and whether that is for the guest.
    let requests = [
        (VIRTIO_BLK_T_IN, 3, 1024, true),
        (VIRTIO_BLK_T_OUT, 9, 512, false),
        (VIRTIO_BLK_T_FLUSH, 0, 0, false),
        (VIRTIO_BLK_T_DISCARD, 0, 16, false),
        // Beyond the end, and what nobody knows.
        (VIRTIO_BLK_T_IN, SECTORS, 512, true),
        (99, 0, 512, false),
    ];
    drive(&mut machine, &guest, move |driver| {
        let mut queue = driver.start(8);
        for (kind, sector, len, reads) in requests {
            let request = BlkRequest::new(driver, kind, sector, len, reads);
            if kind == VIRTIO_BLK_T_DISCARD {
                // Eight sectors from the 16th on (virtio 1.3, 5.2.6).
                request.data.write(0, &[16, 0, 0, 0, 0, 0, 0, 0, 8]);
            }
            request.perform(driver, &mut queue);
        }
    });
    let told = kept.0.borrow();
    let details: Vec<_> = told
        .iter()
        .map(|request| {
            let detail = request.detail.unwrap();
            (detail.what, detail.offset, detail.bytes, detail.has_failed)
        })
        .collect();
    assert_eq!(
        details,
        [
            ("read", 3 * 512, 1024, false),
            ("write", 9 * 512, 512, false),
            ("flush", 0, 0, false),
            ("discard", 16 * 512, 8 * 512, false),
            ("refused", 0, 0, true),
            ("refused", 0, 0, true),
        ]
    );
    let read = told[0];
    assert_eq!((read.queue.get(), read.head), (0, 0));
    assert_eq!(
        (read.readable, read.writable, read.written),
        (16, 1025, 1025)
    );
}
