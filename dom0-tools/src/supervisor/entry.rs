//! One entry of libxl's: what it takes to serve it, and how far that is.

use crate::config::{CONFIG_PATH, Config};
use crate::ipc::ToWorker;
use crate::libxl::{self, Entry, EntryKey, EntryKind};
use crate::report::EntryReport;
use crate::xenstore::XenStore;
use anyhow::{Context, Result, bail};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use xen_virtio_backend::blk::Disk;
use xen_virtio_transport::DeviceReport;

/// How long after its failure something is tried again.
pub(super) const TRY_AGAIN: Duration = Duration::from_secs(10);
/// … if somebody has a lock who may let go of it: libxl waits ten seconds for a new device.
const TRY_BUSY_AGAIN: Duration = Duration::from_secs(1);

/// What we have of an entry.
pub(super) struct Known {
    pub(super) detail: String,
    pub(super) status: Status,
    /// The guest has had it, from this worker or an earlier one.
    pub(super) served: bool,
    /// The error that was logged last.
    logged: String,
    /// When the entry was found, and how long it then took until its page was claimed.
    found: Instant,
    claimed_after: Option<Duration>,
    /// The worker's newest report, until it is shown.
    pub(super) device: Option<DeviceReport>,
}

pub(super) enum Status {
    /// Not looked at yet.
    New,
    /// Opened, and to be handed to the worker.
    Pending(Box<Attachment>),
    /// With the worker, which may not have claimed its page yet.
    Handed,
    Failed(String),
    /// Failed as well, for a lock on the disk that somebody has at the moment.
    Busy(String),
    /// Not to be served any more, whatever is done about its entry.
    Lost(String),
}

/// A device to be.
pub(super) struct Attachment {
    entry: Entry,
    disk: Disk,
    serial: String,
}

impl Known {
    pub(super) fn new(served: bool) -> Self {
        Self {
            detail: String::new(),
            status: Status::New,
            served,
            logged: String::new(),
            found: Instant::now(),
            claimed_after: None,
            device: None,
        }
    }

    /// A worker has claimed its page: how long after it was found, if it is the first.
    pub(super) fn claimed(&mut self) -> Option<Duration> {
        self.served = true;
        if matches!(self.status, Status::Failed(_) | Status::Busy(_)) {
            self.status = Status::Handed;
        }
        self.logged.clear();
        if self.claimed_after.is_some() {
            return None;
        }
        self.claimed_after = Some(self.found.elapsed());
        self.claimed_after
    }

    /// It has failed, with [`Status::Failed`] or [`Status::Busy`]. True if that is to be logged: what is tried
    /// again and again is logged once.
    pub(super) fn fails(&mut self, status: fn(String) -> Status, error: &str) -> bool {
        self.status = status(error.to_owned());
        let is_news = self.logged != error;
        error.clone_into(&mut self.logged);
        is_news
    }

    /// Whether the guest has had it, and waits for it to be opened again.
    pub(super) fn is_missed(&self) -> bool {
        self.served && matches!(self.status, Status::Failed(_) | Status::Busy(_))
    }

    /// How long after its failure it is tried again, if it is.
    pub(super) fn try_again_after(&self) -> Option<Duration> {
        match self.status {
            Status::Busy(_) => Some(TRY_BUSY_AGAIN),
            Status::Failed(_) => self.served.then_some(TRY_AGAIN),
            Status::New | Status::Pending(_) | Status::Handed | Status::Lost(_) => None,
        }
    }

    /// What is known now. The device's own report is given once.
    pub(super) fn report(&mut self, key: EntryKey) -> EntryReport {
        EntryReport {
            key,
            detail: self.detail.clone(),
            error: match &self.status {
                Status::Failed(error) | Status::Busy(error) | Status::Lost(error) => {
                    Some(error.clone())
                }
                Status::New | Status::Pending(_) | Status::Handed => None,
            },
            claimed_after_ms: self
                .claimed_after
                .map(|after| after.as_millis().try_into().unwrap_or(u64::MAX)),
            device: self.device.take(),
        }
    }
}

impl Attachment {
    /// Reads the entry at `key` of the guest, and opens what it names. `detail` is then what that is.
    pub(super) fn open(
        domid: u16,
        guest: &str,
        key: EntryKey,
        store: &mut XenStore,
        config: &Config,
        detail: &mut String,
    ) -> Result<Self> {
        let entry = libxl::read_entry(store, domid, key)?;
        let (path, read_only, serial) = match &entry.kind {
            EntryKind::Disk {
                path,
                read_only,
                vdev,
            } => (path.as_path(), *read_only, vdev.clone()),
            EntryKind::Virtio {
                device_type: VIRTIO_ID_BLOCK,
            } => {
                let device = config.device(guest, key.devid).with_context(|| {
                    format!(
                        "nothing says which disk this is: add to {CONFIG_PATH} [[virtio]] guest = {guest:?}, \
                         index = {}, path = \"…\", and restart xen-virtiod",
                        key.devid
                    )
                })?;
                (
                    device.path.as_path(),
                    device.read_only,
                    format!("virtio{}", key.devid),
                )
            }
            EntryKind::Virtio { device_type } => {
                bail!(
                    "this version serves virtio,device2 (block), and not virtio,device{device_type:x}"
                )
            }
        };
        *detail = describe(path, read_only);
        let disk = Disk::open(path, read_only)?;
        Ok(Self {
            disk,
            serial,
            entry,
        })
    }

    /// What its worker is told; the disk goes beside.
    pub(super) fn message(&self, key: EntryKey, served: bool, lock: u64) -> ToWorker {
        let range = self.entry.range();
        ToWorker::AttachDisk {
            key,
            base: range.base,
            len: range.len,
            irq: self.entry.irq,
            grant_usage: self.entry.grant_usage,
            read_only: self.disk.read_only(),
            serial: self.serial.clone(),
            served,
            lock,
        }
    }

    pub(super) fn disk(&self) -> BorrowedFd<'_> {
        self.disk.file().as_fd()
    }
}

fn describe(path: &Path, read_only: bool) -> String {
    format!(
        "{}, {}",
        path.display(),
        if read_only { "read-only" } else { "read-write" }
    )
}
