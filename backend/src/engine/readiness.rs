//! What tells of clients who come and go: one descriptor for all of a device's.

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use xen_virtio_guest_mapping::syscalls;

/// Something has happened to whoever was added by this key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) key: u64,
    /// Its other end is closed.
    pub(crate) has_ended: bool,
}

/// Events that are taken at once.
const AT_ONCE: usize = 16;

pub(crate) struct Readiness(OwnedFd);

impl Readiness {
    /// # Errors
    ///
    /// The system's.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Readable when there are events.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Tells of each change of `fd` from now on, as one of `key`'s.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(crate) fn add(&self, fd: BorrowedFd<'_>, key: u64) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        epoll::add(&self.0, fd, EventData::new_u64(key), flags)?;
        Ok(())
    }

    /// Tells of `fd` no more. Others may have what it is of still.
    pub(crate) fn remove(&self, fd: BorrowedFd<'_>) {
        // What was added can be removed.
        let _ = epoll::delete(&self.0, fd);
    }

    /// Some of what has happened, and whether there may be more.
    pub(crate) fn take(&self) -> (Vec<Ready>, bool) {
        let mut events = Vec::with_capacity(AT_ONCE);
        let now = Timespec::default();
        syscalls::count();
        let room = rustix::buffer::spare_capacity(&mut events);
        if epoll::wait(&self.0, room, Some(&now)).is_err() {
            return (Vec::new(), false);
        }
        let ready = |event: &epoll::Event| {
            let (data, flags) = (event.data, event.flags);
            Ready {
                key: data.u64(),
                has_ended: flags.intersects(EventFlags::HUP | EventFlags::ERR),
            }
        };
        (events.iter().map(ready).collect(), events.len() == AT_ONCE)
    }
}
