//! One entry of libxl's: what it takes to serve it, and how far that is.

use super::guest::WorkerContext;
use super::state_files::{Binding, Identity};
use crate::config::CONFIG_PATH;
use crate::disk_lock;
use crate::disk_use::{DeviceLock, Stores, Wanted};
use crate::guest_state::Backing;
use crate::ipc::ToWorker;
use crate::libxl::{self, Entry, EntryKey, EntryKind};
use crate::report::EntryReport;
use crate::worker::disk_state_bytes;
use crate::xenstore::XenStore;
use anyhow::{Context, Result, bail};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use xen_virtio_backend::blk::{Disk, DiskError};
use xen_virtio_transport::DeviceReport;

/// How long after its failure something is tried again.
pub(super) const TRY_AGAIN: Duration = Duration::from_secs(10);
/// … if somebody has a lock who may let go of it: libxl waits ten seconds for a new device.
const TRY_BUSY_AGAIN: Duration = Duration::from_secs(1);

/// How long a guest may take from having a device to beginning with it, before that is worth a word.
const DRIVER_LIMIT: Duration = Duration::from_secs(120);

/// What we have of an entry.
pub(super) struct DeviceEntry {
    pub(super) detail: String,
    pub(super) status: Status,
    /// The guest has had it, from this worker or an earlier one.
    pub(super) served: bool,
    /// The error that was logged last.
    logged: String,
    /// When the entry was found, and how long it then took until its page was claimed.
    found: Instant,
    claimed_after: Option<Duration>,
    /// Its memory is named by grants.
    grants: bool,
    /// What it is kept in, once it was opened.
    backing: Option<Backing>,
    /// Bytes of the guest's state file that it takes, once it was opened.
    pub(super) state_bytes: usize,
    /// When its worker is asked whether a driver has begun with it, and whether it was.
    driver_due: Option<Instant>,
    driver_asked: bool,
    /// What its integrator should know, though nothing has failed.
    hint: Option<String>,
    /// The worker's newest report, until it is shown.
    pub(super) device: Option<DeviceReport>,
}

pub(super) enum Status {
    /// Not looked at yet.
    New,
    /// Opened, and to be handed to the worker.
    Pending(Box<OpenedDevice>),
    /// With the worker, which may not have claimed its page yet.
    Handed,
    Failed(String),
    /// Failed as well, for a lock on the disk that somebody has at the moment.
    Busy(String),
    /// Not to be served any more, whatever is done about its entry.
    Lost(String),
}

/// A device to be.
pub(super) struct OpenedDevice {
    entry: Entry,
    disk: Disk,
    shared: bool,
    serial: String,
    /// Bytes of the guest's state file, in which there is room for it.
    pub(super) state_bytes: usize,
}

/// Somebody else has the disk, who may let go of it.
#[derive(Debug, thiserror::Error)]
#[error(
    "disk {path}: is in use, and one of its users writes it: {user}; to share it on purpose, add [[disk]] path = \"{path}\", \
    shared = true to {CONFIG_PATH}, and restart xen-virtiod"
)]
pub(super) struct InUse {
    path: String,
    user: String,
}

impl InUse {
    fn of(path: &Path, user: &str) -> Self {
        Self {
            path: path.display().to_string(),
            user: user.to_owned(),
        }
    }
}

/// `error`, or who has the block device that Linux opens for nobody else's writing, because dom0 has it mounted
/// (CONFIG_BLK_DEV_WRITE_MOUNTED).
fn in_use(path: &Path, error: DiskError) -> anyhow::Error {
    let user = || {
        let disk = Disk::open_again(path, true).ok()?;
        Stores::of(disk.file())
            .ok()?
            .user_in_dom0(&disk, true)
            .ok()?
    };
    match &error {
        DiskError::Open { source, .. } if source.kind() == io::ErrorKind::ResourceBusy => {
            match user() {
                Some(user) => InUse::of(path, &user).into(),
                None => error.into(),
            }
        }
        _ => error.into(),
    }
}

/// Where the disk of an entry is, and whether it is for reading only, as xl or the configuration says.
fn configured<'a>(
    kind: &'a EntryKind,
    guest: &str,
    key: EntryKey,
    context: &WorkerContext<'a>,
) -> Result<(&'a Path, bool)> {
    match kind {
        EntryKind::Disk {
            path, read_only, ..
        } => Ok((path, *read_only)),
        EntryKind::Virtio {
            device_type: VIRTIO_ID_BLOCK,
        } => {
            let device = context.config.device(guest, key.devid).with_context(|| {
                format!(
                    "nothing says which disk this is: add to {CONFIG_PATH} [[virtio]] guest = {guest:?}, \
                     index = {}, path = \"…\", and restart xen-virtiod",
                    key.devid
                )
            })?;
            Ok((&device.path, device.read_only))
        }
        EntryKind::Virtio { device_type } => bail!(
            "this version serves virtio,device2 (block), and not virtio,device{device_type:x}"
        ),
    }
}

impl DeviceEntry {
    pub(super) fn new(served: bool) -> Self {
        Self {
            detail: String::new(),
            status: Status::New,
            served,
            logged: String::new(),
            found: Instant::now(),
            claimed_after: None,
            grants: false,
            backing: None,
            state_bytes: 0,
            driver_due: None,
            driver_asked: false,
            hint: None,
            device: None,
        }
    }

    /// A worker has claimed its page: how long after it was found, if it is the first.
    pub(super) fn claimed(&mut self) -> Option<Duration> {
        self.served = true;
        self.logged.clear();
        if self.claimed_after.is_some() {
            return None;
        }
        self.claimed_after = Some(self.found.elapsed());
        self.driver_due = Some(Instant::now() + DRIVER_LIMIT);
        self.claimed_after
    }

    pub(super) fn driver_due(&self) -> Option<Instant> {
        self.driver_due
    }

    /// Whether the worker is to be asked whether a driver has begun: once, whatever it answers.
    pub(super) fn ask_driver(&mut self, now: Instant) -> bool {
        let due = self.driver_due.take_if(|due| *due <= now).is_some();
        self.driver_asked |= due;
        due
    }

    /// Takes in what the worker says of the device. A hint, if that is one to be logged.
    pub(super) fn reported(&mut self, device: &DeviceReport) -> Option<&str> {
        self.device = Some(device.clone());
        if device.status != 0 || device.traps != 0 {
            self.driver_due = None;
            self.driver_asked = false;
            self.hint = None;
            return None;
        }
        if !std::mem::take(&mut self.driver_asked) {
            return None;
        }
        let (grants, otherwise) = if self.grants {
            (
                ", and CONFIG_XEN_VIRTIO",
                " Without the last it waits for ever for the device that grants its memory; a guest that cannot grant wants \
                 grant_usage=0",
            )
        } else {
            ("", "")
        };
        self.hint = Some(format!(
            "no driver has begun with it, {} minutes after it was there: has the guest's kernel CONFIG_VIRTIO_MMIO and \
             CONFIG_VIRTIO_BLK{grants}?{otherwise}",
            DRIVER_LIMIT.as_secs() / 60
        ));
        self.hint.as_deref()
    }

    /// Whether its guest was kept from running for want of it.
    pub(super) fn refusal(&self) -> Option<&str> {
        match &self.status {
            Status::Failed(error) | Status::Busy(error) | Status::Lost(error) if !self.served => {
                Some(error)
            }
            _ => None,
        }
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
            hint: self.hint.clone(),
            device: self.device.take(),
        }
    }
}

impl OpenedDevice {
    /// Reads the entry at `key` of the guest, and opens what it names, or what the guest has had by that name.
    ///
    /// # Errors
    ///
    /// What keeps it from being served; [`InUse`] if that may go away by itself.
    pub(super) fn open(
        (guest, name): (&Identity, &str),
        key: EntryKey,
        known: &mut DeviceEntry,
        store: &mut XenStore,
        context: &mut WorkerContext<'_>,
    ) -> Result<Self> {
        let entry = libxl::read_entry(store, guest.domid, key)?;
        known.grants = entry.grant_usage;
        let bound = if known.served {
            context.files.binding(guest, key)?
        } else {
            None
        };
        let serial = match &entry.kind {
            EntryKind::Disk { vdev, .. } => vdev.clone(),
            EntryKind::Virtio { .. } => format!("virtio{}", key.devid),
        };
        let (path, read_only) = match &bound {
            Some(Binding {
                path, read_only, ..
            }) => (path.as_path(), *read_only),
            None => configured(&entry.kind, name, key, context)?,
        };
        known.detail = describe(path, read_only);
        let shared = context.config.is_shared(path);
        let opened = if known.served {
            Disk::open_again(path, read_only)
        } else {
            Disk::open(path, read_only)
        };
        let mut disk = opened.map_err(|error| in_use(path, error))?;
        if let Some(bound) = &bound {
            disk.set_bytes(bound.bytes);
        }
        let stores = Stores::of(disk.file())?;
        let writes = !read_only;
        // What a running guest has it keeps: it may be that dom0 came later.
        if !shared
            && !known.served
            && let Some(user) = stores.user_in_dom0(&disk, writes)?
        {
            return Err(InUse::of(path, &user).into());
        }
        let wanted = Wanted {
            guest,
            name,
            key,
            path,
            stores,
            writes,
            lock: DeviceLock {
                name: disk_lock::name(guest.vm.as_deref().unwrap_or_default(), key),
                inode: disk.file().metadata()?.ino(),
            },
        };
        if !shared && let Some(user) = context.uses.conflict(&wanted) {
            let in_use = InUse::of(path, &user);
            if !known.served {
                return Err(in_use.into());
            }
            // It has been so since before this version looked.
            tracing::warn!("guest {name} ({}): {key}: {in_use}", guest.domid);
        }
        let binding = Binding {
            path: path.to_owned(),
            read_only,
            bytes: disk.bytes(),
        };
        if let Err(error) = context.files.bind(guest, key, Some(binding)) {
            if !known.served {
                return Err(error);
            }
            tracing::warn!("guest {name} ({}): {key}: {error:#}", guest.domid);
        }
        known.backing = Some(Backing::of(disk.file())?);
        known.state_bytes = disk_state_bytes();
        if !shared {
            context.uses.add(wanted);
        }
        Ok(Self {
            disk,
            shared,
            serial,
            entry,
            state_bytes: 0,
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
            bytes: self.disk.bytes(),
            shared: self.shared,
            serial: self.serial.clone(),
            served,
            lock,
            state_bytes: self.state_bytes,
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

/// What a running device can be resized to.
///
/// # Errors
///
/// Why it cannot.
pub(super) fn new_size(known: &DeviceEntry, bound: &Binding) -> Result<u64> {
    let disk = Disk::open_again(&bound.path, true)?;
    let path = bound.path.display();
    if known.backing != Some(Backing::of(disk.file())?) {
        bail!("another file or block device is at {path} than the guest has");
    }
    let (now, told) = (disk.measure()?, bound.bytes);
    if now < told {
        bail!(
            "{path} has {now} bytes, and the guest knows {told}: a disk does not shrink under its guest"
        );
    }
    if now == told {
        bail!(
            "{path} has {now} bytes, as the guest knows: enlarge it first (truncate -s, lvextend)"
        );
    }
    Ok(now)
}
