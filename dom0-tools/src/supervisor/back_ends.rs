//! The back-ends that devices have: which of them are away, and when each is looked for.
//!
//! The supervisor connects, since no worker can, and keeps a duplicate of the connection, of which it reads nothing: the kernel
//! tells by it when one of both ends has closed it.

use super::state_files::Shared;
use crate::connections::{close_later, connect_to};
use crate::devices::{BackEnd, Inherited, RegionSize};
use crate::program::Program;
use crate::toolstack::libxl::EntryKey;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::fs::{fstat, inotify};
use rustix::net::{Shutdown, shutdown};
use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use xen_virtio_backend::LogLimit;
use xen_virtio_backend::vhost_user::{Brought, connection_name};

/// The first wait for a back-end that has gone, or has made its socket and does not listen yet; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(10);
/// The longest wait while nothing tells of the socket's folder, and while something does.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
const LONGEST_TOLD_WAIT: Duration = Duration::from_secs(1);
/// A back-end that was there for less is waited for as if it had not been there.
const SHORT_LIFE: Duration = Duration::from_secs(5);
/// For how long something new in a socket's folder may be a back-end that does not listen yet.
const BEGINNING: Duration = Duration::from_secs(5);

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
    region: RegionSize,
    state: State,
    /// It is not looked for again before so long after the last time, whatever is new in its folder.
    wait: Duration,
    last_try: Instant,
    /// When there was something new in its folder last.
    told: Option<Instant>,
}

enum State {
    /// Since then.
    There {
        /// What the device's worker is given.
        brought: Brought,
        /// The memory that the worker shares with it, or that the last one shared.
        left: Option<OwnedFd>,
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

    /// The device has a back-end. A connection that it has already stays, with another memory for the next worker.
    pub(super) fn have(
        &mut self,
        device: Device,
        back_end: BackEnd,
        registry: &Registry,
        next_token: &mut usize,
    ) {
        let BackEnd {
            socket,
            brought: new,
            left,
            region,
            program,
        } = back_end;
        if let Some(new) = &new
            && let Some(link) = self.links.get_mut(&device)
            && let State::There { brought, .. } = &mut link.state
            && name_of(&brought.socket) == name_of(&new.socket)
            && let Ok(memory) = new.memory.try_clone()
        {
            brought.memory = memory;
            return;
        }
        self.forget(device, registry);
        let mut link = Link {
            path: socket,
            program,
            region,
            state: State::Away {
                try_at: Instant::now() + FIRST_WAIT,
            },
            wait: FIRST_WAIT,
            last_try: Instant::now(),
            told: None,
        };
        self.folders.watch(&link.path);
        if let Some(brought) = new {
            link.is_there(brought, left, registry, next_token);
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

    /// The device's worker shares its memory with the back-end by the connection of this name, if that is still its own. What the
    /// next supervisor knows both by, and both.
    pub(super) fn share(&mut self, device: Device, connection: u64) -> Option<(Shared, Inherited)> {
        match &mut self.links.get_mut(&device)?.state {
            State::There { brought, left, .. } if name_of(&brought.socket) == Some(connection) => {
                let memory = fstat(&brought.memory).ok()?.st_ino;
                *left = Some(brought.memory.try_clone().ok()?);
                let Brought {
                    socket,
                    memory: left,
                } = brought.try_clone().ok()?;
                Some((Shared { connection, memory }, Inherited { socket, left }))
            }
            State::There { .. } | State::Away { .. } => None,
        }
    }

    /// Whether anything is known of a back-end of the device.
    pub(super) fn know(&self, device: Device) -> bool {
        self.links.contains_key(&device)
    }

    /// What a worker that has died had of the device's back-end, which is there still as far as is known.
    pub(super) fn inherited(&self, device: Device) -> Option<Inherited> {
        match &self.links.get(&device)?.state {
            State::There {
                brought,
                left: Some(left),
                ..
            } => Some(Inherited {
                socket: brought.socket.try_clone().ok()?,
                left: left.try_clone().ok()?,
            }),
            State::There { .. } | State::Away { .. } => None,
        }
    }

    /// A worker has been handed the device with what there was of its back-end. That is handed on once: what a worker that dies in
    /// taking it over has asked, nobody can tell from what the next one asks.
    pub(super) fn handed(&mut self, device: Device) {
        let link = self.links.get_mut(&device).map(|link| &mut link.state);
        if let Some(State::There { left, .. }) = link {
            *left = None;
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
                    link.told = Some(now);
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

    /// Looks for those that are to be looked for: the devices whose back-ends are there, with what their workers are given.
    pub(super) fn look(
        &mut self,
        registry: &Registry,
        next_token: &mut usize,
    ) -> Vec<(Device, Brought)> {
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
                let whose = program.whose();
                let (domid, device) = (whose.domid, &whose.device);
                tracing::error!(guest = whose.guest, domid, device, "{error:#}");
            }
            match link.connect() {
                Ok((ours, theirs)) => {
                    link.is_there(ours, None, registry, next_token);
                    found.push((*device, theirs));
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

    /// A new connection and a memory for it, twice.
    fn connect(&self) -> io::Result<(Brought, Brought)> {
        let brought = self.region.brought(connect_to(&self.path)?)?;
        match brought.try_clone() {
            Ok(other) => Ok((brought, other)),
            Err(error) => {
                close_later(&self.path, vec![brought.socket]);
                Err(error)
            }
        }
    }

    fn is_there(
        &mut self,
        brought: Brought,
        left: Option<OwnedFd>,
        registry: &Registry,
        next_token: &mut usize,
    ) {
        let token = Token(*next_token);
        *next_token += 1;
        // Nothing is read here: only that it is closed is of interest.
        let registered = registry.register(
            &mut SourceFd(&brought.socket.as_raw_fd()),
            token,
            Interest::PRIORITY,
        );
        self.state = match registered {
            Ok(()) => State::There {
                brought,
                left,
                token,
                since: Instant::now(),
            },
            // The worker finds out that it is of no use.
            Err(_) => {
                let _ = shutdown(&brought.socket, Shutdown::Both);
                close_later(&self.path, vec![brought.socket]);
                State::Away {
                    try_at: Instant::now() + LONGEST_WAIT,
                }
            }
        };
    }

    fn is_away(&mut self, now: Instant) {
        let begins = |told: Instant| now.saturating_duration_since(told) < BEGINNING;
        let wait = match self.told.is_some_and(begins) {
            true => self.wait.min(LONGEST_TOLD_WAIT),
            false => self.wait,
        };
        self.state = State::Away { try_at: now + wait };
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
    }

    /// Ends the connection for both ends, if there is one.
    fn cut(&mut self, registry: &Registry) {
        let now = Instant::now();
        let try_at = now;
        let state = std::mem::replace(&mut self.state, State::Away { try_at });
        if let State::There { brought, since, .. } = state {
            if now.saturating_duration_since(since) >= SHORT_LIFE {
                self.wait = FIRST_WAIT;
            }
            self.last_try = now;
            // The next one may have told of itself already, when this one was not known to be gone.
            let told = now + self.wait.min(LONGEST_TOLD_WAIT);
            self.is_away(now);
            self.state = State::Away { try_at: told };
            let socket = brought.socket;
            let _ = registry.deregister(&mut SourceFd(&socket.as_raw_fd()));
            // An error means that the back-end is gone.
            let _ = shutdown(&socket, Shutdown::Both);
            close_later(&self.path, vec![socket]);
        } else {
            self.state = state;
        }
    }
}

fn name_of(connection: &OwnedFd) -> Option<u64> {
    connection_name(connection.as_fd()).ok()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolstack::libxl::EntryForm;
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
    };

    const FOLDERS: Token = Token(1);
    const DEVICE: Device = (
        7,
        EntryKey {
            form: EntryForm::File,
            devid: 0,
        },
    );

    /// A program's socket is there a moment before the program listens.
    #[test]
    fn one_that_does_not_listen_yet_is_looked_for_again_soon() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let poll = mio::Poll::new().unwrap();
        let (registry, mut next) = (poll.registry(), 2);
        let mut back_ends = BackEnds::new(registry, FOLDERS).unwrap();
        let back_end = BackEnd {
            socket: path.clone(),
            brought: None,
            left: None,
            region: RegionSize {
                queue_size: 8,
                pool: 4096,
            },
            program: None,
        };
        back_ends.have(DEVICE, back_end, registry, &mut next);
        let link = back_ends.links.get_mut(&DEVICE).unwrap();
        // It has been away for long.
        link.wait = LONGEST_WAIT;
        link.last_try = Instant::now().checked_sub(LONGEST_TOLD_WAIT).unwrap();
        link.is_away(Instant::now());
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let socket = socket_with(family, SocketType::STREAM, flags, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        back_ends.ready(FOLDERS, registry);
        assert!(back_ends.look(registry, &mut next).is_empty());
        listen(&socket, 1).unwrap();
        let again = back_ends.look_at().unwrap();
        assert!(again <= Instant::now() + LONGEST_TOLD_WAIT, "{again:?}");
        std::thread::sleep(again.saturating_duration_since(Instant::now()));
        assert_eq!(back_ends.look(registry, &mut next).len(), 1);
    }
}
