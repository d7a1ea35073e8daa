//! The process of a device that a back-end serves dies at every step of what it does; the next one goes on with the same back-end,
//! whose connection and memory somebody has kept: no request is carried out twice, and none is lost.

use rustix::net::{Shutdown, shutdown};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use xen_virtio_backend::shadow::{Answer, Loss, Rules, ShadowRecord};
use xen_virtio_backend::vhost_user::{
    Arrival, CLASSES, Class, Frontend, Lasting, Link, Offer, Setup,
};
use xen_virtio_backend::{
    Device, DeviceError, DeviceType, Failure, Identity, Interest, OneByOne, QueueError, QueueIndex,
    QueueStart, Request, RequestCounters, Scratch, Serve, Step, Unfinished,
};
use xen_virtio_guest_mapping::GuestAccess;
use xen_virtio_sim::SimGuest;
use xen_virtio_tests::{
    Buffer, MakeDevice, NEXT, Random, WRITE, allow_descriptors, drive_over_deaths, driver,
    wait_for_all,
};
use xen_virtio_transport::vhost_user_server::serve;

const SIZE: u16 = 32;
const REQUESTS: u16 = 12;
/// Requests that are made available at once.
const TOGETHER: u16 = 4;
const LOOK: Duration = Duration::from_millis(1);

/// A device no request of which may be carried out twice.
fn class() -> &'static Class {
    Box::leak(Box::new(Class {
        device_type: DeviceType(0x3f),
        queue_size: SIZE,
        queues: 1,
        config_bytes: 0,
        rules: Rules {
            loss: &[Loss::Fail(Answer::Nothing)],
            overstate: false,
            alike: false,
        },
        ..CLASSES[0].clone()
    }))
}

/// Gives back what it is brought, and remembers it.
struct Noting {
    identity: Identity,
    scratch: Scratch,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Serve for Noting {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn unfinished(&self, _queue: QueueIndex) -> Unfinished {
        Unfinished::GiveBack
    }

    fn serve(
        &mut self,
        _queue: usize,
        request: &Request,
        access: &mut dyn GuestAccess,
    ) -> Result<usize, Failure> {
        let bytes = self.scratch.read(&request.readable, access)?.to_vec();
        self.seen.lock().unwrap().push(bytes.clone());
        Ok(self.scratch.write(&bytes, &request.writable, access)?)
    }
}

/// What outlives the processes: as a supervisor has it.
#[derive(Default)]
struct Supervisor {
    socket: Option<OwnedFd>,
    memory: Option<OwnedFd>,
    offer: Option<Offer>,
    connections: u32,
}

/// A device whose connections a supervisor keeps.
struct Supervised {
    frontend: Frontend,
    link: Link,
    path: PathBuf,
    supervisor: Arc<Mutex<Supervisor>>,
}

impl Supervised {
    fn new(path: &Path, record: ShadowRecord, supervisor: Arc<Mutex<Supervisor>>) -> Self {
        let link = Link::default();
        let class = class();
        let setup = Setup {
            class,
            queue_size: SIZE,
            pool: 1 << 18,
            config: Vec::new(),
            features: 0,
        };
        let lasting = Lasting {
            records: vec![record],
            ..Lasting::nothing(1, SIZE).unwrap()
        };
        let known = supervisor.lock().unwrap().offer.clone();
        let offer = known.unwrap_or_else(|| offer(path, class));
        let mut frontend = Frontend::new(setup, &offer, link.clone(), lasting).unwrap();
        let inherited = {
            let mut keeps = supervisor.lock().unwrap();
            keeps.offer = Some(offer);
            // Once: what a process that dies in this has asked, nobody can tell from what the next one asks.
            let memory = keeps.memory.take();
            let socket = keeps.socket.as_ref();
            memory.zip(socket.map(|socket| socket.try_clone().unwrap()))
        };
        // Whoever dies in this has no lock.
        if let Some((memory, socket)) = inherited {
            frontend.inherit(socket, memory);
        }
        Self {
            frontend,
            link,
            path: path.to_owned(),
            supervisor,
        }
    }

    fn look(&mut self) {
        let mut keeps = self.supervisor.lock().unwrap();
        if let Some(memory) = self.link.take_memory() {
            keeps.memory = Some(memory);
        }
        if !self.frontend.is_connected() {
            // A process that is dead has it still, as nothing of it goes on.
            if let Some(before) = keeps.socket.take() {
                let _ = shutdown(&before, Shutdown::Both);
            }
            let socket = OwnedFd::from(UnixStream::connect(&self.path).unwrap());
            *keeps = Supervisor {
                socket: Some(socket.try_clone().unwrap()),
                memory: None,
                offer: keeps.offer.clone(),
                connections: keeps.connections + 1,
            };
            self.link.put(socket);
            drop(keeps);
            self.frontend.update();
        }
    }
}

/// What the back-end at `path` has.
fn offer(path: &Path, class: &'static Class) -> Offer {
    let socket = OwnedFd::from(UnixStream::connect(path).unwrap());
    let mut arrival = Arrival::new(socket, class).unwrap();
    loop {
        if let Some(offer) = arrival.step().unwrap() {
            return offer.clone();
        }
    }
}

impl Device for Supervised {
    fn identity(&self) -> &Identity {
        self.frontend.identity()
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError> {
        self.frontend.start_queue(index, start, access)
    }

    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        self.look();
        self.frontend.step(access)
    }

    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError> {
        self.frontend.prepare_sleep(access)
    }

    fn try_again_at(&self) -> Option<Instant> {
        let looks = (!self.frontend.is_connected()).then(|| Instant::now() + LOOK);
        looks.into_iter().chain(self.frontend.try_again_at()).min()
    }

    fn sources(&self, add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {
        self.frontend.sources(add);
    }

    fn close_queue(&mut self, index: QueueIndex) {
        self.frontend.close_queue(index);
    }

    fn stop_queue(&mut self, index: QueueIndex) {
        self.frontend.stop_queue(index);
    }

    fn settle(&mut self) -> bool {
        self.look();
        self.frontend.settle()
    }

    fn reset(&mut self) {
        self.frontend.reset();
    }

    fn counters(&self) -> RequestCounters {
        self.frontend.counters()
    }
}

fn payload(number: u16) -> Vec<u8> {
    number.to_le_bytes().repeat(8)
}

/// Has all requests carried out: which of them came back empty.
fn drive(guest: &SimGuest) -> Vec<u16> {
    let driver = driver(guest, 0);
    let mut queue = driver.start(SIZE);
    let mut empty = Vec::new();
    for first in (0..REQUESTS).step_by(TOGETHER.into()) {
        let buffers: Vec<(u16, Buffer, Buffer)> = (first..first + TOGETHER)
            .map(|number| {
                let (sent, answer) = (driver.buffer(16, false), driver.buffer(16, true));
                sent.write(0, &payload(number));
                (number, sent, answer)
            })
            .collect();
        let mut heads = Vec::new();
        for ((_, sent, answer), head) in buffers.iter().zip((0..).step_by(2)) {
            queue.set_descriptor(head, sent.address(), 16, NEXT, head + 1);
            queue.set_descriptor(head + 1, answer.address(), 16, WRITE, 0);
            queue.offer(head);
            heads.push(head);
        }
        driver.notify(0);
        let back = wait_for_all(guest, &queue, first + TOGETHER, &heads);
        for ((number, _, answer), head) in buffers.iter().zip(heads) {
            match back[&head] {
                16 => assert_eq!(answer.read(), payload(*number)),
                0 => empty.push(*number),
                other => panic!("{other} bytes came back"),
            }
        }
    }
    assert!(!driver.needs_reset());
    empty
}

/// Drives the device over a death at step `death`: whether there was one, what came back empty, and how often somebody connected.
fn dies_at(deaths: &[u64]) -> (usize, usize, u32) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("socket");
    let seen: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let listener = UnixListener::bind(&path).unwrap();
    let noted = Arc::clone(&seen);
    std::thread::spawn(move || {
        let device = Noting {
            identity: Identity {
                device_type: DeviceType(0x3f),
                features: 1 << 29,
                queue_sizes: vec![SIZE],
            },
            scratch: Scratch::new()?,
            seen: noted,
        };
        serve(Box::new(OneByOne::new(device)), &listener).map_err(io::Error::other)
    });
    let supervisor: Arc<Mutex<Supervisor>> = Arc::default();
    let keeps = Arc::clone(&supervisor);
    let make: Arc<MakeDevice> = Arc::new(move |records| {
        let area = records.own(0, ShadowRecord::bytes(SIZE)).unwrap();
        let record = ShadowRecord::new(area);
        Box::new(Supervised::new(&path, record, Arc::clone(&keeps)))
    });
    let empty: Arc<Mutex<Vec<u16>>> = Arc::default();
    let found = Arc::clone(&empty);
    let died = drive_over_deaths(deaths, 0, &make, move |guest| {
        *found.lock().unwrap() = drive(guest);
    });
    let (seen, empty) = (seen.lock().unwrap(), empty.lock().unwrap());
    for number in 0..REQUESTS {
        let times = seen
            .iter()
            .filter(|bytes| **bytes == payload(number))
            .count();
        let least = usize::from(!empty.contains(&number));
        assert!(
            (least..=1).contains(&times),
            "request {number} was carried out {times} times, after deaths at {deaths:?}"
        );
    }
    let connections = supervisor.lock().unwrap().connections;
    (died, empty.len(), connections)
}

#[test]
fn a_back_end_is_handed_on_at_every_step() {
    allow_descriptors();
    let (mut runs, mut lost) = (0u32, 0u32);
    for step in (1..).step_by(3) {
        let (died, empty, connections) = dies_at(&[step]);
        if died == 0 {
            break;
        }
        runs += 1;
        // Where the memory that is shared was being exchanged, the next process begins anew.
        lost += u32::from(empty > 0 || connections > 2);
    }
    assert!(runs > 50, "only {runs} deaths");
    assert!(lost * 20 < runs, "{lost} of {runs} deaths lost something");
}

/// The process that takes over dies too, at each of its first steps. The next one begins anew.
#[test]
fn a_second_death_in_the_takeover_repeats_nothing() {
    /// Steps from a process's beginning to the end of a few requests.
    const TAKEOVER: u64 = 150;
    allow_descriptors();
    let seed = 0x6261_636b;
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    let mut both = 0;
    for second in 1..=TAKEOVER {
        // Those before set up a device's state.
        let first = 530 + random.below(220) as u64;
        let (died, _, _) = dies_at(&[first, second]);
        both += u32::from(died == 2);
    }
    assert!(both > 50, "only {both} second deaths");
}
