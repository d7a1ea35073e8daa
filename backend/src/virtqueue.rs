//! Virtqueues: the rings of a driver, what is asked for in them, and what of that outlives a process.

mod journal;
mod latency;
mod queue;
mod request;
mod set;
mod trace;

pub use journal::{JournalError, QueueJournal};
pub use latency::{LATENCY_BUCKETS, Latencies};
pub use queue::{MAX_QUEUE_SIZE, QueueError, QueueIndex, QueueLayout, Unfinished, VirtQueue};
pub use request::{Buffers, Completion, GuestBuffer, Request};
pub use set::{ActiveQueue, QueueSet, QueueStart};
pub use trace::{RequestDetail, Trace, TraceSink, TracedRequest};
