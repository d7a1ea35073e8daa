//! What devices share: copies to and from the guest, memory for them, when requests are taken, and how many.

mod allowance;
mod coalescer;
mod copy;
mod one_by_one;
mod pool;
mod scratch;
mod stopwatch;

pub(crate) use allowance::Allowance;
pub(crate) use coalescer::Coalescer;
pub(crate) use copy::{copy, first_fault};
pub use one_by_one::{Failure, OneByOne, Serve};
pub(crate) use pool::{PageRun, Pool};
pub use scratch::Scratch;
pub(crate) use stopwatch::Stopwatch;
