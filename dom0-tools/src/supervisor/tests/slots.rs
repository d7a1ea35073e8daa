//! Devices that come to a guest that runs, and go.

use super::*;
use crate::ctl::{control, slots};
use crate::worker::event_loop::EventLoopReport;
use rustix::pipe::{PipeFlags, pipe_with};
use std::os::fd::AsFd;
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER};
use xen_virtio_transport::DeviceReport;

const ATTACHED: EntryKey = EntryKey {
    form: EntryForm::Attached,
    devid: 0,
};

/// A worker that does what it is asked, and reports this status of the devices that it has.
struct Worker {
    index: usize,
    status: u32,
    devices: Vec<EntryKey>,
    asked: Vec<ToWorker>,
    /// It does not come to reports.
    is_busy: bool,
    owes_report: bool,
}

impl Worker {
    fn new(index: usize) -> Self {
        Self {
            index,
            status: 0,
            devices: Vec::new(),
            asked: Vec::new(),
            is_busy: false,
            owes_report: false,
        }
    }

    /// Answers what was asked.
    fn work(&mut self, dom0: &Dom0) {
        let workers = dom0.workers.launched.borrow();
        let Some(worker) = workers.get(self.index) else {
            return;
        };
        while let Ok(Some((message, _))) = worker.channel.receive() {
            let answer = match &message {
                ToWorker::Start { .. }
                | ToWorker::Change { .. }
                | ToWorker::Trace { .. }
                | ToWorker::Stop => None,
                ToWorker::Claim { key, .. } => Some(attached(*key)),
                ToWorker::Attach(device) => {
                    self.devices.push(device.key);
                    Some(attached(device.key))
                }
                ToWorker::Serve => Some(FromWorker::Serving),
                ToWorker::Detach { key } => {
                    self.devices.retain(|device| device != key);
                    Some(FromWorker::Detached { key: *key })
                }
                ToWorker::Report => {
                    self.owes_report = true;
                    None
                }
            };
            if let Some(answer) = answer {
                worker.channel.send(&answer).unwrap();
            }
            if !matches!(message, ToWorker::Report) {
                self.asked.push(message);
            }
        }
        if !self.is_busy && std::mem::take(&mut self.owes_report) {
            let device = DeviceReport {
                status: self.status,
                ..DeviceReport::default()
            };
            let keys = self.devices.iter();
            let report = FromWorker::Report {
                server: EventLoopReport::default(),
                devices: keys.map(|key| (*key, device.clone())).collect(),
            };
            worker.channel.send(&report).unwrap();
        }
    }

    /// What it was asked since the last look, but for reports.
    fn asked(&mut self, dom0: &mut Dom0, what: &str) -> ToWorker {
        dom0.until(what, |dom0| {
            self.work(dom0);
            (!self.asked.is_empty()).then(|| self.asked.remove(0))
        })
    }
}

fn attached(key: EntryKey) -> FromWorker {
    FromWorker::Attached { key, known: None }
}

/// What `asks` says at its end, which is run beside the service.
fn run(
    dom0: &mut Dom0,
    worker: &mut Worker,
    asks: impl FnOnce(PathBuf) -> Result<String> + Send + 'static,
) -> Result<String, String> {
    let path = dom0.directory.path().join("control.sock");
    let asking = thread::spawn(move || asks(path).map_err(|error| format!("{error:#}")));
    dom0.until("an answer", |dom0| {
        worker.work(dom0);
        asking.is_finished().then_some(())
    });
    asking.join().unwrap()
}

fn attach(
    dom0: &mut Dom0,
    worker: &mut Worker,
    slot: Option<&'static str>,
    line: &str,
) -> Result<String, String> {
    let line = line.to_owned();
    run(dom0, worker, move |path| {
        slots::attach(&path, "ivi", slot.map(str::to_owned), line, LIMIT)
    })
}

fn detach(
    dom0: &mut Dom0,
    worker: &mut Worker,
    device: &'static str,
    force: bool,
) -> Result<String, String> {
    run(dom0, worker, move |path| {
        slots::detach(&path, "ivi", device, force, LIMIT)
    })
}

/// Guest `ivi` (3) has two empty slots and a source of entropy.
fn with_slots() -> (Dom0, Worker) {
    let mut dom0 = Dom0::new();
    let guests = dom0.directory.path().join("guests");
    std::fs::create_dir(&guests).unwrap();
    let file = "[[device]]\ntype = \"empty\"\n[[device]]\ntype = \"empty\"\ngrant-usage = false\n[[device]]\ntype = \"rng\"\n";
    std::fs::write(guests.join("ivi.toml"), file).unwrap();
    dom0.store.introduce(3, "ivi", "a");
    let mut worker = Worker::new(0);
    dom0.until("its devices", |dom0| {
        worker.work(dom0);
        let last = EntryKey { devid: 2, ..FIRST };
        (dom0.state(3, last)? == "2").then_some(())
    });
    let claims = worker.asked.iter().filter_map(|message| match message {
        ToWorker::Claim { key, base, len } => Some((key.devid, *base, *len)),
        _ => None,
    });
    let claims: Vec<_> = claims.collect();
    assert_eq!(claims, [(0, 0x200_0000, 0x200), (1, 0x200_0200, 0x200)]);
    worker.asked.clear();
    (dom0, worker)
}

/// The worker is handed the device `key`.
fn handed(dom0: &mut Dom0, worker: &mut Worker, key: EntryKey, served: bool) -> Attachment {
    match worker.asked(dom0, "a device") {
        ToWorker::Attach(device) => {
            assert_eq!((device.key, device.served), (key, served));
            *device
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_comes_to_a_guest_that_runs_and_goes() {
    let (mut dom0, mut worker) = with_slots();
    let line = format!("blk, path={}", dom0.image("a.img").display());
    for _ in 0..2 {
        let done = attach(&mut dom0, &mut worker, None, &line).unwrap();
        assert!(
            done.starts_with("virtio_attached/0 at 0x2000000: "),
            "{done}"
        );
        assert!(done.contains("echo 2000000.virtio > "), "{done}");
        let device = handed(&mut dom0, &mut worker, ATTACHED, false);
        assert_eq!(
            (device.base, device.irq, device.grant_usage),
            (0x200_0000, 33, true)
        );
        // No other disk of the guest has the same.
        assert_eq!(device.spec["serial"], "attached0");
        // A driver has it.
        worker.status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        let refused = detach(&mut dom0, &mut worker, "virtio_attached/0", false);
        let error = refused.unwrap_err();
        assert!(
            error.contains("echo 2000000.virtio > ") && error.contains("/unbind"),
            "{error}"
        );
        worker.is_busy = true;
        let refused = detach(&mut dom0, &mut worker, "virtio_attached/0", false);
        let error = refused.unwrap_err();
        assert!(error.contains("its worker does not say"), "{error}");
        worker.is_busy = false;
        // As Linux leaves it.
        worker.status = VIRTIO_CONFIG_S_ACKNOWLEDGE;
        let gone = detach(&mut dom0, &mut worker, "virtio_attached/0", false);
        assert_eq!(gone.unwrap(), "virtio_attached/0: taken away\n");
        let asked = worker.asked(&mut dom0, "the device back");
        assert!(
            matches!(asked, ToWorker::Detach { key: ATTACHED }),
            "{asked:?}"
        );
        assert_eq!(dom0.state(3, ATTACHED), None);
    }
    // The image is somebody else's to have.
    dom0.store.introduce(4, "web", "b");
    dom0.add_disk(4, XVDA, "a.img", 1);
    dom0.begins(1, 4, &[(XVDA, false)]);
}

#[test]
fn an_empty_slot_has_no_requests_to_trace() {
    let (mut dom0, mut worker) = with_slots();
    let (_ours, theirs) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let traced = run(&mut dom0, &mut worker, move |path| {
        Ok(control::trace(
            &path,
            "ivi",
            "virtio_file/0",
            false,
            theirs.as_fd(),
        )?)
    });
    let error = traced.unwrap_err();
    assert!(
        error.contains("an empty slot, which has no requests"),
        "{error}"
    );
}

#[test]
fn a_slot_has_one_device_of_its_own_terms() {
    let (mut dom0, mut worker) = with_slots();
    let line = format!("blk, path={}", dom0.image("a.img").display());
    let mut refuse = |slot, line: &str, expected: &str| {
        let error = attach(&mut dom0, &mut worker, slot, line).unwrap_err();
        assert!(error.contains(expected), "{line}: {error}");
        assert_eq!(dom0.state(3, ATTACHED), None, "{line}");
    };
    for (slot, line, expected) in [
        (None, "empty", "empty is no device"),
        (None, "blk", "missing field `path`"),
        (None, "blc, path=/a", "\"blc\" is none of"),
        (
            None,
            "rng, grant_usage=0",
            "made with grant_usage=1: virtio_file/0",
        ),
        (
            Some("virtio_file/1"),
            "rng, grant_usage=1",
            "made with grant_usage=0: virtio_file/1",
        ),
        (
            Some("virtio_file/2"),
            "rng",
            "virtio_file/2 is no empty slot",
        ),
        (
            Some("virtio_file/7"),
            "rng",
            "it has no device virtio_file/7, but virtio_file/0",
        ),
        (None, "blk, path=/there/is/none", "disk /there/is/none"),
    ] {
        refuse(slot, line, expected);
    }
    refuse(
        None,
        &format!("blk, path=/{}", "a".repeat(4000)),
        "room for 3500",
    );
    assert!(dom0.refusals().is_empty(), "its guest runs");
    let second = Some("virtio_file/1");
    attach(&mut dom0, &mut worker, second, &line).unwrap();
    worker.asked.clear();
    let refused = attach(&mut dom0, &mut worker, second, "rng").unwrap_err();
    assert!(
        refused.contains("virtio_file/1 has a device already"),
        "{refused}"
    );
    let next = attach(&mut dom0, &mut worker, None, "rng").unwrap();
    assert!(next.starts_with("virtio_attached/1 at 0x2000000"), "{next}");
    let refused = attach(&mut dom0, &mut worker, None, "rng").unwrap_err();
    assert!(
        refused.contains("its 2 empty slots have devices"),
        "{refused}"
    );
    // Whatever its driver does: it need not be unbound for nothing.
    worker.status = VIRTIO_CONFIG_S_DRIVER;
    let error = detach(&mut dom0, &mut worker, "virtio_file/2", false).unwrap_err();
    assert!(error.contains("was not attached"), "{error}");
    for (device, expected) in [
        ("virtio_file/2", "was not attached"),
        ("virtio_file/0", "virtio_attached/1 is the device in it"),
        ("virtio_attached/7", "it has no device virtio_attached/7"),
    ] {
        let error = detach(&mut dom0, &mut worker, device, true).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

/// The guest has slots: it need not be created anew.
#[test]
fn a_guest_whose_worker_is_gone_is_told_of_that() {
    let (mut dom0, mut worker) = with_slots();
    dom0.says(
        0,
        &FromWorker::Failed {
            error: "no ioreq server".to_owned(),
        },
    );
    dom0.kill(0);
    let refused = run(&mut dom0, &mut worker, |path| {
        let limit = Duration::from_secs(1);
        slots::attach(&path, "ivi", None, "rng".to_owned(), limit)
    });
    let error = refused.unwrap_err();
    assert!(
        error.contains("1 s it is not served: no ioreq server"),
        "{error}"
    );
}

#[test]
fn a_guest_without_slots_is_told_what_it_wants() {
    let mut dom0 = serving("[[device]]\ntype = \"rng\"\n");
    let mut worker = Worker::new(0);
    let error = attach(&mut dom0, &mut worker, None, "rng").unwrap_err();
    assert!(error.contains("xen_virtio = [ \"empty\" ]"), "{error}");
}

#[test]
fn what_was_attached_outlives_the_worker_and_ends_with_its_guest() {
    let (mut dom0, mut worker) = with_slots();
    let line = format!("blk, path={}", dom0.image("a.img").display());
    attach(&mut dom0, &mut worker, None, &line).unwrap();
    dom0.kill(0);
    let mut next = Worker::new(1);
    dom0.until("the next worker to serve", |dom0| {
        next.work(dom0);
        let last = next.asked.last()?;
        matches!(last, ToWorker::Serve).then_some(())
    });
    // Its slot first: what is attached has the slot's place.
    let places = next.asked.iter().filter_map(|message| match message {
        ToWorker::Claim { key, .. } => Some((*key, true)),
        ToWorker::Attach(device) => Some((device.key, device.served)),
        _ => None,
    });
    let [one, two, rng] = [0, 1, 2].map(|devid| EntryKey { devid, ..FIRST });
    let expected = [(one, true), (two, true), (rng, true), (ATTACHED, true)];
    assert_eq!(places.collect::<Vec<_>>(), expected);
    dom0.store.release(3);
    dom0.until("its entries to be gone", |dom0| {
        [ATTACHED, FIRST]
            .iter()
            .all(|key| dom0.state(3, *key).is_none())
            .then_some(())
    });
}

/// A worker has been told; the disk is the guest's until that has said so.
#[test]
fn a_device_that_is_being_taken_away_is_listed_and_its_slot_is_not_empty() {
    let (mut dom0, mut worker) = with_slots();
    let line = format!("blk, path={}", dom0.image("a.img").display());
    attach(&mut dom0, &mut worker, None, &line).unwrap();
    dom0.says(
        0,
        &FromWorker::Failed {
            error: "no answer".to_owned(),
        },
    );
    let (guests, mut context) = dom0.supervisor.parts();
    let guest = guests.get_mut(&3).unwrap();
    guest.detach("virtio_attached/0", &mut context).unwrap();
    let closing = dom0.until("it to be closing", |dom0| {
        let report = dom0.supervisor.guests.get_mut(&3)?.report();
        (!report.closing.is_empty()).then_some(report.closing)
    });
    assert_eq!(
        (closing[0].key, closing[0].base),
        (ATTACHED, Some(0x200_0000))
    );
    assert_eq!(dom0.state(3, ATTACHED).as_deref(), Some("5"));
}

/// A back-end may take its time, and a program that is started for a device takes some.
#[test]
fn what_may_come_is_waited_for() {
    let (mut dom0, mut worker) = with_slots();
    let socket = dom0.directory.path().join("late.sock");
    let line = format!("fs, tag=share, socket={}", socket.display());
    let late = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        std::os::unix::net::UnixListener::bind(socket).unwrap()
    });
    let done = attach(&mut dom0, &mut worker, None, &line).unwrap();
    assert!(done.contains("virtio_attached/0"), "{done}");
    late.join().unwrap();
}

/// Whichever of its disks they are of.
#[test]
fn a_device_goes_when_the_last_transfer_by_its_name_has_ended() {
    let (mut dom0, mut worker) = with_slots();
    let line = format!("blk, path={}", dom0.image("a.img").display());
    attach(&mut dom0, &mut worker, None, &line).unwrap();
    let image = File::options()
        .write(true)
        .open(dom0.image("other.img"))
        .unwrap();
    let image = OwnedFd::from(image);
    lock::take(&image, lock::name("/vm/a", ATTACHED)).unwrap();
    let mut detach = |image: Option<OwnedFd>| {
        let gone = run(&mut dom0, &mut worker, |path| {
            let limit = Duration::from_secs(1);
            slots::detach(&path, "ivi", "virtio_attached/0", true, limit)
        });
        drop(image);
        gone
    };
    let error = detach(Some(image)).unwrap_err();
    assert!(
        error.contains("transfers of virtio_attached/0 are under way"),
        "{error}"
    );
    dom0.until("it to go", |dom0| {
        dom0.state(3, ATTACHED).is_none().then_some(())
    });
}

/// The next device of a name is another one.
#[test]
fn what_was_kept_of_a_device_is_not_the_next_ones() {
    let (mut dom0, mut worker) = with_slots();
    let guest = Identity {
        domid: 3,
        vm: Some("/vm/a".to_owned()),
    };
    let files = StateFiles::new(dom0.directory.path()).unwrap();
    // As a service leaves it that ends in the middle of a detach.
    let kept = serde_json::json!({"socket": "/there/is/none"});
    files.keep(&guest, ATTACHED, Some(kept)).unwrap();
    attach(&mut dom0, &mut worker, None, "rng").unwrap();
    assert_eq!(files.kept(&guest, ATTACHED).unwrap(), None);
}
