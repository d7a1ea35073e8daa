//! One entry of libxl's: what it takes to serve it, and how far that is.

use super::guest::WorkerContext;
use super::orphan_workers;
use crate::connections::close_later;
use crate::ctl::report::EntryReport;
use crate::devices::{self, Changed, DeviceKind, Opened, Order, Service, Wanted};
use crate::guest_state::Backing;
use crate::ipc::{Attachment, ToWorker};
use crate::toolstack::Identity;
use crate::toolstack::libxl::{Entry, EntryForm, EntryKey};
use anyhow::{Context, Result};
use serde_json::Value;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use xen_virtio_backend::DeviceType;
use xen_virtio_transport::{DeviceReport, MmioRange};

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
    /// It could not be opened since an earlier worker has it.
    pub(super) is_held: bool,
    /// Its toolstack does not give up a guest that has not got it: libxl does for disks.
    is_waited_for: bool,
    /// The error that was logged last.
    logged: String,
    /// When the entry was found, and how long it then took until its page was claimed.
    found: Instant,
    claimed_after: Option<Duration>,
    /// Its memory is named by grants.
    grants: bool,
    /// Of which kind it is, once its entry was read.
    kind: Option<&'static dyn DeviceKind>,
    /// Where its guest finds it, once its entry was read.
    pub(super) base: Option<u64>,
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
    Pending,
    /// With the worker, which may not have claimed its page yet.
    Handed,
    Failed(String),
    /// Failed as well, for what somebody has at the moment, or for a back-end that is not there yet.
    Busy(String),
    /// Not to be served any more, whatever is done about its entry.
    Lost(String),
}

/// A device to be.
pub(super) struct OpenedDevice {
    entry: Entry,
    kind: &'static dyn DeviceKind,
    service: Service,
    opened: Opened,
    /// Where its back-end listens, which may have sent descriptors by the connection.
    socket: Option<PathBuf>,
    /// Bytes of the guest's state file, in which there is room for it.
    pub(super) state_bytes: usize,
}

impl DeviceEntry {
    pub(super) fn new(key: EntryKey, served: bool, now: Instant) -> Self {
        Self {
            detail: String::new(),
            status: Status::New,
            served,
            is_held: false,
            is_waited_for: key.form != EntryForm::Disk,
            logged: String::new(),
            found: now,
            claimed_after: None,
            grants: false,
            kind: None,
            base: None,
            backing: None,
            state_bytes: 0,
            driver_due: None,
            driver_asked: false,
            hint: None,
            device: None,
        }
    }

    /// A worker has claimed its page. True if it is the first that has.
    pub(super) fn claimed(&mut self, now: Instant) -> bool {
        self.served = true;
        self.logged.clear();
        if self.claimed_after.is_some() {
            return false;
        }
        self.claimed_after = Some(now.saturating_duration_since(self.found));
        self.driver_due = Some(now + DRIVER_LIMIT);
        true
    }

    /// How long it took from its being found to its page's being claimed.
    pub(super) fn claimed_after(&self) -> Option<Duration> {
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
        let option = self.kind.and_then(|kind| kind.driver_option());
        let driver = option.unwrap_or("a driver for it");
        self.hint = Some(format!(
            "no driver has begun with it, {} minutes after it was there: has the guest's kernel CONFIG_VIRTIO_MMIO and \
             {driver}{grants}?{otherwise}",
            DRIVER_LIMIT.as_secs() / 60
        ));
        self.hint.as_deref()
    }

    /// What it changes to by `order`: `kept` is what was kept of it.
    ///
    /// # Errors
    ///
    /// Why it cannot be.
    pub(super) fn change(&self, order: Order, kept: Option<Value>) -> Result<Changed> {
        let kind = self.kind.context("it was not opened yet")?;
        kind.change(order, kept, self.backing)
    }

    /// Whether it can be changed in this part, see [`Order::part`].
    pub(super) fn has_part(&self, part: &str) -> bool {
        self.kind.is_some_and(|kind| kind.parts().contains(&part))
    }

    /// Whether it is a place for a device that has none of its own.
    pub(super) fn is_slot(&self) -> bool {
        self.kind
            .is_some_and(|kind| kind.device_type() == DeviceType::NONE)
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

    /// Whether the guest is kept from running until it is served: an access to what nobody has claimed ends a guest's kernel, and
    /// its toolstack does not wait.
    pub(super) fn holds_guest(&self, form: EntryForm) -> bool {
        let may_be_served = match form {
            EntryForm::File => !matches!(self.status, Status::Lost(_)),
            // What cannot be served may be another back-end's.
            EntryForm::Virtio => !matches!(self.status, Status::Failed(_) | Status::Lost(_)),
            // libxl waits for its disks, and whoever attaches a device has a guest that runs.
            EntryForm::Disk | EntryForm::Attached => false,
        };
        may_be_served && !self.served
    }

    /// Whether the guest has had it, and waits for it to be opened again, which the end of an earlier worker would not change.
    pub(super) fn is_missed(&self) -> bool {
        self.served && !self.is_held && matches!(self.status, Status::Failed(_) | Status::Busy(_))
    }

    /// How long after its failure it is tried again, if it is.
    pub(super) fn try_again_after(&self) -> Option<Duration> {
        match self.status {
            Status::Busy(_) => Some(TRY_BUSY_AGAIN),
            // libxl gives a guest up whose new disk is not served.
            Status::Failed(_) => (self.served || self.is_waited_for).then_some(TRY_AGAIN),
            Status::New | Status::Pending | Status::Handed | Status::Lost(_) => None,
        }
    }

    /// What is known now. The device's own report is given once.
    pub(super) fn report(&mut self, key: EntryKey) -> EntryReport {
        EntryReport {
            key,
            device_type: self.kind.map(|kind| kind.device_type().0),
            base: self.base,
            detail: self.detail.clone(),
            error: match &self.status {
                Status::Failed(error) | Status::Busy(error) | Status::Lost(error) => {
                    Some(error.clone())
                }
                Status::New | Status::Pending | Status::Handed => None,
            },
            busy: matches!(self.status, Status::Busy(_)),
            served: self.served,
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
    /// What keeps it from being served; [`devices::is_busy`] tells whether that may go away by itself.
    pub(super) fn open(
        (guest, name): (&Identity, &str),
        known_as: &str,
        key: EntryKey,
        known: &mut DeviceEntry,
        context: &mut WorkerContext<'_>,
    ) -> Result<Self> {
        let entry = context.toolstack.device(guest.domid, key)?;
        known.grants = entry.grant_usage;
        known.base = Some(entry.base);
        let kept = if known.served {
            context.files.kept(guest, key)?
        } else {
            None
        };
        let device = (guest.domid, key);
        let inherited = match context.back_ends.inherited(device) {
            None if known.served && !context.back_ends.know(device) => {
                let shared = context.files.shared(guest, key).unwrap_or_else(|error| {
                    tracing::warn!(guest = name, domid = guest.domid, device = %key, "{error:#}");
                    None
                });
                let left = |shared| context.descriptors.left(device, shared);
                let by_worker = |shared| orphan_workers::shared_by(guest.domid, shared);
                shared.and_then(|shared| left(shared).or_else(|| by_worker(shared)))
            }
            inherited => inherited,
        };
        let wanted = Wanted {
            guest,
            name,
            key,
            source: &entry.kind,
            config: context.config,
            created: match key.form {
                EntryForm::Virtio => context.created.settings(guest.uuid(), key.devid)?,
                EntryForm::Disk | EntryForm::File | EntryForm::Attached => None,
            },
            served: known.served,
            kept,
            known: context.known.of(known_as, key),
            inherited,
        };
        let service = wanted.service();
        let kind = devices::kind(entry.kind.device_type(), service)?;
        known.kind = Some(kind);
        let mut opened = kind.open(&wanted, context.uses)?;
        let socket = opened
            .back_end
            .as_ref()
            .map(|back_end| back_end.socket.clone());
        if let Some(back_end) = opened.back_end.take() {
            let (registry, next_token) = (context.registry, &mut *context.next_token);
            context
                .back_ends
                .have(device, back_end, registry, next_token);
        }
        context.dialling.have(device, opened.dials.take());
        let listens = std::mem::take(&mut opened.listens);
        let (registry, next_token) = (context.registry, &mut *context.next_token);
        let listening = context
            .listeners
            .have(device, listens, registry, next_token);
        if let Err(error) = listening {
            if !known.served {
                context.uses.end(guest, key);
                return Err(error);
            }
            tracing::warn!(guest = name, domid = guest.domid, device = %key, "{error:#}");
        }
        // Also nothing, of a device that is new: what another one has left by this name is not its.
        if (opened.kept.is_some() || !known.served)
            && let Err(error) = context.files.keep(guest, key, opened.kept.clone())
        {
            if !known.served {
                context.uses.end(guest, key);
                return Err(error);
            }
            tracing::warn!(guest = name, domid = guest.domid, device = %key, "{error:#}");
        }
        known.detail.clone_from(&opened.detail);
        known.backing = opened.backing;
        known.state_bytes = kind.state_bytes(&opened.spec);
        Ok(Self {
            entry,
            kind,
            service,
            opened,
            socket,
            state_bytes: 0,
        })
    }

    /// What its worker is told; [`OpenedDevice::descriptors`] go beside.
    pub(super) fn message(&self, key: EntryKey, served: bool) -> ToWorker {
        let range = self.entry.range();
        if self.kind.device_type() == DeviceType::NONE {
            let MmioRange { base, len } = range;
            return ToWorker::Claim { key, base, len };
        }
        ToWorker::Attach(Box::new(Attachment {
            key,
            device_type: self.kind.device_type().0,
            service: self.service,
            base: range.base,
            len: range.len,
            irq: self.entry.irq,
            grant_usage: self.entry.grant_usage,
            served,
            backing: self.opened.backing,
            state_bytes: self.state_bytes,
            spec: self.opened.spec.clone(),
        }))
    }

    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.opened.descriptors.iter().map(AsFd::as_fd).collect()
    }
}

impl Drop for OpenedDevice {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            close_later(socket, std::mem::take(&mut self.opened.descriptors));
        }
    }
}
