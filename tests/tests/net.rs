//! The network device, by the one driver and on a wire whose other end is the test's.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_net as ids;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use xen_virtio_backend::net::{Interface, Net};
use xen_virtio_backend::tap::HEADER;
use xen_virtio_backend::{Activity, Limits, StateArea};
use xen_virtio_dom0_tools::guest_state::DeviceRecords;
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{
    FIRST_DEVICE, FIRST_IRQ, Fault, SimGuest, SimHypervisor, SimMachine, simulate,
};
use xen_virtio_tests::{
    Buffer, Driver, Flood, MAC, MakeDevice, NEXT, Negotiated, RawQueue, WRITE, Wire, drive,
    drive_over_deaths, driver, frame, network,
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

#[test]
fn frames_go_both_ways_in_any_pieces() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive, mut sending] = bench.start(MERGED, [RECEIVE, SEND]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let sent = frame(OTHER, 1500, 5);
    for pieces in [
        &[HEADER, 1500][..],
        &[HEADER + 1500],
        &[1, HEADER - 1, 1, 1499],
        &[HEADER + 6, 700, 0, 794],
        &[5, 5, 5, 5, 1492],
    ] {
        send(driver, &mut sending, &sent, pieces);
        assert_eq!(wire.receive(), sent, "{pieces:?}");
    }
    let mut received = frame(MAC, 1514, 6);
    wire.send(&received);
    // 5.1.6.4.1: one buffer, which is several descriptors.
    received[10] = 1;
    let buffers = [5, HEADER, 700, 2000].map(|len| driver.buffer(len, true));
    for (index, buffer) in (0..).zip(&buffers) {
        let len = u32::try_from(buffer.len).unwrap();
        let next = if index < 3 { NEXT } else { 0 };
        receive.set_descriptor(index, buffer.address(), len, WRITE | next, index + 1);
    }
    receive.offer(0);
    driver.notify(RECEIVE);
    assert!(driver.wait(|| receive.used_index() == 1));
    let bytes: Vec<u8> = buffers.iter().flat_map(Buffer::read).collect();
    assert_eq!(bytes[..received.len()], received);
    assert_eq!(receive.used(0), (0, u32::try_from(received.len()).unwrap()));
    let report = bench.end();
    let metric = |name: &str| report.metrics[name];
    assert_eq!((metric("sent_frames"), metric("sent_bytes")), (5, 7500));
    assert_eq!(
        (metric("received_frames"), metric("received_bytes")),
        (1, 1514)
    );
    assert_eq!((report.requests, report.request_errors), (6, 0));
}

#[test]
fn a_frame_larger_than_a_buffer_is_dropped_whole_and_counted() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive] = bench.start(MERGED, [RECEIVE]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let buffers = post(
        driver,
        &mut receive,
        RECEIVE,
        0,
        &[HEADER + 100, HEADER + 100],
    );
    wire.send(&frame(MAC, 101, 1));
    wire.send(&frame(MAC, 2000, 2));
    wire.send(&frame(MAC, 100, 3));
    assert!(driver.wait(|| receive.used_index() == 1));
    driver.settle();
    assert_eq!((receive.used_index(), receive.used(0)), (1, (0, 112)));
    assert_eq!(buffers[0].read()[HEADER + 6..], [3; 94]);
    assert_eq!(buffers[1].read(), [0; HEADER + 100]);
    assert_eq!(bench.end().metrics["dropped_too_large"], 2);
}

#[test]
fn a_frame_lies_in_as_many_buffers_as_it_takes_where_they_are_merged() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive] = bench.start(0, [RECEIVE]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    // It waits for the third.
    let mut buffers = post(driver, &mut receive, RECEIVE, 0, &[100, 100]);
    wire.send(&frame(MAC, 250, 1));
    driver.settle();
    assert_eq!(receive.used_index(), 0);
    buffers.extend(post(driver, &mut receive, RECEIVE, 2, &[100, 100]));
    assert!(driver.wait(|| receive.used_index() == 3));
    let lens = [0, 1, 2].map(|index| receive.used(index));
    assert_eq!(lens, [(0, 100), (1, 100), (2, 62)]);
    let bytes: Vec<u8> = buffers.iter().flat_map(Buffer::read).collect();
    assert_eq!(bytes[10..12], [3, 0], "num_buffers");
    assert_eq!(bytes[HEADER + 6..HEADER + 250], [1; 244]);
    // More than all of the queue: whatever the driver posts is too little.
    buffers.extend(post(driver, &mut receive, RECEIVE, 4, &[100; 12]));
    buffers.extend(post(driver, &mut receive, RECEIVE, 0, &[100; 3]));
    wire.send(&frame(MAC, 1600, 2));
    wire.send(&frame(MAC, 60, 3));
    assert!(driver.wait(|| receive.used_index() == 4));
    assert_eq!(receive.used(3), (3, 72));
    assert_eq!(bench.end().metrics["dropped_too_large"], 1);
}

#[test]
fn a_driver_sees_no_part_of_what_it_does_not_take() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive, mut sending] = bench.start(PLAIN, [RECEIVE, SEND]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    // Offloads need each other (5.1.3.1); this driver has accepted some that need what it has not.
    let csum = 1 << ids::VIRTIO_NET_F_GUEST_CSUM;
    assert!(driver.wait(|| wire.offloads().is_some_and(|bits| bits & csum == 0)));
    let buffers = post(driver, &mut receive, RECEIVE, 0, &[2000]);
    let mut partial = frame(MAC, 60, 1);
    partial[0] = 1;
    wire.send(&partial);
    wire.send(&frame(MAC, 60, 2));
    assert!(driver.wait(|| receive.used_index() == 1));
    assert_eq!(buffers[0].read()[HEADER + 6], 2);
    // Nor does it send what it has not accepted.
    let mut partial = frame(OTHER, 60, 3);
    partial[0] = 1;
    send(driver, &mut sending, &partial, &[72]);
    for len in [0, 1, HEADER, HEADER + 13, (1 << 16) + 100] {
        send(driver, &mut sending, &vec![0; len], &[len]);
    }
    send(driver, &mut sending, &frame(OTHER, 60, 4), &[72]);
    assert_eq!(wire.receive()[HEADER + 6], 4);
    let report = bench.end();
    assert_eq!(report.metrics["dropped_unfit"], 1);
    assert_eq!(report.metrics["dropped_malformed"], 6);
    assert_eq!(report.request_errors, 6);
}

#[test]
fn memory_that_cannot_be_used_costs_its_frame_and_no_other() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive, mut sending] = bench.start(0, [RECEIVE, SEND]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let good = [driver.buffer(2000, true), driver.buffer(2000, true)];
    let bad = driver.buffer(2000, false);
    for (head, buffer) in [(0, &good[0]), (1, &bad), (2, &good[1])] {
        receive.set_descriptor(head, buffer.address(), 2000, WRITE, 0);
    }
    receive.offer_together(&[0, 1, 2]);
    for mark in 1..=3 {
        wire.send(&frame(MAC, 60, mark));
    }
    driver.notify(RECEIVE);
    assert!(driver.wait(|| receive.used_index() == 3));
    assert_eq!(
        [0, 1, 2].map(|index| receive.used(index)),
        [(0, 72), (1, 0), (2, 72)]
    );
    assert_eq!(
        [&good[0], &good[1]].map(|buffer| buffer.read()[HEADER + 6]),
        [1, 3]
    );
    // A frame that cannot be read is not sent.
    let gone = driver.buffer(72, false);
    let address = gone.address();
    gone.revoke();
    sending.set_descriptor(0, address, 72, 0, 0);
    sending.offer(0);
    driver.notify(SEND);
    assert!(driver.wait(|| sending.used_index() == 1));
    send(driver, &mut sending, &frame(OTHER, 60, 4), &[72]);
    assert_eq!(wire.receive()[HEADER + 6], 4);
    assert!(!driver.needs_reset());
    assert_eq!(bench.end().request_errors, 2);
}

#[test]
fn what_dom0_lacks_for_a_moment_costs_no_frame() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive, mut sending] = bench.start(0, [RECEIVE, SEND]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let faults = bench.guest.memory().faults();
    for round in 0..8u8 {
        faults.order(Fault::CopyCall, 4);
        let buffers = post(driver, &mut receive, RECEIVE, u16::from(round), &[2000]);
        wire.send(&frame(MAC, 60, round));
        let expected = u16::from(round) + 1;
        assert!(driver.wait(|| receive.used_index() == expected));
        assert_eq!(buffers[0].read()[HEADER + 6], round);
        faults.order(Fault::CopyCall, 4);
        send(driver, &mut sending, &frame(OTHER, 60, round), &[72]);
        assert_eq!(wire.receive()[HEADER + 6], round);
    }
    let report = bench.end();
    assert_eq!((report.request_errors, report.warning), (0, None));
}

#[test]
fn a_reset_in_a_flood_delivers_nothing_into_old_buffers() {
    let (guest, machine) = SimMachine::start(AddressMode::Grants, || {
        let flood = Flood::new(frame(MAC, 60, 7))?;
        let kept = StateArea::private(Net::kept_bytes(1))?;
        Ok(vec![network(vec![Box::new(flood)], NO_LIMITS, kept, true)?])
    })
    .unwrap();
    let driver = driver(&guest, 0);
    for round in 0..100 {
        let [mut receive] = start(&driver, 0, [RECEIVE]);
        let lens = vec![2000; 1 + round % 8];
        let buffers = post(&driver, &mut receive, RECEIVE, 0, &lens);
        for _ in 0..round % 5 {
            driver.read(Register::Status);
        }
        driver.write(Register::Status, 0);
        let used = receive.used_index();
        let marks = || -> Vec<u8> { buffers.iter().map(|buffer| buffer.read()[30]).collect() };
        let before = marks();
        driver.settle();
        assert_eq!((receive.used_index(), marks()), (used, before));
    }
    drop(machine.stop().unwrap());
}

#[test]
fn a_receive_queue_that_is_empty_and_refilled_under_a_flood_goes_on() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive] = bench.start(0, [RECEIVE]);
    let driver = &bench.driver;
    let wire = &bench.wires[0];
    thread::scope(|scope| {
        const FRAMES: u16 = 300;
        scope.spawn(|| {
            for mark in 0..FRAMES {
                wire.send(&frame(MAC, 60, mark.to_le_bytes()[0]));
            }
        });
        let mut next = 0;
        while next < FRAMES {
            let count = (next % 7 + 1).min(FRAMES - next);
            let buffers = post(driver, &mut receive, RECEIVE, 0, &vec![256; count.into()]);
            // Asleep, now and then, before there are any.
            if next % 50 == 0 {
                thread::sleep(Duration::from_millis(5));
            }
            next += count;
            assert!(
                driver.wait(|| receive.used_index() == next),
                "stalled before {next}"
            );
            for (buffer, mark) in buffers.iter().zip(next - count..) {
                assert_eq!(buffer.read()[HEADER + 6], mark.to_le_bytes()[0]);
            }
        }
    });
    drop(bench.end());
}

#[test]
fn the_control_queue_sets_what_is_received() {
    let bench = Bench::new(1, NO_LIMITS);
    let [mut receive, mut control] = bench.start(0, [RECEIVE, 2]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let mut set = |bytes: &[u8]| command(driver, &mut control, 2, bytes).0;
    // A frame that is wanted and marks the end of those that are not.
    let end = frame(MAC, 60, 0xff);
    let mut posted = 0;
    let mut arrive = |frames: &[Vec<u8>]| -> Vec<u8> {
        for frame in frames.iter().chain([&end]) {
            wire.send(frame);
        }
        let mut marks = Vec::new();
        while marks.last() != Some(&0xff) {
            let buffers = post(driver, &mut receive, RECEIVE, posted % SIZE, &[2000]);
            posted += 1;
            assert!(driver.wait(|| receive.used_index() == posted));
            marks.push(buffers[0].read()[HEADER + 30]);
        }
        marks
    };
    let to = [MAC, OTHER, BROADCAST, [1, 0, 0, 0, 0, 1]];
    let all = || (0..).zip(to).map(|(mark, to)| frame(to, 60, mark));
    let all = || all().collect::<Vec<_>>();
    assert_eq!(arrive(&all()), [0, 1, 2, 3, 0xff]);
    assert_eq!(set(&[0, 0, 0]), 0, "not promiscuous");
    assert_eq!(arrive(&all()), [0, 2, 0xff]);
    let table = [&[1, 0, 1, 0, 0, 0][..], &OTHER, &[0, 0, 0, 0]].concat();
    assert_eq!(set(&table), 0);
    assert_eq!(arrive(&all()), [0, 1, 2, 0xff]);
    assert_eq!(set(&[0, 1, 1]), 0, "all multicast");
    assert_eq!(arrive(&all()), [0, 1, 2, 3, 0xff]);
    let mut tagged = frame(MAC, 60, 9);
    tagged[HEADER + 12..HEADER + 16].copy_from_slice(&[0x81, 0, 0, 7]);
    assert_eq!(arrive(std::slice::from_ref(&tagged)), [0xff]);
    assert_eq!(set(&[2, 0, 7, 0]), 0, "VLAN 7");
    assert_eq!(arrive(std::slice::from_ref(&tagged)), [9, 0xff]);
    assert_eq!(set(&[1, 1, 2, 2, 2, 2, 2, 2]), 0, "another address");
    assert_eq!(driver.raw_read(0x100, Width::Four), 0x0202_0202);
    assert_eq!(set(&[0, 0, 1]), 0, "promiscuous again");
    assert_eq!(arrive(&all()), [0, 1, 2, 3, 0xff]);
    let csum = 1u64 << ids::VIRTIO_NET_F_GUEST_CSUM;
    assert_eq!(set(&[&[5, 0][..], &csum.to_le_bytes()].concat()), 0);
    assert!(driver.wait(|| wire.offloads() == Some(csum)));
    // What cannot be is refused, and changes nothing.
    for bad in [
        &[4, 0, 1, 0][..],
        &[5, 0, 0xff, 0, 0, 0, 0, 0, 0, 0xff],
        &[2, 0, 0, 0x10],
        &[0],
        &[9, 9, 9],
    ] {
        assert_eq!(set(bad), 1, "{bad:?}");
    }
    assert_eq!(wire.offloads(), Some(csum));
    let report = bench.end();
    assert_eq!(report.metrics["control_refused"], 5);
    assert_eq!(report.metrics["control_commands"], 12);
}

#[test]
fn pairs_are_used_as_the_driver_sets_them() {
    let bench = Bench::new(2, NO_LIMITS);
    assert_eq!(bench.driver.raw_read(0x108, Width::Two), 2);
    let [mut first, mut second, mut control] = bench.start(0, [0, 2, 4]);
    let driver = &bench.driver;
    let mut set = |pairs: u16| {
        let [low, high] = pairs.to_le_bytes();
        command(driver, &mut control, 4, &[4, 0, low, high]).0
    };
    let one = post(driver, &mut first, 0, 0, &[256; 8]);
    let other = post(driver, &mut second, 2, 0, &[256; 8]);
    bench.wires[1].send(&frame(MAC, 60, 9));
    bench.wires[0].send(&frame(MAC, 60, 2));
    assert!(driver.wait(|| first.used_index() == 1));
    driver.settle();
    assert_eq!(
        (second.used_index(), one[0].read()[40]),
        (0, 2),
        "not used yet"
    );
    for (pairs, answer) in [(0, 1), (3, 1), (u16::MAX, 1), (2, 0), (2, 0)] {
        assert_eq!(set(pairs), answer, "{pairs}");
    }
    driver.settle();
    bench.wires[1].send(&frame(MAC, 60, 1));
    assert!(driver.wait(|| second.used_index() == 1));
    assert_eq!(other[0].read()[40], 1);
    assert_eq!(set(1), 0);
    bench.wires[1].send(&frame(MAC, 60, 3));
    driver.settle();
    assert_eq!(second.used_index(), 1);
    // Without MQ the control queue is the third.
    let [mut control] = bench.start(1 << ids::VIRTIO_NET_F_MQ, [2]);
    assert_eq!(command(driver, &mut control, 2, &[0, 0, 1]).0, 0);
    assert_eq!(command(driver, &mut control, 2, &[4, 0, 1, 0]).0, 1);
    assert!(!driver.needs_reset());
    drop(bench.end());
}

#[test]
fn interrupts_come_as_the_driver_has_asked() {
    let bench = Bench::new(1, NO_LIMITS);
    // By the flag: an interrupt for each frame, if nothing moderates them.
    let [mut receive, mut control] = bench.start(1 << VIRTIO_RING_F_EVENT_IDX, [RECEIVE, 2]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    // Eight frames, or 200 ms.
    let coal = [&[6, 1][..], &8u32.to_le_bytes(), &200_000u32.to_le_bytes()].concat();
    assert_eq!(command(driver, &mut control, 2, &coal).0, 0);
    let (answer, rule) = command(driver, &mut control, 2, &[6, 3, 0, 0, 0, 0]);
    assert_eq!((answer, &rule[..]), (0, &coal[2..]));
    assert_eq!(command(driver, &mut control, 2, &[6, 3, 2, 0, 0, 0]).0, 1);
    let _buffers = post(driver, &mut receive, RECEIVE, 0, &[256; 16]);
    driver.settle();
    let before = bench.guest.interrupts(FIRST_IRQ);
    for mark in 0..7 {
        wire.send(&frame(MAC, 60, mark));
    }
    assert!(driver.wait(|| receive.used_index() == 7), "they are there");
    assert_eq!(bench.guest.interrupts(FIRST_IRQ), before);
    wire.send(&frame(MAC, 60, 7));
    assert!(driver.wait(|| bench.guest.interrupts(FIRST_IRQ) == before + 1));
    let began = Instant::now();
    wire.send(&frame(MAC, 60, 8));
    assert!(driver.wait(|| bench.guest.interrupts(FIRST_IRQ) == before + 2));
    assert!(
        began.elapsed() >= Duration::from_millis(150),
        "{:?}",
        began.elapsed()
    );
    drop(bench.end());
}

#[test]
fn a_rate_holds_both_ways() {
    let rate = |frames| Limits {
        operations: NonZeroU64::new(frames),
        ..Limits::default()
    };
    let bench = Bench::new(1, [rate(200), rate(100)]);
    let [mut receive, mut sending] = bench.start(0, [RECEIVE, SEND]);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    let began = Instant::now();
    for _ in 0..41 {
        send(driver, &mut sending, &frame(OTHER, 60, 1), &[72]);
        wire.receive();
    }
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(150), "{took:?}");
    let began = Instant::now();
    for round in 0..2 {
        let _buffers = post(driver, &mut receive, RECEIVE, 0, &[256; 16]);
        for _ in 0..16 {
            wire.send(&frame(MAC, 60, 1));
        }
        assert!(driver.wait(|| receive.used_index() == 16 * (round + 1)));
    }
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(260), "{took:?}");
    drop(bench.end());
}

#[test]
fn what_the_driver_has_set_outlives_the_process_that_it_told() {
    // Frames for another address, which nobody may see after the first command.
    let make = |records: &DeviceRecords<'_>| {
        let flood = Flood::new(frame(OTHER, 60, 7)).unwrap();
        let kept = records.own(0, Net::kept_bytes(1)).unwrap();
        network(vec![Box::new(flood)], NO_LIMITS, kept, true).unwrap()
    };
    let make: Arc<MakeDevice> = Arc::new(make);
    let mut died = 0;
    for death in (500..4000).step_by(200) {
        died += drive_over_deaths(&[death, 700], 0, &make, |guest| {
            let driver = driver(guest, 0);
            let [mut receive, mut control] = start(&driver, 0, [RECEIVE, 2]);
            assert_eq!(command(&driver, &mut control, 2, &[0, 0, 0]).0, 0);
            assert_eq!(
                command(&driver, &mut control, 2, &[1, 1, 2, 2, 2, 2, 2, 2]).0,
                0
            );
            let _buffers = post(&driver, &mut receive, RECEIVE, 0, &[256; 8]);
            for _ in 0..4 {
                driver.settle();
                assert_eq!(receive.used_index(), 0);
                assert_eq!(driver.raw_read(0x100, Width::Four), 0x0202_0202);
                assert_eq!(status(&driver), 1);
            }
        });
    }
    assert!(died > 10, "{died}");
}

#[test]
fn a_cable_that_was_unplugged_is_told_of_by_the_next_process_and_carries_nothing() {
    // The first process has it plugged in.
    let is_up = AtomicBool::new(true);
    let make = move |records: &DeviceRecords<'_>| {
        let flood = Flood::new(frame(MAC, 60, 7)).unwrap();
        let kept = records.own(0, Net::kept_bytes(1)).unwrap();
        let is_up = is_up.swap(false, Ordering::SeqCst);
        network(vec![Box::new(flood)], NO_LIMITS, kept, is_up).unwrap()
    };
    let make: Arc<MakeDevice> = Arc::new(make);
    let died = drive_over_deaths(&[4000], 0, &make, |guest| {
        let driver = driver(guest, 0);
        let generation = driver.read(Register::ConfigGeneration);
        let [mut receive] = start(&driver, 0, [RECEIVE]);
        assert_eq!(status(&driver), 1);
        let _buffers = post(&driver, &mut receive, RECEIVE, 0, &[256; 8]);
        let mut next = 8u16;
        while status(&driver) == 1 {
            if receive.used_index() == next {
                receive.offer_together(&[0, 1, 2, 3, 4, 5, 6, 7]);
                driver.notify(RECEIVE);
                next = next.wrapping_add(8);
            }
        }
        assert_ne!(driver.read(Register::ConfigGeneration), generation);
        let before = receive.used_index();
        driver.settle();
        assert_eq!(receive.used_index(), before);
        // The next driver finds it so.
        let [_receive] = start(&driver, 0, [RECEIVE]);
        assert_eq!(status(&driver), 0);
    });
    assert_eq!(died, 1);
}

/// A device of `pairs` pairs, of which the driver has started `queues`, with buffers in the first receiving one if that is
/// among them.
fn still<const N: usize>(
    pairs: u16,
    without: u64,
    queues: [u32; N],
) -> (
    GuestDevices<SimHypervisor>,
    SimGuest,
    Vec<Wire>,
    [RawQueue; N],
) {
    let (hypervisor, guest) = simulate(1024).unwrap();
    let (wires, interfaces): (Vec<_>, Vec<_>) = (0..pairs).map(|_| Wire::new().unwrap()).unzip();
    let interfaces = interfaces.into_iter().map(|one| one as Box<dyn Interface>);
    let kept = StateArea::private(Net::kept_bytes(pairs)).unwrap();
    let net = network(interfaces.collect(), NO_LIMITS, kept, true).unwrap();
    let state = DeviceState::private().unwrap();
    let net = MmioDevice::new(net, &hypervisor, AddressMode::Grants, FIRST_IRQ, state);
    let mut machine = GuestDevices::new(hypervisor);
    machine.add(FIRST_DEVICE, net.unwrap()).unwrap();
    let queues = drive(&mut machine, &guest, move |driver| {
        let mut queues = start(driver, without, queues);
        if let Some(receive) = queues.first_mut() {
            post(driver, receive, RECEIVE, 0, &[256; 8]);
        }
        queues
    });
    // What the driver has set is followed some time later.
    thread::sleep(Duration::from_millis(60));
    while machine.prepare_sleep().unwrap() == Activity::Working {}
    (machine, guest, wires, queues)
}

/// However many steps have found nothing before.
fn sleeps(machine: &mut GuestDevices<SimHypervisor>) {
    for steps in 0..40 {
        for _ in 0..steps {
            machine.step();
        }
        assert!(
            machine.prepare_sleep().unwrap() < Activity::Working,
            "{steps}"
        );
    }
    assert_eq!(machine.try_again_at(), None);
}

#[test]
fn a_device_with_nothing_to_do_lets_its_worker_sleep() {
    let (mut machine, _guest, wires, [receive, _sending]) = still(1, 0, [RECEIVE, SEND]);
    sleeps(&mut machine);
    // What has woken it is found, whatever the step before has looked at.
    for mark in 0..8u16 {
        wires[0].send(&frame(MAC, 60, 1));
        for _ in 0..mark {
            machine.step();
        }
        while machine.prepare_sleep().unwrap() == Activity::Working {}
        assert_eq!(receive.used_index(), mark + 1);
    }
}

#[test]
fn queues_that_the_driver_does_not_use_keep_no_worker_awake() {
    let mq = 1 << ids::VIRTIO_NET_F_MQ;
    sleeps(&mut still(2, 0, [RECEIVE, SEND, 2, 3]).0);
    sleeps(&mut still(2, mq, [RECEIVE, SEND]).0);
    let (mut machine, _guest, wires, _queues) = still(2, 0, [2]);
    wires[0].send(&frame(MAC, 60, 1));
    wires[1].send(&frame(MAC, 60, 1));
    sleeps(&mut machine);
}

#[test]
fn a_driver_that_is_gone_leaves_nothing_to_wait_for() {
    let (mut machine, guest, _wires, _queues) = still(2, 0, [RECEIVE, SEND]);
    drive(&mut machine, &guest, |driver| {
        let [mut control] = start(driver, 0, [4]);
        // More changes than the interface follows at once.
        for pairs in [2, 1, 2, 1] {
            assert_eq!(command(driver, &mut control, 4, &[4, 0, pairs, 0]).0, 0);
        }
        driver.write(Register::Status, 0);
    });
    while machine.prepare_sleep().unwrap() == Activity::Working {}
    assert_eq!(machine.try_again_at(), None);
}

#[test]
fn frames_that_came_before_the_driver_are_not_its_own() {
    let bench = Bench::new(1, NO_LIMITS);
    let (driver, wire) = (&bench.driver, &bench.wires[0]);
    driver.write(Register::Status, 0);
    for _ in 0..20 {
        wire.send(&frame(MAC, 60, 1));
    }
    let [mut receive] = bench.start(0, [RECEIVE]);
    let buffers = post(driver, &mut receive, RECEIVE, 0, &[256; 8]);
    driver.settle();
    wire.send(&frame(MAC, 60, 2));
    assert!(driver.wait(|| receive.used_index() == 1));
    assert_eq!(buffers[0].read()[40], 2);
    drop(bench.end());
}

#[test]
fn no_pair_starves_for_the_others_at_a_rate() {
    let limits = Limits {
        operations: NonZeroU64::new(200),
        ..Limits::default()
    };
    let bench = Bench::new(2, [limits, Limits::default()]);
    let [mut first, mut other] = bench.start(0, [1, 3]);
    let driver = &bench.driver;
    let buffer = driver.buffer(72, false);
    buffer.write(0, &frame(OTHER, 60, 1));
    let mut rounds = [0u16; 2];
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end {
        for ((queue, index), round) in [(&mut first, 1), (&mut other, 3)]
            .into_iter()
            .zip(&mut rounds)
        {
            if queue.used_index() == *round {
                for head in 0..SIZE {
                    queue.set_descriptor(head, buffer.address(), 72, 0, 0);
                }
                queue.offer_together(&(0..SIZE).collect::<Vec<_>>());
                driver.notify(index);
                *round += SIZE;
            }
        }
        for wire in &bench.wires {
            while wire.try_receive().is_some() {}
        }
    }
    let [one, two] = [first.used_index(), other.used_index()];
    assert!(one > 15 && two > 15, "{one} and {two}");
    drop(bench.end());
}

#[test]
fn many_small_buffers_are_copied_a_few_at_a_time() {
    let bench = Bench::new(1, NO_LIMITS);
    let driver = &bench.driver;
    assert_eq!(
        driver.negotiate(driver.offered_features()),
        Negotiated::Accepted
    );
    let mut sending = RawQueue::new(driver, 512);
    driver.start_queue(SEND, 512, sending.addresses());
    driver.driver_ok();
    let buffer = driver.buffer(512, false);
    buffer.write(0, &frame(OTHER, 500, 1));
    // Heads that share a tail of 400 descriptors.
    for head in 0..64 {
        sending.set_descriptor(head, buffer.address(), 32, NEXT, 64);
    }
    for index in 64..464 {
        let next = if index < 463 { NEXT } else { 0 };
        sending.set_descriptor(index, buffer.address(), 1, next, index + 1);
    }
    sending.offer_together(&(0..64).collect::<Vec<_>>());
    driver.notify(SEND);
    thread::scope(|scope| {
        let wire = &bench.wires[0];
        let drained = scope.spawn(move || (0..64).for_each(|_| drop(wire.receive())));
        assert!(driver.wait(|| sending.used_index() == 64));
        drained.join().unwrap();
    });
    let report = bench.end();
    let (calls, segments) = (report.copy_batches, report.copy_segments);
    assert!(segments <= calls * 1000, "{segments} in {calls} calls");
}
