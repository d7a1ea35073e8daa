//! The structures of Linux's vhost devices (`linux/vhost.h`, `linux/vhost_types.h`).
//!
//! The `abi` test of the `tests` package checks every layout and number against the C headers.

use crate::tap;
use nix::sys::ioctl::ioctl_num_type;

const VHOST: u8 = 0xaf;

/// `struct vhost_memory`, with one `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct VhostMemory {
    pub nregions: u32,
    pub padding: u32,
    pub guest_phys_addr: u64,
    pub memory_size: u64,
    pub userspace_addr: u64,
    pub flags_padding: u64,
}

/// Bytes of `struct vhost_memory` as the header declares it, without regions: they are part of the ioctl's number.
pub const VHOST_MEMORY_HEADER: usize = 8;

/// `struct vhost_vring_state`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct VhostVringState {
    pub index: u32,
    pub num: u32,
}

/// `struct vhost_vring_file`; no file is -1.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct VhostVringFile {
    pub index: u32,
    pub fd: i32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct VhostVringAddr {
    pub index: u32,
    pub flags: u32,
    pub desc_user_addr: u64,
    pub used_user_addr: u64,
    pub avail_user_addr: u64,
    pub log_guest_addr: u64,
}

const fn write<T>(kind: u8, number: u8) -> ioctl_num_type {
    nix::request_code_write!(kind, number, size_of::<T>())
}

pub const VHOST_GET_FEATURES: ioctl_num_type = nix::request_code_read!(VHOST, 0x00, 8);
pub const VHOST_SET_FEATURES: ioctl_num_type = write::<u64>(VHOST, 0x00);
pub const VHOST_SET_OWNER: ioctl_num_type = nix::request_code_none!(VHOST, 0x01);
pub const VHOST_SET_MEM_TABLE: ioctl_num_type =
    nix::request_code_write!(VHOST, 0x03, VHOST_MEMORY_HEADER);
pub const VHOST_SET_VRING_NUM: ioctl_num_type = write::<VhostVringState>(VHOST, 0x10);
pub const VHOST_SET_VRING_ADDR: ioctl_num_type = write::<VhostVringAddr>(VHOST, 0x11);
pub const VHOST_SET_VRING_BASE: ioctl_num_type = write::<VhostVringState>(VHOST, 0x12);
pub const VHOST_GET_VRING_BASE: ioctl_num_type =
    nix::request_code_readwrite!(VHOST, 0x12, size_of::<VhostVringState>());
pub const VHOST_SET_VRING_KICK: ioctl_num_type = write::<VhostVringFile>(VHOST, 0x20);
pub const VHOST_SET_VRING_CALL: ioctl_num_type = write::<VhostVringFile>(VHOST, 0x21);
pub const VHOST_SET_VRING_ERR: ioctl_num_type = write::<VhostVringFile>(VHOST, 0x22);
pub const VHOST_NET_SET_BACKEND: ioctl_num_type = write::<VhostVringFile>(VHOST, 0x30);
pub const VHOST_VSOCK_SET_GUEST_CID: ioctl_num_type = write::<u64>(VHOST, 0x60);
pub const VHOST_VSOCK_SET_RUNNING: ioctl_num_type = write::<i32>(VHOST, 0x61);

/// What a worker may ask of the devices that it was given. The guest's number and the interface are not its to choose.
pub const OF_A_WORKER: [ioctl_num_type; 14] = [
    VHOST_GET_FEATURES,
    VHOST_SET_FEATURES,
    VHOST_SET_OWNER,
    VHOST_SET_MEM_TABLE,
    VHOST_SET_VRING_NUM,
    VHOST_SET_VRING_ADDR,
    VHOST_SET_VRING_BASE,
    VHOST_GET_VRING_BASE,
    VHOST_SET_VRING_KICK,
    VHOST_SET_VRING_CALL,
    VHOST_SET_VRING_ERR,
    VHOST_NET_SET_BACKEND,
    VHOST_VSOCK_SET_RUNNING,
    tap::TUNSETOFFLOAD,
];
