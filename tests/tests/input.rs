//! The input device, by the one driver, with a device of Linux's that is the test's: a stream of its events.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;
use xen_virtio_backend::input::{Axis, Description, Evdev, Input, kind};
use xen_virtio_backend::{Device, StateArea, StateCell};
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{SimGuest, SimMachine};
use xen_virtio_tests::{
    Buffer, Driver, MakeDevice, Negotiated, RawQueue, WRITE, allow_descriptors, drive_over_deaths,
    driver,
};
use xen_virtio_transport::{DeviceReport, Register, Width};

const SIZE: u16 = 64;
const EVENTS: u32 = 0;
const STATUS: u32 = 1;

/// Bytes of `struct input_event`.
const OF_LINUX: usize = 24;

const REPORT: [i32; 3] = [0, 0, 0];
const DROPPED: [i32; 3] = [0, 3, 0];
const PRESS: [i32; 3] = [1, 30, 1];
const RELEASE: [i32; 3] = [1, 30, 0];

fn description() -> Description {
    let codes = |codes: &[u16]| codes.iter().copied().collect::<BTreeSet<_>>();
    Description {
        name: "a panel".to_owned(),
        ids: [3, 1, 2, 4],
        codes: BTreeMap::from([
            (kind::KEY, codes(&[30, 31, 0x110])),
            (kind::ABSOLUTE, codes(&[0])),
            (0x11, codes(&[1])),
        ]),
        axes: BTreeMap::from([(
            0,
            Axis {
                maximum: 500,
                ..Axis::default()
            },
        )]),
        ..Description::default()
    }
}

/// `struct input_event`: a time, then type, code and value.
fn of_linux([of, code, value]: [i32; 3]) -> Vec<u8> {
    let mut bytes = vec![0; OF_LINUX - 8];
    bytes.extend(u16::try_from(of).unwrap().to_ne_bytes());
    bytes.extend(u16::try_from(code).unwrap().to_ne_bytes());
    bytes.extend(value.to_ne_bytes());
    bytes
}

/// Has the device of Linux's say `events`, at once.
fn say(source: &mut UnixStream, events: &[[i32; 3]]) {
    let bytes: Vec<_> = events.iter().flat_map(|event| of_linux(*event)).collect();
    source.write_all(&bytes).unwrap();
}

fn source() -> (UnixStream, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, theirs.into())
}

/// The guest's side of the device.
struct Side {
    driver: Driver,
    events: RawQueue,
    status: RawQueue,
    buffers: Vec<Buffer>,
    seen: u16,
}

impl Side {
    fn start(driver: Driver, buffers: usize) -> Self {
        assert_eq!(
            driver.negotiate(driver.offered_features()),
            Negotiated::Accepted
        );
        let queue = |index| {
            let queue = RawQueue::new(&driver, SIZE);
            driver.start_queue(index, SIZE.into(), queue.addresses());
            queue
        };
        let (events, status) = (queue(EVENTS), queue(STATUS));
        driver.driver_ok();
        // What came before it is thrown away.
        driver.settle();
        let mut side = Self {
            driver,
            events,
            status,
            buffers: Vec::new(),
            seen: 0,
        };
        side.post(buffers, 8);
        side
    }

    fn post(&mut self, count: usize, len: usize) {
        for _ in 0..count {
            let buffer = self.driver.buffer(len, true);
            let head = u16::try_from(self.buffers.len()).unwrap();
            let len = u32::try_from(len).unwrap();
            self.events
                .set_descriptor(head, buffer.address(), len, WRITE, 0);
            self.buffers.push(buffer);
            self.events.offer(head);
        }
        self.driver.notify(EVENTS);
    }

    fn has_event(&self) -> bool {
        self.events.used_index() != self.seen
    }

    /// The next event, whose buffer is offered again.
    fn next(&mut self) -> [i32; 3] {
        assert!(self.driver.wait(|| self.has_event()), "no event came");
        let (head, written) = self.events.used(self.seen);
        self.seen = self.seen.wrapping_add(1);
        assert_eq!(written, 8);
        let bytes = self.buffers[head as usize].read();
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let value = i32::from_le_bytes(bytes[4..8].try_into().unwrap());
        self.events.offer(u16::try_from(head).unwrap());
        self.driver.notify(EVENTS);
        [half(0).into(), half(2).into(), value]
    }

    fn expect(&mut self, events: &[[i32; 3]]) {
        for event in events {
            assert_eq!(self.next(), *event);
        }
    }

    fn is_quiet(&self) -> bool {
        self.driver.settle();
        !self.has_event()
    }

    /// Tells the device something.
    fn tell(&mut self, bytes: &[u8]) {
        let before = self.status.used_index();
        let buffer = self.driver.buffer(bytes.len(), false);
        buffer.write(0, bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.status.set_descriptor(0, buffer.address(), len, 0, 0);
        self.status.offer(0);
        self.driver.notify(STATUS);
        assert!(self.driver.wait(|| self.status.used_index() != before));
    }
}

struct Bench {
    guest: SimGuest,
    machine: SimMachine,
    side: Side,
    source: UnixStream,
}

impl Bench {
    /// A guest whose driver has so many buffers.
    fn new(buffers: usize) -> Self {
        let (source, theirs) = source();
        let (guest, machine) = SimMachine::start(AddressMode::Grants, move || {
            let kept = StateCell::new(StateArea::private(Input::KEPT).unwrap());
            let source = Some(Evdev::new(theirs));
            Ok(vec![Box::new(
                Input::new(description(), source, kept, false).unwrap(),
            )])
        })
        .unwrap();
        Self {
            side: Side::start(driver(&guest, 0), buffers),
            guest,
            machine,
            source,
        }
    }

    fn end(self) -> DeviceReport {
        let mut reports = self.machine.stop().unwrap();
        assert_eq!(self.guest.memory().revoked_while_mapped(), 0);
        reports.remove(0)
    }
}

#[test]
fn a_driver_reads_what_the_device_is() {
    let bench = Bench::new(0);
    let driver = &bench.side.driver;
    let selected = |select: u8, subselect: u8| -> Vec<u8> {
        driver.raw_write(0x100, Width::One, select.into());
        driver.raw_write(0x101, Width::One, subselect.into());
        let byte = |offset: u64| driver.raw_read(0x100 + offset, Width::One).to_le_bytes()[0];
        assert_eq!((byte(0), byte(1)), (select, subselect));
        (0..byte(2).into()).map(|at| byte(8 + at)).collect()
    };
    assert_eq!(selected(1, 0), b"a panel");
    assert_eq!(selected(3, 0), [3, 0, 1, 0, 2, 0, 4, 0]);
    // No lights, though it has some.
    assert!(selected(0x11, 0x11).is_empty());
    assert_eq!(selected(0x11, 3), [1]);
    assert_eq!(selected(0x12, 0)[4..8], [0xf4, 1, 0, 0]);
    assert!(selected(0x77, 0).is_empty());
    // What is not to be written stays.
    driver.raw_write(0x102, Width::One, 9);
    driver.raw_write(0x108, Width::Four, u64::MAX);
    assert_eq!(selected(1, 0), b"a panel");
    bench.end();
}

#[test]
fn events_come_in_their_order_and_those_that_it_cannot_say_do_not() {
    let mut bench = Bench::new(16);
    let moved = [[3, 0, 100], PRESS, REPORT, RELEASE, REPORT];
    say(&mut bench.source, &moved);
    bench.side.expect(&moved);
    // No such key, another type, and what Linux says of times.
    say(
        &mut bench.source,
        &[
            [1, 99, 1],
            [2, 0, 5],
            [0, 1, 0],
            [0x14, 0, 250],
            PRESS,
            REPORT,
        ],
    );
    bench.side.expect(&[PRESS, REPORT]);
    assert!(bench.side.is_quiet());
    // Linux has lost some: what follows up to the next report is none, and what is known of keys is made good.
    say(
        &mut bench.source,
        &[DROPPED, [3, 0, 7], [1, 31, 1], REPORT, [3, 0, 8], REPORT],
    );
    bench.side.expect(&[RELEASE, REPORT]);
    assert!(bench.side.is_quiet());
    // Linux says by the value of a report's end whose it is; a finger's part has an end of its own.
    let repeated = [[1, 31, 2], [0, 2, 0], [0, 0, 1]];
    say(&mut bench.source, &repeated);
    bench.side.expect(&repeated);
    let metrics = bench.end().metrics;
    assert_eq!((metrics["events"], metrics["losses"]), (12, 1));
}

#[test]
fn what_the_guest_has_no_buffers_for_waits() {
    let mut bench = Bench::new(0);
    let (mut source, count) = (bench.source.try_clone().unwrap(), 3000);
    let saying = std::thread::spawn(move || {
        for position in 0..count {
            say(&mut source, &[[3, 0, position], REPORT]);
        }
    });
    bench.side.driver.settle();
    bench.side.post(8, 8);
    for position in 0..count {
        bench.side.expect(&[[3, 0, position], REPORT]);
    }
    saying.join().unwrap();
    assert_eq!(bench.end().metrics["dropped"], 0);
}

#[test]
fn what_a_driver_asks_of_it_does_nothing_and_buffers_without_room_come_back_empty() {
    let mut bench = Bench::new(0);
    for bytes in [&[0x11, 0, 1, 0, 1, 0, 0, 0][..], &[1], &[0; 100]] {
        bench.side.tell(bytes);
    }
    bench.side.post(1, 7);
    bench.side.post(2, 8);
    say(&mut bench.source, &[PRESS, REPORT]);
    assert!(bench.side.driver.wait(|| bench.side.has_event()));
    assert_eq!(bench.side.events.used(0), (0, 0));
    bench.side.seen = 1;
    bench.side.expect(&[PRESS, REPORT]);
    // Nothing was written to the device.
    bench.source.set_nonblocking(true).unwrap();
    assert!(bench.source.read(&mut [0]).is_err());
    assert_eq!(bench.end().metrics["malformed"], 1);
}

#[test]
fn a_driver_sees_nothing_of_what_came_before_it() {
    let mut bench = Bench::new(0);
    say(&mut bench.source, &[PRESS, REPORT]);
    bench.side.driver.settle();
    bench.side.driver.write(Register::Status, 0);
    say(&mut bench.source, &[[1, 31, 1], REPORT]);
    bench.side = Side::start(driver(&bench.guest, 0), 8);
    assert!(bench.side.is_quiet());
    say(&mut bench.source, &[RELEASE, REPORT]);
    bench.side.expect(&[RELEASE, REPORT]);
    bench.end();
}

#[test]
fn keys_of_a_device_that_is_taken_away_are_let_go() {
    let mut bench = Bench::new(8);
    say(&mut bench.source, &[PRESS, [1, 31, 1], REPORT]);
    bench.side.expect(&[PRESS, [1, 31, 1], REPORT]);
    bench.source.shutdown(std::net::Shutdown::Both).unwrap();
    bench.side.expect(&[RELEASE, [1, 31, 0], REPORT]);
    assert!(bench.side.is_quiet());
    let warning = bench.end().warning.unwrap();
    assert!(warning.contains("was taken away"), "{warning}");
}

/// Let go and pressed again by what the guest sees at once: it is pressed.
#[test]
fn a_key_that_is_pressed_again_at_once_is_let_go_too() {
    let mut bench = Bench::new(0);
    say(
        &mut bench.source,
        &[PRESS, REPORT, RELEASE, REPORT, PRESS, REPORT],
    );
    bench.side.driver.settle();
    bench.side.post(16, 8);
    bench
        .side
        .expect(&[PRESS, REPORT, RELEASE, REPORT, PRESS, REPORT]);
    bench.source.shutdown(std::net::Shutdown::Both).unwrap();
    bench.side.expect(&[RELEASE, REPORT]);
    bench.end();
}

/// Has a key pressed and let go by a device whose process dies at these steps. How many have died, and the steps of the last one.
fn press_and_let_go(deaths: &[u64]) -> (usize, u64) {
    let (mut source, theirs) = source();
    let processes = AtomicU32::new(0);
    let make: Arc<MakeDevice> = Arc::new(move |records| {
        let served = processes.fetch_add(1, Ordering::SeqCst) > 0;
        let kept = StateCell::new(records.own(0, Input::KEPT).unwrap());
        let source = Some(Evdev::new(theirs.try_clone().unwrap()));
        let device = Input::new(description(), source, kept, served);
        Box::new(device.unwrap()) as Box<dyn Device>
    });
    let steps = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&steps);
    let died = drive_over_deaths(deaths, 0, &make, move |guest| {
        let mut side = Side::start(driver(guest, 0), 16);
        // What is said in the moment of a death may be lost.
        loop {
            say(&mut source, &[PRESS, REPORT]);
            if !side.is_quiet() && side.next() == PRESS {
                break;
            }
        }
        say(&mut source, &[RELEASE, REPORT]);
        // Fails if it does not come.
        while side.next() != RELEASE {}
        counted.store(guest.memory().faults().steps(), Ordering::SeqCst);
    });
    (died, steps.load(Ordering::SeqCst))
}

/// A key that the guest has seen pressed it sees let go, whatever dies: also if a process has read that, and told nobody.
#[test]
fn no_key_stays_pressed_when_a_process_dies() {
    allow_descriptors();
    let (_, steps) = press_and_let_go(&[]);
    let last = steps.saturating_sub(60)..=steps;
    let deaths = (1..steps).step_by(7).chain(last);
    let died: usize = deaths.map(|death| press_and_let_go(&[death]).0).sum();
    assert!(died > 40, "{died}");
}
