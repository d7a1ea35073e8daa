//! The structures of `xen/hvm/dm_op.h`, `xen/hvm/ioreq.h`, the head of those of `xen/domctl.h`, and Linux's `xen/evtchn.h`
//! and the hypercalls of `xen/privcmd.h`.
//!
//! The `abi` test of the `tests` package checks every layout against the C headers.

use libc::c_void;
use nix::sys::ioctl::ioctl_num_type;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};
use xen_sys::{domid_t, evtchn_port_t};
use xen_virtio_guest_mapping::xen::abi::ioc_none;

/// `ioservid_t`.
pub type IoservId = u16;

pub const XEN_DMOP_CREATE_IOREQ_SERVER: u32 = 1;
pub const XEN_DMOP_MAP_IO_RANGE_TO_IOREQ_SERVER: u32 = 3;
pub const XEN_DMOP_SET_IOREQ_SERVER_STATE: u32 = 5;
pub const XEN_DMOP_SET_IRQ_LEVEL: u32 = 19;
pub const XEN_DMOP_NR_VCPUS: u32 = 20;
pub const XEN_DMOP_IO_RANGE_MEMORY: u32 = 1;
pub const HVM_IOREQSRV_BUFIOREQ_OFF: u8 = 0;

/// `struct xen_dm_op_create_ioreq_server`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CreateIoreqServer {
    pub handle_bufioreq: u8,
    pub pad: [u8; 3],
    pub id: IoservId,
}

/// `struct xen_dm_op_ioreq_server_range`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IoreqServerRange {
    pub id: IoservId,
    pub pad: u16,
    pub kind: u32,
    pub start: u64,
    pub end: u64,
}

/// `struct xen_dm_op_set_ioreq_server_state`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SetIoreqServerState {
    pub id: IoservId,
    pub enabled: u8,
    pub pad: u8,
}

/// `struct xen_dm_op_set_irq_level`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SetIrqLevel {
    pub irq: u32,
    pub level: u8,
    pub pad: [u8; 3],
}

/// `struct xen_dm_op_nr_vcpus`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct NrVcpus {
    pub vcpus: u32,
}

/// The `u` of a `struct xen_dm_op`, with those of its members that are used here and one that gives it the
/// size and alignment of the whole.
#[repr(C)]
#[derive(Clone, Copy)]
pub union DmOpArgument {
    pub create_ioreq_server: CreateIoreqServer,
    pub range: IoreqServerRange,
    pub set_ioreq_server_state: SetIoreqServerState,
    pub set_irq_level: SetIrqLevel,
    pub nr_vcpus: NrVcpus,
    /// As long as the longest member, `struct xen_dm_op_pin_memory_cacheattr`.
    pub whole: [u64; 3],
}

/// `struct xen_dm_op`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DmOp {
    pub op: u32,
    pub pad: u32,
    pub argument: DmOpArgument,
}

/// `struct privcmd_dm_op_buf`.
#[repr(C)]
pub struct PrivcmdDmOpBuf {
    pub uptr: *mut c_void,
    pub size: usize,
}

/// `struct privcmd_dm_op`.
#[repr(C)]
pub struct PrivcmdDmOp {
    pub dom: domid_t,
    pub num: u16,
    pub ubufs: *const PrivcmdDmOpBuf,
}

/// `__HYPERVISOR_domctl` of `xen/xen.h`.
pub const HYPERVISOR_DOMCTL: u64 = 36;
pub const XEN_DOMCTL_PAUSEDOMAIN: u32 = 3;
pub const XEN_DOMCTL_UNPAUSEDOMAIN: u32 = 4;

/// `struct xen_domctl`, of an operation that has no argument.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Domctl {
    pub cmd: u32,
    pub interface_version: u32,
    pub domain: domid_t,
    pub pad: [u16; 3],
    /// As long as the longest argument.
    pub argument: [u64; 16],
}

/// `struct privcmd_hypercall`.
#[repr(C)]
pub struct PrivcmdHypercall {
    pub op: u64,
    pub arg: [u64; 5],
}

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
pub struct EvtchnBindInterdomain {
    pub remote_domain: u32,
    pub remote_port: evtchn_port_t,
}

/// `struct ioctl_evtchn_notify`, and `struct ioctl_evtchn_unbind`.
#[repr(C)]
pub struct EvtchnPort {
    pub port: evtchn_port_t,
}

/// `struct ioctl_evtchn_restrict_domid`.
#[repr(C)]
pub struct EvtchnRestrictDomid {
    pub domid: domid_t,
}

pub const IOCTL_PRIVCMD_HYPERCALL: ioctl_num_type = ioc_none::<PrivcmdHypercall>(b'P', 0);
pub const IOCTL_PRIVCMD_DM_OP: ioctl_num_type = ioc_none::<PrivcmdDmOp>(b'P', 5);
pub const IOCTL_EVTCHN_BIND_INTERDOMAIN: ioctl_num_type =
    ioc_none::<EvtchnBindInterdomain>(b'E', 1);
pub const IOCTL_EVTCHN_NOTIFY: ioctl_num_type = ioc_none::<EvtchnPort>(b'E', 4);
pub const IOCTL_EVTCHN_RESTRICT_DOMID: ioctl_num_type = ioc_none::<EvtchnRestrictDomid>(b'E', 6);

nix::ioctl_write_ptr_bad!(privcmd_hypercall, IOCTL_PRIVCMD_HYPERCALL, PrivcmdHypercall);
nix::ioctl_write_ptr_bad!(privcmd_dm_op, IOCTL_PRIVCMD_DM_OP, PrivcmdDmOp);
nix::ioctl_write_ptr_bad!(
    evtchn_bind_interdomain,
    IOCTL_EVTCHN_BIND_INTERDOMAIN,
    EvtchnBindInterdomain
);
nix::ioctl_write_ptr_bad!(evtchn_notify, IOCTL_EVTCHN_NOTIFY, EvtchnPort);
nix::ioctl_write_ptr_bad!(
    evtchn_restrict_domid,
    IOCTL_EVTCHN_RESTRICT_DOMID,
    EvtchnRestrictDomid
);

/// `struct ioreq`: the slot of one vCPU in an ioreq server's page, shared with Xen.
#[repr(C)]
pub struct Ioreq {
    pub addr: AtomicU64,
    pub data: AtomicU64,
    pub count: AtomicU32,
    pub size: AtomicU32,
    pub vp_eport: AtomicU32,
    pub pad0: u16,
    /// `state:4`, `data_is_ptr:1`, `dir:1`, `df:1`, from the lowest bit.
    pub flags: AtomicU8,
    pub kind: AtomicU8,
}

pub const IOREQ_STATE_MASK: u8 = 0xf;
pub const IOREQ_DATA_IS_PTR: u8 = 1 << 4;
pub const IOREQ_DIR_READ: u8 = 1 << 5;

pub const STATE_IOREQ_READY: u8 = 1;
pub const STATE_IOREQ_INPROCESS: u8 = 2;
pub const STATE_IORESP_READY: u8 = 3;

pub const IOREQ_TYPE_COPY: u8 = 1;
pub const IOREQ_TYPE_INVALIDATE: u8 = 8;
