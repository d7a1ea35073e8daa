//! virtio-mmio on a type-1 hypervisor: traps in, interrupts out.
//!
//! [`Machine`] takes the [`Trap`]s of one guest from a [`Hypervisor`] to its [`MmioDevice`]s.

mod device_state;
mod hypervisor;
mod interrupt;
mod machine;
mod mmio_device;
mod register_file;
mod registers;
pub mod sim;
pub mod xen;

pub use device_state::{DeviceState, DeviceStateError};
pub use hypervisor::{Hypervisor, InterruptLine, MmioRange, Respond, Trap, TrapRequest, Width};
pub use machine::{Machine, MachineError, Slot};
pub use mmio_device::{DeviceReport, MmioDevice};
pub use register_file::{Effect, Offer, RegisterFile, RegisterSet, RestoreError};
pub use registers::{Location, Register};
