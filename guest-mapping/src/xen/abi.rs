//! The structures of Linux's gntdev and privcmd devices (`xen/gntdev.h`, `xen/privcmd.h` of the kernel's
//! UAPI), and the few constants of `xen/grant_table.h` and `xen/memory.h` that they carry.
//!
//! The `abi` test of the `tests` package checks every layout against the C headers.

use libc::{c_int, c_ulong, c_void};
use nix::sys::ioctl::{NONE, ioctl_num_type};
use xen_sys::{domid_t, xen_pfn_t};

/// `grant_ref_t` of `xen/grant_table.h`.
pub type GrantRef = u32;

/// `_IOC(_IOC_NONE, kind, number, size_of::<T>())`: Xen's devices encode a size and no direction.
pub const fn ioc_none<T>(kind: u8, number: u8) -> ioctl_num_type {
    nix::ioc!(NONE, kind, number, size_of::<T>())
}

/// `struct ioctl_gntdev_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GntdevGrantRef {
    pub domid: u32,
    pub reference: GrantRef,
}

/// `struct ioctl_gntdev_map_grant_ref`, with room for as many references as the policy lets a ring have.
#[repr(C)]
#[derive(Debug)]
pub struct GntdevMapGrantRef {
    pub count: u32,
    pub pad: u32,
    pub index: u64,
    pub refs: [GntdevGrantRef; crate::MAX_RING_PAGES],
}

/// `struct ioctl_gntdev_map_grant_ref` as the header declares it, with one reference: its size is part of
/// the ioctl's number.
#[repr(C)]
pub struct GntdevMapGrantRefHeader {
    pub count: u32,
    pub pad: u32,
    pub index: u64,
    pub refs: [GntdevGrantRef; 1],
}

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
#[derive(Debug)]
pub struct GntdevUnmapGrantRef {
    pub index: u64,
    pub count: u32,
    pub pad: u32,
}

/// The foreign side of a `struct gntdev_grant_copy_segment`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GrantCopyForeign {
    pub reference: GrantRef,
    pub offset: u16,
    pub domid: domid_t,
}

/// `source` and `dest` of a `struct gntdev_grant_copy_segment`.
#[repr(C)]
#[derive(Clone, Copy)]
pub union GrantCopyPointer {
    pub virt: *mut c_void,
    pub foreign: GrantCopyForeign,
}

/// `struct gntdev_grant_copy_segment`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GntdevGrantCopySegment {
    pub source: GrantCopyPointer,
    pub dest: GrantCopyPointer,
    pub len: u16,
    pub flags: u16,
    pub status: i16,
}

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
pub struct GntdevGrantCopy {
    pub count: u32,
    pub segments: *mut GntdevGrantCopySegment,
}

/// `struct privcmd_mmapbatch_v2`.
#[repr(C)]
pub struct PrivcmdMmapbatchV2 {
    pub num: u32,
    pub dom: domid_t,
    pub addr: u64,
    pub arr: *const xen_pfn_t,
    pub err: *mut c_int,
}

/// `struct privcmd_mmap_resource`.
#[repr(C)]
pub struct PrivcmdMmapResource {
    pub dom: domid_t,
    pub kind: u32,
    pub id: u32,
    pub idx: u32,
    pub num: u64,
    pub addr: u64,
}

pub const IOCTL_GNTDEV_MAP_GRANT_REF: ioctl_num_type = ioc_none::<GntdevMapGrantRefHeader>(b'G', 0);
pub const IOCTL_GNTDEV_UNMAP_GRANT_REF: ioctl_num_type = ioc_none::<GntdevUnmapGrantRef>(b'G', 1);
pub const IOCTL_GNTDEV_GRANT_COPY: ioctl_num_type = ioc_none::<GntdevGrantCopy>(b'G', 8);
pub const IOCTL_PRIVCMD_MMAPBATCH_V2: ioctl_num_type = ioc_none::<PrivcmdMmapbatchV2>(b'P', 4);
pub const IOCTL_PRIVCMD_RESTRICT: ioctl_num_type = ioc_none::<domid_t>(b'P', 6);
pub const IOCTL_PRIVCMD_MMAP_RESOURCE: ioctl_num_type = ioc_none::<PrivcmdMmapResource>(b'P', 7);

/// `GNTCOPY_source_gref` and `GNTCOPY_dest_gref`.
pub const GNTCOPY_SOURCE_GREF: u16 = 1 << 0;
pub const GNTCOPY_DEST_GREF: u16 = 1 << 1;
/// `GNTST_okay`.
pub const GNTST_OKAY: i16 = 0;

/// `XENMEM_resource_ioreq_server` and `XENMEM_resource_ioreq_server_frame_ioreq(0)`.
pub const RESOURCE_IOREQ_SERVER: u32 = 0;
pub const IOREQ_SERVER_FRAME_IOREQ: u32 = 1;

nix::ioctl_readwrite_bad!(
    gntdev_map_grant_ref,
    IOCTL_GNTDEV_MAP_GRANT_REF,
    GntdevMapGrantRef
);
nix::ioctl_readwrite_bad!(
    gntdev_unmap_grant_ref,
    IOCTL_GNTDEV_UNMAP_GRANT_REF,
    GntdevUnmapGrantRef
);
nix::ioctl_readwrite_bad!(gntdev_grant_copy, IOCTL_GNTDEV_GRANT_COPY, GntdevGrantCopy);
nix::ioctl_readwrite_bad!(
    privcmd_mmapbatch_v2,
    IOCTL_PRIVCMD_MMAPBATCH_V2,
    PrivcmdMmapbatchV2
);
nix::ioctl_write_ptr_bad!(privcmd_restrict, IOCTL_PRIVCMD_RESTRICT, domid_t);
nix::ioctl_readwrite_bad!(
    privcmd_mmap_resource,
    IOCTL_PRIVCMD_MMAP_RESOURCE,
    PrivcmdMmapResource
);

// The ioctl numbers above are built for the kernel's 64-bit layout.
const _: () = assert!(size_of::<c_ulong>() == 8);
