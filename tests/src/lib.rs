//! A guest driver that does as it is told, also what no driver should: for tests, fuzz seeds and benches.
#![forbid(unsafe_code)]

mod blk;
mod driver;
mod queue;
mod workload;

pub use blk::{BlkRequest, NEXT, NO_STATUS, WRITE, disk_of};
pub use driver::{Driver, Negotiated};
pub use queue::{Buffer, RawQueue};
pub use workload::{Operation, WORKLOADS, Workload};
