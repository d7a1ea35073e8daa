//! A back-end that answers what it likes, says what it was not asked, and goes and comes, while a driver uses its device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::cell::OnceCell;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use xen_virtio_backend::vhost_user::{
    Arrival, Brought, CLASSES, Class, Frontend, Lasting, Link, Offer, Setup,
};
use xen_virtio_backend::{Device, DeviceError};
use xen_virtio_fuzz::{Numbers, QueueGuest};
use xen_virtio_guest_mapping::{AddressMode, GuestAccess};
use xen_virtio_sim::SimAccess;

const SIZE: u16 = 8;
const POOL: usize = 32 << 12;
const EVENT_IDX: u64 = 1 << 29;
/// `VHOST_USER_F_PROTOCOL_FEATURES`, `VIRTIO_F_VERSION_1`, and the first bits of any type.
const FEATURES: u64 = 1 << 30 | 1 << 32 | EVENT_IDX | 0xff;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, STATUS.
const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 16;
const REPLY: u32 = 1 << 2 | 1;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;

const BUFFERS: [(usize, bool); 2] = [(4096, false), (4096, true)];

thread_local! {
    static GUEST: OnceCell<QueueGuest> = const { OnceCell::new() };
}

/// The back-end's end of a connection.
struct BackEnd {
    socket: UnixStream,
    /// What it has read of the frontend, and not answered.
    asked: Vec<u8>,
}

impl BackEnd {
    fn pair() -> (Self, OwnedFd) {
        let (socket, theirs) = UnixStream::pair().expect("descriptors");
        for end in [&socket, &theirs] {
            end.set_nonblocking(true).expect("a socket");
        }
        let asked = Vec::new();
        (Self { socket, asked }, theirs.into())
    }

    fn send(&mut self, bytes: &[u8]) {
        // The frontend may have ended it, or not have read what was sent before.
        let _ = self.socket.write(bytes);
    }

    fn message(&mut self, request: u32, flags: u32, payload: &[u8]) {
        let size = u32::try_from(payload.len()).expect("a short one");
        let header = [request, flags, size].map(u32::to_ne_bytes).concat();
        self.send(&[&header[..], payload].concat());
    }

    /// Answers what was asked first, if that wants an answer; `change` is what an honest answer is changed by.
    fn answer(&mut self, change: u64) {
        let mut bytes = [0; 4096];
        // Descriptors that came beside are closed.
        while let Ok(len @ 1..) = self.socket.read(&mut bytes) {
            self.asked.extend(&bytes[..len]);
        }
        while self.asked.len() >= HEADER {
            let word = |place: usize| {
                let bytes = self.asked[place..place + 4].try_into();
                u32::from_ne_bytes(bytes.expect("four bytes"))
            };
            let (request, flags, size) = (word(0), word(4), word(8));
            let end = HEADER + usize::try_from(size).expect("a message of ours");
            if self.asked.len() < end {
                return;
            }
            let payload: Vec<u8> = self.asked.drain(..end).skip(HEADER).collect();
            let number = |number: u64| Some((number ^ change).to_ne_bytes().to_vec());
            let answer = match request {
                // GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM.
                1 => number(FEATURES),
                15 => number(PROTOCOL),
                17 => number(4),
                // GET_VRING_BASE: as if it had finished so many.
                11 => {
                    let state = [&payload[..4], &[0; 4]].concat();
                    let state = u64::from_ne_bytes(state.try_into().expect("eight bytes"));
                    number(state)
                }
                // GET_CONFIG.
                24 => Some(payload),
                _ if flags & NEED_REPLY != 0 => number(0),
                _ => None,
            };
            if let Some(answer) = answer {
                self.message(request, REPLY, &answer);
                return;
            }
        }
    }
}

struct Serving<'a> {
    guest: &'a QueueGuest,
    access: SimAccess,
    device: Frontend,
    link: Link,
    back_end: BackEnd,
    is_started: bool,
    available: u16,
}

impl Serving<'_> {
    fn start(&mut self) {
        let start = self.guest.start(SIZE, FEATURES);
        self.available = 0;
        let access: &mut dyn GuestAccess = &mut self.access;
        let started = self.device.start_queue(QueueGuest::index(), start, access);
        started.expect("a good queue");
        self.is_started = true;
    }

    fn stop(&mut self) {
        if std::mem::take(&mut self.is_started) {
            self.device.stop_queue(QueueGuest::index());
            self.device.reset();
        }
        self.device.settle();
    }

    /// The guest offers a request, of which it changes nothing.
    fn offer(&mut self) {
        let queue = &self.guest.queue;
        let [readable, writable] = &self.guest.buffers[..] else {
            unreachable!("two of them")
        };
        queue.set_descriptor(0, readable.address(), 16, 1, 1);
        queue.set_descriptor(1, writable.address(), 600, 2, 0);
        let slot = usize::from(self.available % SIZE);
        queue.available.write(4 + 2 * slot, &[0, 0]);
        self.available = self.available.wrapping_add(1);
        queue.set_available_index(self.available);
    }

    fn step(&mut self) -> Result<(), DeviceError> {
        if !self.is_started {
            self.device.settle();
            return Ok(());
        }
        self.device.step(&mut self.access).map(drop)
    }
}

fn brought(socket: OwnedFd) -> Brought {
    Brought::new(socket, SIZE, POOL).expect("memory")
}

/// A device of `class`, whose back-end may have said already what it has.
fn device(class: &'static Class, answers: u8) -> (Frontend, Link, BackEnd) {
    let setup = Setup {
        class,
        queue_size: SIZE,
        pool: POOL,
        config: Vec::new(),
        features: 0,
    };
    let (mut back_end, socket) = BackEnd::pair();
    let mut arrival = Arrival::new(brought(socket), class).expect("a connection");
    let mut offer = None;
    for _ in 0..answers {
        back_end.answer(0);
        offer = arrival.step().ok().flatten().cloned();
    }
    let link = Link::default();
    let known = offer.clone().unwrap_or(Offer {
        features: FEATURES,
        queues: class.queues,
        config: Vec::new(),
    });
    let lasting = Lasting::nothing(known.queues, SIZE).expect("memory");
    let device = Frontend::new(setup, &known, link.clone(), lasting).expect("memory");
    match offer {
        Some(_) => (device.with(arrival).expect("descriptors"), link, back_end),
        None => (device, link, back_end),
    }
}

fuzz_target!(|input: &[u8]| {
    GUEST.with(|cell| {
        let guest = cell.get_or_init(|| QueueGuest::new(SIZE, &BUFFERS));
        let mut numbers = Numbers(input);
        let class = &CLASSES[usize::from(numbers.byte()) % CLASSES.len()];
        let (device, link, back_end) = device(class, numbers.byte() % 8);
        let mut serving = Serving {
            access: guest.guest.memory().access(AddressMode::Grants),
            guest,
            device,
            link,
            back_end,
            is_started: false,
            available: 0,
        };
        serving.start();
        while !numbers.is_empty() {
            let mut done = Ok(());
            match numbers.byte() % 10 {
                0..=2 => serving.back_end.answer(0),
                3 => serving.back_end.answer(numbers.u64()),
                4 => {
                    let payload = [numbers.byte(); 16];
                    let payload = &payload[..usize::from(numbers.byte() % 17)];
                    let request = u32::from(numbers.byte() % 48);
                    let flags = u32::from(numbers.byte());
                    serving.back_end.message(request, flags, payload);
                }
                5 => serving.back_end.send(&numbers.u64().to_ne_bytes()),
                6 => {
                    let (back_end, socket) = BackEnd::pair();
                    serving.back_end = back_end;
                    serving.link.put(brought(socket));
                    serving.device.update();
                }
                7 => {
                    serving.offer();
                    done = serving.step();
                }
                8 if serving.is_started => {
                    done = serving.device.prepare_sleep(&mut serving.access).map(drop);
                }
                8 => serving.start(),
                _ => {
                    let offset = usize::from(numbers.byte());
                    serving.device.write_config(offset, &[1]);
                    if numbers.byte() & 1 != 0 {
                        serving.stop();
                    }
                }
            }
            let done = done.and_then(|()| serving.step());
            // As a driver whose device needs a reset.
            if done.is_err() {
                serving.stop();
                serving.start();
            }
        }
        serving.stop();
        serving.device.retire();
        let mapped = serving.access.counters().grants_mapped;
        assert_eq!(mapped, 0);
    });
});
