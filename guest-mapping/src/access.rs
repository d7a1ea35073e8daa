//! The one way to a guest's memory.

use crate::policy::{AddressMode, Refusal};
use crate::ring::RingMemory;
use std::io;
use std::ops::Range;
use vm_memory::{GuestAddress, Permissions, VolatileSlice};

/// A device's access to the memory of its guest.
///
/// Rings are mapped, because both sides poll them. Everything else is copied, so that nothing of a
/// request is mapped once the request is done.
pub trait GuestAccess {
    /// Maps `len` bytes from `address` until the returned [`RingMemory`] is dropped.
    ///
    /// # Errors
    ///
    /// [`AccessError`] if the policy refuses the address or the hypervisor the mapping.
    fn map_ring(
        &mut self,
        address: GuestAddress,
        len: usize,
        permissions: Permissions,
    ) -> Result<RingMemory, AccessError>;

    /// Carries out every operation, in any order, and sets its `result`. Other parts of `buffer` may be in
    /// use elsewhere meanwhile.
    ///
    /// # Panics
    ///
    /// If an operation's range lies outside `buffer`: the ranges are the device's own, not the guest's.
    fn copy(&mut self, buffer: &VolatileSlice<'_>, operations: &mut [CopyOp]);

    /// How the guest names its memory.
    fn mode(&self) -> AddressMode;

    /// Gives up what is kept for speed only. False if there is nothing of that kind.
    fn make_room(&mut self) -> bool {
        false
    }

    /// The guest's memory map changed (`IOREQ_TYPE_INVALIDATE`): forget what was cached of it.
    fn invalidate(&mut self) {}

    fn counters(&self) -> AccessCounters;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    FromGuest,
    ToGuest,
}

/// One copy between the guest, at `guest`, and the range `local` of the buffer given to
/// [`GuestAccess::copy`]; the range's length is the copy's.
#[derive(Clone, Debug)]
pub struct CopyOp {
    pub direction: Direction,
    pub guest: GuestAddress,
    pub local: Range<usize>,
    pub result: Result<(), CopyFault>,
}

impl CopyOp {
    pub fn new(direction: Direction, guest: GuestAddress, local: Range<usize>) -> Self {
        Self {
            direction,
            guest,
            local,
            result: Ok(()),
        }
    }
}

/// Why one copy of a batch failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CopyFault {
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// `status` is a `GNTST_*` code (`xen/grant_table.h`).
    #[error("Xen refused to copy by grant {} (GNTST {status}): revoked, read-only, or never granted", .reference.0)]
    Grant { reference: crate::Gref, status: i16 },
    #[error("frame {:#x} of the guest could not be mapped (errno {errno})", .gfn.0)]
    Frame { gfn: crate::Gfn, errno: i32 },
    #[error("{len} bytes at {address:#x} are not all in the memory that the VMM shares")]
    Outside { address: u64, len: usize },
    #[error("the copy call itself failed (errno {errno})")]
    Call { errno: i32 },
}

impl CopyFault {
    /// Whether dom0 lacked something, and the guest did nothing wrong.
    pub fn is_dom0s(&self) -> bool {
        match self {
            Self::Refused(_) | Self::Grant { .. } | Self::Outside { .. } => false,
            Self::Frame { errno, .. } => is_shortage(*errno),
            // What a guest got wrong has a status of its own.
            Self::Call { .. } => true,
        }
    }
}

/// Whether an errno tells of what the system lacks now, and may have later.
fn is_shortage(errno: i32) -> bool {
    matches!(
        errno,
        libc::ENOMEM
            | libc::EAGAIN
            | libc::EINTR
            | libc::EBUSY
            | libc::ENOSPC
            | libc::EMFILE
            | libc::ENFILE
    )
}

/// Why a mapping was not made.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("a ring of {len} bytes at {address:#x} is empty or larger than any virtqueue needs")]
    RingTooLarge { address: u64, len: usize },
    #[error(
        "a ring of {len} bytes at {address:#x} is not in one region of the memory that the VMM shares"
    )]
    Outside { address: u64, len: usize },
    #[error("mapping {len} bytes at {address:#x} of the guest failed")]
    Map {
        address: u64,
        len: usize,
        source: io::Error,
    },
    #[error(
        "the {count} pages from grant {} on are not granted as they must be: they were revoked, are read-only, or were \
         never granted. Linux with 64 KiB pages grants wrong frames (give it 4 KiB pages, or the device grant_usage=0)",
        .first.0
    )]
    NotGranted { first: crate::Gref, count: usize },
    #[error(
        "the {count} pages from grant {} on cannot be mapped, although they can be read: they were granted read-only, or dom0 \
         lacks memory",
        .first.0
    )]
    Unmappable { first: crate::Gref, count: usize },
}

impl AccessError {
    /// Whether dom0 lacked something, and the guest did nothing wrong.
    pub fn is_dom0s(&self) -> bool {
        match self {
            Self::Map { source, .. } => source.raw_os_error().is_some_and(is_shortage),
            Self::Refused(_)
            | Self::RingTooLarge { .. }
            | Self::Outside { .. }
            | Self::NotGranted { .. }
            | Self::Unmappable { .. } => false,
        }
    }

    /// Whether dom0 may have lacked something: a few more tries tell.
    pub fn may_be_dom0s(&self) -> bool {
        matches!(self, Self::Unmappable { .. })
    }
}

/// Plain counts since the device's access was made; `*_mapped` are what is mapped now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AccessCounters {
    /// Pages of the rings, by grant.
    pub grants_mapped: u64,
    /// Frames mapped by number: the device's rings, and for data those that its guest's devices share.
    pub frames_mapped: u64,
    /// Addresses of the kind that the device was not configured for, see [`Refusal::Kind`].
    pub refused: u64,
    /// Calls of [`GuestAccess::copy`] with something to copy.
    pub copy_batches: u64,
    pub copy_segments: u64,
    pub copy_bytes: u64,
}

impl AccessCounters {
    pub(crate) fn count_refusal(&mut self, refusal: Refusal) {
        self.refused += u64::from(matches!(refusal, Refusal::Kind { .. }));
    }

    pub(crate) fn count_copy(&mut self, segments: usize, bytes: usize) {
        self.copy_batches += 1;
        self.copy_segments += segments as u64;
        self.copy_bytes += bytes as u64;
    }
}
