//! What an implementation of [`GuestAccess`](crate::GuestAccess) is built of, whichever hypervisor it is for: every address
//! that a guest chose passes the [`Policy`] here.

use crate::access::{AccessCounters, AccessError, CopyOp, Direction};
use crate::address::Segment;
use crate::policy::Policy;
pub use crate::ring::MappedPages;
use std::ops::Range;
use vm_memory::{GuestAddress, VolatileSlice};

/// The segments of a ring, if the policy admits it.
///
/// # Errors
///
/// Those of [`Policy::admit_ring`]; refused addresses are counted.
pub fn ring_segments(
    policy: Policy,
    counters: &mut AccessCounters,
    address: GuestAddress,
    len: usize,
) -> Result<Vec<Segment>, AccessError> {
    policy
        .admit_ring(address, len)
        .map(Iterator::collect)
        .inspect_err(|error| {
            if let AccessError::Refused(refusal) = error {
                counters.count_refusal(*refusal);
            }
        })
}

/// What of a copy lies in one page of the guest.
#[derive(Debug)]
pub struct Piece {
    /// The operation that it belongs to.
    pub owner: usize,
    pub direction: Direction,
    pub segment: Segment,
    /// The part of the buffer.
    pub local: Range<usize>,
}

/// Admits every operation, and fills `pieces` with what they come to. An operation that is refused gets its
/// fault here.
pub fn admit_pieces(
    policy: Policy,
    counters: &mut AccessCounters,
    operations: &mut [CopyOp],
    pieces: &mut Vec<Piece>,
) {
    pieces.clear();
    let mut bytes = 0;
    for (owner, operation) in operations.iter_mut().enumerate() {
        operation.result = Ok(());
        match policy.admit(operation.guest, operation.local.len()) {
            Ok(segments) => {
                bytes += operation.local.len();
                let mut start = operation.local.start;
                for segment in segments {
                    let local = start..start + segment.len;
                    start = local.end;
                    pieces.push(Piece {
                        owner,
                        direction: operation.direction,
                        segment,
                        local,
                    });
                }
            }
            Err(refusal) => {
                counters.count_refusal(refusal);
                operation.result = Err(refusal.into());
            }
        }
    }
    if !pieces.is_empty() {
        counters.count_copy(pieces.len(), bytes);
    }
}

/// The part of a device's buffer that a segment is for.
///
/// # Panics
///
/// If it lies outside `buffer`: ranges are the device's own, not the guest's.
pub fn part<'a>(buffer: &VolatileSlice<'a>, range: Range<usize>) -> VolatileSlice<'a> {
    buffer
        .subslice(range.start, range.len())
        .expect("an operation's range lies in its device's buffer")
}
