//! Why data was not moved between a driver and what a device is on.

use crate::device::DeviceError;
use xen_virtio_guest_mapping::CopyFault;

#[derive(Debug)]
pub(crate) enum TransferError {
    Device(DeviceError),
    /// dom0 lacks something; a later call moves it.
    Dom0(CopyFault),
}

impl From<DeviceError> for TransferError {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}
