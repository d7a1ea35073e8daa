//! Reads and writes of descriptors that do not block, from and to memory that is copied to and from guests.

use std::io;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};
use xen_virtio_guest_mapping::syscalls;

/// # Errors
///
/// The system's.
pub(crate) fn read(from: &mut impl ReadVolatile, to: &mut VolatileSlice<'_>) -> io::Result<usize> {
    syscalls::count();
    from.read_volatile(to).map_err(of_system)
}

/// # Errors
///
/// The system's.
pub(crate) fn write(to: &mut impl WriteVolatile, from: &VolatileSlice<'_>) -> io::Result<usize> {
    syscalls::count();
    to.write_volatile(from).map_err(of_system)
}

/// The system's error in one of `vm-memory`.
fn of_system(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}
