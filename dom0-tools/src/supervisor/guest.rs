//! One guest: its entries in xenstore, and its worker.

use super::worker_process::WorkerProcess;
use crate::config::{Config, PollingConfig};
use crate::ipc::{FromWorker, ToWorker};
use crate::libxl::{self, Entry, EntryKey, EntryKind};
use crate::report::{EntryReport, GuestReport};
use crate::server::ServerReport;
use crate::xenstore::{XenStore, XenStoreError};
use anyhow::{Context, Result, bail};
use mio::{Registry, Token};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use xen_virtio_backend::blk::Disk;
use xen_virtio_transport::DeviceReport;

pub(super) struct Guest {
    domid: u16,
    name: String,
    /// Tells this guest from an earlier one of the same domid: the path of its uuid.
    vm: Option<String>,
    worker: Option<WorkerProcess>,
    error: Option<String>,
    entries: BTreeMap<EntryKey, Known>,
    /// The worker's newest report of itself, until it is shown.
    server: Option<ServerReport>,
}

/// What we have of an entry.
struct Known {
    detail: String,
    status: Status,
    /// When the entry was found, and how long it then took until its page was claimed.
    found: Instant,
    claimed_after: Option<Duration>,
    /// The worker's newest report, until it is shown.
    report: Option<DeviceReport>,
}

impl Known {
    fn new(detail: String, status: Status, found: Instant) -> Self {
        Self {
            detail,
            status,
            found,
            claimed_after: None,
            report: None,
        }
    }
}

enum Status {
    /// Opened, and to be handed to the worker.
    Pending(Box<Attachment>),
    /// With the worker, which may not have claimed its page yet.
    Handed,
    Failed(String),
}

/// A device to be.
struct Attachment {
    entry: Entry,
    disk: Disk,
    serial: String,
}

impl Guest {
    pub(super) fn read(store: &mut XenStore, domid: u16) -> Result<Self, XenStoreError> {
        let name = store.read(&format!("/local/domain/{domid}/name"))?;
        Ok(Self {
            domid,
            name: name.unwrap_or_else(|| "?".to_owned()),
            vm: read_vm(store, domid)?,
            worker: None,
            error: None,
            entries: BTreeMap::new(),
            server: None,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the domid now belongs to another guest than when this was read.
    pub(super) fn is_stale(&self, store: &mut XenStore) -> Result<bool, XenStoreError> {
        let now = read_vm(store, self.domid)?;
        Ok(now.is_some() && now != self.vm)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = EntryKey> {
        self.entries.keys().copied()
    }

    pub(super) fn knows(&self, key: EntryKey) -> bool {
        self.entries.contains_key(&key)
    }

    /// Opens what the entry at `key` needs. What fails is logged, and kept for the report.
    pub(super) fn attach(&mut self, key: EntryKey, store: &mut XenStore, config: &Config) {
        let found = Instant::now();
        let mut detail = String::new();
        let status = match self.open(key, store, config, &mut detail) {
            Ok(attachment) => Status::Pending(Box::new(attachment)),
            Err(error) => {
                self.log_error(key, &format!("{error:#}"));
                Status::Failed(format!("{error:#}"))
            }
        };
        self.entries.insert(key, Known::new(detail, status, found));
    }

    fn open(
        &self,
        key: EntryKey,
        store: &mut XenStore,
        config: &Config,
        detail: &mut String,
    ) -> Result<Attachment> {
        let entry = libxl::read_entry(store, self.domid, key)?;
        let (path, read_only, serial) = match &entry.kind {
            EntryKind::Disk {
                path,
                read_only,
                vdev,
            } => (path.as_path(), *read_only, vdev.clone()),
            EntryKind::Virtio {
                device_type: VIRTIO_ID_BLOCK,
            } => {
                let device = config.device(&self.name, key.devid).with_context(|| {
                    format!(
                        "nothing says which disk this is: add to {} [[virtio]] guest = {:?}, index = {}, \
                         path = \"…\", and restart xen-virtiod",
                        crate::config::CONFIG_PATH,
                        self.name,
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
        Ok(Attachment {
            disk,
            serial,
            entry,
        })
    }

    /// An entry that was served before this supervisor was: its claim is with Xen still, and a second one
    /// would not be asked.
    pub(super) fn refuse_served(&mut self, key: EntryKey) {
        let error = "was served by an earlier xen-virtiod, and is left as it is; \
                     destroy and create the guest to have it served by this one";
        self.log_error(key, error);
        let status = Status::Failed(error.to_owned());
        let known = Known::new(String::new(), status, Instant::now());
        self.entries.insert(key, known);
    }

    /// Starts the worker, if something waits for one.
    pub(super) fn start_worker(
        &mut self,
        polling: PollingConfig,
        registry: &Registry,
        next_token: &mut usize,
    ) {
        let waiting = self
            .entries
            .values()
            .any(|known| matches!(known.status, Status::Pending(_)));
        if !waiting || self.worker.is_some() {
            return;
        }
        let token = Token(*next_token);
        *next_token += 1;
        match WorkerProcess::start(self.domid, polling, registry, token) {
            Ok(worker) => {
                tracing::info!(
                    "guest {} ({}): worker {} serves it",
                    self.name,
                    self.domid,
                    worker.pid()
                );
                self.worker = Some(worker);
                self.error = None;
            }
            Err(error) => self.fail(format!("{error:#}")),
        }
    }

    /// Hands to the worker what waits for it.
    pub(super) fn send_pending(&mut self) {
        let Some(worker) = &self.worker else { return };
        for (key, known) in &mut self.entries {
            let Status::Pending(attachment) = &known.status else {
                continue;
            };
            let Attachment {
                entry,
                disk,
                serial,
            } = &**attachment;
            let range = entry.range();
            let message = ToWorker::AttachDisk {
                key: *key,
                base: range.base,
                len: range.len,
                irq: entry.irq,
                grant_usage: entry.grant_usage,
                read_only: disk.read_only(),
                serial: serial.clone(),
            };
            known.status = match worker.send(&message, &[disk.file().as_fd()]) {
                Ok(()) => Status::Handed,
                Err(error) => Status::Failed(format!("the guest's worker takes no disk: {error}")),
            };
        }
    }

    /// libxl wants the entry closed. True if the worker will say when it is.
    pub(super) fn detach(&mut self, key: EntryKey) -> bool {
        let handed = self
            .entries
            .get(&key)
            .is_some_and(|known| matches!(known.status, Status::Handed));
        let asked = handed
            && self
                .worker
                .as_ref()
                .is_some_and(|worker| worker.send(&ToWorker::Detach { key }, &[]).is_ok());
        self.entries.remove(&key);
        asked
    }

    /// The entry is gone from xenstore.
    pub(super) fn forget(&mut self, key: EntryKey) {
        self.detach(key);
    }

    pub(super) fn has_worker(&self, token: Token) -> bool {
        self.worker
            .as_ref()
            .is_some_and(|worker| worker.token() == token)
    }

    pub(super) fn into_worker(self) -> Option<WorkerProcess> {
        self.worker
    }

    /// Takes in the worker's next message. The end of the worker is the end of its messages.
    pub(super) fn hear(&mut self, registry: &Registry) -> Option<FromWorker> {
        let message = match self.worker.as_ref()?.receive() {
            Ok(message) => message?,
            Err(_) => {
                self.give_up_worker(registry, "it ended");
                return None;
            }
        };
        match &message {
            FromWorker::Failed { error } => self.fail(error.clone()),
            FromWorker::AttachFailed { key, error } => {
                self.log_error(*key, error);
                if let Some(known) = self.entries.get_mut(key) {
                    known.status = Status::Failed(error.clone());
                }
            }
            FromWorker::Attached { key } => {
                if let Some(known) = self.entries.get_mut(key) {
                    let after = known.found.elapsed();
                    known.claimed_after = Some(after);
                    tracing::info!(
                        "guest {} ({}): {key} is {}, {} ms after libxl asked for it",
                        self.name,
                        self.domid,
                        known.detail,
                        after.as_millis()
                    );
                }
            }
            FromWorker::Report { server, devices } => {
                self.server = Some(server.clone());
                for (key, report) in devices {
                    if let Some(known) = self.entries.get_mut(key) {
                        known.report = Some(report.clone());
                    }
                }
            }
            FromWorker::Detached { .. } => {}
        }
        Some(message)
    }

    /// Ends a worker that cannot be worked with. Why it did, if it gave a reason, stands already.
    pub(super) fn give_up_worker(&mut self, registry: &Registry, why: &str) {
        let status = self.worker.take().and_then(|worker| worker.reap(registry));
        if self.error.is_none() {
            let how = status.map_or(String::new(), |status| format!(", {status}"));
            self.fail(format!(
                "has lost its worker ({why}{how}); destroy and create the guest"
            ));
        }
    }

    fn fail(&mut self, error: String) {
        tracing::error!("guest {} ({}): {error}", self.name, self.domid);
        self.error = Some(error);
    }

    fn log_error(&self, key: EntryKey, error: &str) {
        tracing::error!("guest {} ({}): {key}: {error}", self.name, self.domid);
    }

    /// Asks the worker for a report; the token that it will answer with.
    pub(super) fn ask_report(&mut self) -> Option<Token> {
        let worker = self.worker.as_ref()?;
        worker.send(&ToWorker::Report, &[]).ok()?;
        Some(worker.token())
    }

    /// What is known of the guest now. Device reports are given once: the next must be asked for.
    pub(super) fn report(&mut self) -> GuestReport {
        let devices = self.entries.iter_mut().map(|(key, known)| EntryReport {
            key: *key,
            detail: known.detail.clone(),
            error: match &known.status {
                Status::Failed(error) => Some(error.clone()),
                Status::Pending(_) | Status::Handed => None,
            },
            claimed_after_ms: known
                .claimed_after
                .map(|after| after.as_millis().try_into().unwrap_or(u64::MAX)),
            device: known.report.take(),
        });
        GuestReport {
            domid: self.domid,
            name: self.name.clone(),
            devices: devices.collect(),
            worker: self.worker.as_ref().map(WorkerProcess::pid),
            error: self.error.clone(),
            server: self.server.take(),
        }
    }
}

fn read_vm(store: &mut XenStore, domid: u16) -> Result<Option<String>, XenStoreError> {
    store.read(&format!("/local/domain/{domid}/vm"))
}

fn describe(path: &Path, read_only: bool) -> String {
    format!(
        "{}, {}",
        path.display(),
        if read_only { "read-only" } else { "read-write" }
    )
}
