//! What the transport asks of a device.

use crate::queue::{QueueError, QueueIndex, QueueLayout};
use xen_virtio_guest_mapping::{CopyFault, GuestAccess};

/// A virtio device type number (virtio 1.3, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceType(pub u32);

impl DeviceType {
    pub const BLOCK: Self = Self(virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK);
}

/// What a device needs to start one of its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    pub layout: QueueLayout,
    /// The features that the driver accepted.
    pub features: u64,
}

impl QueueSetup {
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// What one turn at a queue came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the driver waits for its interrupt"]
pub struct Turn {
    /// The driver wants an interrupt.
    pub interrupt: bool,
    /// The turn's budget ran out: there is more to do.
    pub more: bool,
}

/// A device that cannot go on until its driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a request has no writable byte for its status")]
    NoStatus,
    #[error("a request's status cannot be written")]
    Status(#[source] CopyFault),
}

/// Counts since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    pub requests: u64,
    /// Requests that ended with an error status.
    pub errors: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
}

/// A virtio device, without its transport.
///
/// Queues start and stop one at a time; a device knows of a queue only between the two.
pub trait Device {
    fn device_type(&self) -> DeviceType;

    /// The feature bits that the device offers, its own and the queue's; the transport adds its.
    fn features(&self) -> u64;

    /// The largest size of each queue: powers of two, at most
    /// [`MAX_QUEUE_SIZE`](crate::MAX_QUEUE_SIZE). As many as the device has queues.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space. A read past its end gives zeros.
    fn config(&self) -> &[u8];

    /// The driver wrote to the configuration space. What is not writable stays as it is.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// # Errors
    ///
    /// [`QueueError`] if the queue is not usable as the driver set it up.
    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: QueueSetup,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError>;

    /// Does what is to be done on a queue, within a budget. Nothing, for a queue that was not started.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if the device cannot go on.
    fn process(
        &mut self,
        index: QueueIndex,
        access: &mut dyn GuestAccess,
    ) -> Result<Turn, DeviceError>;

    /// Forgets a queue and what was in flight on it; nothing of it is mapped afterwards.
    fn stop_queue(&mut self, index: QueueIndex);

    fn counters(&self) -> DeviceCounters;
}
