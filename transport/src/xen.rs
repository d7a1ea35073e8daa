//! Xen: ioreq servers, event channels, and interrupts by device-model operations.

pub mod abi;
mod dm_op;
mod evtchn;
mod ioreq;

pub use evtchn::EventChannels;
pub use ioreq::{XenError, XenGuest};
