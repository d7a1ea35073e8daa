//! How a driver reaches its virtio device on a type-1 hypervisor: traps in, interrupts out.
//!
//! [`GuestDevices`] takes the [`Trap`]s of one guest from a [`Hypervisor`] to its [`MmioDevice`]s. Behind the registers of
//! each is a [`Host`], which knows of none: whatever else a driver may reach a device through stands on it as well.

mod host;
mod hypervisor;
mod mmio;
pub mod vhost_user_server;
mod virtio_state;
pub mod xen;

pub use host::{Host, Outcome};
pub use hypervisor::{Hypervisor, InterruptLine, MmioRange, Respond, Trap, TrapRequest, Width};
pub use mmio::{
    DeviceReport, DeviceState, DeviceStateError, DevicesError, GuestDevices, LatencyReport,
    Location, MmioDevice, QueueReport, Register, RegisterFile, SavedRegisters, Slot,
};
pub use virtio_state::{Effect, Misstep, QueueSetup, RestoreError, VirtioState};
