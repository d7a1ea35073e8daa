//! How a back-end is kicked.

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::write;
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, send, shutdown, socketpair,
};
use std::io;
use std::os::fd::OwnedFd;

/// Kicks whoever serves a queue.
pub(crate) struct Doorbell {
    to: To,
}

enum To {
    /// Another process, which reads eight bytes as from an eventfd.
    ///
    /// It is a socket: whoever has an eventfd too can have a write to it wait for ever. A datagram's: whoever reads a stream
    /// finds its end when we die, which some back-ends take for a reason to fail.
    Process(OwnedFd),
    /// The kernel, which has an eventfd and reads nothing of it.
    Kernel(OwnedFd),
    Nobody,
}

impl Doorbell {
    /// A doorbell, and what another process is given of it.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub(super) fn new() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        // What the back-end would send here is never read, and could be a file that takes its time to be closed.
        shutdown(&ours, Shutdown::Read)?;
        let to = To::Process(ours);
        Ok((Self { to }, theirs))
    }

    /// A doorbell, and what the kernel is given of it.
    ///
    /// # Errors
    ///
    /// As [`Doorbell::new`].
    pub(crate) fn kernels() -> io::Result<(Self, OwnedFd)> {
        let ours = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let theirs = ours.try_clone()?;
        let to = To::Kernel(ours);
        Ok((Self { to }, theirs))
    }

    /// Of a queue that nobody looks at.
    pub(crate) fn nobodys() -> Self {
        Self { to: To::Nobody }
    }

    pub(super) fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        match &self.to {
            To::Process(socket) => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                // With so many unread that there is no room, one more tells nothing new.
                let _ = send(socket, &one, flags);
            }
            To::Kernel(event) => {
                // It holds more than anybody rings.
                let _ = write(event, &one);
            }
            To::Nobody => {}
        }
    }
}
