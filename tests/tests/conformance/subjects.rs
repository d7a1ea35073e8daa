//! The kinds of devices: how each is made, and what a request of it looks like and comes to.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use xen_virtio_backend::RingStock;
use xen_virtio_backend::blk::{Blk, Disk};
use xen_virtio_backend::console::{Console, Line};
use xen_virtio_backend::input::{Description, Input};
use xen_virtio_backend::net::Net;
use xen_virtio_backend::rng::Rng;
use xen_virtio_backend::tap::HEADER;
use xen_virtio_backend::vsock::{Dial, Vsock};
use xen_virtio_backend::{Device, Limits, OneByOne, StateCell, Unfinished};
use xen_virtio_dom0_tools::guest_state::DeviceRecords;
use xen_virtio_tests::net::frame;
use xen_virtio_tests::{
    BlkRequest, Buffer, Driver, Echo, Flood, MAC, MakeDevice, NEXT, RawQueue, ShadowEcho, WRITE,
    network, numbered_disk,
};

/// A request of a device, and how it is to end.
pub(crate) trait Piece {
    /// Writes its descriptors, from `head` on.
    fn describe(&self, queue: &RawQueue, head: u16);
    /// # Panics
    ///
    /// If `written` bytes are not what it was to come to.
    fn check(&self, written: u32);
}

impl Piece for BlkRequest {
    fn describe(&self, queue: &RawQueue, head: u16) {
        self.describe(queue, head);
    }

    fn check(&self, written: u32) {
        assert_eq!((written, self.status.read()), (513, vec![0]));
        assert!(self.data.read().iter().all(|byte| *byte == 3));
    }
}

struct Entropy(Buffer);

impl Piece for Entropy {
    fn describe(&self, queue: &RawQueue, head: u16) {
        queue.set_descriptor(head, self.0.address(), 64, WRITE, 0);
    }

    fn check(&self, written: u32) {
        assert_eq!(written, 64);
        assert!(self.0.read().iter().any(|byte| *byte != 0));
    }
}

struct Received(Buffer);

impl Received {
    const FRAME: usize = 60;
}

impl Piece for Received {
    fn describe(&self, queue: &RawQueue, head: u16) {
        queue.set_descriptor(head, self.0.address(), 2048, WRITE, 0);
    }

    fn check(&self, written: u32) {
        let bytes = self.0.read();
        assert_eq!(written as usize, HEADER + Self::FRAME);
        assert_eq!(bytes[HEADER..][..6], MAC);
        assert!(bytes[HEADER + Self::FRAME..].iter().all(|byte| *byte == 0));
    }
}

struct Typed(Buffer);

impl Piece for Typed {
    fn describe(&self, queue: &RawQueue, head: u16) {
        queue.set_descriptor(head, self.0.address(), 64, WRITE, 0);
    }

    fn check(&self, written: u32) {
        let bytes = self.0.read();
        assert!((1..=64).contains(&written));
        let (typed, rest) = bytes.split_at(written as usize);
        assert!(typed.iter().all(|byte| *byte == 7) && rest.iter().all(|byte| *byte == 0));
    }
}

/// Something for the device, in two pieces of these lengths, which comes to nothing that is written.
struct Sent(Buffer, [u32; 2]);

impl Piece for Sent {
    fn describe(&self, queue: &RawQueue, head: u16) {
        let Self(buffer, [first, second]) = self;
        let (start, next) = (buffer.address(), head + 1);
        queue.set_descriptor(head, start, *first, NEXT, next);
        queue.set_descriptor(next, start + u64::from(*first), *second, 0, 0);
    }

    fn check(&self, written: u32) {
        assert_eq!(written, 0);
    }
}

/// A console that somebody types to, without end.
fn console(records: &DeviceRecords<'_>) -> Box<dyn Device> {
    let (mut typist, line) = UnixStream::pair().unwrap();
    line.set_nonblocking(true).unwrap();
    thread::spawn(move || while typist.write_all(&[7; 100]).is_ok() {});
    let kept = records.own(0, Console::kept_bytes(1)).unwrap();
    let history = records.own(1, Console::HISTORY_BYTES).unwrap();
    let mut device = Console::new(vec![None], StateCell::new(kept), vec![history]).unwrap();
    device.attaching().attach(0, Line::Stream(line.into()));
    device.update();
    Box::new(device)
}

/// An interface with frames without end.
fn net(records: &DeviceRecords<'_>) -> Box<dyn Device> {
    let flood = Flood::new(frame(MAC, Received::FRAME, 7)).unwrap();
    let kept = records.own(0, Net::kept_bytes(1)).unwrap();
    network(vec![Box::new(flood)], [Limits::default(); 2], kept, true).unwrap()
}

struct Commanded {
    command: Buffer,
    answer: Buffer,
}

impl Piece for Commanded {
    fn describe(&self, queue: &RawQueue, head: u16) {
        queue.set_descriptor(head, self.command.address(), 3, NEXT, head + 1);
        queue.set_descriptor(head + 1, self.answer.address(), 1, WRITE, 0);
    }

    fn check(&self, written: u32) {
        assert_eq!((written, self.answer.read()), (1, vec![0]));
    }
}

struct Echoed {
    sent: Buffer,
    answer: Buffer,
}

impl Piece for Echoed {
    fn describe(&self, queue: &RawQueue, head: u16) {
        queue.set_descriptor(head, self.sent.address(), 32, NEXT, head + 1);
        queue.set_descriptor(head + 1, self.answer.address(), 48, WRITE, 0);
    }

    fn check(&self, written: u32) {
        assert_eq!(written, 32);
        assert_eq!(self.answer.read()[..32], self.sent.read());
    }
}

/// A kind of device.
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    pub(crate) make: Arc<MakeDevice>,
    /// What becomes of requests that were taken when their process died.
    pub(crate) unfinished: Unfinished,
    /// Bytes at the beginning of its configuration space that are the driver's to write.
    pub(crate) selected: u64,
    /// The queue that requests are made by.
    pub(crate) queue: u32,
    pub(crate) request: fn(&Driver) -> Box<dyn Piece>,
}

pub(crate) fn subjects() -> Vec<Subject> {
    let disk = Arc::new(numbered_disk(8));
    let blk = move |records: &DeviceRecords<'_>| {
        let disk = Disk::open(disk.path(), false).unwrap();
        let kept = records.own(0, Blk::KEPT).unwrap();
        Box::new(Blk::new(disk, [0; 20], 1, kept, &RingStock::new(1)).unwrap()) as Box<dyn Device>
    };
    vec![
        Subject {
            name: "blk",
            make: Arc::new(blk),
            unfinished: Unfinished::Repeat,
            selected: 0,
            queue: 0,
            request: |driver| Box::new(BlkRequest::new(driver, VIRTIO_BLK_T_IN, 3, 512, true)),
        },
        Subject {
            name: "console",
            make: Arc::new(console),
            unfinished: Unfinished::Repeat,
            selected: 0,
            queue: 0,
            request: |driver| Box::new(Typed(driver.buffer(64, true))),
        },
        Subject {
            name: "console, what the guest writes",
            make: Arc::new(console),
            unfinished: Unfinished::Repeat,
            selected: 0,
            queue: 1,
            request: |driver| Box::new(Sent(driver.buffer(64, false), [40, 24])),
        },
        Subject {
            name: "input",
            make: Arc::new(|records| {
                let kept = StateCell::new(records.own(0, Input::KEPT).unwrap());
                let device = Input::new(Description::default(), None, kept, true);
                Box::new(device.unwrap())
            }),
            unfinished: Unfinished::Repeat,
            selected: 2,
            queue: 1,
            request: |driver| {
                let light = driver.buffer(64, false);
                light.write(0, &[0x11, 0, 0, 0, 1, 0, 0, 0]);
                Box::new(Sent(light, [3, 5]))
            },
        },
        Subject {
            name: "net",
            make: Arc::new(net),
            unfinished: Unfinished::Repeat,
            selected: 0,
            queue: 0,
            request: |driver| Box::new(Received(driver.buffer(2048, true))),
        },
        Subject {
            name: "net, what it sends",
            make: Arc::new(net),
            unfinished: Unfinished::Repeat,
            selected: 0,
            queue: 1,
            request: |driver| {
                let sent = driver.buffer(HEADER + Received::FRAME, false);
                sent.write(0, &frame(MAC, Received::FRAME, 7));
                Box::new(Sent(sent, [20, 1000]))
            },
        },
        Subject {
            name: "net, its control queue",
            make: Arc::new(net),
            unfinished: Unfinished::Repeat,
            selected: 0,
            queue: 2,
            request: |driver| {
                let command = driver.buffer(3, false);
                // Promiscuous (virtio 1.3, 5.1.6.5.1).
                command.write(0, &[0, 0, 1]);
                let answer = driver.buffer(1, true);
                answer.write(0, &[0xee]);
                Box::new(Commanded { command, answer })
            },
        },
        Subject {
            name: "rng",
            make: Arc::new(|_| Box::new(OneByOne::new(Rng::new(1 << 30).unwrap()))),
            unfinished: Unfinished::Repeat,
            selected: 0,
            queue: 0,
            request: |driver| Box::new(Entropy(driver.buffer(64, true))),
        },
        Subject {
            name: "vsock",
            make: Arc::new(|_| {
                let dial = Dial::new(|_, _| false);
                Box::new(Vsock::new(42, false, dial).unwrap())
            }),
            unfinished: Unfinished::Repeat,
            selected: 0,
            queue: 1,
            // Of nobody: it is dropped.
            request: |driver| Box::new(Sent(driver.buffer(64, false), [44, 20])),
        },
        echo(
            "echo",
            Arc::new(|_| Box::new(OneByOne::new(Echo::new().unwrap()))),
        ),
        echo(
            "shadow echo",
            Arc::new(|_| Box::new(ShadowEcho::new().unwrap())),
        ),
    ]
}

/// A device that echoes, and gives back what it had when its process died.
fn echo(name: &'static str, make: Arc<MakeDevice>) -> Subject {
    Subject {
        name,
        make,
        unfinished: Unfinished::GiveBack,
        selected: 0,
        queue: 0,
        request: |driver| {
            let sent = driver.buffer(32, false);
            sent.write(0, &[7; 32]);
            Box::new(Echoed {
                sent,
                answer: driver.buffer(48, true),
            })
        },
    }
}
