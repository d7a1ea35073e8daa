//! One guest: its entries in xenstore, and its worker.

use super::closing::ClosingEntries;
use super::entry::{DeviceEntry, OpenedDevice, Status, TRY_AGAIN};
use super::orphan_workers;
use super::restarts::Restarts;
use super::state_files::{Identity, StateFiles};
use super::worker_process::{Launcher, WorkerProcess};
use crate::config::Config;
use crate::ctl::report::{GuestReport, Refusal};
use crate::devices::blk::Uses;
use crate::devices::blk::lock::{self, Locks};
use crate::devices::{self, Resized};
use crate::ipc::{FromWorker, ToWorker};
use crate::toolstack::libxl::{EntryKey, entry_path};
use crate::toolstack::xenstore::{XenStore, XenStoreError};
use crate::worker::event_loop::EventLoopReport;
use anyhow::{Context, Result, bail};
use mio::{Registry, Token};
use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::io;
use std::time::Instant;
use tracing::Level;
use xen_virtio_backend::LogLimit;

/// Lines a minute of a guest's workers, whichever of them write these.
const WORKER_LINES: u32 = 30;

pub(super) struct Guest {
    identity: Identity,
    name: String,
    /// An earlier supervisor's worker has served it, and may be serving it still.
    served_earlier: bool,
    /// It has devices, or has had them: without a worker its accesses would wait for ever.
    served: bool,
    worker: Option<WorkerProcess>,
    /// The worker before, until it has died, and why it was given up.
    dying: Option<(WorkerProcess, &'static str)>,
    restarts: Restarts,
    /// When a worker is to be started again, or a device to be opened again.
    again_at: Option<Instant>,
    error: Option<String>,
    entries: BTreeMap<EntryKey, DeviceEntry>,
    closing: ClosingEntries,
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
    pub(super) config: &'a Config,
    pub(super) files: &'a StateFiles,
    pub(super) uses: &'a mut Uses,
    pub(super) launcher: &'a dyn Launcher,
    pub(super) registry: &'a Registry,
    pub(super) next_token: &'a mut usize,
}

impl Guest {
    pub(super) fn read(
        store: &mut XenStore,
        files: &StateFiles,
        domid: u16,
    ) -> Result<Self, XenStoreError> {
        let name = store.read(&format!("/local/domain/{domid}/name"))?;
        let identity = identify(store, domid)?;
        let served_earlier = files.has(&identity);
        Ok(Self {
            served_earlier,
            served: served_earlier,
            identity,
            name: name.unwrap_or_else(|| "?".to_owned()),
            worker: None,
            dying: None,
            restarts: Restarts::new(Instant::now()),
            again_at: None,
            error: None,
            entries: BTreeMap::new(),
            closing: ClosingEntries::default(),
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
        self.served_earlier && self.entries.is_empty() && self.again_at.is_none()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the domid now belongs to another guest than when this was read.
    pub(super) fn is_stale(&self, store: &mut XenStore) -> Result<bool, XenStoreError> {
        let now = identify(store, self.domid())?;
        Ok(now.vm.is_some() && now != self.identity)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = EntryKey> {
        self.entries.keys().copied()
    }

    pub(super) fn knows(&self, key: EntryKey) -> bool {
        self.entries.contains_key(&key)
    }

    /// Opens what the entry at `key` needs, which the guest may have had from an earlier worker. What fails
    /// is logged, and kept for the report.
    pub(super) fn attach(
        &mut self,
        key: EntryKey,
        served: bool,
        store: &mut XenStore,
        context: &mut WorkerContext<'_>,
    ) {
        let mut known = DeviceEntry::new(served);
        let others = self.entries.iter().filter(|(other, _)| **other != key);
        let others = others.map(|(_, known)| known.state_bytes).sum();
        self.open(key, &mut known, others, store, context);
        self.entries.insert(key, known);
    }

    /// Opens an entry; the guest's other devices take `others` bytes of its state file.
    fn open(
        &mut self,
        key: EntryKey,
        known: &mut DeviceEntry,
        others: usize,
        store: &mut XenStore,
        context: &mut WorkerContext<'_>,
    ) {
        let guest = (&self.identity, self.name.as_str());
        // A guest of which we serve no device gets no state file: it would count as served.
        let opened =
            OpenedDevice::open(guest, key, known, store, context).and_then(|mut device| {
                let devices = others + known.state_bytes;
                device.state_bytes = context.files.reserve(&self.identity, devices)?;
                Ok(device)
            });
        match opened {
            Ok(device) => known.status = Status::Pending(Box::new(device)),
            Err(error) => {
                let busy = devices::is_busy(&error);
                let status = if busy { Status::Busy } else { Status::Failed };
                let error = format!("{error:#}");
                if known.fails(status, &error) {
                    self.log_error(key, &error);
                }
            }
        }
    }

    /// An entry that was served before this supervisor was, and nobody knows how far its driver has got.
    pub(super) fn refuse_served(&mut self, key: EntryKey) {
        let error = "was served by an earlier xen-virtiod, of whose state nothing is left; \
                     destroy and create the guest to have it served by this one";
        self.log_error(key, error);
        let mut known = DeviceEntry::new(true);
        known.status = Status::Lost(error.to_owned());
        self.entries.insert(key, known);
    }

    /// Hands to the worker what waits for it; starts the worker, if there is none.
    pub(super) fn serve_pending(&mut self, context: &mut WorkerContext<'_>) {
        if self.worker.is_some() {
            self.send_pending(context.registry);
        } else if self.wants_worker() {
            match self.start_worker(context) {
                Ok(worker) => self.begin(worker, context.registry),
                Err(error) => {
                    self.fail(&format!("{error:#}"));
                    self.again_at = Some(Instant::now() + TRY_AGAIN);
                }
            }
        }
        // A guest without a worker has nothing that was ever served; a disk that somebody lets go of soon it may have.
        self.plan_next_try();
    }

    /// Sees to it that what has failed is tried again, if that may help.
    fn plan_next_try(&mut self) {
        let after = self
            .entries
            .values()
            .filter_map(DeviceEntry::try_again_after);
        if let Some(after) = after.min() {
            let at = Instant::now() + after;
            self.again_at = Some(self.again_at.map_or(at, |planned| planned.min(at)));
        }
    }

    fn wants_worker(&self) -> bool {
        let waiting = |known: &DeviceEntry| matches!(known.status, Status::Pending(_));
        let wanted = self.served || self.entries.values().any(waiting);
        wanted && self.dying.is_none() && self.again_at.is_none()
    }

    /// Has `worker` serve the guest.
    fn begin(&mut self, worker: WorkerProcess, registry: &Registry) {
        tracing::info!(
            "guest {} ({}): worker {} serves it",
            self.name,
            self.domid(),
            worker.pid()
        );
        self.served_earlier = false;
        self.served = true;
        self.error = None;
        self.worker = Some(worker);
        // First, so that a device that has come back under the same name is not the one given up.
        let entries = &self.entries;
        let is_served = |key| entries.get(&key).is_some_and(|known| known.served);
        for key in self.closing.not_given_up(is_served) {
            self.send(registry, &ToWorker::Detach { key });
        }
        self.send_pending(registry);
        self.send(registry, &ToWorker::Serve);
    }

    fn start_worker(&mut self, context: &mut WorkerContext<'_>) -> Result<WorkerProcess> {
        let state = context.files.open(&self.identity)?;
        if self.served_earlier {
            // A worker that serves all its devices is better than one that cannot.
            let missed = self.entries.iter().find(|(_, known)| known.is_missed());
            if let Some((key, _)) = missed
                && orphan_workers::has_workers(self.domid())?
            {
                bail!("is left to its earlier worker, which has {key}, until that can be opened");
            }
        }
        if self.served_earlier || !self.served {
            // Also one of a guest that had this domid before, if no supervisor was there to end it.
            orphan_workers::end_workers(self.domid())?;
        }
        let token = Token(*context.next_token);
        *context.next_token += WorkerProcess::TOKENS;
        WorkerProcess::start(
            context.launcher,
            self.domid(),
            &state,
            context.config,
            context.registry,
            token,
        )
    }

    fn send_pending(&mut self, registry: &Registry) {
        let Some(worker) = &mut self.worker else {
            return;
        };
        let mut result = Ok(());
        for (key, known) in &mut self.entries {
            if let Status::Pending(device) = &known.status {
                let message = device.message(*key, known.served);
                result = worker.conversation.send(&message, &device.descriptors());
                if result.is_err() {
                    break;
                }
                known.status = Status::Handed;
            }
        }
        if result.is_err() {
            self.give_up_worker(registry, "it takes no message");
        }
    }

    fn send(&mut self, registry: &Registry, message: &ToWorker) {
        let sent = self
            .worker
            .as_mut()
            .map(|worker| worker.conversation.send(message, &[]));
        if let Some(Err(_)) = sent {
            self.give_up_worker(registry, "it takes no message");
        }
    }

    pub(super) fn again_at(&self) -> Option<Instant> {
        self.again_at
    }

    /// Starts a worker in place of one that has died, which is given what that one had; and opens those
    /// devices that could not be.
    pub(super) fn try_again(&mut self, store: &mut XenStore, context: &mut WorkerContext<'_>) {
        self.again_at = None;
        let mut entries = std::mem::take(&mut self.entries);
        let all: usize = entries.values().map(|known| known.state_bytes).sum();
        for (key, known) in &mut entries {
            let again = match known.status {
                Status::Handed | Status::Pending(_) => self.worker.is_none(),
                Status::Failed(_) | Status::Busy(_) => known.try_again_after().is_some(),
                Status::New | Status::Lost(_) => false,
            };
            if again {
                let others = all - known.state_bytes;
                self.open(*key, known, others, store, context);
            }
        }
        self.entries = entries;
        self.serve_pending(context);
    }

    /// libxl wants the entry closed. True if a worker will say when it is.
    pub(super) fn detach(&mut self, key: EntryKey, context: &mut WorkerContext<'_>) -> bool {
        self.entries.remove(&key);
        context.uses.end(&self.identity, key);
        if !self.served {
            self.release(key, context);
            return false;
        }
        // The next worker is told too, if this one dies before it says so.
        self.closing.begin(key);
        self.send(context.registry, &ToWorker::Detach { key });
        true
    }

    /// Nobody has the disk of entry `key` any more.
    fn release(&self, key: EntryKey, context: &mut WorkerContext<'_>) {
        if let Err(error) = context.files.keep(&self.identity, key, None) {
            tracing::error!("guest {} ({}): {key}: {error:#}", self.name, self.domid());
        }
    }

    /// The worker says that it has given the entry up, which counts if it was asked to.
    pub(super) fn gave_up(&mut self, key: EntryKey) {
        self.closing.gave_up(key);
    }

    /// When to look again for entries that are closed.
    pub(super) fn closing_at(&self) -> Option<Instant> {
        self.closing.look_at()
    }

    /// The entries that are closed now. Until [`Guest::is_closed`] they are looked at again.
    pub(super) fn closed(&mut self) -> Vec<EntryKey> {
        let entries = &self.entries;
        let vm = self.identity.vm.as_deref().unwrap_or_default();
        let locks = LazyCell::new(Locks::read);
        let (closed, held) = self.closing.closed(
            |key| entries.contains_key(&key),
            |key| locks.have(lock::name(vm, key), None),
            Instant::now(),
        );
        for key in held {
            tracing::warn!(
                "guest {} ({}): {key} is not closed yet: transfers of its disk are under way",
                self.name,
                self.domid()
            );
        }
        closed
    }

    /// libxl has been told that entry `key` is closed.
    pub(super) fn is_closed(&mut self, key: EntryKey, context: &mut WorkerContext<'_>) {
        self.closing.end(key);
        self.release(key, context);
    }

    /// The entry is gone from xenstore.
    pub(super) fn forget(&mut self, key: EntryKey, context: &mut WorkerContext<'_>) {
        if self.knows(key) {
            self.detach(key, context);
        }
    }

    /// What kept the guest from running, of its entries or of entry `key`.
    pub(super) fn refusals(&self, key: Option<EntryKey>) -> Vec<Refusal> {
        let entries = self.entries.iter();
        let asked = entries.filter(|(other, _)| key.is_none_or(|key| key == **other));
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
        let entries = self.entries.values();
        let due = entries.filter_map(DeviceEntry::driver_due).min();
        due.filter(|_| self.worker.is_some())
    }

    /// Tells the guest of what has been added to the disk that is known as `device`, by its entry or its vdev: the
    /// sizes before and after.
    ///
    /// # Errors
    ///
    /// Why it cannot be.
    pub(super) fn resize(
        &mut self,
        device: &str,
        store: &mut XenStore,
        context: &mut WorkerContext<'_>,
    ) -> Result<(u64, u64)> {
        let domid = self.domid();
        let mut found = None;
        for key in self.entries.keys() {
            let vdev = store.read(&format!("{}/dev", entry_path(domid, *key)))?;
            if key.to_string() == device || vdev.as_deref() == Some(device) {
                found = Some(*key);
            }
        }
        let entries: Vec<_> = self.entries.keys().map(EntryKey::to_string).collect();
        let key = found
            .with_context(|| format!("it has no device {device}, but {}", entries.join(", ")))?;
        let known = &self.entries[&key];
        if !known.served || !matches!(known.status, Status::Handed) {
            bail!("{key} is not served now");
        }
        let kept = context.files.kept(&self.identity, key)?;
        let Resized {
            before,
            after,
            kept,
            change,
        } = known.resize(kept).with_context(|| key.to_string())?;
        context.files.keep(&self.identity, key, Some(kept))?;
        // A worker that dies before it is told is followed by one that is told this size.
        self.send(context.registry, &ToWorker::Change { key, change });
        Ok((before, after))
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
        if std::mem::take(&mut self.served_earlier)
            && let Err(error) = orphan_workers::end_workers(self.domid())
        {
            tracing::error!("guest {} ({}): {error:#}", self.name, self.domid());
        }
    }

    /// Whether the guest is as well served as it can be, also without this supervisor.
    pub(super) fn is_settled(&self) -> bool {
        match &self.worker {
            Some(worker) => worker.conversation.is_serving(),
            None => !self.served || self.error.is_some(),
        }
    }

    /// Takes in the worker's next message. The end of the worker is the end of its messages.
    pub(super) fn on_message(&mut self, registry: &Registry) -> Option<FromWorker> {
        self.reap();
        let message = match self.worker.as_mut()?.conversation.receive() {
            Ok(message) => message?,
            Err(error) => {
                let why = match error.kind() {
                    io::ErrorKind::InvalidData => "it says what it was not asked for",
                    _ => "it ended",
                };
                self.give_up_worker(registry, why);
                return None;
            }
        };
        match &message {
            FromWorker::Failed { error } => {
                self.fail(error);
                self.give_up_worker(registry, "it cannot serve");
            }
            FromWorker::AttachFailed { key, error, busy } => {
                let status = if *busy { Status::Busy } else { Status::Failed };
                let known = self.handed(*key);
                if known.is_some_and(|known| known.fails(status, error)) {
                    self.log_error(*key, error);
                }
                self.plan_next_try();
            }
            FromWorker::Serving | FromWorker::Detached { .. } => {}
            FromWorker::Attached { key } => {
                let domid = self.domid();
                let name = self.name.clone();
                if let Some(known) = self.handed(*key)
                    && let Some(after) = known.claimed()
                {
                    tracing::info!(
                        "guest {name} ({domid}): {key} is {}, {} ms after it was found",
                        known.detail,
                        after.as_millis()
                    );
                }
            }
            FromWorker::Report { server, devices } => {
                self.report_asked = None;
                self.server = Some(server.clone());
                let domid = self.domid();
                for (key, report) in devices {
                    if let Some(known) = self.entries.get_mut(key)
                        && let Some(hint) = known.reported(report)
                    {
                        tracing::info!("guest {} ({domid}): {key}: {hint}", self.name);
                    }
                }
            }
        }
        Some(message)
    }

    /// The entry at `key`, if it is with the worker: one that was refused a worker cannot have.
    fn handed(&mut self, key: EntryKey) -> Option<&mut DeviceEntry> {
        let known = self.entries.get_mut(&key)?;
        matches!(known.status, Status::Handed).then_some(known)
    }

    /// Whether the worker has the entry at `key`.
    pub(super) fn has_handed(&self, key: EntryKey) -> bool {
        let known = self.entries.get(&key);
        known.is_some_and(|known| matches!(known.status, Status::Handed))
    }

    /// Ends a worker that cannot be worked with. Another one takes the guest over: at once, unless this one
    /// has said why it cannot.
    pub(super) fn give_up_worker(&mut self, registry: &Registry, why: &'static str) {
        let Some(mut worker) = self.worker.take() else {
            return;
        };
        worker.kill(registry);
        self.dying = Some((worker, why));
        self.reap();
    }

    /// Goes on when the worker that was given up has died: until then it may use what the next one needs.
    fn reap(&mut self) {
        let Some((worker, why)) = &mut self.dying else {
            return;
        };
        let Some(how) = worker.death() else { return };
        // Its last words say why.
        let limit = &mut self.worker_lines;
        worker.drain_log(|level, line| {
            relay(limit, &self.name, self.identity.domid, level, line);
        });
        let (pid, why) = (worker.pid(), *why);
        self.dying = None;
        let now = Instant::now();
        if self.error.is_some() {
            self.again_at = Some(now + TRY_AGAIN);
            return;
        }
        self.again_at = Some(self.restarts.next(now));
        if self.log_limit.allow() {
            tracing::warn!(
                "guest {} ({}): worker {pid} is lost ({why}, {how}); another one takes over",
                self.name,
                self.domid()
            );
        }
    }

    fn fail(&mut self, error: &str) {
        // What is tried again and again is logged once.
        if self.error.as_deref() != Some(error) && self.log_limit.allow() {
            tracing::error!("guest {} ({}): {error}", self.name, self.domid());
        }
        self.error = Some(error.to_owned());
    }

    fn log_error(&mut self, key: EntryKey, error: &str) {
        if self.log_limit.allow() {
            tracing::error!("guest {} ({}): {key}: {error}", self.name, self.domid());
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
        for known in self.entries.values_mut() {
            due |= known.ask_driver(now);
        }
        if due {
            self.ask_report();
        }
    }

    /// What is known of the guest now. Device reports are given once: the next must be asked for.
    pub(super) fn report(&mut self) -> GuestReport {
        let entries = self.entries.iter_mut();
        let devices = entries.map(|(key, known)| known.report(*key));
        GuestReport {
            domid: self.identity.domid,
            name: self.name.clone(),
            restarts: self.restarts.count(),
            devices: devices.collect(),
            worker: self.worker.as_ref().map(WorkerProcess::pid),
            error: self.error.clone(),
            server: self.server.take(),
        }
    }
}

/// Logs a worker's line. Who asked for debug lines wants them all.
fn relay(limit: &mut LogLimit, name: &str, domid: u16, level: Level, line: &str) {
    if level <= Level::INFO && !limit.allow() {
        return;
    }
    match level {
        Level::ERROR => tracing::error!("guest {name} ({domid}): {line}"),
        Level::WARN => tracing::warn!("guest {name} ({domid}): {line}"),
        Level::INFO => tracing::info!("guest {name} ({domid}): {line}"),
        _ => tracing::debug!("guest {name} ({domid}): {line}"),
    }
}

/// Which guest has `domid` now.
pub(super) fn identify(store: &mut XenStore, domid: u16) -> Result<Identity, XenStoreError> {
    let vm = store.read(&format!("/local/domain/{domid}/vm"))?;
    Ok(Identity { domid, vm })
}
