//! Xen: ioreq servers, event channels, and interrupts by device-model operations.

pub mod abi;
// The system calls of Xen's devices, and the page that Xen shares.
#[allow(unsafe_code)]
mod dm_op;
#[allow(unsafe_code)]
mod domctl;
#[allow(unsafe_code)]
mod evtchn;
#[allow(unsafe_code)]
mod ioreq;

pub use domctl::DomainControl;
pub use evtchn::EventChannels;
pub use ioreq::{XenError, XenGuest, ioreq_servers_exist};
