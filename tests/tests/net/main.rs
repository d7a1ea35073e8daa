//! The network device, by the one driver and on a wire whose other end is the test's.

mod control;
mod frames;
mod worker;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_net as ids;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_backend::net::{Interface, Net};
use xen_virtio_backend::tap::HEADER;
use xen_virtio_backend::{Limits, StateArea};
use xen_virtio_dom0_tools::guest_state::DeviceRecords;
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{
    FIRST_DEVICE, FIRST_IRQ, Fault, SimGuest, SimHypervisor, SimMachine, simulate,
};
use xen_virtio_tests::{
    Buffer, Driver, Flood, MAC, MakeDevice, NEXT, Negotiated, RawQueue, WRITE, Wire, come_to_rest,
    drive, drive_over_deaths, driver, frame, network, sleeps,
};
use xen_virtio_transport::{DeviceReport, DeviceState, GuestDevices, MmioDevice, Register, Width};

const SIZE: u16 = 16;
const RECEIVE: u32 = 0;
const SEND: u32 = 1;
const OTHER: [u8; 6] = [0, 0x16, 0x3e, 0, 0, 9];
const BROADCAST: [u8; 6] = [0xff; 6];
const NO_LIMITS: [Limits; 2] = [Limits {
    bytes: None,
    operations: None,
    burst_seconds: 0,
}; 2];
/// Features without which a driver has none of the offloads.
const PLAIN: u64 = 1 << ids::VIRTIO_NET_F_GUEST_CSUM | 1 << ids::VIRTIO_NET_F_CSUM;
const MERGED: u64 = 1 << ids::VIRTIO_NET_F_MRG_RXBUF;

/// A guest with a network device, whose pairs of queues have these wires.
struct Bench {
    guest: SimGuest,
    machine: SimMachine,
    driver: Driver,
    wires: Vec<Wire>,
}

impl Bench {
    fn new(pairs: u16, limits: [Limits; 2]) -> Self {
        let (wires, interfaces): (Vec<_>, Vec<_>) =
            (0..pairs).map(|_| Wire::new().unwrap()).unzip();
        let (guest, machine) = SimMachine::start(AddressMode::Grants, move || {
            let kept = StateArea::private(Net::kept_bytes(pairs))?;
            let interfaces = interfaces.into_iter().map(|one| one as Box<dyn Interface>);
            Ok(vec![network(interfaces.collect(), limits, kept, true)?])
        })
        .unwrap();
        Self {
            driver: driver(&guest, 0),
            guest,
            machine,
            wires,
        }
    }

    /// A running device of a driver that has accepted all but `without`, and a queue for each of `queues`.
    fn start<const N: usize>(&self, without: u64, queues: [u32; N]) -> [RawQueue; N] {
        start(&self.driver, without, queues)
    }

    fn end(self) -> DeviceReport {
        let mut reports = self.machine.stop().unwrap();
        assert_eq!(reports.len(), 1);
        reports.remove(0)
    }
}

fn start<const N: usize>(driver: &Driver, without: u64, queues: [u32; N]) -> [RawQueue; N] {
    let features = driver.offered_features() & !without;
    assert_eq!(driver.negotiate(features), Negotiated::Accepted);
    let queues = queues.map(|index| {
        let queue = RawQueue::new(driver, SIZE);
        driver.start_queue(index, SIZE.into(), queue.addresses());
        queue
    });
    driver.driver_ok();
    // What was at the interface before is thrown away.
    driver.settle();
    queues
}

/// Offers buffers of these lengths, each a chain of its own, from descriptor `first` on.
fn post(
    driver: &Driver,
    queue: &mut RawQueue,
    index: u32,
    first: u16,
    lens: &[usize],
) -> Vec<Buffer> {
    let buffers: Vec<_> = lens.iter().map(|len| driver.buffer(*len, true)).collect();
    let heads: Vec<u16> = (first..).take(lens.len()).collect();
    for (buffer, head) in buffers.iter().zip(&heads) {
        let len = u32::try_from(buffer.len).unwrap();
        queue.set_descriptor(*head, buffer.address(), len, WRITE, 0);
    }
    queue.offer_together(&heads);
    driver.notify(index);
    buffers
}

/// Sends `bytes` in pieces of these lengths.
fn send(driver: &Driver, queue: &mut RawQueue, bytes: &[u8], pieces: &[usize]) {
    let mut at = 0;
    let before = queue.used_index();
    let mut buffers = Vec::new();
    for (index, len) in (0..).zip(pieces) {
        let buffer = driver.buffer((*len).max(1), false);
        buffer.write(0, &bytes[at..at + len]);
        let flags = if at + len < bytes.len() { NEXT } else { 0 };
        queue.set_descriptor(
            index,
            buffer.address(),
            u32::try_from(*len).unwrap(),
            flags,
            index + 1,
        );
        buffers.push(buffer);
        at += len;
    }
    assert_eq!(at, bytes.len());
    queue.offer(0);
    driver.notify(SEND);
    assert!(
        driver.wait(|| queue.used_index() != before),
        "it never came back"
    );
    assert_eq!(queue.used(before), (0, 0));
}

/// A command, and what is behind the byte that answers it.
fn command(driver: &Driver, queue: &mut RawQueue, index: u32, bytes: &[u8]) -> (u8, Vec<u8>) {
    let sent = driver.buffer(bytes.len(), false);
    sent.write(0, bytes);
    let answer = driver.buffer(9, true);
    answer.write(0, &[0xee]);
    let before = queue.used_index();
    let len = u32::try_from(bytes.len()).unwrap();
    queue.set_descriptor(0, sent.address(), len, NEXT, 1);
    queue.set_descriptor(1, answer.address(), 9, WRITE, 0);
    queue.offer(0);
    driver.notify(index);
    assert!(driver.wait(|| queue.used_index() != before), "no answer");
    let answer = answer.read();
    (answer[0], answer[1..].to_vec())
}

fn status(driver: &Driver) -> u64 {
    driver.raw_read(0x106, Width::Two)
}
