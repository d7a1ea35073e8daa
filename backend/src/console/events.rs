//! What tells of clients, who come and go: one descriptor for all of a device's.

use super::client::Client;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use xen_virtio_guest_mapping::syscalls;

/// Something has happened to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClientEvent {
    pub(super) port: usize,
    pub(super) id: u32,
    /// Its other end is closed.
    pub(super) has_ended: bool,
}

/// Events that are taken at once.
pub(super) const EVENTS: usize = 16;

pub(super) struct Events(OwnedFd);

impl Events {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Readable when there are events.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Tells of `client`, the client `id` of port `port`, from now on.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(super) fn add(&self, port: usize, id: u32, client: &Client) -> io::Result<()> {
        let data = EventData::new_u64((port as u64) << 32 | u64::from(id));
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        epoll::add(&self.0, client.fd(), data, flags)?;
        if let Some(other) = client.other_fd() {
            epoll::add(&self.0, other, data, EventFlags::IN | EventFlags::ET)?;
        }
        Ok(())
    }

    /// Others may have its descriptors still.
    pub(super) fn remove(&self, client: &Client) {
        for fd in [Some(client.fd()), client.other_fd()].into_iter().flatten() {
            // What was added can be removed.
            let _ = epoll::delete(&self.0, fd);
        }
    }

    /// Some of what has happened; nothing, if nothing has.
    pub(super) fn take(&self) -> Vec<ClientEvent> {
        let mut events = Vec::with_capacity(EVENTS);
        let now = Timespec::default();
        syscalls::count();
        if epoll::wait(
            &self.0,
            rustix::buffer::spare_capacity(&mut events),
            Some(&now),
        )
        .is_err()
        {
            return Vec::new();
        }
        let event = |event: epoll::Event| {
            let (data, flags) = (event.data.u64(), event.flags);
            ClientEvent {
                port: usize::try_from(data >> 32).expect("a port's number"),
                id: u32::try_from(data & u64::from(u32::MAX)).expect("32 bits"),
                has_ended: flags.intersects(EventFlags::HUP | EventFlags::ERR),
            }
        };
        events.into_iter().map(event).collect()
    }
}
