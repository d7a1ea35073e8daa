//! Device-model operations on one guest (`HYPERVISOR_dm_op`, `xen/hvm/dm_op.h`): all of a stable ABI.

use super::abi::{self, DmOp, DmOpArgument, IoservId};
use crate::hypervisor::MmioRange;
use std::io;
use std::os::fd::AsRawFd;
use xen_virtio_guest_mapping::syscalls;
use xen_virtio_guest_mapping::xen::Privcmd;

fn call(privcmd: &Privcmd, op: u32, argument: DmOpArgument) -> io::Result<DmOpArgument> {
    let mut operation = DmOp {
        op,
        pad: 0,
        argument,
    };
    let buffers = [abi::PrivcmdDmOpBuf {
        uptr: (&raw mut operation).cast(),
        size: size_of_val(&operation),
    }];
    let request = abi::PrivcmdDmOp {
        dom: privcmd.domid().0,
        num: 1,
        ubufs: buffers.as_ptr(),
    };
    syscalls::count();
    // SAFETY: the kernel reads one buffer description and lets Xen read and write that buffer, a whole
    // `struct xen_dm_op`.
    unsafe { abi::privcmd_dm_op(privcmd.file().as_raw_fd(), &raw const request) }?;
    Ok(operation.argument)
}

/// All zeros, so that no member has an undefined byte whichever of them is set afterwards.
const ZERO: DmOpArgument = DmOpArgument { whole: [0; 3] };

pub(super) fn vcpus(privcmd: &Privcmd) -> io::Result<u32> {
    let answer = call(privcmd, abi::XEN_DMOP_NR_VCPUS, ZERO)?;
    // SAFETY: any bytes are a valid `NrVcpus`.
    Ok(unsafe { answer.nr_vcpus }.vcpus)
}

pub(super) fn create_ioreq_server(privcmd: &Privcmd) -> io::Result<IoservId> {
    let mut argument = ZERO;
    argument.create_ioreq_server = abi::CreateIoreqServer {
        handle_bufioreq: abi::HVM_IOREQSRV_BUFIOREQ_OFF,
        ..Default::default()
    };
    let answer = call(privcmd, abi::XEN_DMOP_CREATE_IOREQ_SERVER, argument)?;
    // SAFETY: any bytes are a valid `CreateIoreqServer`.
    Ok(unsafe { answer.create_ioreq_server }.id)
}

pub(super) fn enable_ioreq_server(privcmd: &Privcmd, id: IoservId) -> io::Result<()> {
    let mut argument = ZERO;
    argument.set_ioreq_server_state = abi::SetIoreqServerState {
        id,
        enabled: 1,
        pad: 0,
    };
    call(privcmd, abi::XEN_DMOP_SET_IOREQ_SERVER_STATE, argument).map(drop)
}

pub(super) fn map_range(privcmd: &Privcmd, id: IoservId, range: MmioRange) -> io::Result<()> {
    let mut argument = ZERO;
    argument.range = abi::IoreqServerRange {
        id,
        pad: 0,
        kind: abi::XEN_DMOP_IO_RANGE_MEMORY,
        start: range.base,
        // The end is inclusive.
        end: range.base + (range.len - 1),
    };
    call(
        privcmd,
        abi::XEN_DMOP_MAP_IO_RANGE_TO_IOREQ_SERVER,
        argument,
    )
    .map(drop)
}

pub(super) fn raise_irq(privcmd: &Privcmd, irq: u32) -> io::Result<()> {
    let mut argument = ZERO;
    argument.set_irq_level = abi::SetIrqLevel {
        irq,
        level: 1,
        pad: [0; 3],
    };
    call(privcmd, abi::XEN_DMOP_SET_IRQ_LEVEL, argument).map(drop)
}
