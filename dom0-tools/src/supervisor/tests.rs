//! The supervisor's decisions, on a simulated toolstack: what libxl writes, what workers are told and answer, and what
//! follows from it. No Xen and no worker is needed; the processes that stand for workers sleep.

mod back_ends;
mod consoles;
mod holds;
mod slots;
mod sockets;
mod traces;

use super::Supervisor;
use super::state_files::StateFiles;
use super::worker_process::{Launched, Launcher};
use crate::config::Config;
use crate::ctl::control::ControlError;
use crate::devices::Order;
use crate::devices::blk::lock;
use crate::ipc::{Attachment, FromWorker, SupervisorEnd, ToWorker, WorkerEnd, WorkerEnds};
use crate::toolstack::guest_file::GuestFiles;
use crate::toolstack::libxl::{self, EntryForm, EntryKey};
use crate::toolstack::xenstore::sim::SimStore;
use crate::toolstack::{Identity, XenToolstack};
use anyhow::Result;
use mio::Events;
use std::cell::RefCell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use xen_virtio_backend::blk::SECTOR;

/// How long what follows from something may take.
const LIMIT: Duration = Duration::from_secs(10);

/// A worker's end of its conversation.
struct Worker {
    domid: u16,
    channel: WorkerEnd,
    pid: u32,
}

/// The workers that were launched, in order.
#[derive(Clone, Default)]
struct Workers {
    launched: Rc<RefCell<Vec<Worker>>>,
}

impl Launcher for Workers {
    fn launch(&self, domid: u16, ends: WorkerEnds) -> Result<Launched> {
        let child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        self.launched.borrow_mut().push(Worker {
            domid,
            channel: WorkerEnd::new(ends),
            pid: child.id(),
        });
        let null = || File::open("/dev/null");
        Ok(Launched {
            child,
            privcmd: null()?,
            evtchn: null()?,
            gntdev: null()?,
        })
    }
}

/// dom0: a toolstack, a supervisor, and disks.
struct Dom0 {
    store: SimStore,
    workers: Workers,
    supervisor: Supervisor,
    events: Events,
    directory: Rc<TempDir>,
}

const fn key(devid: u32) -> EntryKey {
    EntryKey {
        form: EntryForm::Disk,
        devid,
    }
}

/// The first disk of a guest.
const XVDA: EntryKey = key(51712);
const XVDB: EntryKey = key(51728);

impl Dom0 {
    fn new() -> Self {
        let (store, connection) = SimStore::new();
        Self::with(
            store,
            connection,
            Rc::new(tempfile::tempdir().unwrap()),
            Config::default(),
        )
    }

    fn with(
        store: SimStore,
        connection: crate::toolstack::xenstore::XenStore,
        directory: Rc<TempDir>,
        config: Config,
    ) -> Self {
        let workers = Workers::default();
        let socket = directory.path().join("control.sock");
        // A process that another test is starting may have the socket of the service before still, until it is a program.
        let end = Instant::now() + LIMIT;
        while UnixStream::connect(&socket).is_ok() && Instant::now() < end {
            std::thread::yield_now();
        }
        let supervisor = Supervisor::new(
            config,
            &socket,
            Box::new(XenToolstack::new(
                connection,
                GuestFiles::new(&directory.path().join("guests")),
                Box::new(store.clone()),
            )),
            StateFiles::new(directory.path()).unwrap(),
            Box::new(workers.clone()),
        )
        .unwrap();
        let mut dom0 = Self {
            store,
            workers,
            supervisor,
            events: Events::with_capacity(64),
            directory,
        };
        dom0.supervisor.start().unwrap();
        dom0
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        if !path.exists() && path.parent().is_some_and(std::path::Path::exists) {
            File::create(&path).unwrap().set_len(64 * SECTOR).unwrap();
        }
        path
    }

    /// What libxl writes for a disk of the guest, the state last.
    fn add_disk(&self, domid: u16, key: EntryKey, image: &str, state: u32) {
        let path = libxl::entry_path(domid, key);
        let base = 0x200_0000 + (key.devid - 51712) / 16 * 0x200;
        for (name, value) in [
            ("params", self.image(image).to_str().unwrap().to_owned()),
            ("mode", "w".to_owned()),
            ("base", base.to_string()),
            ("irq", "33".to_owned()),
            ("grant_usage", "1".to_owned()),
            ("dev", "xvda".to_owned()),
            ("state", state.to_string()),
        ] {
            self.store.write(&format!("{path}/{name}"), &value);
        }
    }

    fn state(&self, domid: u16, key: EntryKey) -> Option<String> {
        self.store
            .read(&format!("{}/state", libxl::entry_path(domid, key)))
    }

    /// The lock of guest `a`'s first disk, as its worker and its transfers have it.
    fn lock(&self, image: &str) -> OwnedFd {
        let disk = File::options().write(true).open(self.image(image)).unwrap();
        let disk = OwnedFd::from(disk);
        lock::take(&disk, lock::name("/vm/a", XVDA)).unwrap();
        disk
    }

    fn set_state(&self, domid: u16, key: EntryKey, state: u32) {
        self.store.write(
            &format!("{}/state", libxl::entry_path(domid, key)),
            &state.to_string(),
        );
    }

    fn turn(&mut self) {
        self.supervisor
            .turn(&mut self.events, Some(Duration::from_millis(5)))
            .unwrap();
    }

    /// Turns until `condition` gives something.
    fn until<T>(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> Option<T>) -> T {
        let end = Instant::now() + LIMIT;
        loop {
            self.turn();
            if let Some(found) = condition(self) {
                return found;
            }
            assert!(Instant::now() < end, "waited in vain for {what}");
        }
    }

    /// A while in which nothing should happen.
    fn rest(&mut self) {
        for _ in 0..20 {
            self.turn();
        }
    }

    fn launched(&self) -> usize {
        self.workers.launched.borrow().len()
    }

    /// The next message for worker `index`.
    fn next(&mut self, index: usize) -> ToWorker {
        self.next_with_descriptors(index).0
    }

    fn next_with_descriptors(&mut self, index: usize) -> (ToWorker, Vec<OwnedFd>) {
        self.until("a message", |dom0| {
            let workers = dom0.workers.launched.borrow();
            workers.get(index)?.channel.receive().ok()?
        })
    }

    fn hears_nothing(&mut self, index: usize) {
        self.rest();
        let message = self.workers.launched.borrow()[index].channel.receive();
        assert!(matches!(message, Ok(None) | Err(_)), "{message:?}");
    }

    fn says(&mut self, index: usize, message: &FromWorker) {
        self.workers.launched.borrow()[index]
            .channel
            .send(message)
            .unwrap();
        self.turn();
    }

    /// Worker `index` is handed the device `key`, which the guest has had if it is `served`.
    fn hands(&mut self, index: usize, key: EntryKey, served: bool) -> Attachment {
        let attach = self.next(index);
        let ToWorker::Attach(device) = attach else {
            panic!("{attach:?}")
        };
        assert_eq!((device.key, device.served), (key, served));
        *device
    }

    /// Worker `index` is started and told to serve, with the disks `expected`: which, and whether the guest has had them.
    fn begins(&mut self, index: usize, domid: u16, expected: &[(EntryKey, bool)]) {
        let started = self.next(index);
        assert!(
            matches!(started, ToWorker::Start { domid: told, .. } if told == domid),
            "{started:?}"
        );
        for (key, served) in expected {
            self.hands(index, *key, *served);
        }
        let serve = self.next(index);
        assert!(matches!(serve, ToWorker::Serve), "{serve:?}");
        for (key, _) in expected {
            self.says(
                index,
                &FromWorker::Attached {
                    key: *key,
                    known: None,
                },
            );
        }
        self.says(index, &FromWorker::Serving);
    }

    /// A guest with one disk that is served by worker 0.
    fn serving(&mut self) {
        self.store.introduce(3, "ivi", "a");
        self.add_disk(3, XVDA, "a.img", 1);
        self.begins(0, 3, &[(XVDA, false)]);
        self.until("libxl to be told", |dom0| {
            (dom0.state(3, XVDA)? == "2").then_some(())
        });
    }

    /// As SIGKILL does.
    fn kill(&self, index: usize) {
        let mut workers = self.workers.launched.borrow_mut();
        let (_, ends) = SupervisorEnd::pair().unwrap();
        // Its end of the conversation ends with it.
        workers[index].channel = WorkerEnd::new(ends);
        let pid = rustix::process::Pid::from_raw(workers[index].pid.cast_signed()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }

    fn lives(&self, index: usize) -> bool {
        let pid = self.workers.launched.borrow()[index].pid;
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.contains(") Z ") && stat.contains("(sleep)"))
    }

    fn refusals(&mut self) -> Vec<String> {
        let refusals = self.supervisor.refusals.iter();
        refusals.map(|refusal| refusal.error.clone()).collect()
    }
}

impl Drop for Dom0 {
    fn drop(&mut self) {
        for index in 0..self.launched() {
            self.kill(index);
        }
    }
}

#[test]
fn a_guest_is_served_and_libxl_told() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    assert_eq!(dom0.workers.launched.borrow()[0].domid, 3);
}

/// A guest of `init-dom0less` could write another guest's.
#[test]
fn what_is_known_of_devices_goes_by_a_uuid_that_was_given() {
    for (is_given, expected) in [(true, Some("x".into())), (false, None)] {
        let mut dom0 = Dom0::new();
        match is_given {
            true => dom0.store.introduce(3, "ivi", "a"),
            false => dom0.store.introduce_owner(3, "dom0less-3", "a"),
        }
        dom0.add_disk(3, XVDA, "a.img", 1);
        let started = dom0.next(0);
        assert!(matches!(started, ToWorker::Start { .. }), "{started:?}");
        dom0.hands(0, XVDA, false);
        let attached = FromWorker::Attached {
            key: XVDA,
            known: Some("x".into()),
        };
        dom0.says(0, &attached);
        assert_eq!(dom0.supervisor.known.of("a", XVDA), expected);
    }
}

#[test]
fn a_second_disk_goes_to_the_same_worker() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.add_disk(3, XVDB, "b.img", 1);
    dom0.hands(0, XVDB, false);
    assert_eq!(dom0.launched(), 1);
}

/// A device that is made of nothing in dom0.
#[test]
fn a_source_of_entropy_needs_no_configuration_and_keeps_nothing() {
    let mut dom0 = Dom0::new();
    let rng = EntryKey {
        form: EntryForm::Virtio,
        devid: 0,
    };
    dom0.store.introduce(3, "ivi", "a");
    let path = libxl::entry_path(3, rng);
    for (name, value) in [
        ("type", "virtio,device4"),
        ("base", "0x2000000"),
        ("irq", "33"),
        ("transport", "mmio"),
        ("grant_usage", "1"),
        ("state", "1"),
    ] {
        dom0.store.write(&format!("{path}/{name}"), value);
    }
    assert!(matches!(dom0.next(0), ToWorker::Start { .. }));
    let device = dom0.hands(0, rng, false);
    assert_eq!((device.device_type, device.backing), (4, None));
    assert!(matches!(dom0.next(0), ToWorker::Serve));
    dom0.says(
        0,
        &FromWorker::Attached {
            key: rng,
            known: None,
        },
    );
    dom0.says(0, &FromWorker::Serving);
    let (guests, mut context) = dom0.supervisor.parts();
    let resized =
        guests
            .get_mut(&3)
            .unwrap()
            .change(Some("virtio/0"), Order::Resize, None, &mut context);
    let error = format!("{:#}", resized.unwrap_err());
    assert!(
        error.contains("virtio/0: a device of type rng has no size"),
        "{error}"
    );
    dom0.kill(0);
    dom0.begins(1, 3, &[(rng, true)]);
}

/// A guest of which no toolstack says anything.
#[test]
fn a_guest_has_the_devices_of_its_file_as_long_as_it_lives() {
    let mut dom0 = Dom0::new();
    let guests = dom0.directory.path().join("guests");
    std::fs::create_dir(&guests).unwrap();
    let file = guests.join("ivi.toml");
    let image = dom0.image("a.img");
    let text =
        format!("[[device]]\ntype = \"rng\"\n[[device]]\ntype = \"blk\"\npath = {image:?}\n");
    std::fs::write(&file, text).unwrap();
    let [rng, disk] = [0, 1].map(|devid| EntryKey {
        form: EntryForm::File,
        devid,
    });
    dom0.store.introduce(3, "ivi", "a");
    dom0.begins(0, 3, &[(rng, false)]);
    dom0.hands(0, disk, false);
    dom0.says(
        0,
        &FromWorker::Attached {
            key: disk,
            known: None,
        },
    );
    for key in [rng, disk] {
        dom0.until("its state to be told", |dom0| {
            (dom0.state(3, key)? == "2").then_some(())
        });
    }
    // What becomes of the file is none of a running guest's.
    std::fs::write(&file, "nonsense").unwrap();
    dom0.kill(0);
    dom0.begins(1, 3, &[(rng, true), (disk, true)]);
    dom0.store.release(3);
    assert!(matches!(dom0.next(1), ToWorker::Stop));
    dom0.until("its entries to be gone", |dom0| {
        dom0.state(3, rng).is_none().then_some(())
    });
    // The next one of its name waits for a better file.
    dom0.store.introduce(4, "ivi", "b");
    dom0.rest();
    assert_eq!(dom0.launched(), 2);
}

#[test]
fn a_worker_that_dies_is_followed_by_one_that_takes_over() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.kill(0);
    dom0.begins(1, 3, &[(XVDA, true)]);
    assert_eq!(dom0.state(3, XVDA).as_deref(), Some("2"));
}

#[test]
fn a_death_in_the_takeover_is_followed_too() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.kill(0);
    assert!(matches!(dom0.next(1), ToWorker::Start { .. }));
    dom0.kill(1);
    dom0.begins(2, 3, &[(XVDA, true)]);
}

#[test]
fn a_worker_that_says_what_it_was_not_asked_is_followed_by_another() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.says(0, &FromWorker::Detached { key: XVDA });
    dom0.begins(1, 3, &[(XVDA, true)]);
    assert!(!dom0.lives(0));
    assert_eq!(dom0.state(3, XVDA).as_deref(), Some("2"));
}

#[test]
fn what_was_detached_when_its_worker_died_is_detached_by_the_next() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.set_state(3, XVDA, 5);
    assert!(matches!(dom0.next(0), ToWorker::Detach { key: XVDA }));
    assert_eq!(
        dom0.state(3, XVDA).as_deref(),
        Some("5"),
        "closed before it was"
    );
    dom0.kill(0);
    assert!(matches!(dom0.next(1), ToWorker::Start { .. }));
    assert!(matches!(dom0.next(1), ToWorker::Detach { key: XVDA }));
    assert!(matches!(dom0.next(1), ToWorker::Serve));
    dom0.says(1, &FromWorker::Detached { key: XVDA });
    dom0.until("the entry to be closed", |dom0| {
        (dom0.state(3, XVDA)? == "6").then_some(())
    });
}

/// The worker that has the entry now holds the lock that one closed would be waited for with.
#[test]
fn an_entry_that_is_made_again_with_its_disk_outlives_its_worker() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.store.remove(&libxl::entry_path(3, XVDA));
    assert!(matches!(dom0.next(0), ToWorker::Detach { key: XVDA }));
    dom0.add_disk(3, XVDA, "a.img", 1);
    dom0.hands(0, XVDA, false);
    let _lock = dom0.lock("a.img");
    dom0.says(0, &FromWorker::Detached { key: XVDA });
    dom0.says(
        0,
        &FromWorker::Attached {
            key: XVDA,
            known: None,
        },
    );
    dom0.rest();
    dom0.kill(0);
    dom0.begins(1, 3, &[(XVDA, true)]);
}

/// The disk of the entry before hangs, so that the worker has not given that up when it dies.
#[test]
fn an_entry_that_is_made_again_is_not_given_up_for_the_one_before() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.store.remove(&libxl::entry_path(3, XVDA));
    assert!(matches!(dom0.next(0), ToWorker::Detach { key: XVDA }));
    dom0.add_disk(3, XVDA, "b.img", 1);
    dom0.hands(0, XVDA, false);
    dom0.says(
        0,
        &FromWorker::Attached {
            key: XVDA,
            known: None,
        },
    );
    dom0.rest();
    dom0.kill(0);
    dom0.begins(1, 3, &[(XVDA, true)]);
}

/// libxl, told too early, would give the disk to somebody whom an old write then hits.
#[test]
fn a_disk_is_not_closed_while_transfers_of_a_killed_worker_are_under_way() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    let left_behind = dom0.lock("a.img");
    dom0.kill(0);
    dom0.set_state(3, XVDA, 5);
    assert!(matches!(dom0.next(1), ToWorker::Start { .. }));
    assert!(matches!(dom0.next(1), ToWorker::Detach { key: XVDA }));
    assert!(matches!(dom0.next(1), ToWorker::Serve));
    dom0.says(1, &FromWorker::Detached { key: XVDA });
    dom0.rest();
    assert_eq!(
        dom0.state(3, XVDA).as_deref(),
        Some("5"),
        "closed too early"
    );
    drop(left_behind);
    dom0.until("the entry to be closed", |dom0| {
        (dom0.state(3, XVDA)? == "6").then_some(())
    });
}

#[test]
fn an_entry_that_nobody_serves_is_closed_at_once() {
    let mut dom0 = Dom0::new();
    dom0.store.introduce(3, "ivi", "a");
    dom0.add_disk(3, XVDA, "no/such/directory", 1);
    dom0.rest();
    dom0.set_state(3, XVDA, 5);
    dom0.until("the entry to be closed", |dom0| {
        (dom0.state(3, XVDA)? == "6").then_some(())
    });
}

/// The answer about the entry before must not close the one that libxl made in its place.
#[test]
fn an_entry_that_is_removed_and_made_again_stays_open() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.store.remove(&libxl::entry_path(3, XVDA));
    assert!(matches!(dom0.next(0), ToWorker::Detach { key: XVDA }));
    dom0.add_disk(3, XVDA, "b.img", 1);
    dom0.hands(0, XVDA, false);
    dom0.says(0, &FromWorker::Detached { key: XVDA });
    dom0.rest();
    assert_eq!(dom0.state(3, XVDA).as_deref(), Some("1"));
    dom0.says(
        0,
        &FromWorker::Attached {
            key: XVDA,
            known: None,
        },
    );
    dom0.until("libxl to be told", |dom0| {
        (dom0.state(3, XVDA)? == "2").then_some(())
    });
}

#[test]
fn a_domid_that_comes_round_again_is_another_guest() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    // Released and made anew before anybody looked.
    dom0.store.introduce(3, "rtos", "b");
    dom0.set_state(3, XVDA, 1);
    assert!(matches!(dom0.next(0), ToWorker::Stop));
    dom0.begins(1, 3, &[(XVDA, false)]);
    dom0.until("the worker before to be ended", |dom0| {
        (!dom0.lives(0)).then_some(())
    });
}

#[test]
fn a_guest_that_is_gone_leaves_nothing() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    let files = |dom0: &Dom0| {
        ["state", "disks"].map(|name| {
            std::fs::read_dir(dom0.directory.path().join(name))
                .unwrap()
                .count()
        })
    };
    assert_eq!(files(&dom0), [1, 1]);
    dom0.store.release(3);
    assert!(matches!(dom0.next(0), ToWorker::Stop));
    assert_eq!(files(&dom0), [0, 0]);
    // A worker that does not end is killed.
    dom0.until("the worker to be killed", |dom0| {
        (!dom0.lives(0)).then_some(())
    });
}

#[test]
fn a_refusal_of_xenstored_costs_one_entry() {
    let mut dom0 = Dom0::new();
    dom0.store.introduce(3, "ivi", "a");
    dom0.store.introduce(4, "rtos", "b");
    dom0.store
        .refuse(&format!("{}/params", libxl::entry_path(3, XVDA)));
    dom0.add_disk(3, XVDA, "a.img", 1);
    dom0.add_disk(4, XVDA, "b.img", 1);
    dom0.begins(0, 4, &[(XVDA, false)]);
    // Also where whole directories are listed, as at the start.
    let mut dom0 = Dom0::new();
    dom0.store.introduce(4, "rtos", "b");
    dom0.store.refuse("backend/virtio_disk/3");
    dom0.store.write("backend/virtio_disk/3/51712/state", "1");
    dom0.store.write("backend/virtio_disk", "");
    dom0.rest();
    dom0.add_disk(4, XVDA, "b.img", 1);
    dom0.begins(0, 4, &[(XVDA, false)]);
}

#[test]
fn a_busy_disk_is_tried_again_and_the_other_served() {
    let mut dom0 = Dom0::new();
    dom0.store.introduce(3, "ivi", "a");
    dom0.add_disk(3, XVDA, "a.img", 1);
    assert!(matches!(dom0.next(0), ToWorker::Start { .. }));
    dom0.hands(0, XVDA, false);
    assert!(matches!(dom0.next(0), ToWorker::Serve));
    let error = "somebody has a lock".to_owned();
    dom0.says(
        0,
        &FromWorker::AttachFailed {
            key: XVDA,
            error,
            busy: true,
        },
    );
    dom0.says(0, &FromWorker::Serving);
    dom0.hands(0, XVDA, false);
    dom0.says(
        0,
        &FromWorker::Attached {
            key: XVDA,
            known: None,
        },
    );
    dom0.until("libxl to be told", |dom0| {
        (dom0.state(3, XVDA)? == "2").then_some(())
    });
}

#[test]
fn a_disk_that_another_guest_writes_is_refused_until_that_is_gone() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.store.introduce(4, "rtos", "b");
    dom0.add_disk(4, XVDA, "a.img", 1);
    dom0.rest();
    assert_eq!(dom0.launched(), 1);
    let told = dom0.supervisor.guests.get_mut(&4).unwrap().report().devices[0]
        .error
        .clone();
    assert!(
        told.unwrap()
            .contains("guest ivi (3) has it: virtio_disk/51712")
    );
    dom0.store.release(3);
    assert!(matches!(dom0.next(0), ToWorker::Stop));
    // Not before the first one's worker has ended: its transfers may be under way.
    assert_eq!(dom0.launched(), 1);
    dom0.begins(1, 4, &[(XVDA, false)]);
    assert!(!dom0.lives(0));
}

#[test]
fn a_guest_that_xl_gave_up_leaves_the_reason() {
    let mut dom0 = Dom0::new();
    dom0.store.introduce(3, "ivi", "a");
    dom0.add_disk(3, XVDA, "no/such/directory", 1);
    dom0.rest();
    dom0.store.remove(&libxl::entry_path(3, XVDA));
    dom0.store.release(3);
    let refusals = dom0.until("a refusal", |dom0| {
        let refusals = dom0.refusals();
        (!refusals.is_empty()).then_some(refusals)
    });
    assert!(
        refusals.len() == 1 && refusals[0].contains("no/such/directory"),
        "{refusals:?}"
    );
    // One that was served was not refused.
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.store.release(3);
    dom0.rest();
    assert_eq!(dom0.refusals(), Vec::<String>::new());
}

#[test]
fn a_service_that_starts_among_running_guests_takes_all_of_them_over() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    dom0.add_disk(3, XVDB, "b.img", 1);
    dom0.hands(0, XVDB, false);
    dom0.says(
        0,
        &FromWorker::Attached {
            key: XVDB,
            known: None,
        },
    );
    dom0.until("libxl to be told", |dom0| {
        (dom0.state(3, XVDB)? == "2").then_some(())
    });
    // The next supervisor finds one guest that was served with all its entries, one whose entries libxl has removed, one
    // that was never served, and one of which nothing is left but its entry.
    let (store, connection) = SimStore::new();
    let directory = Rc::clone(&dom0.directory);
    for (domid, name, uuid) in [
        (3, "ivi", "a"),
        (5, "gone", "c"),
        (6, "new", "d"),
        (7, "lost", "e"),
    ] {
        store.introduce(domid, name, uuid);
    }
    let files = StateFiles::new(directory.path()).unwrap();
    let gone = Identity {
        domid: 5,
        vm: Some("/vm/c".to_owned()),
    };
    files.reserve(&gone, 0).unwrap();
    drop(dom0);
    let mut next = {
        let unstarted = |store: &SimStore| {
            let write = |domid, key: EntryKey, image: &str, state: u32| {
                let path = libxl::entry_path(domid, key);
                let image = directory.path().join(image);
                File::options()
                    .create(true)
                    .append(true)
                    .open(&image)
                    .unwrap()
                    .set_len(64 * SECTOR)
                    .unwrap();
                let base = 0x200_0000 + (key.devid - 51712) / 16 * 0x200;
                for (name, value) in [
                    ("params", image.to_str().unwrap().to_owned()),
                    ("mode", "w".to_owned()),
                    ("base", base.to_string()),
                    ("irq", "33".to_owned()),
                    ("state", state.to_string()),
                ] {
                    store.write(&format!("{path}/{name}"), &value);
                }
            };
            write(3, XVDA, "a.img", 2);
            write(3, XVDB, "b.img", 2);
            write(6, XVDA, "c.img", 1);
            write(7, XVDA, "d.img", 2);
        };
        unstarted(&store);
        Dom0::with(store, connection, Rc::clone(&directory), Config::default())
    };
    next.until("three workers", |dom0| (dom0.launched() == 3).then_some(()));
    let domids: Vec<u16> = next
        .workers
        .launched
        .borrow()
        .iter()
        .map(|worker| worker.domid)
        .collect();
    let index = |domid| domids.iter().position(|other| *other == domid).unwrap();
    next.begins(index(3), 3, &[(XVDA, true), (XVDB, true)]);
    next.begins(index(5), 5, &[]);
    next.begins(index(6), 6, &[(XVDA, false)]);
    let lost = next.supervisor.guests.get_mut(&7).unwrap().report().devices[0]
        .error
        .clone();
    assert!(lost.unwrap().contains("nothing is left"));
}

/// What a running guest was told of its disk holds, whatever its entry says by now.
#[test]
fn a_takeover_gives_a_guest_the_disk_that_it_has_had() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    let entry = libxl::entry_path(3, XVDA);
    dom0.store.write(&format!("{entry}/mode"), "r");
    let image = dom0.image("a.img");
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(128 * SECTOR)
        .unwrap();
    dom0.store.write(
        &format!("{entry}/params"),
        dom0.image("b.img").to_str().unwrap(),
    );
    dom0.kill(0);
    assert!(matches!(dom0.next(1), ToWorker::Start { .. }));
    let spec = dom0.hands(1, XVDA, true).spec;
    assert_eq!(
        (&spec["read_only"], &spec["bytes"]),
        (&false.into(), &(64 * SECTOR).into())
    );
    let detail = dom0.supervisor.guests.get_mut(&3).unwrap().report().devices[0]
        .detail
        .clone();
    assert!(detail.contains("a.img"), "{detail}");
}

#[test]
fn a_disk_grows_on_request_and_never_shrinks() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    let image = dom0.image("a.img");
    let resize = |dom0: &mut Dom0, sectors: u64, device: &str| {
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(sectors * SECTOR)
            .unwrap();
        let (guests, mut context) = dom0.supervisor.parts();
        let resized =
            guests
                .get_mut(&3)
                .unwrap()
                .change(Some(device), Order::Resize, None, &mut context);
        resized.map_err(|error| format!("{error:#}"))
    };
    assert!(
        resize(&mut dom0, 64, "xvda")
            .unwrap_err()
            .contains("as the guest knows")
    );
    assert!(
        resize(&mut dom0, 63, "xvda")
            .unwrap_err()
            .contains("does not shrink")
    );
    assert!(
        resize(&mut dom0, 80, "xvdz")
            .unwrap_err()
            .contains("virtio_disk/51712")
    );
    dom0.hears_nothing(0);
    assert_eq!(
        resize(&mut dom0, 80, "virtio_disk/51712"),
        Ok((XVDA, "32768 bytes before, 40960 bytes now".to_owned()))
    );
    let told = dom0.next(0);
    assert!(
        matches!(&told, ToWorker::Change { key: XVDA, change } if *change == 80 * SECTOR),
        "{told:?}"
    );
    // The next worker is told the new size, whether this one was or not.
    dom0.kill(0);
    assert!(matches!(dom0.next(1), ToWorker::Start { .. }));
    assert_eq!(dom0.hands(1, XVDA, true).spec["bytes"], 80 * SECTOR);
}

#[test]
fn a_worker_that_cannot_serve_says_why() {
    let mut dom0 = Dom0::new();
    dom0.store.introduce(3, "ivi", "a");
    dom0.add_disk(3, XVDA, "a.img", 1);
    assert!(matches!(dom0.next(0), ToWorker::Start { .. }));
    let error = "no ioreq server".to_owned();
    dom0.says(0, &FromWorker::Failed { error });
    dom0.rest();
    let error = dom0.supervisor.guests.get_mut(&3).unwrap().report().error;
    assert_eq!(error.as_deref(), Some("no ioreq server"));
    // Not at once: it would fail again.
    assert_eq!(dom0.launched(), 1);
    assert!(dom0.supervisor.guests[&3].again_at().is_some());
}

#[test]
fn a_worker_that_keeps_dying_is_waited_for() {
    let mut dom0 = Dom0::new();
    dom0.serving();
    for death in 0..16 {
        dom0.kill(death);
        dom0.begins(death + 1, 3, &[(XVDA, true)]);
    }
    dom0.kill(16);
    let at = dom0.until("a plan", |dom0| dom0.supervisor.guests[&3].again_at());
    assert!(at > Instant::now());
    assert_eq!(dom0.launched(), 17);
}

/// The first device of a guest's file.
const FIRST: EntryKey = EntryKey {
    form: EntryForm::File,
    devid: 0,
};

/// Guest `ivi` (3) is served by worker 0, and has the devices of this file.
fn serving(file: &str) -> Dom0 {
    let mut dom0 = Dom0::new();
    let guests = dom0.directory.path().join("guests");
    std::fs::create_dir(&guests).unwrap();
    std::fs::write(guests.join("ivi.toml"), file).unwrap();
    dom0.store.introduce(3, "ivi", "a");
    dom0.begins(0, 3, &[(FIRST, false)]);
    for devid in (1..).take(file.matches("[[device]]").count() - 1) {
        let key = EntryKey { devid, ..FIRST };
        dom0.hands(0, key, false);
        dom0.says(0, &FromWorker::Attached { key, known: None });
    }
    dom0
}

/// What comes of what `asks` asks of the service while it runs.
fn ask(
    dom0: &mut Dom0,
    asks: impl FnOnce(&Path) -> Result<String, ControlError> + Send + 'static,
) -> Result<String, String> {
    let path = dom0.directory.path().join("control.sock");
    let asking = thread::spawn(move || asks(&path).map_err(|error| error.to_string()));
    dom0.until("an answer", |_| asking.is_finished().then_some(()));
    asking.join().unwrap()
}

/// The descriptor that comes with `expected` for the first device's worker `index`.
fn handed(dom0: &mut Dom0, index: usize, expected: &serde_json::Value) -> UnixStream {
    let (message, descriptors) = dom0.next_with_descriptors(index);
    assert!(
        matches!(&message, ToWorker::Change { key: FIRST, change } if change == expected),
        "{message:?}"
    );
    let [socket] = <[OwnedFd; 1]>::try_from(descriptors).unwrap();
    UnixStream::from(socket)
}
