//! The socket device, by the one driver, with programs of the host's that are the test's.

mod death;
mod streams;
mod wrong;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xen_virtio_backend::vsock::{Dial, Switchboard, Vsock};
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{SimGuest, SimMachine};
use xen_virtio_tests::{Buffer, Driver, Negotiated, RawQueue, WRITE, driver};
use xen_virtio_transport::{DeviceReport, Register, Width};

const SIZE: u16 = 16;
const RECEIVE: u32 = 0;
const SEND: u32 = 1;
const EVENT: u32 = 2;

const CID: u64 = 42;
const HEADER: usize = 44;
/// What Linux's buffers have room for.
const DATA: usize = 4096;
/// What a guest may have under way.
const HELD: usize = 128 << 10;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

const NO_MORE_RECEIVING: u32 = 1;
const NO_MORE_SENDING: u32 = 2;

/// A packet without its data, as `struct virtio_vsock_hdr` has it (virtio 1.3, 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    from: (u64, u32),
    to: (u64, u32),
    len: u32,
    kind: u16,
    operation: u16,
    flags: u32,
    buffer: u32,
    forwarded: u32,
}

impl Header {
    /// One of the guest's.
    fn new(operation: u16, guest: u32, host: u32) -> Self {
        Self {
            from: (CID, guest),
            to: (2, host),
            len: 0,
            kind: 1,
            operation,
            flags: 0,
            buffer: 1 << 20,
            forwarded: 0,
        }
    }

    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.from.0.to_le_bytes());
        bytes.extend(self.to.0.to_le_bytes());
        bytes.extend(self.from.1.to_le_bytes());
        bytes.extend(self.to.1.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.operation.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buffer.to_le_bytes());
        bytes.extend(self.forwarded.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Self {
            from: (long(0), word(16)),
            to: (long(8), word(20)),
            len: word(24),
            kind: half(28),
            operation: half(30),
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
        }
    }
}

/// What answers a guest's dials, in the machine's thread. False if nobody hears.
type Operator = dyn FnMut(&Switchboard, u64, u32) -> bool + Send;

/// A device whose dials `operator` answers.
fn device(served: bool, operator: Arc<Mutex<Operator>>) -> Vsock {
    let place: Arc<Mutex<Option<Switchboard>>> = Arc::default();
    let board = Arc::clone(&place);
    let dial = Dial::new(move |number, port| {
        let board = board.lock().unwrap();
        operator.lock().unwrap()(board.as_ref().unwrap(), number, port)
    });
    let device = Vsock::new(CID, served, dial).unwrap();
    *place.lock().unwrap() = Some(device.switchboard());
    device
}

/// A stream to a program, and the device's end.
fn stream() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, theirs)
}

/// A port by which the test has a program of the host's connect to the guest.
const VISITED: u32 = 7;
/// One at which nobody listens.
const NOBODY: u32 = 9;

/// Hands the other ends of what is connected to `to`; at [`VISITED`], of what connects to the guest.
fn operator(to: Sender<UnixStream>) -> Arc<Mutex<Operator>> {
    Arc::new(Mutex::new(move |board: &Switchboard, number, port| {
        let (ours, theirs) = stream();
        match port {
            NOBODY => {
                board.dialled(number, None);
                return true;
            }
            VISITED => {
                board.visit(theirs.into());
                board.dialled(number, None);
            }
            _ => board.dialled(number, Some(theirs.into())),
        }
        to.send(ours).is_ok()
    }))
}

/// A guest with a running socket device.
struct Bench {
    guest: SimGuest,
    machine: SimMachine,
    side: Side,
    programs: Receiver<UnixStream>,
}

/// The guest's side of the device.
struct Side {
    driver: Driver,
    receives: RawQueue,
    sends: RawQueue,
    /// Buffers of the queue that receives, and how many of them were used.
    buffers: Vec<Buffer>,
    received: u16,
}

impl Bench {
    fn new() -> Self {
        let (to, programs) = channel();
        Self::with(operator(to), programs, usize::from(SIZE))
    }

    /// One whose driver has so many buffers.
    fn with(
        operator: Arc<Mutex<Operator>>,
        programs: Receiver<UnixStream>,
        buffers: usize,
    ) -> Self {
        let (guest, machine) = SimMachine::start(AddressMode::Grants, move || {
            Ok(vec![Box::new(device(false, operator))])
        })
        .unwrap();
        let side = Side::start(driver(&guest, 0), buffers);
        Self {
            guest,
            machine,
            side,
            programs,
        }
    }

    fn end(self) -> DeviceReport {
        let mut reports = self.machine.stop().unwrap();
        assert_eq!(self.guest.memory().revoked_while_mapped(), 0);
        reports.remove(0)
    }

    /// A connection of the guest's port to one of the host's: the program's end.
    fn connect(&mut self, guest: u32, host: u32) -> UnixStream {
        self.side.send(Header::new(REQUEST, guest, host), &[]);
        let response = self.side.expect(RESPONSE, guest, host);
        assert_eq!(response.buffer as usize, HELD);
        self.programs.recv().unwrap()
    }

    /// A program that has connected to the device.
    fn visit(&mut self) -> UnixStream {
        self.side.send(Header::new(REQUEST, 1, VISITED), &[]);
        self.side.expect(RESET, 1, VISITED);
        self.programs.recv().unwrap()
    }
}

impl Side {
    fn start(driver: Driver, buffers: usize) -> Self {
        Self::start_with(driver, buffers, |_| {})
    }

    /// Starts as [`Side::start`], with what else `set_up` starts before the driver is there.
    fn start_with(driver: Driver, buffers: usize, set_up: impl FnOnce(&Driver)) -> Self {
        assert_eq!(
            driver.negotiate(driver.offered_features()),
            Negotiated::Accepted
        );
        let queue = |index| {
            let queue = RawQueue::new(&driver, SIZE);
            driver.start_queue(index, SIZE.into(), queue.addresses());
            queue
        };
        let (receives, sends) = (queue(RECEIVE), queue(SEND));
        set_up(&driver);
        driver.driver_ok();
        let mut side = Self {
            driver,
            receives,
            sends,
            buffers: Vec::new(),
            received: 0,
        };
        for _ in 0..buffers {
            side.post(HEADER + DATA);
        }
        side
    }

    /// Offers one more buffer.
    fn post(&mut self, len: usize) {
        let buffer = self.driver.buffer(len, true);
        let head = u16::try_from(self.buffers.len()).unwrap();
        let len = u32::try_from(len).unwrap();
        self.receives
            .set_descriptor(head, buffer.address(), len, WRITE, 0);
        self.buffers.push(buffer);
        self.receives.offer(head);
        self.driver.notify(RECEIVE);
    }

    /// Sends a packet, and waits until the device has taken it.
    fn send(&mut self, header: Header, data: &[u8]) {
        let before = self.sends.used_index();
        let len = u32::try_from(data.len()).unwrap();
        let packet = [Header { len, ..header }.to_bytes(), data.to_vec()].concat();
        let _buffer = self.offer(&packet);
        assert!(
            self.driver.wait(|| self.sends.used_index() != before),
            "{header:?}"
        );
    }

    /// Offers `packet` to the device.
    fn offer(&mut self, packet: &[u8]) -> Buffer {
        let buffer = self.driver.buffer(packet.len(), false);
        buffer.write(0, packet);
        let len = u32::try_from(packet.len()).unwrap();
        self.sends.set_descriptor(0, buffer.address(), len, 0, 0);
        self.sends.offer(0);
        self.driver.notify(SEND);
        buffer
    }

    /// The next packet of the device's.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        assert!(self.has_received(), "no packet came");
        let (head, written) = self.receives.used(self.received);
        self.received = self.received.wrapping_add(1);
        let bytes = self.buffers[head as usize].read();
        let header = Header::from_bytes(&bytes);
        let data = bytes[HEADER..written as usize].to_vec();
        assert_eq!(header.len as usize, data.len());
        assert_eq!((header.from.0, header.to.0, header.kind), (2, CID, 1));
        self.receives.offer(u16::try_from(head).unwrap());
        self.driver.notify(RECEIVE);
        (header, data)
    }

    fn has_received(&self) -> bool {
        self.driver
            .wait(|| self.receives.used_index() != self.received)
    }

    /// Whether there is nothing for the guest.
    fn is_quiet(&self) -> bool {
        self.driver.settle();
        self.receives.used_index() == self.received
    }

    /// The next packet, which is one without data.
    fn expect(&mut self, operation: u16, guest: u32, host: u32) -> Header {
        let (header, data) = self.receive();
        assert_eq!(
            (header.operation, header.to.1, header.from.1),
            (operation, guest, host)
        );
        assert!(data.is_empty());
        header
    }

    /// So many bytes by a connection; between them may be packets that tell of credit.
    fn receive_data(&mut self, len: usize) -> Vec<u8> {
        let mut received = Vec::new();
        while received.len() < len {
            let (header, data) = self.receive();
            assert!(
                [RW, CREDIT_UPDATE, CREDIT_REQUEST].contains(&header.operation),
                "{header:?}"
            );
            received.extend(data);
        }
        received
    }
}

fn read_exactly(from: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

fn is_at_end(stream: &mut UnixStream) -> bool {
    stream.read(&mut [0]).unwrap() == 0
}

/// Bytes of which each tells where it is.
fn numbered(len: usize) -> Vec<u8> {
    let lines = (0..).map(|line: u32| format!("{line:07}\n"));
    lines.flat_map(String::into_bytes).take(len).collect()
}
