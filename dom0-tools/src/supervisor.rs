//! The supervisor: watches xenstore, opens what needs privilege, and has one worker process a guest.
//!
//! It parses nothing that a guest wrote to memory.

mod clients;
mod guest;
mod worker_process;

use crate::config::Config;
use crate::control::Question;
use crate::ipc::{FromWorker, ToWorker};
use crate::libxl::{self, State};
use crate::report::Report;
use crate::xenstore::{XenStore, XenStoreError};
use anyhow::{Context, Result};
use clients::Clients;
use guest::Guest;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};
use worker_process::{MAX_MESSAGES, WorkerProcess};

const XENSTORE: Token = Token(0);
const SIGNALS: Token = Token(1);
const LISTENER: Token = Token(2);
/// Workers and clients get numbers from here on, each its own for good.
const FIRST_FREE: usize = 16;

/// How long a worker may take to report; one that is busy is shown without its numbers.
const REPORT_LIMIT: Duration = Duration::from_secs(1);
/// How long a worker may take to end after its guest has.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Serves every guest that libxl gives a virtio device, until a signal ends it.
///
/// # Errors
///
/// What keeps it from serving any guest at all.
pub fn run(config: Config, control_socket: &Path) -> Result<()> {
    let mut supervisor = Supervisor::new(config, control_socket)?;
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
    guests: BTreeMap<u16, Guest>,
    /// Workers whose guest is gone, and when they are killed if they have not ended.
    stopping: Vec<(WorkerProcess, Instant)>,
    clients: Clients,
    collection: Option<Collection>,
    next_token: usize,
}

/// Reports on their way from the workers to clients.
struct Collection {
    waiting: BTreeSet<Token>,
    deadline: Instant,
    clients: Vec<Token>,
}

impl Supervisor {
    fn new(config: Config, control_socket: &Path) -> Result<Self> {
        let poll = Poll::new()?;
        let store = XenStore::connect()?;
        let clients = Clients::listen(control_socket, poll.registry(), LISTENER)
            .with_context(|| format!("listening at {}", control_socket.display()))?;
        Ok(Self {
            poll,
            store,
            config,
            guests: BTreeMap::new(),
            stopping: Vec::new(),
            clients,
            collection: None,
            next_token: FIRST_FREE,
        })
    }

    /// Begins to watch, and takes in what is there already.
    fn start(&mut self) -> Result<()> {
        let fd = self.store.as_fd().as_raw_fd();
        self.poll
            .registry()
            .register(&mut SourceFd(&fd), XENSTORE, Interest::READABLE)?;
        for form in libxl::Form::ALL {
            self.store
                .watch(&format!("backend/{}", form.directory()), form.directory())?;
        }
        self.store.watch("@releaseDomain", "release")?;
        self.follow_xenstore()
    }

    fn serve(&mut self) -> Result<()> {
        let mut events = Events::with_capacity(64);
        loop {
            match self.poll.poll(&mut events, self.next_deadline()) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(error.into());
                }
                _ => {}
            }
            for event in &events {
                match event.token() {
                    XENSTORE => {}
                    SIGNALS => {
                        tracing::info!("told to end; the guests' workers serve on");
                        return Ok(());
                    }
                    LISTENER => self
                        .clients
                        .accept(self.poll.registry(), &mut self.next_token),
                    token => {
                        if let Some(Question::List) =
                            self.clients.ready(token, self.poll.registry())
                        {
                            self.collect(token);
                        } else if !self.clients.has(token) {
                            tolerate(self.hear_worker(token))?;
                        }
                    }
                }
            }
            // Whatever was asked of xenstored meanwhile may have brought events along, which no readiness
            // will tell of.
            self.follow_xenstore()?;
            self.pass_deadlines();
        }
    }

    fn next_deadline(&self) -> Option<Duration> {
        let collection = self.collection.iter().map(|collection| collection.deadline);
        let stopping = self.stopping.iter().map(|(_, deadline)| *deadline);
        collection
            .chain(stopping)
            .min()
            .map(|at| at.saturating_duration_since(Instant::now()))
    }

    fn pass_deadlines(&mut self) {
        let now = Instant::now();
        let late = |(_, deadline): &mut (_, Instant)| *deadline <= now;
        for (worker, _) in self.stopping.extract_if(.., late) {
            tracing::warn!("worker {} does not end, and is killed", worker.pid());
            worker.reap(self.poll.registry());
        }
        if self
            .collection
            .as_ref()
            .is_some_and(|c| c.waiting.is_empty() || c.deadline <= now)
        {
            self.answer_clients();
        }
    }

    fn follow_xenstore(&mut self) -> Result<()> {
        while let Some(event) = self.store.next_event()? {
            if event.token == "release" {
                tolerate(self.release_guests())?;
            } else if let Some((domid, key)) = libxl::parse_path(&event.path) {
                tolerate(self.follow_entry(domid, key))?;
            } else {
                // A whole directory, as at the start, or as one that is removed.
                let known = self
                    .guests
                    .iter()
                    .flat_map(|(domid, guest)| guest.keys().map(|key| (*domid, key)));
                let mut all: BTreeSet<_> = known.collect();
                all.extend(libxl::entries(&mut self.store)?);
                for (domid, key) in all {
                    tolerate(self.follow_entry(domid, key))?;
                }
            }
        }
        Ok(())
    }

    /// Brings one entry of xenstore and what we have of it together.
    fn follow_entry(&mut self, domid: u16, key: libxl::EntryKey) -> Result<(), XenStoreError> {
        let state = libxl::read_state(&mut self.store, domid, key)?;
        self.replace_stale(domid)?;
        let known = self
            .guests
            .get(&domid)
            .is_some_and(|guest| guest.knows(key));
        match state {
            None => {
                if let Some(guest) = self.guests.get_mut(&domid) {
                    guest.forget(key);
                }
            }
            Some(state) if state == State::Closing as u32 => {
                let detaching = self
                    .guests
                    .get_mut(&domid)
                    .is_some_and(|guest| guest.detach(key));
                if !detaching {
                    libxl::write_state(&mut self.store, domid, key, State::Closed)?;
                }
            }
            Some(state) if state == State::Closed as u32 || known => {}
            Some(state) => {
                let guest = match self.guests.entry(domid) {
                    Entry::Occupied(guest) => guest.into_mut(),
                    Entry::Vacant(place) => place.insert(Guest::read(&mut self.store, domid)?),
                };
                if state == State::Initialising as u32 {
                    // The last guest of this domid must not be served on as this one.
                    let earlier = |(worker, _): &mut (WorkerProcess, _)| worker.domid() == domid;
                    for (worker, _) in self.stopping.extract_if(.., earlier) {
                        worker.reap(self.poll.registry());
                    }
                    guest.attach(key, &mut self.store, &self.config);
                    let registry = self.poll.registry();
                    guest.start_worker(self.config.polling, registry, &mut self.next_token);
                    guest.send_pending();
                } else {
                    guest.refuse_served(key);
                }
            }
        }
        Ok(())
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
        if let Some(guest) = self.guests.remove(&domid) {
            tracing::info!("guest {} ({domid}) is gone", guest.name());
            if let Some(worker) = guest.into_worker() {
                let _ = worker.send(&ToWorker::Stop, &[]);
                self.stopping.push((worker, Instant::now() + STOP_LIMIT));
            }
        }
    }

    fn hear_worker(&mut self, token: Token) -> Result<(), XenStoreError> {
        if let Some(index) = self
            .stopping
            .iter()
            .position(|(worker, _)| worker.token() == token)
        {
            if self.stopping[index].0.has_ended() {
                self.stopping
                    .swap_remove(index)
                    .0
                    .reap(self.poll.registry());
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
        let registry = self.poll.registry();
        for heard in 0.. {
            let Some(message) = guest.hear(registry) else {
                break;
            };
            if heard > MAX_MESSAGES {
                guest.give_up_worker(registry, "it floods its supervisor");
            }
            match message {
                FromWorker::Attached { key } if guest.knows(key) => {
                    libxl::write_state(&mut self.store, domid, key, State::InitWait)?;
                }
                FromWorker::Detached { key } => {
                    libxl::write_state(&mut self.store, domid, key, State::Closed)?;
                }
                FromWorker::Report { .. } => {
                    if let Some(collection) = &mut self.collection {
                        collection.waiting.remove(&token);
                    }
                }
                FromWorker::Attached { .. }
                | FromWorker::Failed { .. }
                | FromWorker::AttachFailed { .. } => {}
            }
        }
        if !guest.has_worker(token)
            && let Some(collection) = &mut self.collection
        {
            collection.waiting.remove(&token);
        }
        Ok(())
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
        let guests = self.guests.values_mut().map(Guest::report).collect();
        let answer =
            serde_json::to_vec(&Report { guests }).expect("a report has no map with odd keys");
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
