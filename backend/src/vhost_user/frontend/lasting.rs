//! What of a device goes beyond its process, and how its connections come.

use super::super::class::MAX_QUEUES;
use crate::shadow::{ShadowRecord, region_file};
use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// Where the next connection to the device's back-end is put.
#[derive(Clone, Default)]
pub struct Link {
    pub(super) brought: Rc<Cell<Option<Brought>>>,
    pub(super) shared: Rc<Cell<Option<u64>>>,
}

/// A connection to a back-end, and the file of the memory that is to be shared by it.
#[derive(Debug)]
pub struct Brought {
    pub socket: OwnedFd,
    pub memory: OwnedFd,
}

impl Brought {
    /// With a new memory, for a device with queues of `queue_size` entries and `pool` bytes for data.
    ///
    /// # Errors
    ///
    /// If the system has not the memory.
    pub fn new(socket: OwnedFd, queue_size: u16, pool: usize) -> io::Result<Self> {
        let sizes = [queue_size; MAX_QUEUES as usize];
        let memory = region_file(&sizes, pool)?;
        Ok(Self { socket, memory })
    }

    /// # Errors
    ///
    /// The system's.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            socket: self.socket.try_clone()?,
            memory: self.memory.try_clone()?,
        })
    }
}

impl Link {
    /// The device's next [`Device::update`](crate::Device::update) begins with this back-end.
    pub fn put(&self, brought: Brought) {
        self.brought.set(Some(brought));
    }

    /// The [name](crate::vhost_user::connection_name) of the connection by which a back-end has had its memory since the last
    /// look, if one has: by both, [`Frontend::inherit`](super::Frontend::inherit) goes on.
    pub fn take_shared(&self) -> Option<u64> {
        self.shared.take()
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
