//! virtio-mmio on a type-1 hypervisor: traps in, interrupts out.
//!
//! [`GuestDevices`] takes the [`Trap`]s of one guest from a [`Hypervisor`] to its [`MmioDevice`]s.

mod device_state;
mod guest_devices;
mod hypervisor;
mod interrupt;
mod mmio_device;
mod register_file;
mod registers;
mod virtio_state;
pub mod xen;

pub use device_state::{DeviceState, DeviceStateError};
pub use guest_devices::{DevicesError, GuestDevices, Slot};
pub use hypervisor::{Hypervisor, InterruptLine, MmioRange, Respond, Trap, TrapRequest, Width};
pub use mmio_device::{DeviceReport, MmioDevice};
pub use register_file::{RegisterFile, SavedRegisters};
pub use registers::{Location, Register};
pub use virtio_state::{Effect, Misstep, QueueSetup, RestoreError, VirtioState};
