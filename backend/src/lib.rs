//! Virtqueues, and the devices that serve them.
//!
//! A device pops [`Request`]s off its [`VirtQueue`]s, copies what it needs of them through
//! [`GuestAccess`](xen_virtio_guest_mapping::GuestAccess), and gives back [`Completion`]s.

pub mod blk;
mod device;
mod journal;
mod log_limit;
mod persist;
mod queue;
mod request;
mod shortage;

pub use device::{
    Activity, Device, DeviceCounters, DeviceError, DeviceFailure, DeviceType, QueueSetup,
    StageTimes, Step,
};
pub use journal::{JournalError, QueueJournal};
pub use log_limit::LogLimit;
pub use persist::{
    RecordError, RecordKey, RecordKind, Records, StateArea, StateCell, StateError, StateMemory,
};
pub use queue::{MAX_QUEUE_SIZE, QueueError, QueueIndex, QueueLayout, VirtQueue};
pub use request::{Buffers, Completion, GuestBuffer, Request};
pub use shortage::Shortage;
