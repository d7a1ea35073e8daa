//! The process of a device that a back-end serves dies at every step of what it does; the next one goes on with the same back-end,
//! whose connection and memory somebody has kept: no request is carried out twice, and none is lost.

use rustix::net::{Shutdown, shutdown};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use xen_virtio_backend::shadow::{Answer, Loss, Rules, ShadowRecord};
use xen_virtio_backend::vhost_user::{
    Brought, CLASSES, Class, Frontend, Lasting, Link, Offer, Setup,
};
use xen_virtio_backend::{Device, DeviceType, OneByOne};
use xen_virtio_sim::SimGuest;
use xen_virtio_tests::{
    Buffer, Echo, MakeDevice, NEXT, Random, Reconnecting, WRITE, allow_descriptors, arrive,
    drive_over_deaths, driver, wait_for_all,
};
use xen_virtio_transport::vhost_user_server::serve;

const SIZE: u16 = 32;
const POOL: usize = 1 << 18;
const REQUESTS: u16 = 12;
/// Requests that are made available at once.
const TOGETHER: u16 = 4;

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

/// What outlives the processes: as a supervisor has it.
#[derive(Default)]
struct Supervisor {
    brought: Option<Brought>,
    /// The last process has shared its memory.
    left: Option<OwnedFd>,
    offer: Option<Offer>,
    connections: u32,
}

/// A device whose connections and memory a supervisor keeps.
fn supervised(
    path: &Path,
    record: ShadowRecord,
    supervisor: Arc<Mutex<Supervisor>>,
) -> Reconnecting {
    let link = Link::default();
    let class = class();
    let setup = Setup {
        class,
        queue_size: SIZE,
        pool: POOL,
        config: Vec::new(),
        features: 0,
    };
    let lasting = Lasting {
        records: vec![record],
        ..Lasting::nothing(1, SIZE).unwrap()
    };
    let known = supervisor.lock().unwrap().offer.clone();
    let offer = known.unwrap_or_else(|| arrive(path, class, POOL).unwrap().1);
    let mut frontend = Frontend::new(setup, &offer, link.clone(), lasting).unwrap();
    let inherited = {
        let mut keeps = supervisor.lock().unwrap();
        keeps.offer = Some(offer);
        // Once: what a process that dies in this has asked, nobody can tell from what the next one asks.
        let left = keeps.left.take();
        let brought = keeps.brought.as_mut().filter(|_| left.is_some());
        let again = brought.map(|brought| {
            let socket = brought.socket.try_clone().unwrap();
            *brought = Brought::new(socket, SIZE, POOL).unwrap();
            brought.try_clone().unwrap()
        });
        again.zip(left)
    };
    // Whoever dies in this has no lock.
    if let Some((brought, left)) = inherited {
        frontend.inherit(brought, left);
    }
    let path = path.to_owned();
    let look = move |frontend: &mut Frontend, link: &Link| {
        let mut keeps = supervisor.lock().unwrap();
        if link.take_shared().is_some()
            && let Some(brought) = &keeps.brought
        {
            let memory = brought.memory.try_clone().unwrap();
            keeps.left = Some(memory);
        }
        if frontend.is_connected() {
            return;
        }
        // A process that is dead has it still, as nothing of it goes on.
        if let Some(before) = keeps.brought.take() {
            let _ = shutdown(&before.socket, Shutdown::Both);
        }
        let socket = UnixStream::connect(&path).unwrap();
        let brought = Brought::new(socket.into(), SIZE, POOL).unwrap();
        keeps.brought = Some(brought.try_clone().unwrap());
        keeps.left = None;
        keeps.connections += 1;
        drop(keeps);
        link.put(brought);
        frontend.update();
    };
    Reconnecting::looking(frontend, link, Box::new(look))
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
        // A device that carries them out in their order gives them back in that.
        let order = (first..first + TOGETHER).map(|index| queue.used(index).0);
        let in_order = order.eq(heads.iter().map(|head| u32::from(*head)));
        assert!(in_order || back.values().any(|written| *written == 0));
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
    let listener = UnixListener::bind(&path).unwrap();
    let (sender, seen) = channel();
    std::thread::spawn(move || {
        let device = Echo::new()?;
        sender.send(device.seen()).map_err(io::Error::other)?;
        serve(Box::new(OneByOne::new(device)), &listener).map_err(io::Error::other)
    });
    let seen = seen.recv().unwrap();
    let supervisor: Arc<Mutex<Supervisor>> = Arc::default();
    let keeps = Arc::clone(&supervisor);
    let make: Arc<MakeDevice> = Arc::new(move |records| {
        let area = records.own(0, ShadowRecord::bytes(SIZE)).unwrap();
        let record = ShadowRecord::new(area);
        Box::new(supervised(&path, record, Arc::clone(&keeps)))
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
