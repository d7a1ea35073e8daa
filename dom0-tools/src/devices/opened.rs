//! What the supervisor opens for a device, with its privilege.

use crate::guest_state::Backing;
use crate::program::Program;
use serde_json::Value;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use xen_virtio_backend::vhost_user::Brought;

/// What was opened for a device.
pub(crate) struct Opened {
    /// What it is, for whoever looks after it.
    pub(crate) detail: String,
    /// What [`DeviceKind::build`] goes by, with the descriptors.
    pub(crate) spec: Value,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// What its contents are in.
    pub(crate) backing: Option<Backing>,
    /// What the guest has of it as long as it lives, whatever its entry and the configuration say later.
    pub(crate) kept: Option<Value>,
    pub(crate) back_end: Option<BackEnd>,
    /// Where the supervisor listens for it.
    pub(crate) listens: Vec<Listen>,
    /// Where the supervisor connects for it: to this path, a low line, and a port.
    pub(crate) dials: Option<PathBuf>,
}

impl Opened {
    /// What is a device by its `spec` alone.
    pub(crate) fn new(detail: String, spec: Value) -> Self {
        Self {
            detail,
            spec,
            descriptors: Vec::new(),
            backing: None,
            kept: None,
            back_end: None,
            listens: Vec::new(),
            dials: None,
        }
    }
}

/// A socket of dom0's whose connections a device has.
pub(crate) struct Listen {
    pub(crate) path: PathBuf,
    /// For its [`Control`], with each connection.
    pub(crate) change: Value,
}

/// The back-end of a device.
pub(crate) struct BackEnd {
    pub(crate) socket: PathBuf,
    /// The connection to it, if there is one, and the memory for it; duplicates of what is among the device's descriptors.
    pub(crate) brought: Option<Brought>,
    /// The memory that the last worker shared with it, if that is to be taken over.
    pub(crate) left: Option<OwnedFd>,
    /// What is shared with it.
    pub(crate) region: RegionSize,
    /// The program that we keep running for it.
    pub(crate) program: Option<Program>,
}

/// The size of the memory that a device shares with its back-ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RegionSize {
    pub(crate) queue_size: u16,
    /// Bytes for data.
    pub(crate) pool: usize,
}

impl RegionSize {
    /// A connection with a new memory for it.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(crate) fn brought(self, socket: OwnedFd) -> io::Result<Brought> {
        Brought::new(socket, self.queue_size, self.pool)
    }
}
