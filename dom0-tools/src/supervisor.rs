//! The supervisor: follows the toolstack, opens what needs privilege, and has one worker process a guest.
//!
//! It parses nothing that a guest wrote to memory.

mod back_ends;
mod clients;
mod closing;
mod conversation;
mod descriptor_store;
mod device_action;
mod dialling;
mod entry;
mod guest;
mod known_devices;
mod lifecycle;
mod listeners;
mod orphan_workers;
mod questions;
mod restarts;
pub(crate) mod state_files;
#[cfg(test)]
mod tests;
mod toolstack_events;
mod watchdog;
mod worker_log;
mod worker_process;

use crate::config::Config;
use crate::created::{self, Created};
use crate::ctl::control::Question;
use crate::ctl::report::Refusal;
use crate::devices::blk::Uses;
use crate::devices::{net, vsock};
use crate::program;
use crate::toolstack::guest_file::{self, GuestFiles};
use crate::toolstack::xenstore::XenStore;
use crate::toolstack::{Identity, Toolstack, ToolstackError, XenDomains, XenToolstack};
use crate::worker::sandbox;
use anyhow::{Context, Result};
use back_ends::BackEnds;
use clients::Clients;
use descriptor_store::DescriptorStore;
use dialling::Dialling;
use guest::{Guest, Untaken, WorkerContext};
use known_devices::KnownDevices;
use lifecycle::Event;
use listeners::Listeners;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use questions::Collection;
use state_files::StateFiles;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};
use watchdog::Watchdog;
use worker_process::{Launcher, WorkerProcess, XenLauncher};

const TOOLSTACK: Token = Token(0);
const SIGNALS: Token = Token(1);
const LISTENER: Token = Token(2);
const FOLDERS: Token = Token(3);
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
    let toolstack = Box::new(XenToolstack::new(store, guest_files, Box::new(XenDomains)));
    let launcher = Box::new(XenLauncher);
    let descriptors =
        DescriptorStore::of_systemd().context("what systemd has kept for this service")?;
    let mut supervisor = Supervisor::new(config, control_socket, toolstack, files, launcher)?;
    supervisor.descriptors = descriptors;
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
    supervisor.watchdog = Watchdog::from_environment();
    tracing::info!("ready: serving the virtio devices that xl gives to guests");
    supervisor.serve()
}

struct Supervisor {
    poll: Poll,
    toolstack: Box<dyn Toolstack>,
    config: Config,
    created: Created,
    files: StateFiles,
    launcher: Box<dyn Launcher>,
    /// The disks that guests have.
    uses: Uses,
    back_ends: BackEnds,
    /// What the next service has of their connections.
    descriptors: DescriptorStore,
    listeners: Listeners,
    dialling: Dialling,
    known: KnownDevices,
    /// Devices that guests were created for in vain: the last [`MAX_REFUSALS`].
    refusals: VecDeque<Refusal>,
    guests: BTreeMap<u16, Guest>,
    /// Workers whose guest is gone, and when those that have not ended are killed.
    stopping: Vec<Stopping>,
    clients: Clients,
    collection: Option<Collection>,
    next_token: usize,
    /// Who ends it when it stands still.
    watchdog: Option<Watchdog>,
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

impl Supervisor {
    fn new(
        config: Config,
        control_socket: &Path,
        toolstack: Box<dyn Toolstack>,
        files: StateFiles,
        launcher: Box<dyn Launcher>,
    ) -> Result<Self> {
        let poll = Poll::new()?;
        let clients = Clients::listen(control_socket, poll.registry(), LISTENER)
            .with_context(|| format!("listening at {}", control_socket.display()))?;
        Ok(Self {
            back_ends: BackEnds::new(poll.registry(), FOLDERS)?,
            descriptors: DescriptorStore::default(),
            listeners: Listeners::default(),
            dialling: Dialling::default(),
            known: KnownDevices::default(),
            poll,
            toolstack,
            config,
            created: Created::new(Path::new(created::DIRECTORY)),
            files,
            launcher,
            uses: Uses::default(),
            refusals: VecDeque::new(),
            guests: BTreeMap::new(),
            stopping: Vec::new(),
            clients,
            collection: None,
            next_token: FIRST_FREE,
            watchdog: None,
            ending: None,
        })
    }

    /// Begins to watch, and takes in what is there already.
    fn start(&mut self) -> Result<()> {
        let fd = self.toolstack.readable().as_raw_fd();
        self.poll
            .registry()
            .register(&mut SourceFd(&fd), TOOLSTACK, Interest::READABLE)?;
        self.toolstack.start()?;
        let toolstack = &mut *self.toolstack;
        let served = self.files.sweep(|domid| toolstack.living(domid))?;
        if let Err(error) = self.descriptors.sweep(&self.files.sharing()) {
            tracing::warn!("systemd keeps connections of devices that are gone: {error}");
        }
        orphan_workers::end_orphans(|domid| toolstack.lives(domid))?;
        program::sweep(|domid| toolstack.living(domid))?;
        net::sweep(|domid, key| {
            let is_there = toolstack.lives(domid)? && toolstack.state(domid, key)?.is_some();
            Ok::<_, ToolstackError>(is_there)
        })?;
        tolerate(toolstack.sweep())?;
        // Also those whose entries libxl has removed meanwhile: what is left of an old program serves them still.
        for domid in served {
            tolerate(self.take_over(domid))?;
        }
        self.follow_toolstack()?;
        // An earlier service has ended between the last device's being served and that.
        tolerate(self.let_run_served())?;
        // Programs of devices that were taken from their guest meanwhile, and connections to back-ends.
        for (domid, guest) in &self.guests {
            program::end_others(guest.identity(), guest.keys());
            if let Err(error) = self.descriptors.end_others(*domid, guest.keys()) {
                tracing::warn!("systemd keeps connections of devices that are gone: {error}");
            }
        }
        Ok(())
    }

    /// Lets the guests run that are held, and have their devices.
    fn let_run_served(&mut self) -> Result<(), ToolstackError> {
        for guest in self.toolstack.held()? {
            let known = self.guests.get(&guest.domid);
            if !known.is_some_and(Guest::is_held) {
                self.toolstack.let_run(&guest)?;
            }
        }
        Ok(())
    }

    fn serve(&mut self) -> Result<()> {
        let mut events = Events::with_capacity(64);
        while !self.may_end() {
            self.turn(&mut events, self.next_deadline())?;
            if let Some(watchdog) = &mut self.watchdog {
                watchdog.tell();
            }
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
                TOOLSTACK => {}
                FOLDERS => self.back_ends.ready(FOLDERS, self.poll.registry()),
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
                token if self.listeners.has(token) => self.accept(token)?,
                token => match self.clients.ready(token, self.poll.registry()) {
                    Some((Question::List, _)) => self.collect(token),
                    Some((
                        Question::Change {
                            guest,
                            device,
                            order,
                        },
                        beside,
                    )) => self.change(token, &guest, device.as_deref(), order, beside),
                    Some((Question::Attach { guest, slot, line }, _)) => {
                        self.attach(token, &guest, slot.as_deref(), &line);
                    }
                    Some((Question::Detach { guest, device }, _)) => {
                        self.detach(token, &guest, &device);
                    }
                    Some((
                        Question::Trace {
                            guest,
                            device,
                            goes_on,
                        },
                        beside,
                    )) => self.trace(token, &guest, &device, goes_on, beside),
                    None if !self.clients.has(token) => {
                        self.back_ends.ready(token, self.poll.registry());
                        tolerate(self.on_worker_readable(token))?;
                    }
                    None => {}
                },
            }
        }
        // Whatever was asked of the toolstack meanwhile may have brought events along, which no readiness will tell of.
        self.follow_toolstack()?;
        self.pass_deadlines();
        self.look_for_back_ends()?;
        self.answer_dials()?;
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
            .chain(self.back_ends.look_at())
            .chain(self.dialling.due())
            .chain(self.ending)
            .chain(self.watchdog.as_ref().map(Watchdog::due))
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

    /// Brings devices the back-ends that have come.
    fn look_for_back_ends(&mut self) -> Result<()> {
        let registry = self.poll.registry();
        for ((domid, key), brought) in self.back_ends.look(registry, &mut self.next_token) {
            let guest = self.guests.get_mut(&domid);
            match guest.and_then(|guest| guest.connected(key, &brought)) {
                Some(Ok(())) => {}
                Some(Err(broken)) => tolerate(self.tell(domid, broken))?,
                // Whoever gets the device next has a connection of its own.
                None => self.back_ends.cut((domid, key), self.poll.registry()),
            }
        }
        Ok(())
    }

    /// Hands on what connects to a device's socket.
    fn accept(&mut self, token: Token) -> Result<()> {
        for ((domid, key), change, connection) in self.listeners.accept(token, self.poll.registry())
        {
            // So many at once leave room in the worker's socket for what it is told else.
            if !self.dialling.admits(domid, Instant::now()) {
                tracing::debug!(domid, device = %key, "more connections at once than are handed on");
                continue;
            }
            let guest = self.guests.get_mut(&domid);
            let handed = guest.map(|guest| guest.connect(key, change, Some(&connection)));
            if let Some(Err(Untaken::Ever(broken))) = handed {
                tolerate(self.tell(domid, broken))?;
            }
        }
        Ok(())
    }

    /// Connects for guests to what they ask for.
    fn answer_dials(&mut self) -> Result<()> {
        let now = Instant::now();
        while let Some(dialled) = self.dialling.next(now) {
            let Some(guest) = self.guests.get_mut(&dialled.domid) else {
                continue;
            };
            if !guest.has_handed(dialled.key) {
                continue;
            }
            let brought = self.dialling.connect(&dialled);
            // Nobody has accepted those before it yet.
            let is_busy = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
            if brought.as_ref().is_err_and(is_busy) && self.dialling.put_back(dialled) {
                continue;
            }
            if let Err(error) = &brought {
                tracing::debug!(device = %dialled.key, "port {}: {error}", dialled.port);
            }
            let change = vsock::dialled(dialled.number);
            match guest.connect(dialled.key, change, brought.ok().as_ref()) {
                Ok(()) => {}
                Err(Untaken::Now) => self.dialling.wait(dialled),
                Err(Untaken::Ever(broken)) => tolerate(self.tell(dialled.domid, broken))?,
            }
        }
        Ok(())
    }

    /// Has `event` happen to a guest, if it is there.
    fn tell(&mut self, domid: u16, event: Event) -> Result<(), ToolstackError> {
        let (guests, mut context) = self.parts();
        match guests.get_mut(&domid) {
            Some(guest) => guest.handle(event, &mut context),
            None => Ok(()),
        }
    }

    /// The guests, and what they are served with.
    fn parts(&mut self) -> (&mut BTreeMap<u16, Guest>, WorkerContext<'_>) {
        let context = WorkerContext {
            toolstack: &mut *self.toolstack,
            config: &self.config,
            created: &self.created,
            files: &self.files,
            uses: &mut self.uses,
            back_ends: &mut self.back_ends,
            descriptors: &mut self.descriptors,
            listeners: &mut self.listeners,
            dialling: &mut self.dialling,
            known: &mut self.known,
            launcher: &*self.launcher,
            registry: self.poll.registry(),
            next_token: &mut self.next_token,
        };
        (&mut self.guests, context)
    }

    fn on_worker_readable(&mut self, token: Token) -> Result<(), ToolstackError> {
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
            let (guests, mut context) = self.parts();
            let Some(guest) = guests.get_mut(&domid) else {
                break;
            };
            let Some(event) = guest.next_event(&mut context) else {
                owes_report = guest.owes_report(token);
                break;
            };
            told = told.and(guest.handle(event, &mut context));
        }
        if !owes_report && let Some(collection) = &mut self.collection {
            collection.waiting.remove(&token);
        }
        let closed = self.close_entries(domid);
        told.and(closed)
    }

    /// Tells libxl which entries of a guest are closed now.
    fn close_entries(&mut self, domid: u16) -> Result<(), ToolstackError> {
        let (guests, mut context) = self.parts();
        let Some(guest) = guests.get_mut(&domid) else {
            return Ok(());
        };
        let mut result = Ok(());
        for key in guest.closed() {
            let told = context.toolstack.tell_closed(domid, key);
            if told.is_ok() {
                guest.is_closed(key, &mut context);
            }
            result = result.and(told);
        }
        result
    }
}

/// What the toolstack refuses concerns one guest, and does not end the service; a broken connection does.
fn tolerate(result: Result<(), ToolstackError>) -> Result<()> {
    match result {
        Err(error @ ToolstackError::Refused(_)) => {
            tracing::error!("{error}");
            Ok(())
        }
        other => Ok(other?),
    }
}
