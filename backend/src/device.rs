//! What the transport asks of a device.

use crate::virtqueue::{QueueError, QueueIndex, QueueStart};
use std::error::Error;
use std::os::fd::BorrowedFd;
use std::time::Instant;
use xen_virtio_guest_mapping::{CopyFault, GuestAccess};

/// A virtio device type number (virtio 1.3, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceType(pub u32);

impl DeviceType {
    /// That of a place without a device (virtio 1.3, 4.2.2.1).
    pub const NONE: Self = Self(0);
    pub const BLOCK: Self = Self(virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK);
}

/// What a device shows its driver, fixed for its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub device_type: DeviceType,
    /// The feature bits that the device offers, its own and the queues'; the transport adds its.
    pub features: u64,
    /// The largest size of each queue: powers of two, at most [`MAX_QUEUE_SIZE`](crate::MAX_QUEUE_SIZE).
    pub queue_sizes: Vec<u16>,
}

/// Reads `to` from byte `offset` of the configuration space `space`, as [`Device::read_config`].
pub(crate) fn read_space(space: &[u8], offset: usize, to: &mut [u8]) {
    for (place, byte) in to.iter_mut().enumerate() {
        let at = offset.checked_add(place);
        *byte = at.and_then(|at| space.get(at)).copied().unwrap_or(0);
    }
}

/// What a device waits for on one of its event sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    Readable,
    Writable,
}

/// What one look at a device's queues came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the driver waits for its interrupt"]
pub struct Step {
    /// The driver wants an interrupt for what it finds in a used ring.
    pub interrupt: bool,
    /// The configuration space has changed.
    pub config_changed: bool,
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

/// What its driver, or who serves it, did to a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFailure {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a request has no writable byte for its status")]
    NoStatus,
    #[error("a request's status cannot be written")]
    Status(#[source] CopyFault),
    #[error(
        "a request takes {pages} pages of the memory that the device shares with its back-end, and may have {room}: raise its \
         pool-kib"
    )]
    Pool { pages: usize, room: usize },
    #[error(
        "a request is malformed for its type of device: dom0's kernel does not get on with its queue"
    )]
    Unservable,
    /// Not the driver's doing.
    #[error("its back-end did what no back-end may")]
    Backend(#[source] Box<dyn Error + Send + Sync>),
}

impl DeviceFailure {
    /// This failure, of queue `queue`.
    pub fn of(self, queue: usize) -> DeviceError {
        DeviceError { queue, cause: self }
    }
}

/// Requests since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCounters {
    pub done: u64,
    /// Those among them that the driver was told have failed.
    pub failed: u64,
}

/// A virtio device, without its transport.
///
/// Queues start and stop one at a time; a device knows of a queue only between the two.
pub trait Device {
    fn identity(&self) -> &Identity;

    /// Reads the configuration space; what lies past its end is zero.
    fn read_config(&self, _offset: usize, to: &mut [u8]) {
        to.fill(0);
    }

    /// The driver wrote to the configuration space. What is not writable stays as it is.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// Takes up what was changed of the device from outside. True if its configuration space has changed.
    fn update(&mut self) -> bool {
        false
    }

    /// Starts a queue, or goes on with one that an earlier process had started, as its journal says.
    ///
    /// # Errors
    ///
    /// [`QueueError`] if the queue is not usable as the driver set it up.
    fn start_queue(
        &mut self,
        index: QueueIndex,
        start: QueueStart,
        access: &mut dyn GuestAccess,
    ) -> Result<(), QueueError>;

    /// The driver kicks a queue that is started. [`Device::step`] follows, as it does without a kick.
    fn kick(&mut self, _index: QueueIndex) {}

    /// Takes a step: takes up some of what the driver made available in the started queues, or delivers
    /// what has ended. Results may be held back while more are about to come, until [`Device::prepare_sleep`] at the
    /// latest.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] if the device cannot go on.
    fn step(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError>;

    /// Prepares for nobody calling [`Device::step`] until the driver kicks or one of [`Device::sources`] is
    /// ready: delivers what is held back, and asks the driver for kicks. With
    /// [`Activity::Working`] there is something to do after all.
    ///
    /// # Errors
    ///
    /// As for [`Device::step`].
    fn prepare_sleep(&mut self, access: &mut dyn GuestAccess) -> Result<Step, DeviceError>;

    /// When [`Device::step`] is to be called though nothing tells of it: dom0 lacks something, and tells nobody when
    /// it has it, or the guest has had its share for now.
    fn try_again_at(&self) -> Option<Instant> {
        None
    }

    /// Hands to `add` what tells of something that [`Device::step`] will take up: the same descriptors whenever it is
    /// asked.
    fn sources(&self, _add: &mut dyn FnMut(BorrowedFd<'_>, Interest)) {}

    /// Takes nothing more of a queue, until it is stopped: what was taken of it ends some time.
    fn close_queue(&mut self, index: QueueIndex);

    /// Forgets a queue, at once; nothing of it is mapped afterwards. What is under way ends some time, in memory of the
    /// device's own, and requests that come later wait for that.
    fn stop_queue(&mut self, index: QueueIndex);

    /// The device is taken away, with its queues stopped: what it keeps beyond this process is not its own from now on.
    fn retire(&mut self) {}

    /// Takes up what has ended of what stopped queues have left under way. True when there is no more of it;
    /// [`Device::sources`] tell when to look again.
    fn settle(&mut self) -> bool {
        true
    }

    /// The driver resets the device, whose queues have been stopped.
    fn reset(&mut self);

    /// What whoever looks after the device should know, though it works.
    fn warning(&self) -> Option<String> {
        None
    }

    fn counters(&self) -> RequestCounters;

    /// Hands to `add` what the device counts besides, by name: counters and sums of nanoseconds since it was made.
    fn metrics(&self, _add: &mut dyn FnMut(&'static str, u64)) {}
}
