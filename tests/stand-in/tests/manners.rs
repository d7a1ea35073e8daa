//! Back-ends of every manner serve a device on the simulator, one after the other: what its driver sees of that.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use xen_virtio_backend::vhost_user::Class;
use xen_virtio_backend::{Device, DeviceType};
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::SimMachine;
use xen_virtio_stand_in::MANNERS;
use xen_virtio_tests::{BlkRequest, Driver, RawQueue, Reconnecting, driver};

/// `VIRTIO_BLK_T_IN`, `VIRTIO_BLK_T_OUT`.
const IN: u32 = 0;
const OUT: u32 = 1;

/// How often an answer is looked for.
const LOOK: Duration = Duration::from_millis(2);
/// How long a back-end that may do anything is given.
const PATIENCE: Duration = Duration::from_millis(700);

/// A back-end in a process of its own.
struct BackEnd(Child);

impl BackEnd {
    fn start(directory: &Path, manner: &str) -> Self {
        let socket = directory.join("socket");
        let _ = std::fs::remove_file(&socket);
        let child = Command::new(env!("CARGO_BIN_EXE_stand-in"))
            .args([
                socket.as_os_str(),
                directory.join("image").as_os_str(),
                manner.as_ref(),
            ])
            .spawn()
            .expect("a process");
        Self(child)
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A driver, its queue, and requests that are under way.
struct Disk {
    driver: Driver,
    queue: RawQueue,
    /// The used ring's index before the last attempt.
    before: u16,
}

impl Disk {
    fn start(driver: &Driver) -> Self {
        Self {
            queue: driver.start(64),
            driver: driver.clone(),
            before: 0,
        }
    }

    /// Writes a sector, and gives up on it after a while.
    fn attempt(&mut self, limit: Duration) -> Attempt {
        let request = BlkRequest::new(&self.driver, OUT, 5, 512, false);
        request.describe(&self.queue, 0);
        let used = self.queue.used_index();
        self.before = used;
        self.queue.offer(0);
        self.driver.notify(0);
        let end = Instant::now() + limit;
        loop {
            if self.driver.needs_reset() {
                return Attempt::NeedsReset;
            }
            if self.queue.used_index() != used {
                return Attempt::Done;
            }
            if Instant::now() > end {
                return Attempt::Waits;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Writes a sector and reads it.
    fn verify(&mut self, sector: u64) {
        let written = BlkRequest::new(&self.driver, OUT, sector, 512, false);
        let byte = u8::try_from(sector).unwrap();
        written.data.write(0, &[byte; 512]);
        assert_eq!(written.perform(&self.driver, &mut self.queue).0, 0);
        let read = BlkRequest::new(&self.driver, IN, sector, 512, true);
        assert_eq!(read.perform(&self.driver, &mut self.queue), (0, 513));
        assert_eq!(read.data.read(), [byte; 512]);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    Done,
    Waits,
    NeedsReset,
}

/// Those that the driver has had something of on which it cannot rely.
const MISBEHAVE: &[&str] = &[
    "huge-id",
    "index-ahead",
    "index-back",
    "scribbles",
    "too-long",
    "twice",
    "unknown-id",
];

/// Those that misbehave before the driver has had anything of them, or after.
const MAY_MISBEHAVE: &[&str] = &["out-of-band-requests", "punches"];

/// Those that serve, at least for a while.
const SERVE: &[&str] = &[
    "out-of-band-requests",
    "blocks",
    "calls",
    "config-changes",
    "ends-at-stop",
    "far-base",
    "long-config",
    "odd-requests",
    "other-queue",
    "punches",
    "short-config",
    "short-stop",
    "shrinks",
    "silent-at-stop",
];

/// Those with which nothing is wrong.
const WELL: &[&str] = &["good", "many-queues", "no-config", "no-event-index"];

/// What the driver sees of a back-end of this manner that takes the place of a good one, and whether the disk works with a good
/// one afterwards.
fn endure(manner: &str) -> [Attempt; 2] {
    let directory = TempDir::new().unwrap();
    let path = directory.path();
    std::fs::write(path.join("image"), vec![0; 1 << 20]).unwrap();
    let good = BackEnd::start(path, "good");
    let socket = path.join("socket");
    let (guest, machine) = SimMachine::start(AddressMode::Grants, move || {
        let class = Class::of(DeviceType::BLOCK).expect("disks");
        Ok(vec![
            Box::new(Reconnecting::new(&socket, class)?) as Box<dyn Device>
        ])
    })
    .unwrap();
    let driver = driver(&guest, 0);
    let mut disk = Disk::start(&driver);
    disk.verify(1);
    drop(good);
    let bad = BackEnd::start(path, manner);
    let patience = match WELL.contains(&manner) {
        true => 10 * PATIENCE,
        false => PATIENCE,
    };
    let first = disk.attempt(patience);
    if WELL.contains(&manner) {
        disk.verify(3);
    }
    // A new driver's beginning, whatever the back-end makes of that.
    let mut disk = Disk::start(&driver);
    let second = disk.attempt(patience);
    drop(bad);
    let good = BackEnd::start(path, "good");
    if driver.needs_reset() || second == Attempt::NeedsReset {
        disk = Disk::start(&driver);
    } else if second == Attempt::Waits {
        assert!(
            driver.wait(|| disk.queue.used_index() != disk.before || driver.needs_reset()),
            "{manner}: what was under way is not carried out"
        );
        if driver.needs_reset() {
            disk = Disk::start(&driver);
        }
    }
    disk.verify(2);
    drop(good);
    machine.stop().unwrap();
    [first, second]
}

#[test]
fn a_back_end_of_any_manner_costs_its_own_device() {
    let names: Vec<&str> = MANNERS.iter().map(|(name, _)| *name).collect();
    let left = Mutex::new(names.clone());
    let seen = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let Some(name) = left.lock().unwrap().pop() else {
                        return;
                    };
                    let attempts = endure(name);
                    seen.lock().unwrap().insert(name, attempts);
                }
            });
        }
    });
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen.len(), MANNERS.len());
    for (name, attempts) in &seen {
        let needs_reset = attempts.contains(&Attempt::NeedsReset);
        assert!(
            needs_reset == MISBEHAVE.contains(name) || MAY_MISBEHAVE.contains(name),
            "{name}: {attempts:?}"
        );
        let is_served = attempts.contains(&Attempt::Done);
        let may_be = SERVE.contains(name) || WELL.contains(name);
        assert!(!is_served || may_be, "{name}: {attempts:?}");
        let is_well = *attempts == [Attempt::Done; 2];
        assert!(is_well || !WELL.contains(name), "{name}: {attempts:?}");
    }
}
