//! Pieces of the data path, to be repeated and measured.

use crate::platform::driver;
use std::hint::black_box;
use std::rc::Rc;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_IN};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::VolatileSlice;
use xen_virtio_backend::RingStock;
use xen_virtio_backend::blk::{Blk, Disk};
use xen_virtio_backend::{
    Device, DeviceType, Identity, QueueIndex, QueueJournal, QueueLayout, QueueStart, StateArea,
    Unfinished, VirtQueue,
};
use xen_virtio_guest_io::{BlkRequest, Buffer, Driver, RawQueue};
use xen_virtio_guest_mapping::{AddressMode, CopyOp, Direction, GuestAccess, GuestAddress};
use xen_virtio_sim::{SimGuest, simulate};
use xen_virtio_transport::{Register, RegisterFile, VirtioState};

/// One operation, ready to be repeated.
pub type Operation = Box<dyn FnMut()>;

/// A workload's name, and what makes its operation.
pub type Workload = (&'static str, fn() -> Operation);

pub const WORKLOADS: [Workload; 4] = [
    ("register-file", register_file),
    ("queue", queue),
    ("copy", copy),
    ("blk-batch", blk_batch),
];

const SIZE: u16 = 64;
/// Requests of one `blk-batch`.
const BATCH: u16 = 8;

/// A guest that nobody answers, of which only the memory is used, and a driver in it.
fn guest() -> (SimGuest, Driver) {
    let (_, guest) = simulate(256).expect("memory for a simulated guest");
    let driver = driver(&guest, 0);
    (guest, driver)
}

fn journal() -> QueueJournal {
    QueueJournal::private().expect("memory")
}

fn layout(queue: &RawQueue) -> QueueLayout {
    let [descriptors, available, used] = queue.addresses().map(GuestAddress);
    QueueLayout {
        size: SIZE,
        descriptors,
        available,
        used,
    }
}

/// The register accesses of a request: the kick, and those of its interrupt.
fn register_file() -> Operation {
    let identity = Identity {
        device_type: DeviceType::BLOCK,
        features: 0,
        queue_sizes: vec![SIZE],
    };
    let mut registers = RegisterFile::default();
    let mut state = VirtioState::new(identity, 1 << VIRTIO_F_VERSION_1);
    for (register, value) in [
        (Register::Status, 1),
        (Register::Status, 3),
        (Register::DriverFeaturesSel, 1),
        (Register::DriverFeatures, 1),
        (Register::Status, 11),
        (Register::QueueSize, SIZE.into()),
        (Register::QueueReady, 1),
        (Register::Status, 15),
    ] {
        let _ = registers.write(&mut state, register, value);
    }
    assert!(state.is_live(), "the driver is set up");
    Box::new(move || {
        // Their values are a guest's, and their results go to one.
        let (registers, state) = black_box((&mut registers, &mut state));
        let _ = black_box(registers.write(state, Register::QueueNotify, black_box(0)));
        let status = black_box(registers.read(state, Register::InterruptStatus));
        let _ = black_box(registers.write(state, Register::InterruptAck, status));
    })
}

/// A request taken from its queue and given back.
fn queue() -> Operation {
    let (guest, driver) = guest();
    let mut raw = RawQueue::new(&driver, SIZE);
    BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 4096, true).describe(&raw, 0);
    let mut access = guest.memory().access(AddressMode::Grants);
    let mut queue = VirtQueue::map(
        layout(&raw),
        true,
        journal(),
        Unfinished::Repeat,
        &mut access,
    )
    .expect("a good queue");
    Box::new(move || {
        raw.offer(0);
        let request = queue.pop().expect("a good ring").expect("a request");
        queue.complete(request.finish(4097)).expect("a good ring");
        queue.publish().expect("a good ring");
    })
}

/// The three copies of a read of 4 KiB.
fn copy() -> Operation {
    let (guest, driver) = guest();
    let request = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 4096, true);
    let mut access = guest.memory().access(AddressMode::Grants);
    let mut bytes = vec![0; 8192];
    let operation = |direction, buffer: &Buffer, local| {
        CopyOp::new(direction, GuestAddress(buffer.address()), local)
    };
    let mut operations = [
        operation(Direction::FromGuest, &request.header, 0..16),
        operation(Direction::ToGuest, &request.data, 4096..8192),
        operation(Direction::ToGuest, &request.status, 16..17),
    ];
    Box::new(move || {
        access.copy(&VolatileSlice::from(&mut bytes[..]), &mut operations);
        assert!(operations.iter().all(|operation| operation.result.is_ok()));
    })
}

/// Eight reads of 4 KiB at once, from the available ring to the used ring.
fn blk_batch() -> Operation {
    let (guest, driver) = guest();
    let mut raw = RawQueue::new(&driver, SIZE);
    for index in 0..BATCH {
        let request = BlkRequest::new(&driver, VIRTIO_BLK_T_IN, 0, 4096, true);
        request.describe(&raw, index * 3);
    }
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(1 << 20).expect("room for a disk");
    let disk = Disk::open(file.path(), false).expect("a disk");
    let kept = StateArea::private(Blk::KEPT).expect("memory");
    let mut blk = Blk::new(disk, [0; 20], 1, kept, &RingStock::new(1)).expect("memory");
    let mut access = guest.memory().access(AddressMode::Grants);
    let start = QueueStart {
        layout: layout(&raw),
        features: 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_BLK_F_FLUSH,
        journal: journal(),
        latencies: Rc::default(),
        trace: Rc::default(),
    };
    let index = QueueIndex::new(0, 1).expect("the first queue");
    blk.start_queue(index, start, &mut access)
        .expect("a good queue");
    Box::new(move || {
        let before = raw.used_index();
        for index in 0..BATCH {
            raw.offer(index * 3);
        }
        while raw.used_index() != before.wrapping_add(BATCH) {
            let _ = blk.step(&mut access).expect("good requests");
        }
    })
}
