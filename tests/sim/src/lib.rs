//! A guest and its hypervisor in this process, for tests, fuzzing and the demo. Nothing that serves a real guest has it.
//!
//! [`SimMachine`] serves a [`SimGuest`] as a worker does a real one. The guest is driven by hand, or by the
//! `virtio-drivers` crate through [`SimHal`] and [`SimTransport`]. What is to go wrong is ordered of its [`Faults`].

mod faults;
// virtio-drivers' trait for a guest's memory is unsafe.
#[allow(unsafe_code)]
mod hal;
mod hypervisor;
mod machine;
mod memory;
mod transport;

pub use faults::{Fault, Faults};
pub use hal::SimHal;
pub use hypervisor::{SimGuest, SimHypervisor, simulate};
pub use machine::{FIRST_DEVICE, FIRST_IRQ, SimMachine};
pub use memory::{SimAccess, SimMemory};
pub use transport::SimTransport;
