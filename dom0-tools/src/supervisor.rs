//! The supervisor: watches xenstore, opens what needs privilege, and has one worker process a guest.
//!
//! It parses nothing that a guest wrote to memory.

mod clients;
mod closing;
mod conversation;
mod entry;
mod guest;
mod lifecycle;
mod orphan_workers;
mod restarts;
mod state_files;
#[cfg(test)]
mod tests;
mod worker_log;
mod worker_process;

use crate::config::Config;
use crate::ctl::control::Question;
use crate::ctl::report::{Refusal, Report};
use crate::devices::blk::Uses;
use crate::ipc::ToWorker;
use crate::text::without_controls;
use crate::toolstack::guest_file::{self, GuestFileError, GuestFiles};
use crate::toolstack::libxl::{self, XenbusState};
use crate::toolstack::xenstore::{XenStore, XenStoreError};
use crate::worker::sandbox;
use anyhow::{Context, Result};
use clients::Clients;
use guest::{Guest, WorkerContext};
use lifecycle::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
pub(crate) use state_files::Identity;
use state_files::StateFiles;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};
use worker_process::{Launcher, WorkerProcess, XenLauncher};
use xen_virtio_backend::LogLimit;

/// The tokens of watches on domains that come and go; those of the others are their directories.
const INTRODUCE: &str = "introduce";
const RELEASE: &str = "release";

const XENSTORE: Token = Token(0);
const SIGNALS: Token = Token(1);
const LISTENER: Token = Token(2);
/// Workers and clients get numbers from here on, each its own for good.
const FIRST_FREE: usize = 16;

/// How long a worker may take to report; one that is busy is shown without its numbers.
const REPORT_LIMIT: Duration = Duration::from_secs(1);
/// How long workers may take to begin before this service ends.
const ENDING_LIMIT: Duration = Duration::from_secs(5);
/// Refusals that are shown.
const MAX_REFUSALS: usize = 16;
/// How long a worker may take to end after its guest has.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Serves every guest that libxl gives a virtio device, until a signal ends it.
///
/// # Errors
///
/// What keeps it from serving any guest at all.
pub fn run(config: Config, control_socket: &Path) -> Result<()> {
    let store = XenStore::connect()?;
    let files = StateFiles::new(Path::new(state_files::DIRECTORY))?;
    let guest_files = GuestFiles::new(Path::new(guest_file::DIRECTORY));
    let launcher = Box::new(XenLauncher);
    let mut supervisor =
        Supervisor::new(config, control_socket, store, files, guest_files, launcher)?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    supervisor.poll.registry().register(
        &mut SourceFd(&signals.as_raw_fd()),
        SIGNALS,
        Interest::READABLE,
    )?;
    sandbox::report_missing();
    supervisor.start()?;
    // Outside systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!("ready: serving the virtio devices that xl gives to guests");
    supervisor.serve()
}

struct Supervisor {
    poll: Poll,
    store: XenStore,
    config: Config,
    files: StateFiles,
    guest_files: GuestFiles,
    /// Of files that cannot be used.
    log_limit: LogLimit,
    launcher: Box<dyn Launcher>,
    /// The disks that guests have.
    uses: Uses,
    /// Devices that guests were created for in vain: the last [`MAX_REFUSALS`].
    refusals: VecDeque<Refusal>,
    guests: BTreeMap<u16, Guest>,
    /// Workers whose guest is gone, and when those that have not ended are killed.
    stopping: Vec<Stopping>,
    clients: Clients,
    collection: Option<Collection>,
    next_token: usize,
    /// It was told to end, and does so by then.
    ending: Option<Instant>,
}

/// A worker that is to end.
struct Stopping {
    worker: WorkerProcess,
    guest: Identity,
    /// When it is killed; `None` once it is.
    deadline: Option<Instant>,
}

/// Reports on their way from the workers to clients.
struct Collection {
    waiting: BTreeSet<Token>,
    deadline: Instant,
    clients: Vec<Token>,
}

impl Supervisor {
    fn new(
        config: Config,
        control_socket: &Path,
        store: XenStore,
        files: StateFiles,
        guest_files: GuestFiles,
        launcher: Box<dyn Launcher>,
    ) -> Result<Self> {
        let poll = Poll::new()?;
        let clients = Clients::listen(control_socket, poll.registry(), LISTENER)
            .with_context(|| format!("listening at {}", control_socket.display()))?;
        Ok(Self {
            poll,
            store,
            config,
            files,
            guest_files,
            log_limit: LogLimit::default(),
            launcher,
            uses: Uses::default(),
            refusals: VecDeque::new(),
            guests: BTreeMap::new(),
            stopping: Vec::new(),
            clients,
            collection: None,
            next_token: FIRST_FREE,
            ending: None,
        })
    }

    /// Begins to watch, and takes in what is there already.
    fn start(&mut self) -> Result<()> {
        let fd = self.store.as_fd().as_raw_fd();
        self.poll
            .registry()
            .register(&mut SourceFd(&fd), XENSTORE, Interest::READABLE)?;
        for form in libxl::EntryForm::ALL {
            self.store
                .watch(&format!("backend/{}", form.directory()), form.directory())?;
        }
        self.store.watch("@releaseDomain", RELEASE)?;
        let store = &mut self.store;
        let served = self.files.sweep(|domid| {
            let lives = store.is_introduced(domid)?;
            lives.then(|| guest::identify(store, domid)).transpose()
        })?;
        orphan_workers::end_orphans(|domid| store.is_introduced(domid))?;
        let swept = guest_file::sweep(store, |store, domid| {
            let lives = store.is_introduced(domid)?;
            lives.then(|| guest::identify(store, domid)).transpose()
        });
        tolerate(swept)?;
        // Which tells of those that are there already, too.
        self.store.watch("@introduceDomain", INTRODUCE)?;
        // Also those whose entries libxl has removed meanwhile: what is left of an old program serves them still.
        for domid in served {
            tolerate(self.take_over(domid))?;
        }
        self.follow_xenstore()
    }

    fn serve(&mut self) -> Result<()> {
        let mut events = Events::with_capacity(64);
        while !self.may_end() {
            self.turn(&mut events, self.next_deadline())?;
        }
        Ok(())
    }

    /// Waits until something has happened, or for `timeout`, and does what follows from it.
    fn turn(&mut self, events: &mut Events, timeout: Option<Duration>) -> Result<()> {
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                return Err(error.into());
            }
            _ => {}
        }
        for event in events.iter() {
            match event.token() {
                XENSTORE => {}
                SIGNALS => {
                    tracing::info!(
                        "told to end; the guests' workers serve on until another one takes over"
                    );
                    self.ending
                        .get_or_insert_with(|| Instant::now() + ENDING_LIMIT);
                }
                LISTENER => self
                    .clients
                    .accept(self.poll.registry(), &mut self.next_token),
                token => match self.clients.ready(token, self.poll.registry()) {
                    Some(Question::List) => self.collect(token),
                    Some(Question::Resize { guest, device }) => {
                        self.resize(token, &guest, &device);
                    }
                    None if !self.clients.has(token) => {
                        tolerate(self.on_worker_readable(token))?;
                    }
                    None => {}
                },
            }
        }
        // Whatever was asked of xenstored meanwhile may have brought events along, which no readiness
        // will tell of.
        self.follow_xenstore()?;
        self.pass_deadlines();
        self.try_again()
    }

    /// Whether it was told to end, and no guest is left without a worker by that.
    fn may_end(&self) -> bool {
        let settled = || self.guests.values().all(Guest::is_settled);
        self.ending
            .is_some_and(|limit| settled() || limit <= Instant::now())
    }

    fn next_deadline(&self) -> Option<Duration> {
        let collection = self.collection.iter().map(|collection| collection.deadline);
        let stopping = self
            .stopping
            .iter()
            .filter_map(|stopping| stopping.deadline);
        let guests = self.guests.values();
        let again = guests.clone().filter_map(Guest::again_at);
        let closing = guests.clone().filter_map(Guest::closing_at);
        let drivers = guests.filter_map(Guest::drivers_due);
        collection
            .chain(stopping)
            .chain(again)
            .chain(closing)
            .chain(drivers)
            .chain(self.ending)
            .min()
            .map(|at| at.saturating_duration_since(Instant::now()))
    }

    fn pass_deadlines(&mut self) {
        let now = Instant::now();
        for Stopping {
            worker, deadline, ..
        } in &mut self.stopping
        {
            if deadline.take_if(|deadline| *deadline <= now).is_some() {
                tracing::warn!("worker {} does not end, and is killed", worker.pid());
                worker.kill(self.poll.registry());
            }
        }
        let died = |stopping: &mut Stopping| {
            stopping.deadline.is_none() && stopping.worker.death().is_some()
        };
        for dead in self.stopping.extract_if(.., died) {
            // What it had under way is at its end too, or holds its lock.
            self.uses.end_guest(&dead.guest);
        }
        for guest in self.guests.values_mut() {
            guest.ask_drivers(now);
        }
        if self
            .collection
            .as_ref()
            .is_some_and(|c| c.waiting.is_empty() || c.deadline <= now)
        {
            self.answer_clients();
        }
    }

    fn try_again(&mut self) -> Result<()> {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let (mut again, mut closing) = (Vec::new(), Vec::new());
        for (domid, guest) in &self.guests {
            if is_due(guest.again_at()) {
                again.push(*domid);
            }
            if is_due(guest.closing_at()) {
                closing.push(*domid);
            }
        }
        for domid in again {
            tolerate(self.tell(domid, Event::Again))?;
        }
        for domid in closing {
            tolerate(self.close_entries(domid))?;
        }
        Ok(())
    }

    /// Has `event` happen to a guest, if it is there.
    fn tell(&mut self, domid: u16, event: Event) -> Result<(), XenStoreError> {
        let (guests, store, mut context) = self.parts();
        match guests.get_mut(&domid) {
            Some(guest) => guest.handle(event, store, &mut context),
            None => Ok(()),
        }
    }

    /// The guests, and what they are served with.
    fn parts(&mut self) -> (&mut BTreeMap<u16, Guest>, &mut XenStore, WorkerContext<'_>) {
        let context = WorkerContext {
            config: &self.config,
            files: &self.files,
            uses: &mut self.uses,
            launcher: &*self.launcher,
            registry: self.poll.registry(),
            next_token: &mut self.next_token,
        };
        (&mut self.guests, &mut self.store, context)
    }

    fn follow_xenstore(&mut self) -> Result<()> {
        while let Some(event) = self.store.next_event()? {
            if event.token == RELEASE {
                tolerate(self.release_guests())?;
            } else if event.token == INTRODUCE {
                tolerate(self.announce_guests())?;
            } else if let Some((domid, key)) = libxl::parse_path(&event.path) {
                tolerate(self.follow_entry(domid, key))?;
            } else {
                // A whole directory, as at the start, or as one that is removed.
                let known = self
                    .guests
                    .iter()
                    .flat_map(|(domid, guest)| guest.keys().map(|key| (*domid, key)));
                let mut all: BTreeSet<_> = known.collect();
                match libxl::entries(&mut self.store) {
                    Ok(entries) => all.extend(entries),
                    refused => tolerate(refused.map(drop))?,
                }
                for (domid, key) in all {
                    tolerate(self.follow_entry(domid, key))?;
                }
            }
        }
        Ok(())
    }

    /// Announces the devices that files give to guests which have come up.
    fn announce_guests(&mut self) -> Result<(), XenStoreError> {
        let mut result = Ok(());
        for domid in self.store.directory("/local/domain")? {
            let Ok(domid) = domid.parse() else { continue };
            // What is refused of one is no reason to keep the others waiting.
            result = result.and(self.announce(domid));
        }
        result
    }

    fn announce(&mut self, domid: u16) -> Result<(), XenStoreError> {
        // One that is being built has no vCPU yet, and one that is dead may have left its nodes.
        if domid == 0 || !self.store.is_introduced(domid)? {
            return Ok(());
        }
        self.replace_stale(domid)?;
        let guest = guest::identify(&mut self.store, domid)?;
        let served = self.files.has(&guest);
        match self.guest_files.announce(&mut self.store, &guest, served) {
            Ok(()) => Ok(()),
            Err(GuestFileError::XenStore(error)) => Err(error),
            Err(error) => {
                if self.log_limit.allow() {
                    let error =
                        without_controls(format!("{:#}", anyhow::Error::from(error)).chars());
                    tracing::error!("guest {domid} gets no device by its file: {error}");
                }
                Ok(())
            }
        }
    }

    /// Brings one entry of xenstore and what we have of it together.
    fn follow_entry(&mut self, domid: u16, key: libxl::EntryKey) -> Result<(), XenStoreError> {
        self.replace_stale(domid)?;
        self.take_over(domid)?;
        let state = libxl::read_state(&mut self.store, domid, key)?;
        let known = self
            .guests
            .get(&domid)
            .is_some_and(|guest| guest.knows(key));
        match state {
            None => {
                self.note_refusals(domid, Some(key));
                self.tell(domid, Event::Gone { key })?;
            }
            Some(state) if state == XenbusState::Closing as u32 => {
                self.note_refusals(domid, Some(key));
                if self.guests.contains_key(&domid) {
                    self.tell(domid, Event::Closing { key })?;
                } else {
                    libxl::tell_closed(&mut self.store, domid, key)?;
                }
            }
            Some(state) if state == XenbusState::Closed as u32 || known => {}
            Some(state) => {
                if let Entry::Vacant(place) = self.guests.entry(domid) {
                    place.insert(Guest::read(&mut self.store, &self.files, domid)?);
                }
                if state != XenbusState::Initialising as u32 {
                    return self.tell(domid, Event::Unrecorded { key });
                }
                // The last guest of this domid must not be served on as this one.
                for stopping in &mut self.stopping {
                    if stopping.guest.domid == domid && stopping.deadline.take().is_some() {
                        stopping.worker.kill(self.poll.registry());
                    }
                }
                let served = false;
                self.tell(domid, Event::Appeared { key, served })?;
                self.tell(domid, Event::Settled)?;
            }
        }
        Ok(())
    }

    /// Keeps what a guest that is given up was refused for, as long as somebody may ask.
    fn note_refusals(&mut self, domid: u16, key: Option<libxl::EntryKey>) {
        if let Some(guest) = self.guests.get(&domid) {
            self.refusals.extend(guest.refusals(key));
            let excess = self.refusals.len().saturating_sub(MAX_REFUSALS);
            self.refusals.drain(..excess);
        }
    }

    /// Takes over a guest that an earlier supervisor has served, with all its devices at once: none of its
    /// accesses may be answered before.
    fn take_over(&mut self, domid: u16) -> Result<(), XenStoreError> {
        let guest = match self.guests.entry(domid) {
            Entry::Occupied(guest) => guest.into_mut(),
            Entry::Vacant(place) => {
                let guest = Guest::read(&mut self.store, &self.files, domid)?;
                if !guest.is_to_be_taken_over() {
                    return Ok(());
                }
                place.insert(guest)
            }
        };
        if !guest.is_to_be_taken_over() {
            return Ok(());
        }
        let entries = libxl::active_entries(&mut self.store, domid)?;
        for (key, state) in entries {
            let served = state != XenbusState::Initialising as u32;
            self.tell(domid, Event::Appeared { key, served })?;
        }
        self.tell(domid, Event::Settled)
    }

    /// A domid that came round again is another guest: its worker goes.
    fn replace_stale(&mut self, domid: u16) -> Result<(), XenStoreError> {
        if let Some(guest) = self.guests.get(&domid)
            && guest.is_stale(&mut self.store)?
        {
            self.release_guest(domid);
        }
        Ok(())
    }

    fn release_guests(&mut self) -> Result<(), XenStoreError> {
        let domids: Vec<u16> = self.guests.keys().copied().collect();
        for domid in domids {
            if !self.store.is_introduced(domid)? {
                self.release_guest(domid);
            }
        }
        Ok(())
    }

    fn release_guest(&mut self, domid: u16) {
        self.note_refusals(domid, None);
        if let Some(mut guest) = self.guests.remove(&domid) {
            if let Err(error) = guest_file::forget(&mut self.store, guest.identity()) {
                tracing::warn!("{error}");
            }
            tracing::info!("guest {} ({domid}) is gone", guest.name());
            guest.end_earlier_workers();
            self.files.remove(guest.identity());
            let deadline = Some(Instant::now() + STOP_LIMIT);
            let identity = guest.identity().clone();
            let mut workers = guest.into_workers().peekable();
            if workers.peek().is_none() {
                self.uses.end_guest(&identity);
            }
            for mut worker in workers {
                let _ = worker.conversation.send(&ToWorker::Stop, &[]);
                self.stopping.push(Stopping {
                    worker,
                    guest: identity.clone(),
                    deadline,
                });
            }
        }
    }

    /// Has a guest told of what was added to its disk, and `client` of how that went.
    fn resize(&mut self, client: Token, guest: &str, device: &str) {
        let (guests, store, mut context) = self.parts();
        let mut guests = guests.iter_mut();
        let found =
            guests.find(|(domid, other)| other.name() == guest || domid.to_string() == guest);
        let result = match found {
            None => Err(format!("there is no guest {guest} with a virtio device")),
            Some((_, found)) => found
                .resize(device, store, &mut context)
                .map(|(before, now)| {
                    format!("guest {guest}, {device}: {before} bytes before, {now} bytes now")
                })
                .map_err(|error| format!("guest {guest}: {error:#}")),
        };
        match &result {
            Ok(done) => tracing::info!("{done}"),
            Err(error) => tracing::warn!("not resized: {error}"),
        }
        let answer = serde_json::to_vec(&result).expect("a text can be written");
        self.clients.answer(client, answer, self.poll.registry());
    }

    fn on_worker_readable(&mut self, token: Token) -> Result<(), XenStoreError> {
        let registry = self.poll.registry();
        let stopping = |stopping: &&mut Stopping| stopping.worker.has(token);
        if let Some(Stopping {
            worker, deadline, ..
        }) = self.stopping.iter_mut().find(stopping)
        {
            worker.read_log(token, registry, |_, _| {});
            if deadline.is_some() && worker.conversation.has_ended() {
                *deadline = None;
                worker.kill(registry);
            }
            return Ok(());
        }
        let Some((&domid, guest)) = self
            .guests
            .iter_mut()
            .find(|(_, guest)| guest.has_worker(token))
        else {
            return Ok(());
        };
        guest.relay_log(token, registry);
        let mut told = Ok(());
        let mut owes_report = true;
        loop {
            let (guests, store, mut context) = self.parts();
            let Some(guest) = guests.get_mut(&domid) else {
                break;
            };
            let Some(event) = guest.next_event() else {
                owes_report = guest.owes_report(token);
                break;
            };
            told = told.and(guest.handle(event, store, &mut context));
        }
        if !owes_report && let Some(collection) = &mut self.collection {
            collection.waiting.remove(&token);
        }
        let closed = self.close_entries(domid);
        told.and(closed)
    }

    /// Tells libxl which entries of a guest are closed now.
    fn close_entries(&mut self, domid: u16) -> Result<(), XenStoreError> {
        let (guests, store, mut context) = self.parts();
        let Some(guest) = guests.get_mut(&domid) else {
            return Ok(());
        };
        let mut result = Ok(());
        for key in guest.closed() {
            let told = libxl::tell_closed(store, domid, key);
            if told.is_ok() {
                guest.is_closed(key, &mut context);
            }
            result = result.and(told);
        }
        result
    }

    /// Asks all workers for their reports, for `client`.
    fn collect(&mut self, client: Token) {
        if let Some(collection) = &mut self.collection {
            collection.clients.push(client);
            return;
        }
        let waiting = self
            .guests
            .values_mut()
            .filter_map(Guest::ask_report)
            .collect();
        let deadline = Instant::now() + REPORT_LIMIT;
        self.collection = Some(Collection {
            waiting,
            deadline,
            clients: vec![client],
        });
    }

    fn answer_clients(&mut self) {
        let Some(collection) = self.collection.take() else {
            return;
        };
        let report = Report {
            guests: self.guests.values_mut().map(Guest::report).collect(),
            refusals: self.refusals.iter().cloned().collect(),
        };
        let answer = serde_json::to_vec(&report).expect("a report has no map with odd keys");
        for client in collection.clients {
            self.clients
                .answer(client, answer.clone(), self.poll.registry());
        }
    }
}

/// What xenstored refuses concerns one guest, and does not end the service; a broken connection does.
fn tolerate(result: Result<(), XenStoreError>) -> Result<()> {
    match result {
        Err(error @ XenStoreError::Refused { .. }) => {
            tracing::error!("{error}");
            Ok(())
        }
        other => Ok(other?),
    }
}
