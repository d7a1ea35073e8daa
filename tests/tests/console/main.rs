//! The console device, by the one driver, with clients whose other ends are the test's.

mod ports;
mod single;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use xen_virtio_backend::console::{Console, INPUT, Line, RESIZE};
use xen_virtio_backend::{Activity, Device, StateArea, StateCell};
use xen_virtio_dom0_tools::guest_state::DeviceRecords;
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{FIRST_DEVICE, FIRST_IRQ, SimGuest, SimHypervisor, SimMachine, simulate};
use xen_virtio_tests::{
    Buffer, Driver, MakeDevice, NEXT, Negotiated, RawQueue, WRITE, come_to_rest, drive,
    drive_over_deaths, driver, sleeps,
};
use xen_virtio_transport::{
    DeviceReport, DeviceState, GuestDevices, MmioDevice, Register, Slot, Width,
};

const SIZE: u16 = 16;
/// The queues of the first port.
const READS: u32 = 0;
const WRITES: u32 = 1;
/// … and those by which device and driver tell each other of ports.
const TELLS: u32 = 2;
const HEARS: u32 = 3;

/// Bytes of its output that a port keeps.
const KEPT: usize = 256 << 10;

/// A guest with a console.
struct Bench {
    guest: SimGuest,
    machine: SimMachine,
    driver: Driver,
}

impl Bench {
    /// One with ports of these names, and what is attached to them.
    fn new(names: &[Option<&str>], lines: Vec<(usize, Line)>) -> Self {
        let names = owned(names);
        let (guest, machine) = SimMachine::start(AddressMode::Grants, move || {
            Ok(vec![attached(console(names), lines)])
        })
        .unwrap();
        Self {
            driver: driver(&guest, 0),
            guest,
            machine,
        }
    }

    fn start<const N: usize>(&self, queues: [u32; N]) -> [RawQueue; N] {
        start(&self.driver, queues)
    }

    fn end(self) -> DeviceReport {
        let mut reports = self.machine.stop().unwrap();
        assert_eq!(self.guest.memory().revoked_while_mapped(), 0);
        reports.remove(0)
    }
}

fn owned(names: &[Option<&str>]) -> Vec<Option<String>> {
    names.iter().map(|name| name.map(str::to_owned)).collect()
}

/// A console that nobody has had.
fn console(names: Vec<Option<String>>) -> Console {
    let kept = StateArea::private(Console::kept_bytes(names.len())).unwrap();
    let history = |_: &_| StateArea::private(Console::HISTORY_BYTES).unwrap();
    let histories = names.iter().map(history).collect();
    Console::new(names, StateCell::new(kept), histories).unwrap()
}

/// One that goes on with what another process has left in `records`.
fn inherited(names: &[Option<&str>], records: &DeviceRecords<'_>) -> Console {
    let kept = records.own(0, Console::kept_bytes(names.len())).unwrap();
    let history = |index| records.own(index, Console::HISTORY_BYTES).unwrap();
    let histories = (1..).take(names.len()).map(history).collect();
    Console::new(owned(names), StateCell::new(kept), histories).unwrap()
}

/// `device`, once it has taken up `lines`.
fn attached(mut device: Console, lines: Vec<(usize, Line)>) -> Box<dyn Device> {
    for (port, line) in lines {
        device.attaching().attach(port, line);
    }
    device.update();
    Box::new(device)
}

/// A console that is served by hand.
fn by_hand(
    names: &[Option<&str>],
    lines: Vec<(usize, Line)>,
) -> (GuestDevices<SimHypervisor>, SimGuest) {
    let (machine, guest, _) = served(attached(console(owned(names)), lines));
    (machine, guest)
}

/// … and where in the machine it is.
fn served(device: Box<dyn Device>) -> (GuestDevices<SimHypervisor>, SimGuest, Slot) {
    let (hypervisor, guest) = simulate(1024).unwrap();
    let state = DeviceState::private().unwrap();
    let device = MmioDevice::new(device, &hypervisor, AddressMode::Grants, FIRST_IRQ, state);
    let mut machine = GuestDevices::new(hypervisor);
    let slot = machine.add(FIRST_DEVICE, device.unwrap()).unwrap();
    (machine, guest, slot)
}

/// A running device, and a queue for each of `queues`.
fn start<const N: usize>(driver: &Driver, queues: [u32; N]) -> [RawQueue; N] {
    assert_eq!(
        driver.negotiate(driver.offered_features()),
        Negotiated::Accepted
    );
    let queues = queues.map(|index| {
        let queue = RawQueue::new(driver, SIZE);
        driver.start_queue(index, SIZE.into(), queue.addresses());
        queue
    });
    driver.driver_ok();
    queues
}

/// Steps of a process before its driver can begin.
fn steps_before(make: &Arc<MakeDevice>) -> u64 {
    let steps = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&steps);
    drive_over_deaths(&[], 0, make, move |guest| {
        driver(guest, 0).read(Register::MagicValue);
        counted.store(guest.memory().faults().steps(), Ordering::SeqCst);
    });
    steps.load(Ordering::SeqCst)
}

/// A stream to the guest, and its end.
fn stream() -> (UnixStream, Line) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, Line::Stream(theirs.into()))
}

/// A client of messages that has read up to `from`, and its end.
fn messages(from: Option<u64>) -> (OwnedFd, Line) {
    let (ours, socket) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    set_socket_timeout(&ours, Timeout::Recv, Some(Duration::from_secs(10))).unwrap();
    rustix::io::ioctl_fionbio(&socket, true).unwrap();
    (ours, Line::Messages { socket, from })
}

/// The next message; nothing, if the connection has ended.
fn receive(from: &OwnedFd) -> Vec<u8> {
    let mut bytes = [0; 1 << 16];
    let len = rustix::io::read(from, &mut bytes).unwrap();
    bytes[..len].to_vec()
}

fn say(to: &OwnedFd, message: &[u8]) {
    rustix::io::write(to, message).unwrap();
}

/// The reading end of a log.
fn log() -> (File, Line) {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    (File::from(reader), Line::Log(writer))
}

/// Writes `bytes` to a port, by one chain of pieces of these lengths. It comes back at once, whoever reads.
fn write(driver: &Driver, queue: &mut RawQueue, index: u32, bytes: &[u8], pieces: &[usize]) {
    let before = queue.used_index();
    let _buffers = offer(driver, queue, index, bytes, pieces);
    assert!(
        driver.wait(|| queue.used_index() != before),
        "it never came back"
    );
    assert_eq!(queue.used(before), (0, 0));
}

fn offer(
    driver: &Driver,
    queue: &mut RawQueue,
    index: u32,
    bytes: &[u8],
    pieces: &[usize],
) -> Vec<Buffer> {
    let (mut at, mut buffers) = (0, Vec::new());
    for (place, len) in (0..).zip(pieces) {
        let buffer = driver.buffer((*len).max(1), false);
        buffer.write(0, &bytes[at..at + len]);
        at += len;
        let is_last = at == bytes.len() && usize::from(place) + 1 == pieces.len();
        let flags = if is_last { 0 } else { NEXT };
        let len = u32::try_from(*len).unwrap();
        queue.set_descriptor(place, buffer.address(), len, flags, place + 1);
        buffers.push(buffer);
    }
    assert_eq!(at, bytes.len());
    queue.offer(0);
    driver.notify(index);
    buffers
}

/// Offers buffers of these lengths, each a chain of its own.
fn post(driver: &Driver, queue: &mut RawQueue, index: u32, lens: &[usize]) -> Vec<Buffer> {
    let buffers: Vec<_> = lens.iter().map(|len| driver.buffer(*len, true)).collect();
    let heads: Vec<u16> = (0..).take(lens.len()).collect();
    for (buffer, head) in buffers.iter().zip(&heads) {
        let len = u32::try_from(buffer.len).unwrap();
        queue.set_descriptor(*head, buffer.address(), len, WRITE, 0);
    }
    queue.offer_together(&heads);
    driver.notify(index);
    buffers
}

/// Waits for the guest to have buffer number `index` back, with `expected` in it.
fn expect(driver: &Driver, queue: &RawQueue, index: u16, buffer: &Buffer, expected: &[u8]) {
    assert!(
        driver.wait(|| queue.used_index() > index),
        "nothing came for {index}"
    );
    let (head, written) = queue.used(index);
    assert_eq!((head, written as usize), (u32::from(index), expected.len()));
    assert_eq!(buffer.read()[..expected.len()], *expected);
}

fn read_exactly(from: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

/// Bytes of which each tells where it is.
fn numbered(len: usize) -> Vec<u8> {
    let lines = (0..).map(|line: u32| format!("{line:07}\n"));
    lines.flat_map(String::into_bytes).take(len).collect()
}
