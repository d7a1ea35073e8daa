//! What a VMM has said of a queue.

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::write;
use std::fs::File;
use std::io;
use vm_memory::GuestAddress;

/// A queue's rings, where the guest has them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Areas {
    pub(super) descriptors: GuestAddress,
    pub(super) available: GuestAddress,
    pub(super) used: GuestAddress,
}

#[derive(Debug, Default)]
pub(super) struct Vring {
    pub(super) size: u16,
    pub(super) areas: Option<Areas>,
    /// The element of both rings with which it begins.
    pub(super) base: u16,
    pub(super) is_enabled: bool,
    pub(super) is_started: bool,
    pub(super) kick: Option<File>,
    pub(super) call: Option<File>,
    pub(super) error: Option<File>,
}

impl Vring {
    /// Where it is, once all is known that it takes to start it.
    pub(super) fn complete(&self) -> Option<Areas> {
        let is_complete = self.is_enabled && !self.is_started && self.kick.is_some();
        self.areas.filter(|_| is_complete)
    }
}

/// `event`, whose writes do not wait, whoever else writes there.
///
/// # Errors
///
/// The system's.
pub(super) fn not_waiting(event: Option<File>) -> io::Result<Option<File>> {
    if let Some(event) = &event {
        fcntl_setfl(event, fcntl_getfl(event)? | OFlags::NONBLOCK)?;
    }
    Ok(event)
}

/// Tells whoever waits at `event`, if there is somebody.
pub(super) fn tell(event: Option<&File>) {
    if let Some(event) = event {
        // One that is full tells already.
        let _ = write(event, &1u64.to_ne_bytes());
    }
}
