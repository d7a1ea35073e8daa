//! One guest: its devices, and its worker.

mod effects;
mod orders;
mod slots;

use super::back_ends::BackEnds;
use super::descriptor_store::DescriptorStore;
use super::dialling::{Dialled, Dialling};
use super::entry::{DeviceEntry, OpenedDevice, Status};
use super::known_devices::KnownDevices;
use super::lifecycle::{Event, Lifecycle};
use super::listeners::Listeners;
use super::orphan_workers;
use super::state_files::{Shared, StateFiles};
use super::worker_process::{Launcher, WorkerProcess};
use crate::config::Config;
use crate::created::Created;
use crate::ctl::report::{GuestReport, Refusal};
use crate::devices::Inherited;
use crate::devices::blk::Uses;
use crate::devices::blk::lock::{self, Locks};
use crate::ipc::{FromWorker, ToWorker};
use crate::text::without_controls;
use crate::toolstack::libxl::{EntryForm, EntryKey};
use crate::toolstack::{Identity, Toolstack, ToolstackError};
use crate::worker::event_loop::EventLoopReport;
use anyhow::{Context, Result};
use mio::{Registry, Token};
use serde_json::Value;
use std::cell::LazyCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;
use tracing::Level;
use xen_virtio_backend::LogLimit;
use xen_virtio_backend::vhost_user::Brought;
use xen_virtio_transport::DeviceReport;

/// Lines a minute of a guest's workers, whichever of them write these.
const WORKER_LINES: u32 = 30;

pub(super) struct Guest {
    identity: Identity,
    /// What is known of its devices in another life goes by this uuid; nothing does, if it is empty.
    known_as: String,
    name: String,
    lifecycle: Lifecycle,
    /// What was opened for devices that no worker has yet.
    opened: BTreeMap<EntryKey, OpenedDevice>,
    worker: Option<WorkerProcess>,
    /// The worker before, until it has died, and why it was given up.
    dying: Option<(WorkerProcess, &'static str)>,
    /// The worker that has died last.
    lost: u32,
    /// The worker that has been asked for a report and has not answered.
    report_asked: Option<Token>,
    /// The worker's newest report of itself, until it is shown.
    server: Option<EventLoopReport>,
    /// Of lines that a worker can cause.
    log_limit: LogLimit,
    /// Of lines that workers write.
    worker_lines: LogLimit,
}

/// What a guest's worker is started with.
pub(super) struct WorkerContext<'a> {
    pub(super) toolstack: &'a mut dyn Toolstack,
    pub(super) config: &'a Config,
    pub(super) created: &'a Created,
    pub(super) files: &'a StateFiles,
    pub(super) uses: &'a mut Uses,
    pub(super) back_ends: &'a mut BackEnds,
    pub(super) descriptors: &'a mut DescriptorStore,
    pub(super) listeners: &'a mut Listeners,
    pub(super) dialling: &'a mut Dialling,
    pub(super) known: &'a mut KnownDevices,
    pub(super) launcher: &'a dyn Launcher,
    pub(super) registry: &'a Registry,
    pub(super) next_token: &'a mut usize,
}

/// A worker has not taken a connection.
pub(super) enum Untaken {
    /// It has too much to read already.
    Now,
    /// It is gone.
    Ever(Event),
}

impl Guest {
    pub(super) fn read(
        toolstack: &mut dyn Toolstack,
        files: &StateFiles,
        domid: u16,
    ) -> Result<Self, ToolstackError> {
        let name = toolstack.name(domid)?;
        let identity = toolstack.identify(domid)?;
        let served_earlier = files.has(&identity);
        let known_as = match toolstack.has_given_uuid(domid)? {
            true => identity.uuid().to_owned(),
            false => String::new(),
        };
        Ok(Self {
            lifecycle: Lifecycle::new(served_earlier, Instant::now()),
            opened: BTreeMap::new(),
            identity,
            known_as,
            // A guest of init-dom0less chooses it.
            name: name.map_or_else(|| "?".to_owned(), |name| without_controls(name.chars())),
            worker: None,
            dying: None,
            lost: 0,
            report_asked: None,
            server: None,
            log_limit: LogLimit::default(),
            worker_lines: LogLimit::new(WORKER_LINES),
        })
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    fn domid(&self) -> u16 {
        self.identity.domid
    }

    /// Whether all of its entries are to be taken over at once: its accesses must not be answered before.
    pub(super) fn is_to_be_taken_over(&self) -> bool {
        self.lifecycle.is_to_be_taken_over()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = EntryKey> {
        self.lifecycle.entries.keys().copied()
    }

    pub(super) fn knows(&self, key: EntryKey) -> bool {
        self.lifecycle.entries.contains_key(&key)
    }

    /// Has `event` happen, and performs what follows from it.
    ///
    /// # Errors
    ///
    /// What the toolstack refuses; all else is done.
    pub(super) fn handle(
        &mut self,
        event: Event,
        context: &mut WorkerContext<'_>,
    ) -> Result<(), ToolstackError> {
        let mut result = Ok(());
        let mut effects = VecDeque::from(self.lifecycle.on(event, Instant::now()));
        while let Some(effect) = effects.pop_front() {
            match self.perform(effect, context) {
                Ok(None) => {}
                // What follows from how it ended comes before what is to be done after it.
                Ok(Some(event)) => {
                    for effect in self.lifecycle.on(event, Instant::now()).into_iter().rev() {
                        effects.push_front(effect);
                    }
                }
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }

    pub(super) fn again_at(&self) -> Option<Instant> {
        self.lifecycle.again_at()
    }

    /// When to look again for entries that are closed.
    pub(super) fn closing_at(&self) -> Option<Instant> {
        self.lifecycle.closing.look_at()
    }

    /// The entries that are closed now. Until [`Guest::is_closed`] they are looked at again.
    pub(super) fn closed(&mut self) -> Vec<EntryKey> {
        let Lifecycle {
            entries, closing, ..
        } = &mut self.lifecycle;
        let vm = self.identity.vm.as_deref().unwrap_or_default();
        let locks = LazyCell::new(Locks::read);
        let (closed, held) = closing.closed(
            |key| entries.contains_key(&key),
            |key| locks.have(lock::name(vm, key), None),
            Instant::now(),
        );
        for key in held {
            tracing::warn!(
                guest = self.name,
                domid = self.domid(),
                device = %key,
                "is not closed yet: transfers of its disk are under way"
            );
        }
        closed
    }

    /// libxl has been told that entry `key` is closed.
    pub(super) fn is_closed(&mut self, key: EntryKey, context: &mut WorkerContext<'_>) {
        self.lifecycle.closing.end(key);
        self.release(key, context);
    }

    /// What kept the guest from running, of its entries or of entry `key`.
    pub(super) fn refusals(&self, key: Option<EntryKey>) -> Vec<Refusal> {
        let entries = self.lifecycle.entries.iter();
        let asked = entries.filter(|(other, _)| key.is_none_or(|key| key == **other));
        // Whoever attaches a device is told himself, and the guest goes on.
        let asked = asked.filter(|(other, _)| other.form != EntryForm::Attached);
        asked
            .filter_map(|(key, known)| {
                Some(Refusal {
                    domid: self.domid(),
                    guest: self.name.clone(),
                    key: *key,
                    error: known.refusal()?.to_owned(),
                })
            })
            .collect()
    }

    /// When the worker is to be asked whether drivers have begun.
    pub(super) fn drivers_due(&self) -> Option<Instant> {
        let entries = self.lifecycle.entries.values();
        let due = entries.filter_map(DeviceEntry::driver_due).min();
        due.filter(|_| self.worker.is_some())
    }

    /// Whether a worker has the device at `key`.
    pub(super) fn has_handed(&self, key: EntryKey) -> bool {
        let known = self.lifecycle.entries.get(&key);
        let is_handed =
            |known: &DeviceEntry| known.served && matches!(known.status, Status::Handed);
        self.worker.is_some() && known.is_some_and(is_handed)
    }

    /// Hands the worker a connection for the device at `key`, or nothing for one that could not be made. What comes of it is closed
    /// if no worker has the device.
    ///
    /// # Errors
    ///
    /// [`Untaken`].
    pub(super) fn connect(
        &mut self,
        key: EntryKey,
        change: Value,
        connection: Option<&OwnedFd>,
    ) -> Result<(), Untaken> {
        self.send_about(key, &ToWorker::Change { key, change }, connection)
    }

    /// Hands the worker a message that may be lost, and a descriptor, about the device at `key`, if it has that.
    ///
    /// # Errors
    ///
    /// [`Untaken`].
    fn send_about(
        &mut self,
        key: EntryKey,
        message: &ToWorker,
        descriptor: Option<&OwnedFd>,
    ) -> Result<(), Untaken> {
        let is_handed = self.has_handed(key);
        let Some(worker) = self.worker.as_mut().filter(|_| is_handed) else {
            return Ok(());
        };
        let fds: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
        let sent = worker.conversation.send(message, &fds);
        sent.map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => Untaken::Now,
            _ => Untaken::Ever(Event::Broken {
                why: "it takes no connection",
            }),
        })
    }

    /// A connection to the back-end of device `key` is there. What became of the worker, if it does not take it; nothing if no
    /// worker has the device.
    pub(super) fn connected(
        &mut self,
        key: EntryKey,
        brought: &Brought,
    ) -> Option<Result<(), Event>> {
        if !self.has_handed(key) {
            return None;
        }
        let change = Value::Null;
        let fds = [brought.socket.as_fd(), brought.memory.as_fd()];
        let broken = self.send_with(&ToWorker::Change { key, change }, &fds);
        Some(broken.map_or(Ok(()), Err))
    }

    pub(super) fn has_worker(&self, token: Token) -> bool {
        let dying = self.dying.iter().map(|(worker, _)| worker);
        let mut workers = self.worker.iter().chain(dying);
        workers.any(|worker| worker.has(token))
    }

    /// Passes on what its workers have logged, if `token` is of one of their logs.
    pub(super) fn relay_log(&mut self, token: Token, registry: &Registry) {
        let dying = self.dying.iter_mut().map(|(worker, _)| worker);
        let limit = &mut self.worker_lines;
        for worker in self.worker.iter_mut().chain(dying) {
            worker.read_log(token, registry, |level, line| {
                relay(limit, &self.name, self.identity.domid, level, line);
            });
        }
    }

    /// Whether a report is to be expected of the worker with `token`.
    pub(super) fn is_served_by(&self, token: Token) -> bool {
        let worker = self.worker.as_ref();
        worker.is_some_and(|worker| worker.token() == token)
    }

    /// Its workers, which are to be ended.
    pub(super) fn into_workers(self) -> impl Iterator<Item = WorkerProcess> {
        let dying = self.dying.into_iter().map(|(worker, _)| worker);
        self.worker.into_iter().chain(dying)
    }

    /// Ends the worker of an earlier supervisor, if this one has not got to that.
    pub(super) fn end_earlier_workers(&mut self) {
        if self.lifecycle.take_served_earlier()
            && let Err(error) = orphan_workers::end_workers(self.domid())
        {
            tracing::error!(guest = self.name, domid = self.domid(), "{error:#}");
        }
    }

    /// Whether it is kept from running.
    pub(super) fn is_held(&self) -> bool {
        self.lifecycle.is_held()
    }

    /// Whether the guest is as well served as it can be, also without this supervisor.
    pub(super) fn is_settled(&self) -> bool {
        match &self.worker {
            Some(worker) => worker.conversation.is_serving(),
            None => self.lifecycle.is_at_rest(),
        }
    }

    /// What the worker says next, or what became of it; what it says of devices is noted. `None` when there is nothing more of that now.
    pub(super) fn next_event(&mut self, context: &mut WorkerContext<'_>) -> Option<Event> {
        if let Some(died) = self.reap() {
            return Some(died);
        }
        loop {
            let message = match self.worker.as_mut()?.conversation.receive() {
                Ok(message) => message?,
                Err(error) => {
                    let why = match error.kind() {
                        io::ErrorKind::InvalidData => "it says what it was not asked for",
                        _ => "it ended",
                    };
                    return Some(Event::Broken { why });
                }
            };
            return Some(match message {
                FromWorker::Failed { error } => Event::CannotServe { error },
                FromWorker::AttachFailed { key, error, busy } => {
                    Event::NotAttached { key, busy, error }
                }
                FromWorker::Attached { key, known: is } => {
                    if let Some(is) = is {
                        context.known.note(&self.known_as, key, is);
                    }
                    Event::Attached { key }
                }
                FromWorker::Detached { key } => Event::GaveUp { key },
                FromWorker::Serving => continue,
                FromWorker::Shares { key, connection } => {
                    let device = (self.domid(), key);
                    let shared = context.back_ends.share(device, connection);
                    self.note_shared(key, shared.as_ref(), context);
                    continue;
                }
                FromWorker::Dials { key, number, port } => {
                    let dialled = Dialled {
                        domid: self.domid(),
                        key,
                        number,
                        port,
                        tries: 0,
                    };
                    if context.dialling.ask(dialled).is_ok() {
                        continue;
                    }
                    let why = "it asks for more connections than it may";
                    Event::Broken { why }
                }
                FromWorker::Report { server, devices } => {
                    self.take_report(server, &devices);
                    continue;
                }
            });
        }
    }

    /// The next supervisor finds what the worker shares with the back-end of device `key` by this, or nothing.
    fn note_shared(
        &mut self,
        key: EntryKey,
        shared: Option<&(Shared, Inherited)>,
        context: &mut WorkerContext<'_>,
    ) {
        let (known, descriptors) = shared
            .map(|(known, descriptors)| (*known, descriptors))
            .unzip();
        let noted = context.files.share(&self.identity, key, known);
        let device = (self.domid(), key);
        let kept = context.descriptors.keep(device, descriptors);
        let kept = kept
            .context("systemd does not keep its connection to its back-end for the next service");
        if let Err(error) = noted.and(kept)
            && self.log_limit.allow()
        {
            let domid = self.domid();
            tracing::error!(guest = self.name, domid, device = %key, "{error:#}");
        }
    }

    fn take_report(&mut self, server: EventLoopReport, devices: &[(EntryKey, DeviceReport)]) {
        self.report_asked = None;
        self.server = Some(server);
        for (key, report) in devices {
            if let Some(known) = self.lifecycle.entries.get_mut(key)
                && let Some(hint) = known.reported(report)
            {
                let domid = self.identity.domid;
                tracing::info!(guest = self.name, domid, device = %key, "{hint}");
            }
        }
    }

    /// Whether a worker owes a report to whoever waits for that of `token`.
    pub(super) fn owes_report(&self, token: Token) -> bool {
        self.report_asked == Some(token) && self.is_served_by(token)
    }

    /// How the worker that was given up has died, if it has: until then it may use what the next one needs.
    fn reap(&mut self) -> Option<Event> {
        let (worker, why) = self.dying.as_mut()?;
        let how = worker.death()?;
        // Its last words say why.
        let limit = &mut self.worker_lines;
        worker.drain_log(|level, line| {
            relay(limit, &self.name, self.identity.domid, level, line);
        });
        let why = *why;
        self.lost = worker.pid();
        self.dying = None;
        Some(Event::Died { how, why })
    }

    /// What was said a while ago is not shown for what is.
    pub(super) fn forget_report(&mut self) {
        for known in self.lifecycle.entries.values_mut() {
            known.device = None;
        }
    }

    /// Asks the worker for a report; the token that it will answer with.
    pub(super) fn ask_report(&mut self) -> Option<Token> {
        let worker = self.worker.as_mut()?;
        // Questions of a worker that is busy do not pile up.
        if self.report_asked != Some(worker.token()) {
            worker.conversation.send(&ToWorker::Report, &[]).ok()?;
            self.report_asked = Some(worker.token());
        }
        Some(worker.token())
    }

    /// Asks the worker whether drivers have begun, if it is time for that.
    pub(super) fn ask_drivers(&mut self, now: Instant) {
        let mut due = false;
        for known in self.lifecycle.entries.values_mut() {
            due |= known.ask_driver(now);
        }
        if due {
            self.ask_report();
        }
    }

    /// What is known of the guest now. Device reports are given once: the next must be asked for.
    pub(super) fn report(&mut self) -> GuestReport {
        let restarts = self.lifecycle.restarts();
        let error = self.lifecycle.error().map(str::to_owned);
        let entries = self.lifecycle.entries.iter_mut();
        let devices = entries.map(|(key, known)| known.report(*key));
        GuestReport {
            domid: self.identity.domid,
            name: self.name.clone(),
            restarts,
            devices: devices.collect(),
            closing: self.lifecycle.closing.report().collect(),
            worker: self.worker.as_ref().map(WorkerProcess::pid),
            error,
            held: self.is_held(),
            server: self.server.take(),
        }
    }
}

/// Logs a worker's line. Who asked for debug lines wants them all.
fn relay(limit: &mut LogLimit, name: &str, domid: u16, level: Level, line: &str) {
    if level <= Level::INFO && !limit.allow() {
        return;
    }
    // A worker's line begins with the device that it is about, if it is about one.
    let about = line.split_once(": ");
    let about = about.filter(|(device, _)| EntryKey::is_name(device));
    let (device, line) = about.map_or((None, line), |(device, line)| (Some(device), line));
    match level {
        Level::ERROR => tracing::error!(guest = name, domid, device, "{line}"),
        Level::WARN => tracing::warn!(guest = name, domid, device, "{line}"),
        Level::INFO => tracing::info!(guest = name, domid, device, "{line}"),
        _ => tracing::debug!(guest = name, domid, device, "{line}"),
    }
}
