//! What devices share: copies to and from the guest, memory for them, transfers of files, when requests are taken, and how many.

mod allowance;
mod coalescer;
mod copy;
// Hands memory to the kernel for as long as a transfer takes.
#[allow(unsafe_code)]
mod file_io;
mod limiter;
mod one_by_one;
mod pool;
mod readiness;
mod rings;
mod scratch;
mod stopwatch;
mod transfer_error;
pub(crate) mod volatile_io;

pub(crate) use allowance::Allowance;
pub(crate) use coalescer::Coalescer;
pub(crate) use copy::{copy, first_fault};
pub(crate) use file_io::{Ended, FileIo, Kind, Transfer};
pub(crate) use limiter::Limiter;
pub use limiter::Limits;
pub use one_by_one::{Failure, OneByOne, Serve};
pub(crate) use pool::{PageRun, Pool};
pub(crate) use readiness::{Readiness, Ready};
pub use rings::{RingStock, try_ring};
pub use scratch::Scratch;
pub(crate) use stopwatch::Stopwatch;
pub(crate) use transfer_error::TransferError;
