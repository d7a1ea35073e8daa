//! A network interface of dom0's whose frames a program reads and writes (`linux/if_tun.h`): a tap, or a macvtap.
//!
//! The `abi` test of the `tests` package checks every number against the C headers.

use crate::ioctl::{call, with};
use nix::sys::ioctl::ioctl_num_type;
use std::io;
use std::os::fd::BorrowedFd;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

const TUN: u8 = b'T';

const fn write<T>(number: u8) -> ioctl_num_type {
    nix::request_code_write!(TUN, number, size_of::<T>())
}

pub const TUNSETIFF: ioctl_num_type = write::<i32>(202);
pub const TUNSETPERSIST: ioctl_num_type = write::<i32>(203);
pub const TUNSETOFFLOAD: ioctl_num_type = write::<u32>(208);
pub const TUNSETSNDBUF: ioctl_num_type = write::<i32>(212);
pub const TUNSETVNETHDRSZ: ioctl_num_type = write::<i32>(216);
pub const TUNSETQUEUE: ioctl_num_type = write::<i32>(217);

/// What the interface may hand over, by the feature that the driver accepts it with. Which of them the kernel has, it says.
const OFFLOADS: [(u32, u32); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6),
];
/// Segmentation of UDP, by the version of IP: Linux 6.2 and later.
pub const TUN_F_USO4: u32 = 0x20;
pub const TUN_F_USO6: u32 = 0x40;

/// Bytes of the header before a frame (virtio 1.3, 5.1.6).
pub const HEADER: usize = 12;

/// Whether an interface has one queue, or several, of which each is a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queues {
    One,
    Several,
}

/// Has `tun`, which is `/dev/net/tun` or a macvtap's own, be the interface `name`, whose frames have a header as virtio 1.3,
/// 5.1.6 has it. An interface that is not there is made, and lasts as long as a descriptor of it.
///
/// # Errors
///
/// The system's: `ResourceBusy` if somebody else has the interface, `InvalidInput` for a name of 16 bytes or more, or for an
/// interface with the other kind of queues.
pub fn attach(tun: BorrowedFd<'_>, name: &str, queues: Queues) -> io::Result<()> {
    let mut request = request(name)?;
    let several = match queues {
        Queues::One => 0,
        Queues::Several => libc::IFF_MULTI_QUEUE,
    };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).expect("flags of 15 bits");
    // SAFETY: its number tells of an int, and it takes a `struct ifreq`.
    unsafe { with(tun, TUNSETIFF, &mut request) }?;
    let mut bytes = i32::try_from(HEADER).expect("a few bytes");
    // SAFETY: it takes a pointer to an int.
    unsafe { with(tun, TUNSETVNETHDRSZ, &mut bytes) }?;
    // A macvtap drops what does not fit in its own limit, a few of the largest frames.
    let mut unlimited = i32::MAX;
    // SAFETY: it takes a pointer to an int.
    unsafe { with(tun, TUNSETSNDBUF, &mut unlimited) }
}

/// Has the interface outlive its descriptors, or not.
///
/// # Errors
///
/// The system's.
pub fn set_persistent(tap: BorrowedFd<'_>, persistent: bool) -> io::Result<()> {
    let flag = std::ptr::without_provenance_mut(usize::from(persistent));
    // SAFETY: the flag is the argument itself.
    unsafe { call(tap, TUNSETPERSIST, flag) }
}

/// Which frames the interface may hand over: `offloads` are `TUN_F_…`.
///
/// # Errors
///
/// The system's: `InvalidInput` for one that the kernel does not have, or that needs another.
pub fn set_offloads(tap: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // The flags are the argument itself.
    let flags = std::ptr::without_provenance_mut(offloads as usize);
    // SAFETY: it takes no pointer.
    unsafe { call(tap, TUNSETOFFLOAD, flags) }
}

/// Has the interface use this queue of several, or not: what is not used gets no frames.
///
/// # Errors
///
/// The system's: `InvalidInput` if that is how it is.
pub fn use_queue(tap: BorrowedFd<'_>, is_used: bool) -> io::Result<()> {
    let mut request = request("")?;
    let flags = match is_used {
        true => libc::IFF_ATTACH_QUEUE,
        false => libc::IFF_DETACH_QUEUE,
    };
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).expect("flags of 15 bits");
    // SAFETY: its number tells of an int, and it takes a `struct ifreq`.
    unsafe { with(tap, TUNSETQUEUE, &mut request) }
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: integers and unions of such, for which zeros are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed() as libc::c_char;
    }
    Ok(request)
}

/// What the interface may hand over to a driver that has accepted `features`: some of it needs another part (virtio 1.3, 5.1.3.1),
/// which the kernel refuses it without.
pub fn offloads(features: u64) -> u32 {
    let accepted = OFFLOADS.iter().filter(|(bit, _)| features & 1 << bit != 0);
    let mut offloads = accepted.fold(0, |flags, (_, flag)| flags | flag);
    if offloads & libc::TUN_F_CSUM == 0 {
        offloads = 0;
    }
    if offloads & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
        offloads &= !libc::TUN_F_TSO_ECN;
    }
    // The kernel has both or none.
    if offloads & (TUN_F_USO4 | TUN_F_USO6) != TUN_F_USO4 | TUN_F_USO6 {
        offloads &= !(TUN_F_USO4 | TUN_F_USO6);
    }
    offloads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_another_part_is_not_asked_for_without_it() {
        let all = OFFLOADS.iter().fold(0u64, |bits, (bit, _)| bits | 1 << bit);
        let flags = OFFLOADS.iter().fold(0, |flags, (_, flag)| flags | flag);
        assert_eq!(offloads(all | 1 << 5), flags);
        assert_eq!(offloads(all & !(1 << VIRTIO_NET_F_GUEST_CSUM)), 0);
        assert_eq!(
            offloads(all & !(1 << VIRTIO_NET_F_GUEST_USO6)),
            flags & !0x60
        );
        let tso = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        assert_eq!(offloads(all & !tso), libc::TUN_F_CSUM | 0x60);
        assert_eq!(offloads(0), 0);
    }
}
