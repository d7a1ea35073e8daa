//! A guest's memory and grant table.

use crate::faults::{Fault, Faults};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use vm_memory::{GuestAddress, MmapRegion, Permissions, VolatileMemory, VolatileSlice};
use xen_virtio_guest_mapping::provider::{MappedPages, Piece, admit_pieces, part, ring_segments};
use xen_virtio_guest_mapping::{
    AccessCounters, AccessError, AddressMode, CopyFault, CopyOp, Direction, Gfn, Gref, GuestAccess,
    PAGE_SIZE, Page, Policy, RingMemory,
};

/// The guest's first frame: where Xen puts an Arm guest's RAM (`GUEST_RAM0_BASE`).
const FIRST_FRAME: u64 = 0x4000_0000 / PAGE_SIZE as u64;

/// `GNTST_bad_gntref` and `GNTST_permission_denied` (`xen/grant_table.h`).
const GNTST_BAD_GNTREF: i16 = -3;
const GNTST_PERMISSION_DENIED: i16 = -8;

/// A simulated guest's memory. Clones share it: one for the guest, others for the backend.
#[derive(Clone, Debug)]
pub struct SimMemory {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    frames: MmapRegion,
    table: Mutex<Table>,
    faults: Faults,
}

#[derive(Debug, Default)]
struct Table {
    used_frames: Vec<bool>,
    grants: BTreeMap<Gref, Grant>,
    next_reference: u32,
    revoked_while_mapped: u64,
}

#[derive(Debug)]
struct Grant {
    gfn: Gfn,
    writable: bool,
    mapped: u32,
}

impl SimMemory {
    /// A guest with `frames` pages of zeroed memory.
    ///
    /// # Errors
    ///
    /// If this machine has not that much.
    pub fn new(frames: usize) -> io::Result<Self> {
        let region = MmapRegion::new(frames * PAGE_SIZE).map_err(io::Error::other)?;
        // References below 8 are Xen's own (GNTTAB_NR_RESERVED_ENTRIES).
        let table = Table {
            used_frames: vec![false; frames],
            next_reference: 8,
            ..Table::default()
        };
        Ok(Self {
            shared: Arc::new(Shared {
                frames: region,
                table: Mutex::new(table),
                faults: Faults::default(),
            }),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared
            .table
            .lock()
            .expect("no holder of this lock panics")
    }

    /// Takes `count` consecutive unused frames and zeroes them; `None` when the guest has not that many.
    pub fn allocate(&self, count: usize) -> Option<Gfn> {
        let mut table = self.table();
        let start = table
            .used_frames
            .windows(count.max(1))
            .position(|window| window.iter().all(|used| !used))?;
        table.used_frames[start..start + count].fill(true);
        let first = Gfn(FIRST_FRAME + start as u64);
        self.memory(first, count * PAGE_SIZE)?
            .copy_from(&vec![0u8; count * PAGE_SIZE]);
        Some(first)
    }

    pub fn free(&self, first: Gfn, count: usize) {
        let start = usize::try_from(first.0 - FIRST_FRAME).expect("a frame that allocate gave");
        self.table().used_frames[start..start + count].fill(false);
    }

    /// Grants `count` frames from `first` to the backend, under consecutive references.
    pub fn grant(&self, first: Gfn, count: usize, writable: bool) -> Gref {
        let mut table = self.table();
        let start = table.next_reference;
        for index in 0..count {
            let grant = Grant {
                gfn: Gfn(first.0 + index as u64),
                writable,
                mapped: 0,
            };
            let reference = Gref(table.next_reference);
            table.grants.insert(reference, grant);
            table.next_reference += 1;
        }
        Gref(start)
    }

    /// Ends `count` grants from `first`. One that the backend has still mapped is what makes Linux give up
    /// a device for good; it is counted, see [`SimMemory::revoked_while_mapped`].
    pub fn revoke(&self, first: Gref, count: usize) {
        let mut table = self.table();
        for reference in (first.0..).take(count) {
            if let Some(grant) = table.grants.remove(&Gref(reference)) {
                table.revoked_while_mapped += u64::from(grant.mapped > 0);
            }
        }
    }

    /// How many grants were ended while the backend had them mapped.
    pub fn revoked_while_mapped(&self) -> u64 {
        self.table().revoked_while_mapped
    }

    /// Grants that exist now.
    pub fn grants(&self) -> usize {
        self.table().grants.len()
    }

    /// The guest's own view of `len` bytes from frame `first`; `None` outside its memory.
    pub fn memory(&self, first: Gfn, len: usize) -> Option<VolatileSlice<'_>> {
        let frame = usize::try_from(first.0.checked_sub(FIRST_FRAME)?).ok()?;
        self.shared
            .frames
            .get_slice(frame.checked_mul(PAGE_SIZE)?, len)
            .ok()
    }

    /// What is to go wrong for whoever serves this guest.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// The backend's access to this guest.
    pub fn access(&self, mode: AddressMode) -> SimAccess {
        SimAccess {
            memory: self.clone(),
            policy: Policy { mode },
            counters: AccessCounters::default(),
            pieces: Vec::new(),
        }
    }
}

impl Table {
    /// The frame that a page names, if the backend may use it so.
    fn frame(&self, page: Page, write: bool) -> Result<Gfn, CopyFault> {
        let reference = match page {
            Page::Frame(gfn) => return Ok(gfn),
            Page::Grant(reference) => reference,
        };
        let fault = |status| CopyFault::Grant { reference, status };
        let grant = self.grants.get(&reference).ok_or(fault(GNTST_BAD_GNTREF))?;
        if write && !grant.writable {
            return Err(fault(GNTST_PERMISSION_DENIED));
        }
        Ok(grant.gfn)
    }
}

/// [`GuestAccess`] to a [`SimMemory`].
#[derive(Debug)]
pub struct SimAccess {
    memory: SimMemory,
    policy: Policy,
    counters: AccessCounters,
    pieces: Vec<Piece>,
}

impl SimAccess {
    fn copy_piece(&self, buffer: &VolatileSlice<'_>, piece: &Piece) -> Result<(), CopyFault> {
        let Piece {
            direction, segment, ..
        } = *piece;
        self.memory.faults().step();
        let table = self.memory.table();
        if self.memory.faults().strikes(Fault::RevokedCopy) {
            return Err(CopyFault::Grant {
                reference: Gref(0),
                status: GNTST_BAD_GNTREF,
            });
        }
        let gfn = table.frame(segment.page, direction == Direction::ToGuest)?;
        let fault = CopyFault::Frame {
            gfn,
            errno: libc::ENOENT,
        };
        let frame = self.memory.memory(gfn, PAGE_SIZE).ok_or(fault)?;
        let slice = frame
            .subslice(segment.offset, segment.len)
            .map_err(|_| fault)?;
        let ours = part(buffer, piece.local.clone());
        match direction {
            Direction::FromGuest => slice.copy_to_volatile_slice(ours),
            Direction::ToGuest => ours.copy_to_volatile_slice(slice),
        }
        Ok(())
    }
}

impl GuestAccess for SimAccess {
    fn map_ring(
        &mut self,
        address: GuestAddress,
        len: usize,
        permissions: Permissions,
    ) -> Result<RingMemory, AccessError> {
        let segments = ring_segments(self.policy, &mut self.counters, address, len)?;
        let failed = |why: &str| AccessError::Map {
            address: address.0,
            len,
            source: io::Error::other(why),
        };
        let mut table = self.memory.table();
        if self.memory.faults().strikes(Fault::DoubtfulMap) {
            let count = segments.len();
            let first = Gref(0);
            return Err(AccessError::Unmappable { first, count });
        }
        if self.memory.faults().strikes(Fault::MapRing) {
            return Err(AccessError::Map {
                address: address.0,
                len,
                source: io::Error::from_raw_os_error(libc::ENOMEM),
            });
        }
        let mut frames = Vec::new();
        for segment in &segments {
            let frame = table.frame(segment.page, permissions.has_write());
            frames.push(frame.map_err(|fault| failed(&fault.to_string()))?);
        }
        if frames.windows(2).any(|pair| pair[1].0 != pair[0].0 + 1) {
            return Err(failed(
                "the simulator maps only rings whose frames are consecutive",
            ));
        }
        let inside = self.memory.memory(frames[0], frames.len() * PAGE_SIZE);
        inside.ok_or_else(|| failed("outside the guest's memory"))?;
        let mut mapped = SimMapping {
            memory: self.memory.clone(),
            first: frames[0],
            references: Vec::new(),
        };
        for segment in &segments {
            if let Page::Grant(reference) = segment.page
                && let Some(grant) = table.grants.get_mut(&reference)
            {
                grant.mapped += 1;
                mapped.references.push(reference);
            }
        }
        drop(table);
        let offset = segments[0].offset;
        Ok(RingMemory::new(
            address,
            Box::new(mapped),
            offset,
            len,
            permissions,
        ))
    }

    fn copy(&mut self, buffer: &VolatileSlice<'_>, operations: &mut [CopyOp]) {
        let mut pieces = std::mem::take(&mut self.pieces);
        admit_pieces(self.policy, &mut self.counters, operations, &mut pieces);
        let fails = !pieces.is_empty() && self.memory.faults().strikes(Fault::CopyCall);
        let errno = libc::ENOMEM;
        for piece in &pieces {
            let copied = match fails {
                true => Err(CopyFault::Call { errno }),
                false => self.copy_piece(buffer, piece),
            };
            if let Err(fault) = copied {
                operations[piece.owner].result = Err(fault);
            }
        }
        self.pieces = pieces;
    }

    fn mode(&self) -> AddressMode {
        self.policy.mode
    }

    fn counters(&self) -> AccessCounters {
        let mapped = self
            .memory
            .table()
            .grants
            .values()
            .map(|grant| u64::from(grant.mapped))
            .sum();
        AccessCounters {
            grants_mapped: mapped,
            ..self.counters
        }
    }
}

/// A ring that the backend has mapped.
#[derive(Debug)]
struct SimMapping {
    memory: SimMemory,
    first: Gfn,
    references: Vec<Gref>,
}

impl MappedPages for SimMapping {
    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        self.memory.faults().step();
        let pages = self.memory.memory(self.first, offset + len);
        let slice = pages.and_then(|pages| pages.subslice(offset, len).ok());
        slice.expect("map_ring found the pages in the guest's memory")
    }
}

impl Drop for SimMapping {
    fn drop(&mut self) {
        let mut table = self.memory.table();
        for reference in &self.references {
            if let Some(grant) = table.grants.get_mut(reference) {
                grant.mapped -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xen_virtio_guest_mapping::BusAddress;

    fn grant_address(reference: Gref) -> GuestAddress {
        BusAddress {
            page: Page::Grant(reference),
            offset: 0,
        }
        .into()
    }

    fn copy_one(
        access: &mut SimAccess,
        direction: Direction,
        guest: GuestAddress,
        len: usize,
    ) -> CopyOp {
        let mut operations = [CopyOp::new(direction, guest, 0..len)];
        let mut bytes = vec![0x5a; len];
        access.copy(&VolatileSlice::from(&mut bytes[..]), &mut operations);
        let [operation] = operations;
        operation
    }

    #[test]
    fn a_copy_reaches_only_what_was_granted() {
        let guest = SimMemory::new(8).unwrap();
        let frames = guest.allocate(2).unwrap();
        let reference = guest.grant(frames, 1, true);
        let mut access = guest.access(AddressMode::Grants);
        let address = grant_address(reference);
        assert_eq!(
            copy_one(&mut access, Direction::ToGuest, address, PAGE_SIZE).result,
            Ok(())
        );
        assert!(
            copy_one(&mut access, Direction::ToGuest, address, PAGE_SIZE + 1)
                .result
                .is_err()
        );
        let mut seen = [0u8; 4];
        guest.memory(frames, 4).unwrap().copy_to(&mut seen[..]);
        assert_eq!(seen, [0x5a; 4]);
    }

    #[test]
    fn a_read_only_grant_is_never_written() {
        let guest = SimMemory::new(8).unwrap();
        let reference = guest.grant(guest.allocate(1).unwrap(), 1, false);
        let mut access = guest.access(AddressMode::Grants);
        let address = grant_address(reference);
        assert!(
            copy_one(&mut access, Direction::ToGuest, address, 1)
                .result
                .is_err()
        );
        assert!(
            access
                .map_ring(address, 64, Permissions::ReadWrite)
                .is_err()
        );
        assert!(access.map_ring(address, 64, Permissions::Read).is_ok());
    }

    #[test]
    fn a_ring_is_mapped_until_it_is_dropped() {
        let guest = SimMemory::new(8).unwrap();
        let reference = guest.grant(guest.allocate(2).unwrap(), 2, true);
        let mut access = guest.access(AddressMode::Grants);
        let ring = access
            .map_ring(
                grant_address(reference),
                2 * PAGE_SIZE,
                Permissions::ReadWrite,
            )
            .unwrap();
        assert_eq!(access.counters().grants_mapped, 2);
        drop(ring);
        assert_eq!(access.counters().grants_mapped, 0);
        guest.revoke(reference, 2);
        assert_eq!((guest.revoked_while_mapped(), guest.grants()), (0, 0));
    }

    #[test]
    fn a_frame_is_refused_and_counted_where_grants_are_due() {
        let guest = SimMemory::new(8).unwrap();
        let mut access = guest.access(AddressMode::Grants);
        let fault = copy_one(
            &mut access,
            Direction::ToGuest,
            GuestAddress(0x4000_0000),
            1,
        )
        .result;
        assert!(matches!(fault, Err(CopyFault::Refused(_))));
        assert_eq!(access.counters().refused, 1);
    }
}
