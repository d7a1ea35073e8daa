//! The back-ends that devices have: which of them are away, and when each is looked for.
//!
//! The supervisor connects, since no worker can, and keeps a duplicate of the connection, of which it reads nothing: the kernel
//! tells by it when one of both ends has closed it.

use crate::devices::{BackEnd, Inherited, connect_to};
use crate::program::Program;
use crate::toolstack::libxl::EntryKey;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::fs::{SealFlags, fcntl_get_seals, inotify};
use rustix::net::{Shutdown, shutdown};
use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use xen_virtio_backend::LogLimit;
use xen_virtio_backend::vhost_user::connection_name;

/// The first wait for a back-end that has gone, or has made its socket and does not listen yet; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(10);
/// The longest wait while nothing tells of the socket's folder, and while something does.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
const LONGEST_TOLD_WAIT: Duration = Duration::from_secs(1);
/// How long a connection is kept for its worker to close it first.
const CLOSING: Duration = Duration::from_secs(2);
/// A back-end that was there for less is waited for as if it had not been there.
const SHORT_LIFE: Duration = Duration::from_secs(5);

/// A device of a guest.
type Device = (u16, EntryKey);

pub(super) struct BackEnds {
    links: BTreeMap<Device, Link>,
    folders: Folders,
    log_limit: LogLimit,
}

struct Link {
    path: PathBuf,
    /// What is kept running there.
    program: Option<Program>,
    state: State,
    /// It is not looked for again before so long after the last time, whatever is new in its folder.
    wait: Duration,
    last_try: Instant,
}

enum State {
    /// Since then.
    There {
        socket: OwnedFd,
        /// The memory that the device shares with it, once that is known.
        memory: Option<OwnedFd>,
        token: Token,
        since: Instant,
    },
    /// Looked for at that time, or when something is new in its folder.
    Away { try_at: Instant },
}

impl BackEnds {
    /// Tells by `token` of what is new in the folders of sockets.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(super) fn new(registry: &Registry, token: Token) -> io::Result<Self> {
        Ok(Self {
            links: BTreeMap::new(),
            folders: Folders::new(registry, token)?,
            log_limit: LogLimit::default(),
        })
    }

    /// The device has a back-end.
    pub(super) fn have(
        &mut self,
        device: Device,
        back_end: BackEnd,
        registry: &Registry,
        next_token: &mut usize,
    ) {
        let BackEnd {
            socket,
            connection,
            program,
        } = back_end;
        self.forget(device, registry);
        let mut link = Link {
            path: socket,
            program,
            state: State::Away {
                try_at: Instant::now() + FIRST_WAIT,
            },
            wait: FIRST_WAIT,
            last_try: Instant::now(),
        };
        self.folders.watch(&link.path);
        if let Some(connection) = connection {
            link.is_there(connection, registry, next_token);
        }
        self.links.insert(device, link);
    }

    /// The device has no back-end any more.
    pub(super) fn end(&mut self, device: Device, registry: &Registry) {
        self.forget(device, registry);
        if self.links.is_empty() {
            self.folders.forget();
        }
    }

    fn forget(&mut self, device: Device, registry: &Registry) {
        if let Some(mut link) = self.links.remove(&device) {
            link.cut(registry);
        }
    }

    /// Nobody takes the connection that the device has: it is looked for again.
    pub(super) fn cut(&mut self, device: Device, registry: &Registry) {
        if let Some(link) = self.links.get_mut(&device) {
            link.cut(registry);
        }
    }

    /// The device shares `shared` with its back-end by the connection of this name. What is no such memory, or of a connection
    /// that was before, is not kept.
    pub(super) fn share(&mut self, device: Device, connection: u64, shared: OwnedFd) {
        let link = self.links.get_mut(&device).map(|link| &mut link.state);
        // Who is not asked for it has none to tell: a worker that was taken over may have sent anything.
        let is_memory =
            fcntl_get_seals(&shared).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if let Some(State::There { memory, socket, .. }) = link
            && is_memory
            && connection_name(socket.as_fd()).is_ok_and(|name| name == connection)
        {
            *memory = Some(shared);
            return;
        }
        close_later(shared);
    }

    /// What a worker that has died had of the device's back-end, which is there still as far as is known.
    pub(super) fn inherited(&self, device: Device) -> Option<Inherited> {
        match &self.links.get(&device)?.state {
            State::There {
                socket,
                memory: Some(memory),
                ..
            } => Some(Inherited {
                socket: socket.try_clone().ok()?,
                memory: memory.try_clone().ok()?,
            }),
            State::There { .. } | State::Away { .. } => None,
        }
    }

    /// A worker has been handed the device with what there was of its back-end. That is handed on once: what a worker that dies in
    /// taking it over has asked, nobody can tell from what the next one asks.
    pub(super) fn handed(&mut self, device: Device) {
        let link = self.links.get_mut(&device).map(|link| &mut link.state);
        if let Some(State::There { memory, .. }) = link {
            *memory = None;
        }
    }

    /// The guest is gone.
    pub(super) fn end_guest(&mut self, domid: u16, registry: &Registry) {
        let of_guest = |device: &&Device| device.0 == domid;
        let devices: Vec<_> = self.links.keys().filter(of_guest).copied().collect();
        for device in devices {
            self.end(device, registry);
        }
    }

    /// One end of a connection has closed it, if `token` is of one; or there is something new in a folder.
    pub(super) fn ready(&mut self, token: Token, registry: &Registry) {
        let now = Instant::now();
        if self.folders.token == token {
            self.folders.clear();
            for link in self.links.values_mut() {
                if let State::Away { try_at } = &mut link.state {
                    let told = link.last_try + link.wait.min(LONGEST_TOLD_WAIT);
                    *try_at = (*try_at).min(told.max(now));
                    self.folders.watch(&link.path);
                }
            }
            return;
        }
        let is_it = |link: &&mut Link| matches!(link.state, State::There { token: other, .. } if other == token);
        if let Some(link) = self.links.values_mut().find(is_it) {
            link.cut(registry);
        }
    }

    /// When one that is away is to be looked for.
    pub(super) fn look_at(&self) -> Option<Instant> {
        let links = self.links.values();
        links.filter_map(Link::try_at).min()
    }

    /// Looks for those that are to be looked for: the devices whose back-ends are there, with the connections.
    pub(super) fn look(
        &mut self,
        registry: &Registry,
        next_token: &mut usize,
    ) -> Vec<(Device, OwnedFd)> {
        let now = Instant::now();
        let mut found = Vec::new();
        for (device, link) in &mut self.links {
            if link.try_at().is_none_or(|at| at > now) {
                continue;
            }
            if let Some(program) = &link.program
                && let Err(error) = program.keep_running()
                && self.log_limit.allow()
            {
                tracing::error!("{}: {error:#}", program.label());
            }
            let connected =
                connect_to(&link.path).and_then(|socket| Ok((socket.try_clone()?, socket)));
            match connected {
                Ok((watched, socket)) => {
                    link.is_there(watched, registry, next_token);
                    found.push((*device, socket));
                }
                Err(_) => {
                    link.last_try = now;
                    link.is_away(now);
                }
            }
        }
        found
    }
}

impl Link {
    fn try_at(&self) -> Option<Instant> {
        match self.state {
            State::There { .. } => None,
            State::Away { try_at } => Some(try_at),
        }
    }

    fn is_there(&mut self, socket: OwnedFd, registry: &Registry, next_token: &mut usize) {
        let token = Token(*next_token);
        *next_token += 1;
        // Nothing is read here: only that it is closed is of interest.
        let registered = registry.register(
            &mut SourceFd(&socket.as_raw_fd()),
            token,
            Interest::PRIORITY,
        );
        self.state = match registered {
            Ok(()) => State::There {
                socket,
                memory: None,
                token,
                since: Instant::now(),
            },
            // The worker finds out that it is of no use.
            Err(_) => {
                let _ = shutdown(&socket, Shutdown::Both);
                State::Away {
                    try_at: Instant::now() + LONGEST_WAIT,
                }
            }
        };
    }

    fn is_away(&mut self, now: Instant) {
        self.state = State::Away {
            try_at: now + self.wait,
        };
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
    }

    /// Ends the connection for both ends, if there is one.
    fn cut(&mut self, registry: &Registry) {
        let now = Instant::now();
        let try_at = now;
        let state = std::mem::replace(&mut self.state, State::Away { try_at });
        if let State::There { socket, since, .. } = state {
            if now.saturating_duration_since(since) >= SHORT_LIFE {
                self.wait = FIRST_WAIT;
            }
            self.last_try = now;
            // The next one may have told of itself already, when this one was not known to be gone.
            let told = now + self.wait.min(LONGEST_TOLD_WAIT);
            self.is_away(now);
            self.state = State::Away { try_at: told };
            let _ = registry.deregister(&mut SourceFd(&socket.as_raw_fd()));
            // An error means that the back-end is gone.
            let _ = shutdown(&socket, Shutdown::Both);
            close_later(socket);
        } else {
            self.state = state;
        }
    }
}

/// Closes the last descriptor of a connection where nobody waits for that: files that the back-end has sent are closed with it,
/// which can take as long as it likes.
fn close_later(socket: OwnedFd) {
    let closing = std::thread::Builder::new().name("closing".to_owned());
    // Without a thread to be had it is closed here.
    let _ = closing.spawn(move || {
        std::thread::sleep(CLOSING);
        drop(socket);
    });
}

/// Tells when something appears in the folders of sockets.
struct Folders {
    inotify: OwnedFd,
    token: Token,
    watched: BTreeMap<PathBuf, i32>,
}

impl Folders {
    fn new(registry: &Registry, token: Token) -> io::Result<Self> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let inotify = inotify::init(flags)?;
        registry.register(
            &mut SourceFd(&inotify.as_raw_fd()),
            token,
            Interest::READABLE,
        )?;
        Ok(Self {
            inotify,
            token,
            watched: BTreeMap::new(),
        })
    }

    /// Watches the folder that the socket at `path` is to be in, or where that folder is to be.
    fn watch(&mut self, path: &Path) {
        let Some(folder) = path.ancestors().skip(1).find(|folder| folder.is_dir()) else {
            return;
        };
        let flags = inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::DELETE_SELF
            | inotify::WatchFlags::ONLYDIR;
        // Without a watch it is looked for now and then. A folder that was made anew under its name is watched anew.
        if let Ok(watch) = inotify::add_watch(&self.inotify, folder, flags) {
            self.watched.insert(folder.to_owned(), watch);
        }
    }

    /// Watches nothing any more.
    fn forget(&mut self) {
        for watch in std::mem::take(&mut self.watched).into_values() {
            // An error means that the folder is gone.
            let _ = inotify::remove_watch(&self.inotify, watch);
        }
    }

    fn clear(&self) {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut space);
        while reader.next().is_ok() {}
    }
}
