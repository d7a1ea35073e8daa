//! What the transport asks of a device.

use crate::journal::QueueJournal;
use crate::queue::{QueueError, QueueIndex, QueueLayout};
use std::os::fd::BorrowedFd;
use std::time::Instant;
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

/// What one look at a device's queues came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the driver waits for its interrupt"]
pub struct Step {
    /// The driver wants an interrupt.
    pub interrupt: bool,
    pub activity: Activity,
}

/// How busy somebody is who has just taken a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Activity {
    /// There is nothing to do until the guest does something.
    #[default]
    Idle,
    /// There is nothing to do until the kernel has done something.
    Waiting,
    /// Something was done, so that there may be more to do at once.
    Working,
}

/// A device that cannot go on until its driver resets it.
#[derive(Debug, thiserror::Error)]
#[error("queue {queue}")]
pub struct DeviceError {
    pub queue: usize,
    #[source]
    pub cause: DeviceFailure,
}

/// What its driver did to a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFailure {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a request has no writable byte for its status")]
    NoStatus,
    #[error("a request's status cannot be written")]
    Status(#[source] CopyFault),
}

impl DeviceFailure {
    /// This failure, of queue `queue`.
    pub fn of(self, queue: usize) -> DeviceError {
        DeviceError { queue, cause: self }
    }
}

/// Counts since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    pub requests: u64,
    /// Requests that ended with an error status.
    pub errors: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// Calls that hand transfers to the kernel: of io_uring, or one for each transfer where that is missing.
    pub submissions: u64,
    pub time: StageTimes,
}

/// Nanoseconds that went into each stage of the device's requests, estimated from some of the batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Batches of requests that were copied in, submitted, and delivered.
    pub batches: u64,
    pub submissions: u64,
    pub deliveries: u64,
    /// Copies from the guest.
    pub copy_in: u64,
    /// Handing transfers to the kernel, and what it does of them meanwhile.
    pub submit: u64,
    /// Copies to the guest.
    pub copy_out: u64,
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

    /// Starts a queue, or goes on with one that an earlier process had started, as `journal` says.
    ///
    /// # Errors
    ///
    /// [`QueueError`] if the queue is not usable as the driver set it up.
    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: QueueSetup,
        journal: QueueJournal,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError>;

    /// Takes a step: takes up some of what the driver made available in the started queues, or delivers
    /// what has ended. Results may be held back while more are about to come, until [`Device::prepare_sleep`] at the
    /// latest.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if the device cannot go on.
    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError>;

    /// Prepares for nobody calling [`Device::step`] until the driver kicks or [`Device::events`] is
    /// readable: delivers what is held back, and asks the driver for kicks. With
    /// [`Activity::Working`] there is something to do after all.
    ///
    /// # Errors
    ///
    /// As for [`Device::step`].
    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError>;

    /// When [`Device::step`] is to be called though nothing tells of it: dom0 lacks something, and tells nobody when
    /// it has it.
    fn try_again_at(&self) -> Option<Instant> {
        None
    }

    /// Readable when something has ended that [`Device::step`] will take up; `None` if nothing ever
    /// does by itself.
    fn events(&self) -> Option<BorrowedFd<'_>>;

    /// Forgets a queue, at once; nothing of it is mapped afterwards. What is under way ends some time, in memory of the
    /// device's own, and requests that come later wait for that.
    fn stop_queue(&mut self, index: QueueIndex);

    /// The device is taken away, with its queues stopped: what it keeps beyond this process is not its own from now on.
    fn retire(&mut self);

    /// Takes up what has ended of what stopped queues have left under way. True when there is no more of it;
    /// [`Device::events`] tell when to look again.
    fn settle(&mut self) -> bool;

    /// The driver resets the device, whose queues have been stopped.
    fn reset(&mut self);

    /// Shows `bytes` of what the device has, if it has a size. True if its configuration space has changed.
    fn resize(&mut self, _bytes: u64) -> bool {
        false
    }

    /// What whoever looks after the device should know, though it works.
    fn warning(&self) -> Option<String> {
        None
    }

    fn counters(&self) -> DeviceCounters;
}
