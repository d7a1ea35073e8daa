//! Access by grant: rings mapped, data copied by the hypervisor (`/dev/xen/gntdev`).

use super::abi::{
    self, GntdevGrantCopySegment, GntdevGrantRef, GrantCopyForeign, GrantCopyPointer,
};
use super::{Domid, Mapping};
use crate::access::{AccessCounters, AccessError, CopyFault, CopyOp, Direction, GuestAccess};
use crate::address::Page;
use crate::provider::{Piece, admit_pieces, part, ring_segments};
use crate::ring::MappedPages;
use crate::{AddressMode, Gref, MAX_RING_PAGES, PAGE_SIZE, Policy, RingMemory, syscalls};
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use vm_memory::{GuestAddress, Permissions, VolatileSlice};

const POLICY: Policy = Policy {
    mode: AddressMode::Grants,
};

/// The memory that one guest granted to this domain.
pub struct GrantAccess {
    gntdev: Rc<File>,
    domid: Domid,
    mapped: Rc<Cell<u64>>,
    counters: AccessCounters,
    /// Scratch space of [`GrantAccess::copy`]: the pieces, and the segment that each becomes.
    pieces: Vec<Piece>,
    segments: Vec<GntdevGrantCopySegment>,
}

impl GrantAccess {
    /// `gntdev` is an open `/dev/xen/gntdev`.
    pub fn new(gntdev: Rc<File>, domid: Domid) -> Self {
        Self {
            gntdev,
            domid,
            mapped: Rc::default(),
            counters: AccessCounters::default(),
            pieces: Vec::new(),
            segments: Vec::new(),
        }
    }

    fn map(&self, references: &[Gref], permissions: Permissions) -> io::Result<GrantMapping> {
        let mut request = abi::GntdevMapGrantRef {
            count: references
                .len()
                .try_into()
                .expect("bounded by MAX_RING_PAGES"),
            pad: 0,
            index: 0,
            refs: [GntdevGrantRef {
                domid: self.domid.0.into(),
                reference: 0,
            }; MAX_RING_PAGES],
        };
        for (slot, Gref(reference)) in request.refs.iter_mut().zip(references) {
            slot.reference = *reference;
        }
        // SAFETY: the kernel reads `count` references, which `refs` has room for, and writes `index`.
        unsafe { abi::gntdev_map_grant_ref(self.gntdev.as_raw_fd(), &raw mut request) }?;
        self.mapped
            .set(self.mapped.get() + u64::from(request.count));
        let reserved = Reservation {
            gntdev: Rc::clone(&self.gntdev),
            index: request.index,
            count: request.count,
            mapped: Rc::clone(&self.mapped),
        };
        let offset = request.index.try_into().map_err(io::Error::other)?;
        let mapping = Mapping::new(
            &self.gntdev,
            offset,
            references.len() * PAGE_SIZE,
            permissions,
        )?;
        Ok(GrantMapping {
            mapping,
            _reserved: reserved,
        })
    }
}

impl GrantAccess {
    /// Whether the guest has granted all these pages at least for reading, as far as Xen can be asked.
    fn can_read(&self, references: &[Gref]) -> bool {
        let mut byte = [0u8];
        let memory = VolatileSlice::from(&mut byte[..]);
        let segment = |reference: &Gref| GntdevGrantCopySegment {
            source: GrantCopyPointer {
                foreign: GrantCopyForeign {
                    reference: reference.0,
                    offset: 0,
                    domid: self.domid.0,
                },
            },
            dest: GrantCopyPointer {
                virt: memory.ptr_guard_mut().as_ptr().cast(),
            },
            len: 1,
            flags: abi::GNTCOPY_SOURCE_GREF,
            status: abi::GNTST_OKAY,
        };
        let mut segments: Vec<_> = references.iter().map(segment).collect();
        self.copy_segments(&mut segments).is_err()
            || segments
                .iter()
                .all(|segment| segment.status == abi::GNTST_OKAY)
    }

    /// Has Xen carry out `segments`, whose local sides are volatile memory of ours that outlives the call. Their outcome
    /// is in their `status`.
    ///
    /// # Errors
    ///
    /// The kernel's; nothing is known of the segments then.
    fn copy_segments(&self, segments: &mut [GntdevGrantCopySegment]) -> io::Result<()> {
        let mut request = abi::GntdevGrantCopy {
            count: segments
                .len()
                .try_into()
                .expect("a batch is far below 2^32 segments"),
            segments: segments.as_mut_ptr(),
        };
        syscalls::count();
        // SAFETY: the callers make segments of volatile memory only, which they hold; the kernel writes only there and
        // in the segments' status.
        unsafe { abi::gntdev_grant_copy(self.gntdev.as_raw_fd(), &raw mut request) }?;
        Ok(())
    }
}

impl GuestAccess for GrantAccess {
    fn map_ring(
        &mut self,
        address: GuestAddress,
        len: usize,
        permissions: Permissions,
    ) -> Result<RingMemory, AccessError> {
        let segments = ring_segments(POLICY, &mut self.counters, address, len)?;
        let references: Vec<Gref> = segments.iter().map(|segment| gref(segment.page)).collect();
        let (first, count) = (references[0], references.len());
        // gntdev says EINVAL for whatever Xen refuses, and where memory of its own is lacking half-way.
        let failed = |source: io::Error| match source.raw_os_error() {
            Some(libc::EINVAL) if self.can_read(&references) => {
                AccessError::Unmappable { first, count }
            }
            Some(libc::EINVAL) => AccessError::NotGranted { first, count },
            _ => AccessError::Map {
                address: address.0,
                len,
                source,
            },
        };
        let grants = Box::new(self.map(&references, permissions).map_err(failed)?);
        Ok(RingMemory::new(
            address,
            grants,
            segments[0].offset,
            len,
            permissions,
        ))
    }

    fn copy(&mut self, buffer: &VolatileSlice<'_>, operations: &mut [CopyOp]) {
        admit_pieces(POLICY, &mut self.counters, operations, &mut self.pieces);
        if self.pieces.is_empty() {
            return;
        }
        // Xen keeps hold of our page from one segment to the next, if it is the same: headers and statuses
        // of many requests share one.
        self.pieces.sort_unstable_by_key(|piece| piece.local.start);
        self.segments.clear();
        for piece in &self.pieces {
            self.segments.push(copy_segment(piece, self.domid, buffer));
        }
        let mut segments = std::mem::take(&mut self.segments);
        let called = self.copy_segments(&mut segments);
        self.segments = segments;
        for (segment, &Piece { owner, .. }) in self.segments.iter().zip(&self.pieces) {
            if let Err(error) = &called {
                operations[owner].result = Err(CopyFault::Call {
                    errno: error.raw_os_error().unwrap_or(libc::EIO),
                });
            } else if segment.status != abi::GNTST_OKAY {
                // SAFETY: `flags` says which side was written as the foreign one.
                let foreign = unsafe {
                    if segment.flags == abi::GNTCOPY_SOURCE_GREF {
                        segment.source.foreign
                    } else {
                        segment.dest.foreign
                    }
                };
                let reference = Gref(foreign.reference);
                operations[owner].result = Err(CopyFault::Grant {
                    reference,
                    status: segment.status,
                });
            }
        }
    }

    fn mode(&self) -> AddressMode {
        POLICY.mode
    }

    fn counters(&self) -> AccessCounters {
        AccessCounters {
            grants_mapped: self.mapped.get(),
            ..self.counters
        }
    }
}

/// The piece as gntdev takes it; `buffer` is the local side.
fn copy_segment(piece: &Piece, domid: Domid, buffer: &VolatileSlice<'_>) -> GntdevGrantCopySegment {
    let local = part(buffer, piece.local.clone());
    let virt = GrantCopyPointer {
        virt: local.ptr_guard_mut().as_ptr().cast(),
    };
    let segment = &piece.segment;
    let foreign = GrantCopyPointer {
        foreign: GrantCopyForeign {
            reference: gref(segment.page).0,
            offset: segment.offset.try_into().expect("below PAGE_SIZE"),
            domid: domid.0,
        },
    };
    let (source, dest, flags) = match piece.direction {
        Direction::FromGuest => (foreign, virt, abi::GNTCOPY_SOURCE_GREF),
        Direction::ToGuest => (virt, foreign, abi::GNTCOPY_DEST_GREF),
    };
    GntdevGrantCopySegment {
        source,
        dest,
        len: segment.len.try_into().expect("at most PAGE_SIZE"),
        flags,
        status: abi::GNTST_OKAY,
    }
}

/// Grants in this process's memory. The memory goes first, then gntdev's record of it.
struct GrantMapping {
    mapping: Mapping,
    _reserved: Reservation,
}

impl MappedPages for GrantMapping {
    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        self.mapping.slice(offset, len)
    }
}

/// What `IOCTL_GNTDEV_MAP_GRANT_REF` made: a place in gntdev's offset space.
struct Reservation {
    gntdev: Rc<File>,
    index: u64,
    count: u32,
    mapped: Rc<Cell<u64>>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut request = abi::GntdevUnmapGrantRef {
            index: self.index,
            count: self.count,
            pad: 0,
        };
        // SAFETY: the kernel only reads the request. It fails only for an index that it did not give.
        let _ = unsafe { abi::gntdev_unmap_grant_ref(self.gntdev.as_raw_fd(), &raw mut request) };
        self.mapped.set(self.mapped.get() - u64::from(self.count));
    }
}

fn gref(page: Page) -> Gref {
    match page {
        Page::Grant(reference) => reference,
        Page::Frame(_) => unreachable!("the policy for grants admits no frame"),
    }
}
