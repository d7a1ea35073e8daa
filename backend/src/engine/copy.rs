//! Copies between a device's own memory and the guest's.

use vm_memory::VolatileSlice;
use xen_virtio_guest_mapping::{CopyFault, CopyOp, GuestAccess};

/// Copies, once more with what room can be made if dom0 lacked something.
///
/// # Errors
///
/// The first fault that is dom0's. Those of the guest stay with their operations.
pub(crate) fn copy(
    access: &mut dyn GuestAccess,
    memory: &VolatileSlice<'_>,
    operations: &mut [CopyOp],
) -> Result<(), CopyFault> {
    access.copy(memory, operations);
    if first_of_dom0s(operations).is_some() && access.make_room() {
        access.copy(memory, operations);
    }
    first_of_dom0s(operations).map_or(Ok(()), Err)
}

fn first_of_dom0s(operations: &[CopyOp]) -> Option<CopyFault> {
    let mut faults = operations
        .iter()
        .filter_map(|operation| operation.result.err());
    faults.find(CopyFault::is_dom0s)
}

/// The first fault, of whomever.
pub(crate) fn first_fault(operations: &[CopyOp]) -> Option<CopyFault> {
    operations
        .iter()
        .find_map(|operation| operation.result.err())
}
