//! virtio-mmio: registers, the ranges that they lie in, and what of them outlives a process.

mod device;
mod device_state;
mod guest_devices;
mod handler_wait;
mod interrupt;
mod register_file;
mod registers;
mod report;

pub use device::MmioDevice;
pub use device_state::{DeviceState, DeviceStateError};
pub use guest_devices::{DevicesError, GuestDevices, Slot};
pub use register_file::{RegisterFile, SavedRegisters};
pub use registers::{Location, Register};
pub use report::{DeviceReport, LatencyReport, QueueReport};
