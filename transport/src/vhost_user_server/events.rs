//! What there is to wait for.

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;
use xen_virtio_backend::Interest;

/// Events that are taken at once.
const TOGETHER: usize = 32;

/// What an event's source is known by; kicks are the queue's number.
const SOCKET: u64 = 1 << 32;
const DEVICE: u64 = SOCKET + 1;

pub(super) struct Events {
    epoll: OwnedFd,
    socket: Option<UnixStream>,
}

/// What has happened.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Ready {
    /// The VMM has said something.
    pub(super) socket: bool,
    /// The numbers of queues that were kicked.
    pub(super) kicks: Vec<u32>,
}

impl Events {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            socket: None,
        })
    }

    /// Watches what tells of a device's work.
    pub(super) fn add_device(&self, source: BorrowedFd<'_>, interest: Interest) -> io::Result<()> {
        let flags = match interest {
            Interest::Readable => EventFlags::IN,
            Interest::Writable => EventFlags::OUT,
        };
        // Some of them are never read: each event is told once.
        self.add(source, DEVICE, flags | EventFlags::ET)
    }

    /// Watches the VMM's socket in place of the one before.
    pub(super) fn hear(&mut self, socket: Option<UnixStream>) -> io::Result<()> {
        if let Some(before) = self.socket.take() {
            self.remove(before.as_fd());
        }
        if let Some(socket) = &socket {
            self.add(socket.as_fd(), SOCKET, EventFlags::IN)?;
        }
        self.socket = socket;
        Ok(())
    }

    /// Whether the VMM's socket is waited for.
    pub(super) fn listen(&self, listens: bool) -> io::Result<()> {
        let flags = match listens {
            true => EventFlags::IN,
            // An end of it is told all the same, once.
            false => EventFlags::ET,
        };
        match &self.socket {
            Some(socket) => Ok(epoll::modify(
                &self.epoll,
                socket,
                EventData::new_u64(SOCKET),
                flags,
            )?),
            None => Ok(()),
        }
    }

    /// Watches the kicks of queue `number`. They are told by the writes, and never read: the VMM has the descriptor too, and could
    /// have us wait for what it has read first.
    pub(super) fn add_kick(&self, kick: BorrowedFd<'_>, number: u32) -> io::Result<()> {
        self.add(kick, number.into(), EventFlags::IN | EventFlags::ET)
    }

    fn add(&self, source: BorrowedFd<'_>, data: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(
            &self.epoll,
            source,
            EventData::new_u64(data),
            flags,
        )?)
    }

    /// Watches it no more. Others have it too, so that closing it does not.
    pub(super) fn remove(&self, source: BorrowedFd<'_>) {
        // An error means that it was not watched.
        let _ = epoll::delete(&self.epoll, source);
    }

    /// Waits until something happens, or until then.
    pub(super) fn wait(&self, until: Option<Instant>) -> io::Result<Ready> {
        let now = Instant::now();
        let timeout = until.map(|at| Timespec::try_from(at.saturating_duration_since(now)));
        let timeout = timeout.transpose().map_err(io::Error::other)?;
        let mut events = [epoll::Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        }; TOGETHER];
        let count = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let mut ready = Ready::default();
        for event in &events[..count] {
            match event.data.u64() {
                SOCKET => ready.socket = true,
                DEVICE => {}
                kick => ready.kicks.extend(u32::try_from(kick)),
            }
        }
        Ok(ready)
    }
}
