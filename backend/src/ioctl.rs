//! Calls of a device's own.

use nix::sys::ioctl::ioctl_num_type;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use xen_virtio_guest_mapping::syscalls;

/// # Safety
///
/// `argument` is what `request` asks for, and stays what the device keeps of it.
pub(crate) unsafe fn call(
    device: BorrowedFd<'_>,
    request: ioctl_num_type,
    argument: *mut libc::c_void,
) -> io::Result<()> {
    syscalls::count();
    // SAFETY: the caller's promise; the descriptor is open.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, argument) };
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A call with a structure that the kernel reads, or fills in, and keeps no pointer to.
///
/// # Safety
///
/// `T` is the structure that `request` is passed.
pub(crate) unsafe fn with<T>(
    device: BorrowedFd<'_>,
    request: ioctl_num_type,
    argument: &mut T,
) -> io::Result<()> {
    // SAFETY: the caller's promise.
    unsafe { call(device, request, std::ptr::from_mut(argument).cast()) }
}
