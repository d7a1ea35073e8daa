//! Memory of a guest that its VMM shares with us: what a VMM's memory table says, and nothing beside it.

use crate::access::{AccessCounters, AccessError, CopyFault, CopyOp, Direction, GuestAccess};
use crate::address::PAGE_SIZE;
use crate::policy::{AddressMode, MAX_RING_PAGES};
use crate::provider::{MappedPages, part};
use crate::ring::RingMemory;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use vm_memory::{FileOffset, GuestAddress, MmapRegion, Permissions, VolatileMemory, VolatileSlice};

/// A part of the guest's memory, as the VMM tells of it.
#[derive(Debug)]
pub struct SharedRegion {
    /// Where it is for the guest.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// Where it is for the VMM.
    pub vmm: u64,
    /// What it is of, from this byte on.
    pub file: File,
    pub offset: u64,
}

/// What is wrong with a memory table.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error("the region of {len:#x} bytes at {guest:#x} runs past the end of the address space")]
    PastTheEnd { guest: u64, len: u64 },
    #[error("the region of {len:#x} bytes at {guest:#x} overlaps another one")]
    Overlap { guest: u64, len: u64 },
    #[error(
        "the region at {guest:#x} ends at byte {end:#x} of its file, which has {file:#x} bytes"
    )]
    ShortFile { guest: u64, end: u64, file: u64 },
    #[error("the region of {len:#x} bytes at {guest:#x} cannot be mapped")]
    Map {
        guest: u64,
        len: u64,
        #[source]
        source: io::Error,
    },
}

/// A guest's memory, whose table the VMM may change. Clones are the same memory.
#[derive(Clone, Debug, Default)]
pub struct OwnedMemory {
    regions: Rc<RefCell<Vec<Rc<Region>>>>,
}

#[derive(Debug)]
struct Region {
    guest: u64,
    len: u64,
    vmm: u64,
    /// Of the file, from its beginning: a file of huge pages is mapped at no other place of a page.
    mapping: MmapRegion<()>,
    /// Where the region begins in it.
    start: usize,
}

impl Region {
    fn map(shared: SharedRegion) -> Result<Self, TableError> {
        let SharedRegion {
            guest,
            len,
            vmm,
            file,
            offset,
        } = shared;
        let ends = [guest, vmm, offset].map(|start| start.checked_add(len));
        let [Some(_), Some(_), Some(end)] = ends else {
            return Err(TableError::PastTheEnd { guest, len });
        };
        let failed = |source| TableError::Map { guest, len, source };
        // An access beyond the file's end would end us.
        let bytes = file.metadata().map_err(failed)?.len();
        if end > bytes {
            let file = bytes;
            return Err(TableError::ShortFile { guest, end, file });
        }
        let fits =
            |number| usize::try_from(number).map_err(|_| TableError::PastTheEnd { guest, len });
        let (start, end) = (fits(offset)?, fits(end)?);
        let mapping = MmapRegion::from_file(FileOffset::new(file, 0), end);
        Ok(Self {
            guest,
            len,
            vmm,
            start,
            mapping: mapping.map_err(|error| failed(io::Error::other(error)))?,
        })
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.guest < other.guest + other.len && other.guest < self.guest + self.len
    }

    /// The part from `address` on, of at most `len` bytes.
    fn slice(&self, address: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let offset = address.checked_sub(self.guest)?;
        let left = self.len.checked_sub(offset).filter(|left| *left > 0)?;
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(len);
        let place = self.start + usize::try_from(offset).ok()?;
        self.mapping.get_slice(place, len).ok()
    }
}

impl OwnedMemory {
    /// The guest's memory from now on. Rings that are mapped stay as they are.
    ///
    /// # Errors
    ///
    /// [`TableError`]; nothing has changed then.
    pub fn set(&self, table: Vec<SharedRegion>) -> Result<(), TableError> {
        let regions = table
            .into_iter()
            .map(|shared| Region::map(shared).map(Rc::new));
        let regions: Vec<_> = regions.collect::<Result<_, _>>()?;
        for (index, region) in regions.iter().enumerate() {
            if regions[..index].iter().any(|other| other.overlaps(region)) {
                let Region { guest, len, .. } = **region;
                return Err(TableError::Overlap { guest, len });
            }
        }
        *self.regions.borrow_mut() = regions;
        Ok(())
    }

    /// What the guest calls an address of the VMM's, if it is shared.
    pub fn guest_address(&self, vmm: u64) -> Option<GuestAddress> {
        let regions = self.regions.borrow();
        regions.iter().find_map(|region| {
            let offset = vmm.checked_sub(region.vmm)?;
            (offset < region.len).then(|| GuestAddress(region.guest + offset))
        })
    }

    /// A device's access to it.
    pub fn access(&self) -> OwnedAccess {
        OwnedAccess {
            memory: self.clone(),
            counters: AccessCounters::default(),
        }
    }

    fn region(&self, address: u64) -> Option<Rc<Region>> {
        let regions = self.regions.borrow();
        let found = regions
            .iter()
            .find(|region| region.slice(address, 1).is_some());
        found.cloned()
    }
}

/// [`GuestAccess`] to an [`OwnedMemory`], of which it touches all that a descriptor names, and nothing outside.
#[derive(Debug)]
pub struct OwnedAccess {
    memory: OwnedMemory,
    counters: AccessCounters,
}

impl OwnedAccess {
    fn copy_one(&self, buffer: &VolatileSlice<'_>, operation: &CopyOp) -> Result<(), CopyFault> {
        let Range { start, end } = operation.local;
        let mut done = 0;
        while start + done < end {
            let left = end - start - done;
            let address = operation.guest.0.checked_add(done as u64);
            let outside = CopyFault::Outside {
                address: operation.guest.0,
                len: operation.local.len(),
            };
            let address = address.ok_or(outside)?;
            let region = self.memory.region(address).ok_or(outside)?;
            let theirs = region.slice(address, left).ok_or(outside)?;
            let here = start + done..start + done + theirs.len();
            done += theirs.len();
            let ours = part(buffer, here);
            match operation.direction {
                Direction::FromGuest => theirs.copy_to_volatile_slice(ours),
                Direction::ToGuest => ours.copy_to_volatile_slice(theirs),
            }
        }
        Ok(())
    }
}

impl GuestAccess for OwnedAccess {
    fn map_ring(
        &mut self,
        address: GuestAddress,
        len: usize,
        permissions: Permissions,
    ) -> Result<RingMemory, AccessError> {
        let address = address.0;
        if len == 0 || len > MAX_RING_PAGES * PAGE_SIZE {
            return Err(AccessError::RingTooLarge { address, len });
        }
        let region = self.memory.region(address);
        let inside = |region: &Rc<Region>| {
            let slice = region.slice(address, len);
            slice.is_some_and(|slice| slice.len() == len)
        };
        let region = region.filter(inside);
        let region = region.ok_or(AccessError::Outside { address, len })?;
        let offset = usize::try_from(address - region.guest).expect("in a mapping");
        let pages = Box::new(OwnedPages(region));
        let base = GuestAddress(address);
        Ok(RingMemory::new(base, pages, offset, len, permissions))
    }

    fn copy(&mut self, buffer: &VolatileSlice<'_>, operations: &mut [CopyOp]) {
        let mut bytes = 0;
        for operation in &mut *operations {
            operation.result = self.copy_one(buffer, operation);
            bytes += operation.local.len();
        }
        if !operations.is_empty() {
            self.counters.count_copy(operations.len(), bytes);
        }
    }

    fn mode(&self) -> AddressMode {
        AddressMode::Frames
    }

    fn counters(&self) -> AccessCounters {
        self.counters
    }
}

struct OwnedPages(Rc<Region>);

impl MappedPages for OwnedPages {
    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        let slice = self.0.mapping.get_slice(self.0.start + offset, len);
        slice.expect("map_ring found it in the region")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn file(bytes: u64) -> File {
        let file = nix::sys::memfd::memfd_create(c"owned", nix::sys::memfd::MFdFlags::empty());
        let file = File::from(file.unwrap());
        file.set_len(bytes).unwrap();
        file
    }

    fn region(guest: u64, len: u64, vmm: u64, file: &File) -> SharedRegion {
        let file = file.try_clone().unwrap();
        let offset = 0;
        SharedRegion {
            guest,
            len,
            vmm,
            file,
            offset,
        }
    }

    /// Two regions side by side, and one apart.
    fn memory() -> (OwnedMemory, [File; 3]) {
        let files = [file(0x2000), file(0x1000), file(0x1000)];
        let memory = OwnedMemory::default();
        let table = vec![
            region(0x10000, 0x2000, 0x7000_0000, &files[0]),
            region(0x12000, 0x1000, 0x7100_0000, &files[1]),
            region(0x20000, 0x1000, 0x7200_0000, &files[2]),
        ];
        memory.set(table).unwrap();
        (memory, files)
    }

    fn copy(
        memory: &OwnedMemory,
        direction: Direction,
        guest: u64,
        bytes: &mut [u8],
    ) -> Result<(), CopyFault> {
        let len = bytes.len();
        let buffer = VolatileSlice::from(bytes);
        let mut operations = [CopyOp::new(direction, GuestAddress(guest), 0..len)];
        memory.access().copy(&buffer, &mut operations);
        operations[0].result
    }

    #[test]
    fn a_copy_may_cross_regions_and_not_leave_them() {
        let (memory, files) = memory();
        let mut sent = *b"across";
        copy(&memory, Direction::ToGuest, 0x11ffd, &mut sent).unwrap();
        let (mut first, mut second) = ([0; 3], [0; 3]);
        files[0].read_exact_at(&mut first, 0x1ffd).unwrap();
        files[1].read_exact_at(&mut second, 0).unwrap();
        assert_eq!([first, second].concat(), b"across");
        let mut back = [0; 6];
        copy(&memory, Direction::FromGuest, 0x11ffd, &mut back).unwrap();
        assert_eq!(&back, b"across");
        for outside in [0, 0xffff, 0x12ffd, 0x1fffe, 0x20ffc, u64::MAX - 2] {
            let failed = copy(&memory, Direction::FromGuest, outside, &mut back);
            assert!(
                matches!(failed, Err(CopyFault::Outside { .. })),
                "{outside:#x}"
            );
        }
    }

    #[test]
    fn a_ring_lies_in_one_region() {
        let (memory, files) = memory();
        let mut access = memory.access();
        let mut map =
            |address, len| access.map_ring(GuestAddress(address), len, Permissions::ReadWrite);
        let ring = map(0x20100, 0x100).unwrap();
        files[2].write_all_at(b"ring", 0x100).unwrap();
        // A table that is gone has no say in what is mapped.
        memory.set(Vec::new()).unwrap();
        let mut read = [0; 4];
        vm_memory::Bytes::read_slice(&ring, &mut read, GuestAddress(0x20100)).unwrap();
        assert_eq!(&read, b"ring");
        assert!(map(0x20100, 0x100).is_err());
        let (memory, _) = self::memory();
        let mut access = memory.access();
        for (address, len) in [
            (0x11f80, 0x100),
            (0x20f80, 0x100),
            (0x30000, 8),
            (0x20000, 0),
            (u64::MAX, 8),
        ] {
            let mapped = access.map_ring(GuestAddress(address), len, Permissions::Read);
            assert!(mapped.is_err(), "{address:#x}");
        }
    }

    #[test]
    fn addresses_of_the_vmm_are_translated() {
        let (memory, _) = memory();
        assert_eq!(
            memory.guest_address(0x7000_1fff),
            Some(GuestAddress(0x11fff))
        );
        assert_eq!(memory.guest_address(0x7000_2000), None);
        assert_eq!(
            memory.guest_address(0x7200_0010),
            Some(GuestAddress(0x20010))
        );
        assert_eq!(memory.guest_address(0), None);
    }

    #[test]
    fn tables_that_cannot_be_are_refused_whole() {
        let (memory, files) = memory();
        let file = &files[1];
        for table in [
            vec![region(0x1000, 0x1001, 0, file)],
            vec![region(u64::MAX, 0x1000, 0, file)],
            vec![region(0, 0x1000, u64::MAX, file)],
            vec![
                region(0x1000, 0x1000, 0, file),
                region(0x1800, 0x1000, 0x10000, file),
            ],
        ] {
            assert!(memory.set(table).is_err());
        }
        let mut unharmed = [0; 4];
        copy(&memory, Direction::FromGuest, 0x20000, &mut unharmed).unwrap();
    }
}
