//! How a back-end is kicked.

use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, send, shutdown, socketpair,
};
use std::io;
use std::os::fd::OwnedFd;

/// Kicks a back-end, which reads eight bytes as from an eventfd.
///
/// It is a socket: whoever has an eventfd too can have a write to it wait for ever. A datagram's: whoever reads a stream finds
/// its end when we die, which some back-ends take for a reason to fail.
pub(super) struct Doorbell {
    ours: OwnedFd,
}

impl Doorbell {
    /// A doorbell, and what the back-end is given of it.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub(super) fn new() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        // What the back-end would send here is never read, and could be a file that takes its time to be closed.
        shutdown(&ours, Shutdown::Read)?;
        Ok((Self { ours }, theirs))
    }

    pub(super) fn ring(&self) {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // With so many unread that there is no room, one more tells nothing new.
        let _ = send(&self.ours, &1u64.to_ne_bytes(), flags);
    }
}
