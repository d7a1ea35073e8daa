//! Processes die: their connections are no more, which the driver is told, and the next ones work.

use super::*;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use xen_virtio_backend::Device;
use xen_virtio_tests::{MakeDevice, allow_descriptors, drive_over_deaths};

/// Buffers for events.
const EVENTS: u16 = 8;
/// Connections that a driver makes, one after the other.
const ROUNDS: u32 = 4;

/// A driver that is told of events.
struct Told {
    side: Side,
    events: RawQueue,
    buffers: Vec<Buffer>,
    seen: u16,
    next: u32,
}

impl Told {
    fn start(guest: &SimGuest) -> Self {
        let driver = driver(guest, 0);
        let events = RawQueue::new(&driver, SIZE);
        let side = Side::start_with(driver, usize::from(SIZE), |driver| {
            driver.start_queue(EVENT, SIZE.into(), events.addresses());
        });
        let mut told = Self {
            side,
            events,
            buffers: Vec::new(),
            seen: 0,
            next: 1000,
        };
        for head in 0..EVENTS {
            let buffer = told.side.driver.buffer(4, true);
            buffer.write(0, &[0xff; 4]);
            told.events
                .set_descriptor(head, buffer.address(), 4, WRITE, 0);
            told.buffers.push(buffer);
            told.events.offer(head);
        }
        told.side.driver.notify(EVENT);
        told
    }

    /// Waits for a packet or an event: the packet, if it is of the connection of this port.
    ///
    /// # Panics
    ///
    /// If neither comes: the connection is no more, and nobody says so.
    fn next(&mut self, guest: u32) -> Result<(Header, Vec<u8>), Ended> {
        loop {
            let (side, events) = (&self.side, &self.events);
            let packet = || side.receives.used_index() != side.received;
            let event = || events.used_index() != self.seen;
            assert!(
                side.driver.wait(|| packet() || event()),
                "nobody says anything"
            );
            if event() {
                let (head, written) = events.used(self.seen);
                let buffer = self.buffers[head as usize].read();
                assert_eq!((written, buffer), (4, vec![0; 4]));
                self.seen += 1;
                return Err(Ended);
            }
            let (header, data) = self.side.receive();
            match header.to.1 == guest {
                true if header.operation == RESET => return Err(Ended),
                true => return Ok((header, data)),
                false => {}
            }
        }
    }

    /// Asks a program something by a connection of its own. What it answers.
    fn ask(&mut self) -> Result<Vec<u8>, Ended> {
        let guest = self.next;
        self.next += 1;
        self.side.send(Header::new(REQUEST, guest, 52), &[]);
        assert_eq!(self.next(guest)?.0.operation, RESPONSE);
        self.side.send(Header::new(RW, guest, 52), b"question");
        let mut answer = Vec::new();
        while answer.len() < 8 {
            answer.extend(self.next(guest)?.1);
        }
        Ok(answer)
    }
}

/// A connection is no more.
#[derive(Debug)]
struct Ended;

/// Has programs answer with what they hear.
fn echoing() -> Arc<Mutex<Operator>> {
    Arc::new(Mutex::new(|board: &Switchboard, number, _| {
        let (mut ours, theirs) = stream();
        thread::spawn(move || {
            let mut bytes = [0; 64];
            while let Ok(len @ 1..) = ours.read(&mut bytes) {
                if ours.write_all(&bytes[..len]).is_err() {
                    break;
                }
            }
        });
        board.dialled(number, Some(theirs.into()));
        true
    }))
}

/// Drives a device whose process dies at these steps. The steps that were taken, and the events that the driver was told.
fn talk(deaths: &[u64]) -> (u64, u32) {
    let processes = AtomicU32::new(0);
    let make: Arc<MakeDevice> = Arc::new(move |_| {
        let served = processes.fetch_add(1, Ordering::SeqCst) > 0;
        Box::new(device(served, echoing())) as Box<dyn Device>
    });
    let (steps, events) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU32::new(0)));
    let (counted, told) = (Arc::clone(&steps), Arc::clone(&events));
    drive_over_deaths(deaths, 0, &make, move |guest| {
        let mut driver = Told::start(guest);
        let mut answered = 0;
        while answered < ROUNDS {
            if let Ok(answer) = driver.ask() {
                assert_eq!(answer, b"question");
                answered += 1;
            }
        }
        told.store(driver.seen.into(), Ordering::SeqCst);
        counted.store(guest.memory().faults().steps(), Ordering::SeqCst);
    });
    (steps.load(Ordering::SeqCst), events.load(Ordering::SeqCst))
}

#[test]
fn a_driver_is_told_that_its_connections_are_no_more_and_the_next_ones_work() {
    allow_descriptors();
    let (steps, events) = talk(&[]);
    assert_eq!(events, 0);
    let mut told = 0;
    for death in (1..steps).step_by(usize::try_from(steps / 60).unwrap().max(1)) {
        let (_, events) = talk(&[death]);
        assert!(events <= 1, "{events} for one death");
        told += events;
    }
    assert!(told > 10, "{told}");
    for first in (steps / 2..steps).step_by(usize::try_from(steps / 8).unwrap().max(1)) {
        let (_, events) = talk(&[first, steps / 3, steps / 2]);
        assert!(events <= 3, "{events} for three deaths");
    }
}

/// What an earlier process had is no business of a driver that begins with this one.
#[test]
fn a_driver_that_begins_is_told_of_nothing() {
    let (guest, machine) = SimMachine::start(AddressMode::Grants, || {
        Ok(vec![Box::new(device(true, echoing()))])
    })
    .unwrap();
    let mut driver = Told::start(&guest);
    assert_eq!(driver.ask().unwrap(), b"question");
    assert_eq!(driver.events.used_index(), 0);
    machine.stop().unwrap();
}
