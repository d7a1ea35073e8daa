//! The calls.

use super::abi::{self, VhostMemory, VhostVringAddr, VhostVringFile, VhostVringState};
use crate::ioctl;
use nix::sys::ioctl::ioctl_num_type;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A call with a structure that the kernel reads, or fills in, and keeps no pointer to.
fn with<T>(device: BorrowedFd<'_>, request: ioctl_num_type, argument: &mut T) -> io::Result<()> {
    // SAFETY: every request of this module is passed the structure that its number is made of (`abi`).
    unsafe { ioctl::with(device, request, argument) }
}

pub(super) fn set_owner(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: it takes no argument.
    unsafe { ioctl::call(device, abi::VHOST_SET_OWNER, std::ptr::null_mut()) }
}

pub(super) fn features(device: BorrowedFd<'_>) -> io::Result<u64> {
    let mut features = 0u64;
    with(device, abi::VHOST_GET_FEATURES, &mut features)?;
    Ok(features)
}

pub(super) fn set_features(device: BorrowedFd<'_>, mut features: u64) -> io::Result<()> {
    with(device, abi::VHOST_SET_FEATURES, &mut features)
}

pub(super) fn set_memory(device: BorrowedFd<'_>, mut memory: VhostMemory) -> io::Result<()> {
    // With its one region, behind what its number tells of.
    with(device, abi::VHOST_SET_MEM_TABLE, &mut memory)
}

pub(super) fn set_vring(
    device: BorrowedFd<'_>,
    request: VringState,
    mut state: VhostVringState,
) -> io::Result<()> {
    let request = match request {
        VringState::Num => abi::VHOST_SET_VRING_NUM,
        VringState::Base => abi::VHOST_SET_VRING_BASE,
    };
    with(device, request, &mut state)
}

/// What is set of a queue by a number.
#[derive(Clone, Copy, Debug)]
pub(super) enum VringState {
    Num,
    Base,
}

pub(super) fn vring_base(device: BorrowedFd<'_>, index: u32) -> io::Result<u32> {
    let mut state = VhostVringState { index, num: 0 };
    with(device, abi::VHOST_GET_VRING_BASE, &mut state)?;
    Ok(state.num)
}

pub(super) fn set_vring_address(
    device: BorrowedFd<'_>,
    mut addresses: VhostVringAddr,
) -> io::Result<()> {
    with(device, abi::VHOST_SET_VRING_ADDR, &mut addresses)
}

/// What is set of a queue by a descriptor.
#[derive(Clone, Copy, Debug)]
pub(super) enum VringFile {
    Kick,
    Call,
    Error,
    /// The interface whose frames it carries.
    Tap,
}

/// Sets a descriptor of a queue, or none.
pub(super) fn set_vring_file(
    device: BorrowedFd<'_>,
    request: VringFile,
    index: u32,
    file: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let request = match request {
        VringFile::Kick => abi::VHOST_SET_VRING_KICK,
        VringFile::Call => abi::VHOST_SET_VRING_CALL,
        VringFile::Error => abi::VHOST_SET_VRING_ERR,
        VringFile::Tap => abi::VHOST_NET_SET_BACKEND,
    };
    let fd = file.map_or(-1, |file| file.as_raw_fd());
    with(device, request, &mut VhostVringFile { index, fd })
}

pub(super) fn set_running(device: BorrowedFd<'_>, runs: bool) -> io::Result<()> {
    with(device, abi::VHOST_VSOCK_SET_RUNNING, &mut i32::from(runs))
}

/// Gives the guest of `/dev/vhost-vsock` the number by which dom0 reaches it.
///
/// # Errors
///
/// The system's: `AddrInUse` if another guest has it, `InvalidInput` if none may have it.
pub fn set_guest_cid(device: BorrowedFd<'_>, cid: u32) -> io::Result<()> {
    with(device, abi::VHOST_VSOCK_SET_GUEST_CID, &mut u64::from(cid))
}
