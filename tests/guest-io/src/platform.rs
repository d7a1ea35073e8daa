//! What a driver stands on: its device's registers, and memory that the device may use.

use vm_memory::VolatileSlice;
use xen_virtio_transport::Width;

/// A guest, as the driver of one of its devices sees it.
pub trait Platform: Send + Sync {
    /// Reads `width` bytes at `offset` of the device's page.
    fn read(&self, offset: u64, width: Width) -> u64;

    /// Writes the low `width` bytes of `value` at `offset` of the device's page.
    fn write(&self, offset: u64, width: Width, value: u64);

    /// Zeroed memory of its own pages, granted to the device.
    fn allocate(&self, len: usize, device_writes: bool) -> Box<dyn GrantedMemory>;
}

/// Memory that the device may use.
pub trait GrantedMemory: Send {
    /// The address that the device knows it by.
    fn address(&self) -> u64;

    /// The address of a frame of the guest that is not granted.
    fn frame_address(&self) -> u64;

    /// `len` bytes from its beginning.
    fn slice(&self, len: usize) -> VolatileSlice<'_>;

    /// Ends its grants.
    fn revoke(self: Box<Self>);
}
