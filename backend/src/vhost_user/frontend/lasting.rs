//! What of a device goes beyond its process, and how its connections come.

use crate::shadow::ShadowRecord;
use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// Where the next connection to the device's back-end is put.
#[derive(Clone, Default)]
pub struct Link {
    pub(super) socket: Rc<Cell<Option<OwnedFd>>>,
    pub(super) memory: Rc<Cell<Option<Memory>>>,
}

/// The memory that a device shares with a back-end.
pub struct Memory {
    pub file: OwnedFd,
    /// The [name](crate::vhost_user::connection_name) of the connection to it.
    pub connection: u64,
}

impl Link {
    /// The device's next [`Device::update`](crate::Device::update) begins with the back-end at the other end of `socket`.
    pub fn put(&self, socket: OwnedFd) {
        self.socket.set(Some(socket));
    }

    /// The memory that the device shares with its back-end, if that is another one since the last look: by it, and by the
    /// connection, [`Frontend::inherit`](super::Frontend::inherit) goes on.
    pub fn take_memory(&self) -> Option<Memory> {
        self.memory.take()
    }
}

/// What of a device goes beyond this process.
pub struct Lasting {
    /// What the driver has written of the configuration space, to an earlier process.
    pub written: Vec<u8>,
    /// By queue, of [`MAX_QUEUES`](crate::vhost_user::MAX_QUEUES) or as many as there are.
    pub records: Vec<ShadowRecord>,
    pub keep: Box<dyn Keep>,
}

impl Lasting {
    /// Nothing does, of a device with `queues` queues of `size` entries.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn nothing(queues: u16, size: u16) -> io::Result<Self> {
        let records = (0..queues).map(|_| ShadowRecord::private(size));
        Ok(Self {
            written: Vec::new(),
            records: records.collect::<io::Result<_>>()?,
            keep: Box::new(NotKept),
        })
    }
}

/// Keeps what a driver reads as its configuration space beyond this process.
pub trait Keep {
    /// What the back-end says of it has become this.
    fn back_ends(&self, config: &[u8]);

    /// What the driver has written of it; nothing after a reset.
    fn drivers(&self, written: &[u8]);
}

/// Nothing goes on from it.
struct NotKept;

impl Keep for NotKept {
    fn back_ends(&self, _config: &[u8]) {}
    fn drivers(&self, _written: &[u8]) {}
}
