//! Virtqueues, and the devices that serve them.
//!
//! A device pops [`Request`]s off its [`VirtQueue`]s, copies what it needs of them through
//! [`GuestAccess`](xen_virtio_guest_mapping::GuestAccess), and gives back [`Completion`]s.

pub mod blk;
pub mod console;
mod device;
mod engine;
mod error_line;
pub mod input;
// Makes the calls.
#[allow(unsafe_code)]
mod ioctl;
mod log_limit;
pub mod net;
mod persist;
pub mod rng;
pub mod shadow;
mod shortage;
// Makes the calls.
#[allow(unsafe_code)]
pub mod tap;
pub mod tuning;
pub mod vhost_kernel;
pub mod vhost_user;
mod virtqueue;
pub mod vsock;

pub use device::{
    Activity, Device, DeviceError, DeviceFailure, DeviceType, Identity, Interest, RequestCounters,
    Step,
};
pub use engine::{Failure, Limits, OneByOne, RingStock, Scratch, Serve, try_ring};
pub use error_line::with_sources;
pub use log_limit::LogLimit;
pub use persist::{
    RecordError, RecordKey, RecordKind, Records, StateArea, StateCell, StateError, StateMemory,
};
pub use shortage::Shortage;
pub use virtqueue::{
    ActiveQueue, Buffers, Completion, GuestBuffer, JournalError, LATENCY_BUCKETS, Latencies,
    MAX_QUEUE_SIZE, QueueError, QueueIndex, QueueJournal, QueueLayout, QueueSet, QueueStart,
    Request, RequestDetail, Trace, TraceSink, TracedRequest, Unfinished, VirtQueue,
};
