//! Ring memory: the parts of a guest that stay mapped while a queue runs.

use std::fmt;
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// Pages of a guest that are mapped side by side, until this is dropped.
pub trait MappedPages {
    /// `len` bytes from byte `offset` of the first page.
    ///
    /// # Panics
    ///
    /// If they do not lie in the pages.
    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_>;
}

/// One or more mapped areas, found by the address that the guest gave, through vm-memory's
/// [`GuestMemory`]. Dropping it unmaps them.
#[derive(Debug)]
pub struct RingMemory {
    areas: Vec<Area>,
}

struct Area {
    base: GuestAddress,
    len: usize,
    permissions: Permissions,
    pages: Box<dyn MappedPages>,
    /// Where the area begins in its pages.
    offset: usize,
}

impl RingMemory {
    /// The `len` bytes from byte `offset` of `pages`, which the guest knows as `base`.
    pub fn new(
        base: GuestAddress,
        pages: Box<dyn MappedPages>,
        offset: usize,
        len: usize,
        permissions: Permissions,
    ) -> Self {
        let area = Area {
            base,
            len,
            permissions,
            pages,
            offset,
        };
        Self { areas: vec![area] }
    }

    /// All areas of both. Where areas overlap, an access uses the first that covers and permits it.
    pub fn join(mut self, other: Self) -> Self {
        self.areas.extend(other.areas);
        self
    }

    fn slice(
        &self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<VolatileSlice<'_>> {
        self.areas
            .iter()
            .find_map(|area| area.slice(address, count, access))
            .ok_or(Error::InvalidGuestAddress(address))
    }
}

impl Area {
    fn slice(
        &self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_>> {
        let offset = usize::try_from(address.0.checked_sub(self.base.0)?).ok()?;
        let inside = offset.checked_add(count)? <= self.len && self.permissions.allow(access);
        inside.then(|| self.pages.slice(self.offset + offset, count))
    }
}

impl fmt::Debug for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#x}+{:#x} {:?}",
            self.base.0, self.len, self.permissions
        )
    }
}

impl GuestMemory for RingMemory {
    /// Not used: ring memory is no physical address space.
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, count: usize, access: Permissions) -> bool {
        self.slice(address, count, access).is_ok()
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        let slice = if count == 0 {
            None
        } else {
            Some(self.slice(address, count, access)?)
        };
        Ok(OneSlice(slice))
    }
}

/// An access lies in one area, so there is at most one slice.
struct OneSlice<'a>(Option<VolatileSlice<'a>>);

impl<'a> Iterator for OneSlice<'a> {
    type Item = Result<VolatileSlice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take().map(Ok)
    }
}

impl std::iter::FusedIterator for OneSlice<'_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for OneSlice<'a> {}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, MmapRegion, VolatileMemory};

    impl MappedPages for MmapRegion<()> {
        fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
            self.get_slice(offset, len).unwrap()
        }
    }

    /// An area of 64 bytes in the middle of a page.
    fn area(base: u64, permissions: Permissions) -> RingMemory {
        let pages = Box::new(MmapRegion::new(4096).unwrap());
        RingMemory::new(GuestAddress(base), pages, 128, 64, permissions)
    }

    #[test]
    fn an_access_lies_within_one_area_or_fails() {
        let memory =
            area(0x1000, Permissions::ReadWrite).join(area(0x1040, Permissions::ReadWrite));
        memory.write_obj(7u64, GuestAddress(0x1038)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1038)).unwrap(), 7);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1078)).unwrap(), 0);
        for address in [0xff8u64, 0x103c, 0x1079, u64::MAX] {
            assert!(
                memory.read_obj::<u64>(GuestAddress(address)).is_err(),
                "{address:#x}"
            );
        }
    }

    #[test]
    fn a_read_only_area_cannot_be_written() {
        let memory = area(0, Permissions::Read);
        assert!(memory.read_obj::<u8>(GuestAddress(0)).is_ok());
        assert!(memory.write_obj(1u8, GuestAddress(0)).is_err());
    }
}
